"""Reads a stored task vector without putting it on a base: its differences, which new values need the base for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.reference import is_path
from alnico.checkpoint.source import Origin, Source, Tensor, TensorSpec
from alnico.checkpoint.task_vectors.decoders import CHUNK, decode_difference
from alnico.checkpoint.task_vectors.equipped_model import EquippedModel
from alnico.checkpoint.task_vectors.manifest import EXACT, Manifest, TensorEntry
from alnico.checkpoint.task_vectors.stored_vector import StoredVector, open_vector
from alnico.checkpoint.virtual_read import read_computed
from alnico.errors import AlnicoError, ModelError
from alnico.numerics.dtypes import DTYPES, MERGEABLE, decode
from alnico.run_options import ONLINE, Access


def open_differences(path: str, *, access: Access = ONLINE) -> Source:
    """Open a stored task vector as its differences. Errors: ModelError, also where they need a base that is not there."""
    vector = open_vector(path, access=access)
    try:
        base = _open_base(vector, access) if any(map(_needs_base, vector.manifest.tensors.values())) else None
        try:
            return StoredDifferences(vector, base)
        except BaseException:
            if base is not None:
                base.close()
            raise
    except BaseException:
        vector.close()
        raise


def _needs_base(entry: TensorEntry) -> bool:
    """Is a difference only known next to the base: for new values, and for what PEFT's files say?"""
    return entry.encoding != "absent" and (entry.encoding in EXACT or entry.encoding == "adapter")


def base_reference(manifest: Manifest) -> str | None:
    """Return the base that a manifest names, at its revision; None if it names none."""
    base = manifest.base
    if base.id is None or base.revision is None or "@" in base.id or is_path(base.id):
        return base.id
    return f"{base.id}@{base.revision}"


def _open_base(vector: StoredVector, access: Access) -> Source:
    reference = base_reference(vector.manifest)
    first = next(name for name, entry in vector.manifest.tensors.items() if _needs_base(entry))
    try:
        if reference is None:
            raise ModelError("its manifest names none")
        return open_model(reference, access=access)
    except AlnicoError as error:
        why, *more = error.args
        raise ModelError(
            f"{vector.label}: {first} is stored as new values, so its difference needs the base"
            f"{f' {reference}' if reference else ''}, which cannot be opened ({str(why).rstrip('.')}); expected the base at that "
            "place. Put the task vector on it: tau.on(base).",
            *more,
        ) from None


class StoredDifferences:
    """The differences of a stored task vector, float32 (float64 for F64), by its names.

    With a ``base`` they are those of what the vector makes of it. Tensors that are not floats do not belong to it. It
    closes both.
    """

    directory: Path | None = None
    origin: Origin | None = None
    config: Mapping[str, Any] = {}

    def __init__(self, vector: StoredVector, base: Source | None) -> None:
        self.label = vector.label
        self._vector = vector
        self._base = base
        self._equipped = None if base is None else EquippedModel(vector.label, base, vector, 1.0)
        entries = vector.manifest.tensors
        self.tensors: Mapping[str, Tensor] = {
            name: TensorSpec("F64" if entry.dtype == "F64" else "F32", entry.shape, "F32")
            for name, entry in entries.items()
            if entry.dtype in MERGEABLE
        }
        if self._equipped is not None:
            lacking = next((n for n in self.tensors if n not in self._start.tensors), None)
            if lacking is not None:
                raise ModelError(
                    f"{vector.label}: the base has no tensor {lacking}, so it has no difference; expected a task vector without new "
                    "tensors. Put it on its base: tau.on(base)."
                )

    @property
    def _start(self) -> Source:
        """The base under the vector's names."""
        assert self._equipped is not None
        return self._equipped.base

    @property
    def held_bytes(self) -> int:
        return self._vector.held_bytes + (0 if self._base is None else self._base.held_bytes)

    @property
    def reading_bytes(self) -> int:
        return (
            self._vector.reading_bytes
            + 4 * 8 * CHUNK
            + (0 if self._base is None else self._base.reading_bytes)
        )

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {} if self._equipped is None else self._equipped.absent(tensors, False)

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        if self._equipped is not None:
            self._equipped.fetch(files, report)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        entry = self._vector.manifest.tensors[name]
        dtype = np.dtype(np.float64 if self.tensors[name].dtype == "F64" else np.float32)

        def compute(first: int, out: np.ndarray) -> None:
            for at in range(0, out.size, CHUNK):
                part = out[at : at + CHUNK]
                if entry.encoding == "absent":
                    part[:] = 0
                elif _needs_base(entry):
                    self._subtract(name, first + at, part)
                else:
                    decode_difference(entry, self._vector.parts(name), entry.scale, first + at, part)

        read_computed(offset, buffer, dtype, compute)

    def _subtract(self, name: str, first: int, out: np.ndarray) -> None:
        assert self._equipped is not None
        after, before = (_read(source, name, first, out.size) for source in (self._equipped, self._start))
        with np.errstate(all="ignore"):  # a NaN or an infinity is reported where it is used
            out[:] = after - before

    def identity(self) -> list[dict[str, Any]]:
        return [*self._vector.identity(), *([] if self._base is None else self._base.identity())]

    def paths(self) -> list[Path]:
        return [*self._vector.paths(), *([] if self._base is None else self._base.paths())]

    def close(self) -> None:
        self._vector.close()
        if self._base is not None:
            self._base.close()


def _read(source: Source, name: str, first: int, count: int) -> np.ndarray:
    """Read elements of a tensor as float64."""
    dtype = source.tensors[name].dtype
    width = DTYPES[dtype].bytes
    raw = np.empty(count * width, np.uint8)
    source.read_into(name, first * width, memoryview(raw))
    values: np.ndarray = decode(raw, dtype).astype(np.float64)
    return values
