"""Reads the pieces of a sentencepiece ``.model`` file, without the sentencepiece library.

The file is a protobuf message ``ModelProto``. Its repeated field 1 holds the ``SentencePiece`` messages in id
order, and field 1 of each is the piece's text. Everything else (scores, types, text normalisation) is
skipped. Format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
PIECES = TEXT = 1


def read_pieces(data: bytes) -> list[str]:
    """Return the pieces in id order. Errors: ValueError, which says what is wrong with the bytes.

    >>> read_pieces(bytes([0x0A, 3, 0x0A, 1, 0x61, 0x0A, 4, 0x0A, 2, 0xC3, 0xA9]))
    ['a', 'é']
    """
    texts: list[str] = []
    for field, value in _fields(memoryview(data)):
        if field == PIECES:
            if not isinstance(value, memoryview):
                raise ValueError("a piece is not a message")
            fields = [v for f, v in _fields(value) if f == TEXT]
            if not fields or not isinstance(fields[-1], memoryview):
                raise ValueError(f"piece {len(fields)} has no text")
            texts.append(str(fields[-1], "utf-8"))
    if not texts:
        raise ValueError("it has no pieces")
    return texts


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yield the fields of a message: number and value, which is an int for varints and bytes otherwise."""
    offset = 0
    while offset < len(data):
        tag, offset = _varint(data, offset)
        kind = tag & 7
        if kind == VARINT:
            value, offset = _varint(data, offset)
            yield tag >> 3, value
            continue
        if kind == BYTES:
            size, offset = _varint(data, offset)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"no field begins at byte {offset}")
        if offset + size > len(data):
            raise ValueError("it ends inside a field")
        yield tag >> 3, data[offset : offset + size]
        offset += size


def _varint(data: memoryview, offset: int) -> tuple[int, int]:
    """Read a number stored as seven bits per byte, low bits first; returns it and the offset after it."""
    value = shift = 0
    while offset < len(data) and shift < 64:
        byte = data[offset]
        value |= (byte & 0x7F) << shift
        offset += 1
        shift += 7
        if byte < 0x80:
            return value, offset
    raise ValueError("it ends inside a number")
