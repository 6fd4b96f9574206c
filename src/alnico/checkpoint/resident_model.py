"""Models that stay open and in memory: files are mapped, what is computed is kept, and blocks are read where they lie."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.files import open_binary
from alnico.checkpoint.memory_model import MemoryModel
from alnico.checkpoint.source import Origin, Source, Tensor
from alnico.numerics.dtypes import DTYPES


class SharedBudget:
    """Bytes that several models may hold together. Safe for threads."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        self._lock = threading.Lock()

    def take(self, byte_size: int) -> bool:
        """Take bytes, if there are as many."""
        with self._lock:
            if byte_size > self.free_bytes:
                return False
            self.free_bytes -= byte_size
            return True


class ResidentModel:
    """A source whose tensors lie in memory as long as it is open: :meth:`held` gives their bytes without a copy.

    Tensors in files are mapped: their memory is the system's page cache, which gives it back where it is short. Those in memory are
    taken where they lie. What is computed while it is read (an adapter on its base) is kept from the first reading on while there is
    ``room``. ``close`` does nothing, so that many plans can use it; :meth:`release` ends it. Files must not be cut short meanwhile.
    """

    def __init__(self, source: Source, room: SharedBudget) -> None:
        self.source = source
        self.label = source.label
        self.tensors: Mapping[str, Tensor] = source.tensors
        self.config: Mapping[str, Any] = source.config
        self.directory: Path | None = source.directory
        self.origin: Origin | None = source.origin
        self.held_bytes = source.held_bytes
        self.reading_bytes = source.reading_bytes
        self.notes = getattr(source, "notes", [])
        self.location: Path | None = getattr(source, "location", None)
        self.unties = getattr(source, "unties", False)
        self._room = room
        self._lock = threading.Lock()
        self._files: dict[Path, np.ndarray] = {}
        self._held: dict[str, np.ndarray | None] = {}

    def held(self, name: str) -> np.ndarray | None:
        """The bytes of a tensor where they lie; None for one that must be read. Its file must have been fetched."""
        if name not in self._held:
            with self._lock:
                if name not in self._held:
                    self._held[name] = self._opened(name)
        return self._held[name]

    def _opened(self, name: str) -> np.ndarray | None:
        if isinstance(self.source, MemoryModel):
            return self.source.flat(name)
        tensor = self.tensors[name]
        place = self.source.place_of(name) if isinstance(self.source, FileModel) else None
        if place is not None:
            path, begin = place
            # A file that names odd places is read into aligned memory: kernels take elements at multiples of their size.
            if begin % DTYPES[tensor.dtype].bytes == 0 and tensor.byte_size:
                return self._mapped(path)[begin : begin + tensor.byte_size]
            return None
        if not self._room.take(tensor.byte_size):
            return None
        raw = np.empty(tensor.byte_size, np.uint8)
        self.source.read_into(name, 0, memoryview(raw))
        return raw

    def _mapped(self, path: Path) -> np.ndarray:
        if path not in self._files:
            with open_binary(path) as file:
                self._files[path] = np.asarray(np.memmap(file, np.uint8, "r"))
        return self._files[path]

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return self.source.absent(tensors, side_files)

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        self.source.fetch(files, report)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        whole = self.held(name)
        if whole is None:
            self.source.read_into(name, offset, buffer)
        else:
            np.frombuffer(buffer, np.uint8)[:] = whole[offset : offset + len(buffer)]

    def identity(self) -> list[dict[str, Any]]:
        return self.source.identity()

    def paths(self) -> list[Path]:
        return self.source.paths()

    def close(self) -> None:
        """Stays open: see :meth:`release`."""

    def release(self) -> None:
        """Close the files, and let go of what was held."""
        self._held.clear()
        self._files.clear()
        self.source.close()


def resident_bytes(source: Source, name: str) -> np.ndarray | None:
    """The bytes of a tensor of a model that stays in memory; None for one that must be read."""
    return source.held(name) if isinstance(source, ResidentModel) else None
