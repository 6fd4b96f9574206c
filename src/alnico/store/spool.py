"""Holds bytes in a temporary file until it is known what is done with them."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from alnico.checkpoint.files import read_fully, write_fully


class NoSpool:
    """Forgets what is written, where only sizes and errors matter."""

    def reserve(self, size: int) -> int:
        return 0

    def write(self, place: int, data: np.ndarray) -> None:
        """Nothing is kept."""


class Spool:
    """A temporary file without a name in a folder, written at reserved places by any thread. Use it in ``with``."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._where = folder
        self._lock = threading.Lock()
        self._end = 0

    def reserve(self, size: int) -> int:
        """Return the place of ``size`` free bytes."""
        with self._lock:
            place, self._end = self._end, self._end + size
        return place

    def write(self, place: int, data: np.ndarray) -> None:
        """Write the bytes of an array. Errors: RunError."""
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        write_fully(self._file.fileno(), memoryview(raw), place, str(self._where))

    def read(self, place: int, size: int) -> np.ndarray:
        """Read bytes that were written. Errors: RunError."""
        raw = np.empty(size, np.uint8)
        read_fully(self._file.fileno(), memoryview(raw), place, str(self._where))
        return raw

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
