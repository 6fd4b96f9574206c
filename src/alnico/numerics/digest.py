"""Hashes the content of a tensor from pieces that may come in any order.

``digest = xxh3_128(dtype | shape | digest(piece 0) | digest(piece 1) | ...)`` with pieces of 4 MiB of raw
bytes.
"""

from __future__ import annotations

import math

import xxhash

HASH = "xxh3-128"
"""The name of this hash in locks and statistics."""

PIECE = 4 << 20
"""Bytes in a piece; a tensor's last piece may be shorter."""


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


def digest_of(dtype: str, shape: tuple[int, ...], data: memoryview) -> str:
    """Hash a tensor whose bytes are all there: 32 hexadecimal digits."""
    return tensor_digest(
        dtype, shape, [piece_digest(data[i : i + PIECE]) for i in range(0, len(data), PIECE)]
    )


class TensorDigest:
    """Collects the digests of a tensor's pieces, from any thread and in any order."""

    def __init__(self, dtype: str, shape: tuple[int, ...], byte_size: int) -> None:
        self.dtype = dtype
        self.shape = shape
        self.pieces: list[bytes] = [b""] * pieces_of(byte_size)

    def result(self) -> str:
        """The tensor's digest, when all pieces are in."""
        return tensor_digest(self.dtype, self.shape, self.pieces)


class PieceHasher:
    """Hashes consecutive bytes of one chunk, piece by piece, as they pass."""

    def __init__(self, digest: TensorDigest, offset: int) -> None:
        import xxhash

        self._new = xxhash.xxh3_128
        self._digest = digest
        self._position = offset
        self._state = self._new()

    def update(self, data: memoryview) -> None:
        while len(data):
            rest = PIECE - self._position % PIECE
            part = data[:rest]
            if len(part) == PIECE:
                self._digest.pieces[self._position // PIECE] = piece_digest(part)
            else:
                self._state.update(part)
            self._position += len(part)
            if self._position % PIECE == 0 and len(part) != PIECE:
                self._close(self._position // PIECE - 1)
            data = data[rest:]

    def finish(self) -> None:
        """Close the last, shorter piece."""
        if self._position % PIECE:
            self._close(self._position // PIECE)

    def _close(self, piece: int) -> None:
        self._digest.pieces[piece] = self._state.digest()
        self._state = self._new()


class Unhashed:
    """Replaces a :class:`PieceHasher` where nothing is hashed."""

    def __init__(self, digest: TensorDigest, offset: int) -> None:
        """Nothing is kept."""

    def update(self, data: memoryview) -> None:
        """Nothing is hashed."""

    def finish(self) -> None:
        """Nothing is open."""
