"""Tensors that a model stores twice: tied weights that were saved under each of their names."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.source import Source

BLOCK = 4 << 20
"""Bytes that are compared at a time."""

MOST_CANDIDATES = 64
"""Most tensors of one shape that a tensor is compared with."""


def find_original(source: Source, name: str, among: Collection[str]) -> str | None:
    """Find the tensor of ``among`` that ``name`` is a tied copy of; None if there is none.

    A copy has the dtype, the shape and the bytes of its original. Where all its values are equal that proves nothing, as norms and biases
    often start at one value: then both must be one range of bytes of one file. Vectors count as copies only where they have an
    entry for each row of a matrix that ``among`` holds too, as the bias of a head has. Reads both tensors.
    """
    tensor = source.tensors[name]
    candidates = [
        other
        for other in among
        if other != name and (t := source.tensors[other]).shape == tensor.shape and t.dtype == tensor.dtype
    ]
    if not candidates or len(candidates) > MOST_CANDIDATES or not tensor.byte_size:
        return None
    for other in candidates:
        if _is_one_range(source, name, other):
            return other
    if len(tensor.shape) < 2 and not any(
        len(s := source.tensors[other].shape) == 2 and s[0] == tensor.elements for other in among
    ):
        return None
    source.fetch(source.absent([name, *candidates], False))
    if _is_constant(source, name):
        return None
    return next((other for other in candidates if _is_equal(source, name, other)), None)


def _is_one_range(source: Source, one: str, other: str) -> bool:
    if not isinstance(source, FileModel):
        return False
    place = source.place_of(one)
    return place is not None and place == source.place_of(other)


def _read(source: Source, name: str, first: int, size: int) -> np.ndarray:
    raw = np.empty(size, np.uint8)
    source.read_into(name, first, memoryview(raw))
    return raw


def _is_constant(source: Source, name: str) -> bool:
    """Are all elements the same bytes as the first?"""
    tensor = source.tensors[name]
    width = tensor.byte_size // tensor.elements
    first = _read(source, name, 0, width)
    step = max(BLOCK // width, 1) * width
    return all(
        bool((_read(source, name, at, min(step, tensor.byte_size - at)).reshape(-1, width) == first).all())
        for at in range(0, tensor.byte_size, step)
    )


def _is_equal(source: Source, one: str, other: str) -> bool:
    size = source.tensors[one].byte_size
    for at in range(0, size, BLOCK):
        first, second = (_read(source, name, at, min(BLOCK, size - at)) for name in (one, other))
        if not np.array_equal(first, second):
            return False
    return True
