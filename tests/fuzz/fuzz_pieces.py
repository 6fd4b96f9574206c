"""A sentencepiece model: a protobuf message."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from alnico.vocabulary.tokenizer import read_sentencepiece
from fuzz.harness import Target


def read(data: bytes, folder: Path) -> None:
    path = folder / "tokenizer.model"
    path.write_bytes(data)
    found = read_sentencepiece(path)
    assert len(found) <= len(data)


def seeds() -> list[bytes]:
    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    def piece(text: str) -> bytes:
        return field(1, field(1, text.encode()) + b"\x15\0\0\x80\xbf" + b"\x18\x03")

    return [
        b"".join(map(piece, ("<unk>", "<s>", "</s>", "▁a", "é"))) + field(2, b"\x08\x01\x10\x80\x80\x02"),
        piece("a") * 20,
        b"\x09" + bytes(8) + piece("b"),
    ]


def mutate(_: bytes, __: random.Random, ___: Sequence[str]) -> None:
    """Of bytes, always."""


TARGET = Target(read, seeds, mutate=mutate)
