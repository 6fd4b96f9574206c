"""Reads what a stored task vector adds to each tensor of a base, in place of the sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from alnico.checkpoint.source import Origin, Source, Tensor, TensorSpec
from alnico.checkpoint.task_vectors.decoders import decode_difference
from alnico.checkpoint.task_vectors.manifest import TensorEntry
from alnico.checkpoint.task_vectors.stored_vector import StoredVector
from alnico.checkpoint.virtual_read import read_computed
from alnico.numerics import dtypes


class DifferenceView:
    """The differences of a base with a stored vector, as tensors of the same names: ``weight * D``, zeros where nothing changes.

    The stored bytes are passed on where the factor is 1 and they are at least as wide as the base's; everything else is
    float32. Adding a tensor to the base in float32 gives the bits of the model. ``check`` is called before a tensor is used.
    """

    config: Mapping[str, Any] = MappingProxyType({})
    directory: Path | None = None
    origin: Origin | None = None
    held_bytes = 0
    reading_bytes = 0

    def __init__(
        self,
        label: str,
        base: Source,
        vector: StoredVector,
        weight: float,
        changed: Mapping[str, TensorEntry],
        unchanged: Mapping[str, Tensor],
        check: Callable[[str], None],
    ) -> None:
        self.label = label
        self._vector = vector
        self._weight = weight
        self._changed = changed
        self._check = check
        stored = {name: self._stored_as(entry, base.tensors[name]) for name, entry in changed.items()}
        self._as_stored = {name for name, tensor in stored.items() if tensor is not None}
        self.tensors: Mapping[str, Tensor] = {
            **unchanged,
            **{n: t or TensorSpec("F32", changed[n].shape, "F32") for n, t in stored.items()},
        }

    def _stored_as(self, entry: TensorEntry, base: Tensor) -> Tensor | None:
        """Return the stored tensor if its bytes are the difference, and at least as wide as the base's."""
        if entry.encoding != "difference" or entry.scale * self._weight != 1:
            return None
        stored = self._vector.files.tensors[entry.stored["values"]]
        return stored if dtypes.DTYPES[stored.dtype].bytes >= dtypes.DTYPES[base.dtype].bytes else None

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self._check(name)
        entry = self._changed.get(name)
        if entry is None:
            np.frombuffer(buffer, np.uint8)[:] = 0
        elif name in self._as_stored:
            self._vector.files.read_into(entry.stored["values"], offset, buffer)
        else:
            parts = self._vector.parts(name)
            factor = entry.scale * self._weight

            def compute(first: int, out: np.ndarray) -> None:
                decode_difference(entry, parts, factor, first, out)

            read_computed(offset, buffer, np.dtype(np.float32), compute)

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        """The model fetches its files."""
        return {}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """The model fetches its files."""

    def identity(self) -> list[dict[str, Any]]:
        return self._vector.identity()

    def paths(self) -> list[Path]:
        return self._vector.paths()

    def close(self) -> None:
        """The model closes the vector."""
