"""Keeps what methods compute from whole matrices, so that later merges of the same tensors only recombine it."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from alnico.checkpoint.resident_model import SharedBudget


@dataclass(frozen=True)
class MatrixNote:
    """What a method says about a matrix: ``text`` with a ``{}`` for each of ``values``, models (int, by position) and
    numbers (float)."""

    text: str
    values: tuple[int | float, ...] = ()


@dataclass(frozen=True)
class KeptArrays:
    """What was computed from some matrices, and what was said meanwhile; its models are positions among those."""

    arrays: tuple[np.ndarray, ...]
    notes: tuple[MatrixNote, ...] = ()

    @property
    def byte_size(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class MatrixStore(Protocol):
    """Keeps arrays for later merges of the same tensors. Safe for threads."""

    def get(self, key: Hashable) -> KeptArrays | None: ...

    def put(self, key: Hashable, kept: KeptArrays) -> None: ...


class ResidentStore:
    """Arrays in memory, within a budget: call :meth:`begin` before each merge.

    What neither this merge nor the one before has used leaves for new arrays, the least recently used first. What one of
    them has used stays: merges use the same matrices in the same order, so if the budget holds half of them, half are
    never computed again. If each new array took the place of the oldest, none would be found.
    """

    def __init__(self, room: SharedBudget) -> None:
        self._room = room
        self._kept: dict[Hashable, KeptArrays] = {}  # the least recently used first
        self._used: dict[Hashable, int] = {}
        self._merge = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Begin a merge."""
        self._merge += 1

    def get(self, key: Hashable) -> KeptArrays | None:
        with self._lock:
            kept = self._kept.pop(key, None)
            if kept is not None:
                self._kept[key] = kept
                self._used[key] = self._merge
            return kept

    def put(self, key: Hashable, kept: KeptArrays) -> None:
        with self._lock:
            if key in self._kept:
                return
            while not self._room.take(kept.byte_size):
                oldest = next(iter(self._kept), None)
                if oldest is None or self._used[oldest] >= self._merge - 1:
                    return
                self._room.give(self._kept.pop(oldest).byte_size)
                del self._used[oldest]
            for array in kept.arrays:
                array.flags.writeable = False
            self._kept[key] = kept
            self._used[key] = self._merge
