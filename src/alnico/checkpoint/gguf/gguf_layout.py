"""Says how the bytes of an output tensor stand in a GGUF file: rows in another order, float32 as blocks of Q8_0."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from alnico.checkpoint.gguf.families import file_rows
from alnico.checkpoint.gguf.simple_blocks import encode_q8_0, prepare_q8_0
from alnico.errors import NonFiniteError

BLOCK = 32
"""Elements of a block of Q8_0."""
BLOCK_BYTES = 34
MOVED_BYTES = 1 << 20
"""Most bytes of rows that are put in another order at a time."""


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
        if self.is_encoded and not offset:
            prepare_q8_0(math.prod(self.shape))
        content = _encoded(tensor, offset, data) if self.is_encoded else data
        first = self._stored_size(offset)
        if not self.heads:
            yield first, content
            return
        row_bytes = self._row_bytes
        start = min(-first % row_bytes, len(content))
        stop = max(len(content) - (first + len(content)) % row_bytes, start)
        for begin, end in ((0, start), (stop, len(content))):  # of a row that is not whole
            if begin < end:
                row, column = divmod(first + begin, row_bytes)
                yield int(self._places_of(np.array(row))) * row_bytes + column, content[begin:end]
        if start < stop:
            yield from self._rows((first + start) // row_bytes, content[start:stop])

    def _rows(self, first: int, content: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yield whole rows from ``first`` on with their places. Rows that follow one another in the file are put together."""
        rows = np.frombuffer(content, np.uint8).reshape(-1, self._row_bytes)
        places = self._places_of(np.arange(first, first + len(rows)))
        order = np.argsort(places)
        cuts = np.flatnonzero(np.diff(places[order]) != 1) + 1
        most = max(MOVED_BYTES // self._row_bytes, 1)
        for neighbours in np.split(order, cuts):
            for begin in range(0, len(neighbours), most):
                some = neighbours[begin : begin + most]
                yield int(places[some[0]]) * self._row_bytes, memoryview(rows[some].reshape(-1))

    @property
    def _row_bytes(self) -> int:
        return self.byte_size // self.shape[0]

    def _places_of(self, rows: np.ndarray) -> np.ndarray:
        """The rows of the file that are rows of the tensor."""
        return file_rows(rows, self.shape[0] // self.heads)

    def places(self, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Yield where bytes [begin, end) of some stored bytes stand: place, begin, end. ``offset`` and ``size`` are those of the tensor as
        it is computed."""
        first, count = self._stored_size(offset), self._stored_size(size)
        if not self.heads:
            yield first, 0, count
            return
        row_bytes = self._row_bytes
        done = 0
        while done < count:
            row, column = divmod(first + done, row_bytes)
            part = min(row_bytes - column, count - done)
            yield int(self._places_of(np.array(row))) * row_bytes + column, done, done + part
            done += part

    def _stored_size(self, size: int) -> int:
        return size // (BLOCK * self.width) * BLOCK_BYTES if self.is_encoded else size


def _encoded(tensor: str, offset: int, data: memoryview) -> memoryview:
    """Encode float32 as Q8_0."""
    out = encode_q8_0(np.frombuffer(data, np.float32).reshape(-1, BLOCK))
    scales = out.view(np.float16)[:, 0]
    if not np.isfinite(scales).all():
        index = offset // 4 + int(np.flatnonzero(~np.isfinite(scales))[0]) * BLOCK
        raise NonFiniteError(
            f"{tensor}: the values from element {index} on are beyond what Q8_0 can hold, about 8,300,000; expected smaller ones. Write it "
            "with dtype: float32."
        )
    return memoryview(out.reshape(-1))
