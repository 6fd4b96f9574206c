"""Tensors that a plan makes itself, as a source: they are computed when they are read, and lie in no file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from alnico.checkpoint.source import Origin, TensorSpec
from alnico.numerics.dtypes import Shape


class ComputedTensors:
    """A :class:`Source` of float32 tensors. ``make`` returns the values of one of them, ``reading_bytes`` is what it needs
    for that at most, and ``identity`` says what the values follow from."""

    config: Mapping[str, Any] = MappingProxyType({})
    directory: Path | None = None
    origin: Origin | None = None
    held_bytes = 0

    def __init__(
        self,
        label: str,
        shapes: Mapping[str, Shape],
        make: Callable[[str], np.ndarray],
        reading_bytes: int,
        identity: Callable[[], list[dict[str, Any]]],
    ) -> None:
        self.label = label
        self.tensors: Mapping[str, TensorSpec] = {n: TensorSpec("F32", s, "F32") for n, s in shapes.items()}
        self.reading_bytes = reading_bytes
        self.identity = identity
        self._make = make
        self._last = ("", b"")
        self._lock = threading.Lock()
        """Holds while a tensor is made: threads that need the same one wait for it."""

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Nothing is ever absent."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        with self._lock:
            if self._last[0] != name:
                self._last = name, np.ascontiguousarray(self._make(name), "<f4").tobytes()
            data = self._last[1]
        buffer[:] = data[offset : offset + len(buffer)]

    def paths(self) -> list[Path]:
        return []

    def close(self) -> None:
        """Nothing is open."""
