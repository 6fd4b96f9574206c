"""Reads the numbers, strings and arrays of a GGUF header, each checked against the bytes that are left.

All numbers are little-endian. A string is ``u64 length | UTF-8``, an array ``u32 type | u64 count | values``.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from alnico.errors import ModelError

SCALARS: dict[int, tuple[str, str]] = {
    0: ("B", "u1"), 1: ("b", "i1"), 2: ("H", "<u2"), 3: ("h", "<i2"), 4: ("I", "<u4"), 5: ("i", "<i4"), 6: ("f", "<f4"),
    7: ("?", "u1"), 10: ("Q", "<u8"), 11: ("q", "<i8"), 12: ("d", "<f8"),
}  # fmt: skip
"""The types of numbers by their code: as ``struct`` and as numpy spell them. 7 is a bool."""
BOOL, STRING, ARRAY = 7, 8, 9
MAX_HEADER_BYTES = 100_000_000
"""Longest header that is read, as of a safetensors file; vocabularies of 300,000 tokens take 30 MB."""
STEP_BYTES = 1 << 20
"""Bytes of the file that are read at a time."""


class ValueReader:
    """Takes values off the start of a file, one after the other.

    ``read(offset, count)`` returns bytes of the file, which has ``size``; ``where`` names it in messages.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, where: str) -> None:
        self._read = read
        self._end = min(size, MAX_HEADER_BYTES)
        self._where = where
        self._data = bytearray()
        self.position = 0

    @property
    def left(self) -> int:
        """The bytes that are not read yet."""
        return self._end - self.position

    @property
    def start(self) -> bytes:
        """All bytes up to the position."""
        return bytes(self._data[: self.position])

    def number(self, code: str) -> Any:
        """Read one number, by its code in ``struct``. Errors: ModelError at the end of the file."""
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code), "a number"))[0]

    def string(self, what: str) -> str:
        """Read a string. Errors: ModelError for a length beyond the file, and for bytes that are not UTF-8."""
        begin = self.position
        try:
            return self._take(self.number("Q"), what).decode("utf-8")
        except UnicodeDecodeError:
            raise ModelError(
                f"{self._where}: {what} at byte {begin} is not UTF-8; expected text. The file is damaged; download it again."
            ) from None

    def value(self, kind: int, key: str) -> Any:
        """Read a value of a type. An array of numbers is a numpy array, one of strings a list.

        Errors: ModelError for an unknown type, an array of arrays, and for a count beyond the file.
        """
        if kind in SCALARS:
            return self.number(SCALARS[kind][0])
        if kind == STRING:
            return self.string(f"the value of {key[:80]!r}")
        if kind == ARRAY:
            return self._array(self.number("I"), self.number("Q"), key)
        raise ModelError(
            f"{self._where}: {key[:80]!r} has a value of the type {kind}; expected 0 to 12. The file is damaged or of a newer "
            "version; download it again."
        )

    def _array(self, kind: int, count: int, key: str) -> np.ndarray | list[str]:
        what = f"the array {key[:80]!r} of {count} values"
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind][1])
            values = np.frombuffer(self._take(count * dtype.itemsize, what), dtype)
            return values.astype(bool) if kind == BOOL else values
        if kind != STRING:
            raise ModelError(
                f"{self._where}: {key[:80]!r} is an array of the type {kind}; expected numbers or strings. The file is damaged; "
                "download it again."
            )
        self._need(8 * count, what)
        return [self.string(f"a string of {key[:80]!r}") for _ in range(count)]

    def _take(self, size: int, what: str) -> bytes:
        self._need(size, what)
        end = self.position + size
        if (begin := len(self._data)) < end:
            self._data += self._read(begin, min(max(STEP_BYTES, end - begin), self._end - begin))
        taken = bytes(memoryview(self._data)[self.position : end])
        self.position = end
        return taken

    def _need(self, size: int, what: str) -> None:
        """Refuse a size beyond the header, before anything is read. Errors: ModelError."""
        if size > self.left:
            raise ModelError(
                f"{self._where}: {what} has {size} bytes, {self.left} are left; expected all of it. The file is truncated or "
                "damaged; download it again."
            )
