"""Says how the bytes of an output tensor stand in a GGUF file: rows in another order, float32 as blocks of Q8_0."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from alnico.checkpoint.gguf.families import file_rows
from alnico.checkpoint.gguf.simple_blocks import encode_q8_0
from alnico.errors import NonFiniteError

BLOCK = 32
"""Elements of a block of Q8_0."""
BLOCK_BYTES = 34
ENCODED = 1 << 16
"""Elements that are encoded at a time: they fit the second-level cache."""


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """One tensor. ``width`` is the bytes of an element that is computed; ``is_encoded``: the file has blocks of Q8_0 in place of
    float32. With ``heads``, its rows are reordered in each head.

    Rows have whole blocks, and what is written begins and ends with one.
    """

    shape: tuple[int, ...]
    width: int
    is_encoded: bool = False
    heads: int = 0

    @property
    def byte_size(self) -> int:
        """The bytes in the file."""
        return self._stored_size(math.prod(self.shape) * self.width)

    def stored(self, tensor: str, offset: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yield where parts of ``data``, from byte ``offset`` of the tensor on, stand in the tensor's bytes in the file, and those parts.

        Errors: NonFiniteError for numbers too large for a block's scale.
        """
        content = _encoded(tensor, offset, data) if self.is_encoded else data
        for place, begin, end in self.places(offset, len(data)):
            yield place, content[begin:end]

    def places(self, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Yield where bytes [begin, end) of some stored bytes stand: place, begin, end. ``offset`` and ``size`` are those of the tensor as
        it is computed."""
        first, count = self._stored_size(offset), self._stored_size(size)
        if not self.heads:
            yield first, 0, count
            return
        rows = self.shape[0]
        row_bytes = self.byte_size // rows
        done = 0
        while done < count:
            row, column = divmod(first + done, row_bytes)
            part = min(row_bytes - column, count - done)
            yield int(file_rows(np.array(row), rows // self.heads)) * row_bytes + column, done, done + part
            done += part

    def _stored_size(self, size: int) -> int:
        return size // (BLOCK * self.width) * BLOCK_BYTES if self.is_encoded else size


def _encoded(tensor: str, offset: int, data: memoryview) -> memoryview:
    """Encode float32 as Q8_0."""
    values = np.frombuffer(data, np.float32).reshape(-1, BLOCK)
    out = np.empty((len(values), BLOCK_BYTES), np.uint8)
    step = ENCODED // BLOCK
    for begin in range(0, len(values), step):
        out[begin : begin + step] = encode_q8_0(values[begin : begin + step])
    scales = out.view(np.float16)[:, 0]
    if not np.isfinite(scales).all():
        index = offset // 4 + int(np.flatnonzero(~np.isfinite(scales))[0]) * BLOCK
        raise NonFiniteError(
            f"{tensor}: the values from element {index} on are beyond what Q8_0 can hold, about 8,300,000; expected smaller ones. Write it "
            "with dtype: float32."
        )
    return memoryview(out.reshape(-1))
