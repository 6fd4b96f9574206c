"""Finds tensors stored twice, by their bytes: tied weights saved under each of their names.

The config is not consulted here; :mod:`alnico.checkpoint.tied_weights` derives ties from the config.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.source import Source

BLOCK_BYTES = 4 << 20
"""Bytes compared at a time."""

MAX_CANDIDATES = 64
"""Most tensors of one shape to compare a tensor with."""


def find_original(source: Source, name: str, among: Collection[str]) -> str | None:
    """Find the tensor in ``among`` that ``name`` is a stored copy of; None if there is none.

    A copy has the dtype, the shape and the bytes of its original. If all its values are the same number,
    equal bytes prove nothing, as norms and biases often start at one value; then both must be the same bytes
    of the same file. Vectors count as copies only if they have an entry per row of a matrix in ``among``, as
    the bias of a head does. Reads both tensors.
    """
    tensor = source.tensors[name]
    candidates = [
        other
        for other in among
        if other != name and (t := source.tensors[other]).shape == tensor.shape and t.dtype == tensor.dtype
    ]
    if not candidates or len(candidates) > MAX_CANDIDATES or not tensor.byte_size:
        return None
    for other in candidates:
        if _share_bytes_in_file(source, name, other):
            return other
    if len(tensor.shape) < 2 and not any(
        len(s := source.tensors[other].shape) == 2 and s[0] == tensor.elements for other in among
    ):
        return None
    source.fetch(source.absent([name, *candidates], False))
    if _is_constant(source, name):
        return None
    return next((other for other in candidates if _is_equal(source, name, other)), None)


def _share_bytes_in_file(source: Source, a: str, b: str) -> bool:
    if not isinstance(source, FileModel):
        return False
    location = source.place_of(a)
    return location is not None and location == source.place_of(b)


def _read(source: Source, name: str, first: int, size: int) -> np.ndarray:
    raw = np.empty(size, np.uint8)
    source.read_into(name, first, memoryview(raw))
    return raw


def _is_constant(source: Source, name: str) -> bool:
    """Do all elements have the bytes of the first?"""
    tensor = source.tensors[name]
    width = tensor.byte_size // tensor.elements
    first = _read(source, name, 0, width)
    step = max(BLOCK_BYTES // width, 1) * width
    return all(
        bool((_read(source, name, at, min(step, tensor.byte_size - at)).reshape(-1, width) == first).all())
        for at in range(0, tensor.byte_size, step)
    )


def _is_equal(source: Source, a: str, b: str) -> bool:
    size = source.tensors[a].byte_size
    for at in range(0, size, BLOCK_BYTES):
        first, second = (_read(source, name, at, min(BLOCK_BYTES, size - at)) for name in (a, b))
        if not np.array_equal(first, second):
            return False
    return True
