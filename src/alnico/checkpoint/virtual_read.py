"""Reads byte ranges of tensors whose values are computed on the fly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

CHUNK = 262_144
"""Elements computed at a time: their bytes and values fit the second-level cache."""


def read_computed(
    offset: int, buffer: memoryview, dtype: np.dtype[Any], compute: Callable[[int, np.ndarray], None]
) -> None:
    """Fill ``buffer`` with a computed tensor of ``dtype``, from byte ``offset`` of the tensor on.

    ``compute(first, out)`` fills ``out``, at most :data:`CHUNK` elements, with the elements from ``first``
    on. ``out`` is the buffer itself where elements begin and end with it, as they do wherever a merge reads.
    """
    width, stop = dtype.itemsize, offset + len(buffer)
    for first in range(offset // width, -(-stop // width), CHUNK):
        last = min(first + CHUNK, -(-stop // width))
        begin, end = max(first * width, offset), min(last * width, stop)
        target = np.frombuffer(buffer[begin - offset : end - offset], np.uint8)
        if target.nbytes == (last - first) * width and target.ctypes.data % width == 0:
            compute(first, target.view(dtype))
        else:
            values = np.empty(last - first, dtype)
            compute(first, values)
            target[:] = values.view(np.uint8)[begin - first * width : end - first * width]
