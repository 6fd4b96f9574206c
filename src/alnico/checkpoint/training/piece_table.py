"""Says where the pieces of a tensor are that is stored in parts, and reads blocks of it from them.

The pieces form a grid: each dimension is cut at some indices, and each cell of the grid is one piece. Data
parallelism cuts the first dimension, tensor parallelism one more. A flat partition is a grid of one dimension.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from alnico.checkpoint.virtual_read import CHUNK, read_computed
from alnico.numerics.dtypes import DTYPES

ReadStored = Callable[[str, int, memoryview], None]
"""Fills a buffer with a stored tensor's raw bytes, from a byte on."""


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """One part of a tensor: where it begins in the tensor, its size, and where it is stored, row by row: in the stored tensor
    ``name``, from element ``first`` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    name: str
    first: int = 0


@dataclass(frozen=True, slots=True)
class PieceTable:
    """A tensor and the grid of its pieces. ``cuts`` are, for each dimension of ``sizes``, the indices at which pieces begin, and
    the size; ``pieces`` are the cells in row-major order, as (stored tensor, first element).

    ``sizes`` is the tensor's shape, or its number of elements where only the first dimension is cut.
    """

    dtype: str
    shape: tuple[int, ...]
    nominal: str
    sizes: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    pieces: tuple[tuple[str, int], ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def byte_size(self) -> int:
        return self.elements * DTYPES[self.dtype].bytes

    def read_into(self, read: ReadStored, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the tensor's raw bytes, from byte ``offset`` of the tensor on."""
        if len(self.sizes) == 1:
            self._read_in_order(read, offset, buffer)
            return
        dtype = np.dtype(f"V{DTYPES[self.dtype].bytes}")
        read_computed(offset, buffer, dtype, lambda first, out: self._read_boxes(read, first, out))

    def _read_in_order(self, read: ReadStored, offset: int, buffer: memoryview) -> None:
        """Read pieces that follow on each other."""
        width, begins = DTYPES[self.dtype].bytes, self.cuts[0]
        done = 0
        while done < len(buffer):
            cell = bisect_right(begins, (offset + done) // width) - 1
            inside = offset + done - begins[cell] * width
            count = min(len(buffer) - done, (begins[cell + 1] - begins[cell]) * width - inside)
            name, first = self.pieces[cell]
            read(name, first * width + inside, buffer[done : done + count])
            done += count

    def _read_boxes(self, read: ReadStored, first: int, out: np.ndarray) -> None:
        """Fill ``out`` with elements from ``first`` on, from a grid of several dimensions."""
        done = 0
        for starts, counts in boxes_of(self.sizes, first, first + out.size):
            size = math.prod(counts)
            self._read_box(read, starts, out[done : done + size].reshape(counts))
            done += size

    def _read_box(self, read: ReadStored, starts: Sequence[int], out: np.ndarray) -> None:
        """Fill ``out`` with the box of its shape that begins at ``starts``.

        A box of :func:`boxes_of` has one index in the first dimensions, a range in the next and all of the others. What it has in
        common with a piece is therefore one run of the piece's elements.
        """
        spans = [self._spans(d, start, start + out.shape[d]) for d, start in enumerate(starts)]
        for cells in itertools.product(*spans):
            number = start = 0
            for dimension, (cell, begin, _) in enumerate(cells):
                cuts = self.cuts[dimension]
                number = number * (len(cuts) - 1) + cell
                start = start * (cuts[cell + 1] - cuts[cell]) + begin - cuts[cell]
            target = out[tuple(slice(b - s, e - s) for (_, b, e), s in zip(cells, starts, strict=True))]
            name, first = self.pieces[number]
            run = target if target.flags.c_contiguous else np.empty(target.shape, target.dtype)
            read(name, (first + start) * out.itemsize, memoryview(run.reshape(-1).view(np.uint8)))
            if run is not target:
                target[...] = run

    def _spans(self, dimension: int, begin: int, end: int) -> list[tuple[int, int, int]]:
        """The cells of a dimension that a range of indices meets, each with its part of the range."""
        cuts = self.cuts[dimension]
        spans = []
        for cell in range(bisect_right(cuts, begin) - 1, len(cuts) - 1):
            if cuts[cell] >= end:
                break
            spans.append((cell, max(begin, cuts[cell]), min(end, cuts[cell + 1])))
        return spans


READING_BYTES = 16 * CHUNK
"""Memory that :meth:`PieceTable.read_into` needs besides the buffer: the elements of a chunk, twice."""


def piece_table(
    dtype: str, shape: tuple[int, ...], pieces: Sequence[StoredPiece], nominal: str | None = None
) -> PieceTable | None:
    """Arrange the pieces of a tensor; None if they are no grid that covers it, without a gap or an overlap.

    Equal pieces are replicas, of which the first counts; empty ones are left out.

    >>> halves = [StoredPiece((0, 3), (2, 2), "right"), StoredPiece((0, 0), (2, 3), "left")]
    >>> piece_table("F32", (2, 5), halves).cuts, piece_table("F32", (2, 6), halves)
    (((0, 2), (0, 3, 5)), None)
    """
    size = math.prod(shape)
    cells: dict[tuple[int, ...], StoredPiece] = {}
    for piece in pieces:
        if math.prod(piece.sizes):
            cells.setdefault(piece.offsets, piece)
    if not size or not shape:
        if (size and len(cells) != 1) or (not size and cells):
            return None
        names = [(piece.name, piece.first) for piece in cells.values()]
        return PieceTable(dtype, shape, nominal or dtype, (size,), ((0, size),), tuple(names))
    cuts = [tuple(sorted({0, n, *(o[d] for o in cells)})) for d, n in enumerate(shape)]
    widths = [dict(itertools.pairwise(c)) for c in cuts]
    if math.prod(len(c) - 1 for c in cuts) != len(cells) or any(
        widths[d].get(begin) != begin + piece.sizes[d]
        for piece in pieces
        if math.prod(piece.sizes)
        for d, begin in enumerate(piece.offsets)
    ):
        return None
    ordered = tuple((cells[o].name, cells[o].first) for o in itertools.product(*(c[:-1] for c in cuts)))
    if all(len(c) == 2 for c in cuts[1:]):
        row = size // shape[0]
        flat = tuple(row * cut for cut in cuts[0])
        return PieceTable(dtype, shape, nominal or dtype, (size,), (flat,), ordered)
    return PieceTable(dtype, shape, nominal or dtype, shape, tuple(cuts), ordered)


def flat_table(
    dtype: str, shape: tuple[int, ...], runs: Sequence[tuple[str, int, int]], nominal: str | None = None
) -> PieceTable:
    """Arrange a tensor whose elements, row by row, are those of runs: (stored tensor, first element, number of elements)."""
    kept = [run for run in runs if run[2]]
    cuts = (0, *itertools.accumulate(count for _, _, count in kept))
    pieces = tuple((name, first) for name, first, _ in kept)
    return PieceTable(dtype, shape, nominal or dtype, (math.prod(shape),), (cuts,), pieces)


def boxes_of(
    shape: Sequence[int], first: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Divide a range of elements in row-major order into boxes (starts, sizes), in order.

    >>> list(boxes_of((3, 4), 2, 12))
    [((0, 2), (1, 2)), ((1, 0), (2, 4))]
    """
    if len(shape) == 1:
        yield (first,), (stop - first,)
        return
    row = math.prod(shape[1:])
    (begin, head), (end, tail) = divmod(first, row), divmod(stop, row)
    if begin == end:
        yield from _in_row(shape, begin, head, tail)
        return
    if head:
        yield from _in_row(shape, begin, head, row)
        begin += 1
    if begin < end:
        yield (begin, *(0 for _ in shape[1:])), (end - begin, *shape[1:])
    if tail:
        yield from _in_row(shape, end, 0, tail)


def _in_row(
    shape: Sequence[int], row: int, first: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for starts, counts in boxes_of(shape[1:], first, stop):
        yield (row, *starts), (1, *counts)
