"""Divides the text of a token into tokens of another vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from alnico.vocabulary.token_texts import TokenTexts
from alnico.vocabulary.tokenizer import read_tokenizer_file

LONGEST = 256
"""Most bytes of a piece of a vocabulary without merges."""
MOST_BYTES = 1000
"""Most bytes of a text that are divided: the time grows with their square."""
DROPPED = -1e6
"""The score of a byte that no token holds."""


class TokenPieces:
    """Divides texts as a tokenizer divides them within a word: by its merges, or by its scores.

    A vocabulary with merges (BPE) joins the pair of the lowest rank first, from single bytes or characters on. Otherwise the division with
    the highest sum of scores is chosen; where tokens have none (WordPiece), the one with the fewest pieces. Bytes that no token holds are
    dropped. Nothing cuts a text into words before: a token is hardly ever longer than one.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self.texts = texts

    def divide(self, text: bytes, without: bytes | None = None) -> list[int]:
        """Return the rows of the pieces of a text, in order. The piece ``without`` is not used."""
        text = text[:MOST_BYTES]
        if self._ranks:
            return [self._rows[piece] for piece in self._merged(text, without) if piece in self._rows]
        return self._best(text, without)

    @property
    def _rows(self) -> Mapping[bytes, int]:
        return self.texts.by_text

    @cached_property
    def _ranks(self) -> Mapping[tuple[bytes, bytes], int]:
        """The rank of each merge, by the texts of its two tokens."""
        tokenizer = self.texts.tokenizer
        model = (tokenizer.document or {}).get("model")
        merges: Any = model.get("merges") if isinstance(model, Mapping) else None
        if tokenizer.document is None and "merges.txt" in tokenizer.files:
            lines = read_tokenizer_file(tokenizer.directory / "merges.txt").decode("utf-8", "replace")
            merges = [line for line in lines.split("\n") if line.strip() and not line.startswith("#version")]
        ranks: dict[tuple[bytes, bytes], int] = {}
        for rank, merge in enumerate(merges if isinstance(merges, list) else ()):
            pair = merge.split(" ", 1) if isinstance(merge, str) else merge
            if isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair):
                ranks.setdefault((self.texts.text(pair[0]), self.texts.text(pair[1])), rank)
        return ranks

    @cached_property
    def _scores(self) -> Mapping[bytes, float]:
        """The score of each piece; none where the vocabulary has none."""
        model = (self.texts.tokenizer.document or {}).get("model")
        vocabulary: Any = model.get("vocab") if isinstance(model, Mapping) else None
        if not isinstance(vocabulary, list):
            return {}
        entries = (entry for entry in vocabulary if len(entry) > 1 and isinstance(entry[1], (int, float)))
        return {self.texts.text(entry[0]): float(entry[1]) for entry in entries}

    @cached_property
    def _longest(self) -> int:
        return min(max(map(len, self._rows), default=1), LONGEST)

    def _symbols(self, text: bytes) -> list[bytes]:
        """Return the pieces that merges begin with: bytes, or characters that have a token."""
        if self.texts.kind == "bytes":
            return [text[i : i + 1] for i in range(len(text))]
        symbols: list[bytes] = []
        for character in text.decode("utf-8", "surrogateescape"):
            piece = character.encode("utf-8", "surrogateescape")
            symbols += [piece] if piece in self._rows else [piece[i : i + 1] for i in range(len(piece))]
        return symbols

    def _merged(self, text: bytes, without: bytes | None) -> list[bytes]:
        pieces = self._symbols(text)
        if without is not None and pieces == [without]:
            return [without[i : i + 1] for i in range(len(without))] if len(without) > 1 else []
        last = len(self._ranks)
        while len(pieces) > 1:
            ranks = [
                self._ranks.get(pair, last) if pair[0] + pair[1] != without else last
                for pair in itertools.pairwise(pieces)
            ]
            rank = min(ranks)
            if rank == last:
                break
            at = ranks.index(rank)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return pieces

    def _best(self, text: bytes, without: bytes | None) -> list[int]:
        scores, least = self._scores, min(self._scores.values(), default=0.0) - 10
        totals, begins = [0.0], [0]
        for end in range(1, len(text) + 1):
            best, begin = totals[end - 1] + DROPPED, end - 1
            for first in range(max(end - self._longest, 0), end):
                piece = text[first:end]
                if piece in self._rows and piece != without:
                    total = totals[first] + (scores.get(piece, least) if scores else -1.0)
                    if total > best:
                        best, begin = total, first
            totals.append(best)
            begins.append(begin)
        rows: list[int] = []
        end = len(text)
        while end:
            piece = text[begins[end] : end]
            if piece in self._rows and piece != without:
                rows.append(self._rows[piece])
            end = begins[end]
        return rows[::-1]
