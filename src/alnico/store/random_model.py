"""Presents a base plus a random vector as a model: the control of what a task vector of that length is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import xxhash

from alnico.checkpoint.source import Source, SourceWrapper, Tensor, TensorSpec
from alnico.checkpoint.virtual_read import read_computed
from alnico.numerics.dtypes import DTYPES, MERGEABLE, decode

CHUNK = 1 << 16
"""Entries of a tensor that are drawn together."""


class RandomModel(SourceWrapper):
    """``base + r``, where ``r`` is normally distributed and has in each tensor a given norm, exactly.

    ``norms`` has the norm of ``r`` by the base's tensors; a tensor without one, or with 0, is the base's. ``seed`` and
    ``position``, that of the vector for which it stands, choose the direction. Values are float32. The base is not closed
    with it.
    """

    def __init__(
        self, label: str, base: Source, norms: Mapping[str, float], seed: int, position: int
    ) -> None:
        self.wrapped = base
        self._label = label
        self._draws = f"{seed}\0{position}"
        self._norms = {
            name: norm
            for name, norm in norms.items()
            if norm > 0 and name in base.tensors and base.tensors[name].dtype in MERGEABLE
        }
        self._lengths: dict[str, float] = {}
        self.tensors: Mapping[str, Tensor] = {
            name: TensorSpec("F32", tensor.shape, tensor.nominal) if name in self._norms else tensor
            for name, tensor in base.tensors.items()
        }

    @property
    def label(self) -> str:
        return self._label

    @property
    def reading_bytes(self) -> int:
        return self.wrapped.reading_bytes + 4 * 8 * CHUNK

    @property
    def shards(self) -> tuple[Any, ...]:
        return ()

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """The base is an input of its own."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name not in self._norms:
            self.wrapped.read_into(name, offset, buffer)
            return
        factor = np.float32(self._norms[name] / self._length(name))
        dtype = self.wrapped.tensors[name].dtype
        width = DTYPES[dtype].bytes

        def compute(first: int, out: np.ndarray) -> None:
            raw = np.empty(out.size * width, np.uint8)
            self.wrapped.read_into(name, first * width, memoryview(raw))
            with np.errstate(all="ignore"):  # a NaN or an infinity is reported where it is merged
                out[:] = decode(raw, dtype)
                out += factor * self._drawn(name, first, out.size)

        read_computed(offset, buffer, np.dtype(np.float32), compute)

    def _drawn(self, name: str, first: int, count: int) -> np.ndarray:
        """Return normally distributed numbers for the entries from ``first`` on."""
        parts = [self._chunk(name, c) for c in range(first // CHUNK, -(-(first + count) // CHUNK))]
        begin = first % CHUNK
        return np.concatenate(parts)[begin : begin + count]

    def _chunk(self, name: str, chunk: int) -> np.ndarray:
        size = min(CHUNK, self.tensors[name].elements - chunk * CHUNK)
        key = xxhash.xxh3_64_intdigest(f"{self._draws}\0{name}\0{chunk}".encode())
        drawn: np.ndarray = np.random.Generator(np.random.Philox(key)).standard_normal(size, np.float32)
        return drawn

    def _length(self, name: str) -> float:
        """The norm of the tensor's drawn numbers."""
        if name not in self._lengths:
            chunks = range(-(-self.tensors[name].elements // CHUNK))
            squares = (np.square(self._chunk(name, c), dtype=np.float64).sum() for c in chunks)
            self._lengths[name] = float(np.sqrt(sum(squares)))
        return self._lengths[name]

    def identity(self) -> list[dict[str, Any]]:
        return [*self.wrapped.identity(), {"random": self._draws}]

    def close(self) -> None:
        """The base is an input of its own."""
