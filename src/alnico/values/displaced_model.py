"""Presents a base plus a stored task vector as one model, computed while it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.source import Origin, Source, Tensor, TensorSpec
from alnico.errors import MismatchError
from alnico.numerics.dtypes import DTYPES, MERGEABLE, decode

CHUNK = 1 << 16
"""Elements computed at a time."""


class DisplacedModel:
    """``base + delta`` in float64, under the names of both.

    Tensors count as the base's dtype. A tensor that only one of the two has is missing here, as it is missing
    in the sum, so that a merge treats it as its recipe says. The base is not closed with it.
    """

    directory: Path | None = None
    origin: Origin | None = None

    def __init__(self, label: str, base: Source, delta: Source) -> None:
        self.label = label
        self._base = base
        self._delta = delta
        self.config: Mapping[str, Any] = base.config
        tensors: dict[str, Tensor] = {}
        for name, tensor in base.tensors.items():
            if tensor.dtype not in MERGEABLE:
                tensors[name] = tensor
                continue
            if name not in delta.tensors:
                continue
            if delta.tensors[name].shape != tensor.shape:
                raise MismatchError(
                    f"{name}: {base.label} is {tensor.shape}, {label} {delta.tensors[name].shape}; expected one "
                    "shape. Put the task vector on a model of its architecture."
                )
            tensors[name] = TensorSpec("F64", tensor.shape, tensor.nominal)
        for name, tensor in delta.tensors.items():
            if name not in base.tensors:  # a merge refuses or drops it, as the recipe says
                tensors[name] = TensorSpec("F64", tensor.shape, tensor.nominal)
        self.tensors: Mapping[str, Tensor] = tensors

    @property
    def held_bytes(self) -> int:
        return self._delta.held_bytes

    @property
    def reading_bytes(self) -> int:
        return self._base.reading_bytes + self._delta.reading_bytes + 4 * 8 * CHUNK

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """The base is an input of its own, and a stored task vector is never absent."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if self.tensors[name].dtype != "F64" or name not in self._delta.tensors:
            self._base.read_into(name, offset, buffer)
            return
        width = DTYPES["F64"].bytes
        first, last = offset // width, -(-(offset + len(buffer)) // width)
        out = np.frombuffer(buffer, np.uint8)
        for start in range(first, last, CHUNK):
            stop = min(start + CHUNK, last)
            values = read_values(self._delta, name, start, stop)
            if name in self._base.tensors:
                with np.errstate(all="ignore"):  # a NaN or an infinity is reported where it is merged
                    values = read_values(self._base, name, start, stop) + values
            raw = values.view(np.uint8)
            begin, end = max(offset, start * width), min(offset + len(buffer), stop * width)
            out[begin - offset : end - offset] = raw[begin - start * width : end - start * width]

    def identity(self) -> list[dict[str, Any]]:
        return [*self._base.identity(), *self._delta.identity()]

    def paths(self) -> list[Path]:
        return [*self._base.paths(), *self._delta.paths()]

    def close(self) -> None:
        self._delta.close()


def read_values(source: Source, name: str, first: int, last: int) -> np.ndarray:
    """Read elements ``first`` to ``last`` of a tensor as float64."""
    dtype = source.tensors[name].dtype
    width = DTYPES[dtype].bytes
    raw = np.empty((last - first) * width, np.uint8)
    source.read_into(name, first * width, memoryview(raw))
    values: np.ndarray = decode(raw, dtype).astype(np.float64)
    return values
