"""Reading any bytes of a tensor whose numbers are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

CHUNK = 262_144
"""Elements computed at a time: their bytes and values stay in the second-level cache."""


def read_computed(
    offset: int, buffer: memoryview, real: np.dtype[Any], compute: Callable[[int, np.ndarray], None]
) -> None:
    """Fill ``buffer`` with the bytes of numbers of dtype ``real`` from byte ``offset`` of a tensor on.

    ``compute(first, out)`` fills ``out``, at most :data:`CHUNK` long, with elements ``first`` on. It does so in place where elements begin
    and end with the buffer, as they do wherever a merge reads.
    """
    width, stop = real.itemsize, offset + len(buffer)
    for first in range(offset // width, -(-stop // width), CHUNK):
        last = min(first + CHUNK, -(-stop // width))
        begin, end = max(first * width, offset), min(last * width, stop)
        place = np.frombuffer(buffer[begin - offset : end - offset], np.uint8)
        if place.nbytes == (last - first) * width and place.ctypes.data % width == 0:
            compute(first, place.view(real))
        else:
            values = np.empty(last - first, real)
            compute(first, values)
            place[:] = values.view(np.uint8)[begin - first * width : end - first * width]
