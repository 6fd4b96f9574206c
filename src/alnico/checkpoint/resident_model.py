"""Keeps models open and in memory: files are mapped, and blocks are read without a copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.files import open_binary
from alnico.checkpoint.memory_model import MemoryModel
from alnico.checkpoint.source import Origin, Source, Tensor
from alnico.numerics.dtypes import DTYPES

if TYPE_CHECKING:
    from alnico.kernels.cuda.memory import GpuMemory

NO_ROOM: Mapping[str, SharedBudget] = MappingProxyType({})


class SharedBudget:
    """Bytes that several models may hold in total. Thread-safe."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        self._lock = threading.Lock()

    def take(self, byte_size: int) -> bool:
        """Reserve bytes. Returns whether that many were free."""
        with self._lock:
            if byte_size > self.free_bytes:
                return False
            self.free_bytes -= byte_size
            return True

    def give(self, byte_size: int) -> None:
        """Give back bytes that were reserved."""
        with self._lock:
            self.free_bytes += byte_size


class ResidentModel:
    """A source whose tensors stay in memory while it is open: :meth:`held` returns their bytes without a
    copy.

    Tensors in files are mapped: their memory is the system's page cache, which the system can reclaim.
    Tensors in memory are used in place. Tensors computed on reading (an adapter on its base) are kept from
    the first read on, within the ``budget``. :meth:`held_on` keeps them in the memory of a GPU, within its budget in ``rooms``.
    ``close`` does nothing, so that many plans can share it; :meth:`release` closes it. Files must not be truncated meanwhile.
    """

    def __init__(
        self, source: Source, budget: SharedBudget, rooms: Mapping[str, SharedBudget] = NO_ROOM
    ) -> None:
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
        self._budget = budget
        self._lock = threading.Lock()
        self._files: dict[Path, np.ndarray] = {}
        self._held: dict[str, np.ndarray | None] = {}
        self._rooms = rooms
        self._on_gpus: dict[tuple[str, str], Any] = {}

    def held(self, name: str) -> np.ndarray | None:
        """The bytes of a tensor in memory; None for one that must be read. Its file must have been
        fetched."""
        if name not in self._held:
            with self._lock:
                if name not in self._held:
                    self._held[name] = self._load(name)
        return self._held[name]

    def _load(self, name: str) -> np.ndarray | None:
        if isinstance(self.source, MemoryModel):
            return self.source.flat(name)
        tensor = self.tensors[name]
        location = self.source.place_of(name) if isinstance(self.source, FileModel) else None
        if location is not None:
            path, begin = location
            # Kernels need aligned elements: a file with odd offsets is read into a buffer.
            if begin % DTYPES[tensor.dtype].bytes == 0 and tensor.byte_size:
                return self._map(path)[begin : begin + tensor.byte_size]
            return None
        return self._read(name) if self._budget.take(tensor.byte_size) else None

    def _read(self, name: str) -> np.ndarray:
        raw = np.empty(self.tensors[name].byte_size, np.uint8)
        self.source.read_into(name, 0, memoryview(raw))
        return raw

    def held_on(self, name: str, gpu: GpuMemory) -> Any:
        """The bytes of a tensor in the memory of a GPU, as a device array; None if there is no room for it."""
        key = gpu.device.name, name
        if key not in self._on_gpus:
            with self._lock:
                if key not in self._on_gpus:
                    self._on_gpus[key] = self._load_on(name, gpu)
        return self._on_gpus[key]

    def _load_on(self, name: str, gpu: GpuMemory) -> Any:
        if torch_place(self.source, name) == gpu.device.torch_name:
            return bytes_on(self.source, name, gpu)
        size, room = self.tensors[name].byte_size, self._rooms.get(gpu.device.name)
        if room is None or not size or not room.take(size):
            return None
        location = self.source.place_of(name) if isinstance(self.source, FileModel) else None
        if location is None:
            host = self._read(name)
        else:
            host = self._map(location[0])[location[1] : location[1] + size]
        raw = gpu.bytes(size)
        gpu.upload(host, raw)
        gpu.finish()
        return raw

    def _map(self, path: Path) -> np.ndarray:
        if path not in self._files:
            with open_binary(path) as file:
                self._files[path] = np.asarray(np.memmap(file, np.uint8, "r"))
        return self._files[path]

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return self.source.absent(tensors, side_files)

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        self.source.fetch(files, report)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        raw = self.held(name)
        if raw is None:
            self.source.read_into(name, offset, buffer)
        else:
            np.frombuffer(buffer, np.uint8)[:] = raw[offset : offset + len(buffer)]

    def identity(self) -> list[dict[str, Any]]:
        return self.source.identity()

    def paths(self) -> list[Path]:
        return self.source.paths()

    def close(self) -> None:
        """Stays open: see :meth:`release`."""

    def release(self) -> None:
        """Close the files and free the memory."""
        self._held.clear()
        self._on_gpus.clear()
        self._files.clear()
        self.source.close()


def resident_bytes(source: Source, name: str) -> np.ndarray | None:
    """The bytes of a tensor of a :class:`ResidentModel`; None for one that must be read."""
    return source.held(name) if isinstance(source, ResidentModel) else None


def bytes_on(source: Source, name: str, gpu: GpuMemory) -> Any:
    """The bytes of a tensor in the memory of a GPU, as a device array; None for one that must be copied there.

    They are there if the tensor lives there, or if its model is a :class:`ResidentModel` with room on the GPU.
    """
    if isinstance(source, ResidentModel):
        return source.held_on(name, gpu)
    if isinstance(source, MemoryModel) and torch_place(source, name) == gpu.device.torch_name:
        return gpu.view(source.raw(name))
    return None


def torch_place(source: Source, name: str) -> str | None:
    """What torch calls the device that a tensor in memory lives on; None for one that is no torch tensor, or not contiguous."""
    if isinstance(source, ResidentModel):
        return torch_place(source.source, name)
    return source.torch_places.get(name) if isinstance(source, MemoryModel) else None
