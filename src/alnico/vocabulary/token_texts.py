"""Says which text a token stands for, as bytes, so that tokens of different kinds of tokenizers can be compared.

``Ġthe`` of a byte-level BPE, ``▁the`` of SentencePiece and ``the`` of WordPiece are all `` the``; ``Ã©`` of a byte-level BPE is ``é``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from alnico.vocabulary.tokenizer import ROLE_NAMES, Tokenizer

SPACE = "\u2581"
"""What SentencePiece writes for a space."""
BYTE_SPACE = "\u0120"
"""What a byte-level BPE writes for a space."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""A token of SentencePiece for a byte that no other token holds."""

TokenKind = Literal["bytes", "pieces", "words", "plain"]
"""How a tokenizer writes its tokens: a character for each byte, with a mark for spaces, by the words that begin with them, as they are."""


def byte_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level BPE stands for: printable ones themselves, the others from 256 on.

    >>> table = byte_characters()
    >>> len(table), table["a"], table[BYTE_SPACE], table["Ã"]
    (256, 97, 32, 195)
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@dataclass(frozen=True, eq=False)
class TokenTexts:
    """The texts of a tokenizer's tokens. Only tokens whose row is below ``rows`` count."""

    tokenizer: Tokenizer
    rows: int

    @cached_property
    def kind(self) -> TokenKind:
        document = self.tokenizer.document or {}
        model = self._model
        if model.get("type") == "WordPiece" or "vocab.txt" in self.tokenizer.files:
            return "words"
        if _names(document.get("pre_tokenizer")) & {"ByteLevel"} or "ByteLevel" in _names(
            document.get("decoder")
        ):
            return "bytes"
        if model.get("type") == "Unigram" or model.get("byte_fallback"):
            return "pieces"
        starts = [token[:1] for token in self.tokenizer.parts]
        marks = {mark: starts.count(mark) for mark in (SPACE, BYTE_SPACE)}
        if not any(marks.values()):
            return "plain"
        return "pieces" if marks[SPACE] >= marks[BYTE_SPACE] else "bytes"

    @cached_property
    def by_text(self) -> Mapping[bytes, int]:
        """The row of each text. A piece goes before a byte token, and the vocabulary before added tokens, whose special ones are left
        out."""
        parts = [
            (t, i)
            for t, i in sorted(self.tokenizer.parts.items(), key=lambda entry: entry[1])
            if i < self.rows and t not in self._special
        ]
        added = [
            (t, e["id"])
            for t, e in self.tokenizer.added.items()
            if e["id"] < self.rows and t not in self._special
        ]
        rows: dict[bytes, int] = {}
        for is_byte in (False, True):
            for token, row in parts:
                if self.is_byte(token) is is_byte and (text := self.text(token)):
                    rows.setdefault(text, row)
        for token, row in added:
            rows.setdefault(self.text(token), row)
        return rows

    @cached_property
    def roles(self) -> Mapping[str, str]:
        """The token of each role that has one, such as ``eos_token``."""
        named = {role: self.tokenizer.special(role.removesuffix("_token")) for role in ROLE_NAMES}
        return {role: token for role, token in named.items() if token}

    @cached_property
    def _special(self) -> frozenset[str]:
        added = {t for t, e in self.tokenizer.added.items() if e.get("special")}
        return frozenset({*added, *self.roles.values()})

    def is_special(self, token: str) -> bool:
        """Is a token a mark, not a text?"""
        return token in self._special

    def is_byte(self, token: str) -> bool:
        """Is a token the byte token of SentencePiece, such as ``<0x0A>``?"""
        return self.kind == "pieces" and len(token) == 6 and BYTE_TOKEN.fullmatch(token) is not None

    def text(self, token: str) -> bytes:
        """Return the bytes that a token stands for.

        A token of WordPiece that begins a word has a space before it; one that ends a word, as CLIP writes it, has a space after it.
        """
        if self.is_special(token):
            return token.encode("utf-8", "surrogatepass")
        end = b""
        if self._suffix and token.endswith(self._suffix):
            token, end = token[: -len(self._suffix)], b" "
        if self.kind == "bytes":
            table = self._bytes
            if all(c in table for c in token):
                return bytes(map(table.__getitem__, token)) + end
        elif self.kind == "pieces":
            if self.is_byte(token):
                return bytes([int(token[3:5], 16)])
            token = token.replace(SPACE, " ")
        elif self.kind == "words":
            token = token[len(self._prefix) :] if token.startswith(self._prefix) else f" {token}"
        return token.encode("utf-8", "surrogatepass") + end

    @property
    def _model(self) -> Mapping[str, Any]:
        model = (self.tokenizer.document or {}).get("model")
        return model if isinstance(model, Mapping) else {}

    @cached_property
    def _bytes(self) -> Mapping[str, int]:
        return byte_characters()

    @cached_property
    def _prefix(self) -> str:
        return str(self._model.get("continuing_subword_prefix") or "##")

    @cached_property
    def _suffix(self) -> str:
        return str(self._model.get("end_of_word_suffix") or "")


@dataclass(frozen=True)
class SharedTokens:
    """What tokens of one tokenizer have a row in another's model: ``rows`` by token. ``by_role`` are marks that mean the same by their
    role, such as the end of a text."""

    rows: Mapping[str, int]
    by_role: frozenset[str]


def shared_tokens(tokens: TokenTexts, own: TokenTexts) -> SharedTokens:
    """Find the tokens of a tokenizer that a model with the tokenizer ``own`` has a row for.

    A mark (a special token) is shared by its name, otherwise by the first of its roles that ``own`` has a token for; any other token by
    the bytes that it stands for. A byte token next to a piece of the same text is shared only with a byte token.
    """
    rows: dict[str, int] = {}
    by_role: set[str] = set()
    named, ids = own.tokenizer.tokens, tokens.tokenizer.tokens
    for token in ids:
        row: int | None
        if tokens.is_special(token):
            row = named.get(token)
            if row is None or row >= own.rows:
                substitutes = [own.roles[r] for r, t in tokens.roles.items() if t == token and r in own.roles]
                row = next((named[t] for t in substitutes if t in named and named[t] < own.rows), None)
                if row is not None:
                    by_role.add(token)
        elif tokens.is_byte(token) and own.is_byte(token) and named.get(token, own.rows) < own.rows:
            row = named[token]
        elif tokens.is_byte(token) and tokens.by_text.get(tokens.text(token)) != ids[token]:
            row = None  # of two tokens with one row, each would get half of its probability
        else:
            row = own.by_text.get(tokens.text(token))
        if row is not None:
            rows[token] = row
    return SharedTokens(rows, frozenset(by_role))


def _names(part: Any) -> set[str]:
    """Return the types of a part of ``tokenizer.json``, and of the parts in it."""
    if isinstance(part, list):
        return set().union(*map(_names, part))
    if not isinstance(part, Mapping):
        return set()
    inner = (value for value in part.values() if isinstance(value, (list, Mapping)))
    return {str(part.get("type"))}.union(*map(_names, inner))
