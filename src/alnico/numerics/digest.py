"""The content hash of a tensor, which can be built from its pieces in any order.

``digest = xxh3_128(dtype | shape | digest(piece 0) | digest(piece 1) | ...)`` with pieces of 4 MiB of raw bytes.
"""

from __future__ import annotations

import math

import xxhash

PIECE = 4 << 20
"""Bytes hashed as one; a tensor's last piece is shorter."""


def piece_digest(data: memoryview | bytes) -> bytes:
    """Hash one piece: 16 bytes."""
    return xxhash.xxh3_128_digest(data)


def pieces_of(byte_size: int) -> int:
    """Number of pieces of a tensor of ``byte_size`` bytes."""
    return math.ceil(byte_size / PIECE)


def tensor_digest(dtype: str, shape: tuple[int, ...], pieces: list[bytes]) -> str:
    """Join the digests of all pieces, in order, to the tensor's: 32 hexadecimal digits.

    >>> tensor_digest("F32", (1,), [piece_digest(bytes(4))])[:8]
    '5539e0b7'
    """
    state = xxhash.xxh3_128(f"{dtype}|{','.join(map(str, shape))}|".encode())
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()
