"""Turns text into the token ids of an uncased BERT vocabulary: words, then their longest known pieces.

The ids are those of the tokenizers library for text without the names of special tokens in it.
Source: Devlin et al. 2018, https://arxiv.org/abs/1810.04805; Wu et al. 2016, https://arxiv.org/abs/1609.08144.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

from alnico.checkpoint.files import open_binary

LONGEST_WORD = 100
"""Longer words are unknown."""

MOST_VOCABULARY_BYTES = 16 << 20

IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
"""Ranges of characters that are words alone."""


class WordPiece:
    """The vocabulary of a model.

    >>> pieces = WordPiece({w: i for i, w in enumerate(["[UNK]", "[CLS]", "[SEP]", "merg", "##es", "café", "cafe", "!"])})
    >>> pieces.ids("Merges Café!")
    [1, 3, 4, 6, 7, 2]
    """

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        self._vocabulary = vocabulary
        self._unknown, self._begin, self._end = (vocabulary[name] for name in ("[UNK]", "[CLS]", "[SEP]"))

    @classmethod
    def of(cls, file: Path) -> WordPiece:
        """Read a ``vocab.txt``: one token per line. Errors: ModelError."""
        with open_binary(file) as opened:
            lines = opened.read(MOST_VOCABULARY_BYTES).decode("utf-8").split("\n")
        return cls({line.removesuffix("\r"): i for i, line in enumerate(lines) if line})

    def ids(self, text: str, longest: int = 256) -> list[int]:
        """Return the ids of a text with the tokens of its begin and end, at most ``longest``."""
        pieces = [piece for word in words(text) for piece in self._pieces(word)]
        return [self._begin, *pieces[: longest - 2], self._end]

    def _pieces(self, word: str) -> list[int]:
        """Return the ids of the longest known pieces of a word, from left to right; one unknown if some part has none."""
        if len(word) > LONGEST_WORD:
            return [self._unknown]
        found: list[int] = []
        begin = 0
        while begin < len(word):
            for end in range(len(word), begin, -1):
                piece = ("##" if begin else "") + word[begin:end]
                if piece in self._vocabulary:
                    found.append(self._vocabulary[piece])
                    begin = end
                    break
            else:
                return [self._unknown]
        return found


def words(text: str) -> Iterator[str]:
    """Split a text into lower-case words without accents; marks of punctuation and ideographs are words alone.

    >>> list(words("Exit-code  137, déjà vu"))
    ['exit', '-', 'code', '137', ',', 'deja', 'vu']
    """
    clean = "".join(" " if c.isspace() else c for c in text if not _is_removed(c))
    apart = "".join(f" {c} " if _is_ideograph(c) else c for c in clean)
    bare = "".join(c for c in unicodedata.normalize("NFD", apart) if unicodedata.category(c) != "Mn")
    word = ""
    for c in "".join(c.lower() for c in bare):
        is_alone = _is_punctuation(c)
        if (is_alone or c.isspace()) and word:
            yield word
            word = ""
        if is_alone:
            yield c
        elif not c.isspace():
            word += c
    if word:
        yield word


@functools.cache
def _is_removed(character: str) -> bool:
    is_control = unicodedata.category(character).startswith("C") and character not in "\t\n\r"
    return is_control or character == "\ufffd"


@functools.cache
def _is_punctuation(character: str) -> bool:
    is_ascii = (
        character.isascii() and character.isprintable() and not character.isalnum() and character != " "
    )
    return is_ascii or unicodedata.category(character).startswith("P")


def _is_ideograph(character: str) -> bool:
    return any(low <= ord(character) <= high for low, high in IDEOGRAPHS)
