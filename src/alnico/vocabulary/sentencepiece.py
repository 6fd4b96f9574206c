"""The pieces of a sentencepiece ``.model``: a protobuf message, of which the first field is read.

A model is a ``ModelProto``; its field 1 is repeated and holds a ``SentencePiece`` each, in the order of their ids, whose
field 1 is the piece's text. All else (scores, types, how the text is normalised) is passed over.
Format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
PIECES = TEXT = 1


def read_pieces(data: bytes) -> list[str]:
    """Return the pieces by id. Errors: ValueError, with what is wrong, for bytes that are no such message.

    >>> pieces(bytes([0x0A, 3, 0x0A, 1, 0x61, 0x0A, 4, 0x0A, 2, 0xC3, 0xA9]))
    ['a', 'é']
    """
    found: list[str] = []
    for field, value in _fields(memoryview(data)):
        if field == PIECES:
            if not isinstance(value, memoryview):
                raise ValueError("a piece is no message")
            texts = [v for f, v in _fields(value) if f == TEXT]
            if not texts or not isinstance(texts[-1], memoryview):
                raise ValueError(f"piece {len(found)} has no text")
            found.append(str(texts[-1], "utf-8"))
    if not found:
        raise ValueError("it holds no pieces")
    return found


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """The fields of a message: number and value, bytes for all but numbers of variable length."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"byte {at} begins no field")
        if at + size > len(data):
            raise ValueError("it ends within a field")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the low ones first; returns it and the place after it."""
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        shift += 7
        if byte < 0x80:
            return value, at
    raise ValueError("it ends within a number")
