"""Reads a part of an open file as a file of its own, by positioned reads."""

from __future__ import annotations

import io
import os
from typing import Any


def part_of_file(descriptor: int, begin: int, size: int) -> io.BufferedReader:
    """Return the bytes ``begin`` to ``begin + size`` of a file as a file. Closing it leaves the descriptor open.

    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     _ = file.write(b"abcdef")
    ...     file.flush()
    ...     part = part_of_file(file.fileno(), 2, 3)
    ...     part.read(2), part.seek(-1, os.SEEK_END), part.read()
    (b'cd', 2, b'e')
    """
    return io.BufferedReader(_FilePart(descriptor, begin, size))


class _FilePart(io.RawIOBase):
    def __init__(self, descriptor: int, begin: int, size: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._begin = begin
        self._size = size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._place))
        wanted = memoryview(buffer)[:count]
        done = os.preadv(self._descriptor, [wanted], self._begin + self._place) if count else 0
        self._place += done
        return done
