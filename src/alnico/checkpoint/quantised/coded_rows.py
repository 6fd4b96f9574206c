"""Decodes rows of codes with scales for groups of columns: ``(table[code] - zero) * scale``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np

from alnico.checkpoint.quantised.stored_tensors import StoredTensors
from alnico.errors import ModelError
from alnico.kernels.choice import kernel_for
from alnico.kernels.lookup_kernel import CodeOrder, IndexedKernel, LookupKernel
from alnico.kernels.template import KernelDescription
from alnico.numerics import dtypes
from alnico.numerics.dtypes import Shape

BYTES = np.arange(256, dtype=np.uint8)
FLOAT8_VALUES = {kind: dtypes.decode(BYTES, kind) for kind in dtypes.FLOAT8}
INT8_VALUES = BYTES.view(np.int8).astype(np.float32)
UINT8_VALUES = BYTES.astype(np.float32)
INT4_VALUES = np.arange(16, dtype=np.float32)
FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of F4 (E2M1), which MXFP4 and NVFP4 share: a sign, two bits of exponent, one of mantissa."""


class GroupNumbers(Protocol):
    """A number for each group of columns of each row."""

    @property
    def name(self) -> str: ...
    @property
    def group(self) -> int:
        """Columns that share a number."""
        ...

    def part(self, stored: StoredTensors, row: int, rows: int, first: int, last: int) -> np.ndarray:
        """Return the numbers of some rows for groups ``first`` to ``last``: (rows, groups) float32."""
        ...


@dataclass(frozen=True)
class ScaleGrid:
    """Numbers of a stack of matrices, ``height`` rows each: ``grid`` numbers for a matrix, each for a ``block`` of rows and columns.

    All are multiplied by the one number of ``factor``, or divided by it, where there is one. ``kind`` is their dtype where the
    file's does not say it.
    """

    name: str
    height: int
    grid: tuple[int, int]
    block: tuple[int, int]
    kind: str | None = None
    factor: str = ""
    divides: bool = False
    times: float = 1.0
    """What every number is multiplied by."""

    @property
    def group(self) -> int:
        return self.block[1]

    def part(self, stored: StoredTensors, row: int, rows: int, first: int, last: int) -> np.ndarray:
        index = np.arange(row, row + rows)
        places = index // self.height * self.grid[0] + index % self.height // self.block[0]
        low, high = int(places[0]), int(places[-1]) + 1
        width = self.grid[1]
        if high - low == 1:
            values = stored.scales(self.name, low * width + first, last - first, self.kind)[None]
        else:
            values = stored.scales(self.name, low * width, (high - low) * width, self.kind).reshape(-1, width)
            values = values[:, first:last]
        if self.factor:
            by = stored.scales(self.factor)[0]
            if by == 0:
                stored.refuse_zero(self.factor)
            values = values / by if self.divides else values * by
        if self.times != 1:
            values = (values * np.float64(self.times)).astype(np.float32)
        of_rows: np.ndarray = values[places - low]
        return of_rows


@dataclass(frozen=True, eq=False)
class CodedRows:
    """A tensor of rows of codes, ``row_bytes`` each for ``columns`` elements.

    The rows are those of the code: all dimensions but the last, or other ones where scales are stored for them.
    """

    title: str
    shape: Shape
    codes: str
    order: CodeOrder
    table: np.ndarray
    scales: GroupNumbers
    zeros: GroupNumbers | None
    columns: int
    row_bytes: int
    parts: tuple[str, ...]
    may_be_zero: bool = False
    """Do zero scales occur in good files?"""
    index: str = ""
    """The group of each column, where that is stored."""
    kept_bytes: int = field(default=0, init=False)

    @property
    def stored(self) -> tuple[str, ...]:
        return (self.codes, *self.parts, *([self.index] if self.index else []))

    def decode(self, stored: StoredTensors, first: int, out: np.ndarray) -> None:
        if not first:  # so that a kernel is compiled where that is worth it
            kernel_for(self._kernel(self._index(stored)), math.prod(self.shape))
        for row, rows, column, width, at in rectangles(first, out.size, self.columns):
            self._decode(stored, row, rows, column, out[at : at + rows * width].reshape(rows, width))

    def _decode(self, stored: StoredTensors, row: int, rows: int, column: int, out: np.ndarray) -> None:
        """Decode a rectangle: whole rows, or a part of one."""
        width = out.shape[1]
        per_byte = 1 if self.order == "byte" else 2
        if column % per_byte:  # begins in the middle of a byte
            wider = np.empty((1, width + 1), np.float32)
            self._decode(stored, row, 1, column - 1, wider)
            out[:] = wider[:, 1:]
            return
        begin = row * self.row_bytes + column // per_byte
        size = rows * self.row_bytes if width == self.columns else -(-width // per_byte)
        codes = stored.read(self.codes, begin, size).reshape(rows, -1)
        group, index = self.scales.group, self._index(stored)
        if index is None:
            first, last = column // group, -(-(column + width) // group)
        elif self.index:
            first, last, index = 0, -(-self.columns // group), index[column : column + width]
        else:
            first, last, index = column, column + width, index[:width]
        scales = np.ascontiguousarray(self.scales.part(stored, row, rows, first, last))
        zeros = np.zeros_like(scales)
        if self.zeros is not None:
            zeros = np.ascontiguousarray(self.zeros.part(stored, row, rows, first, last))
        run = kernel_for(self._kernel(index))

        def decode(by: np.ndarray, into: np.ndarray) -> None:
            if index is None:
                run(codes, self.table, zeros, by, group, column - first * group, into)
            else:
                run(codes, self.table, zeros, by, index, into)

        decode(scales, out)
        if not (self.may_be_zero or scales.all()):
            refuse_lost_scales(stored, self.scales.name, scales, out, decode)

    def _index(self, stored: StoredTensors) -> np.ndarray | None:
        """The place of each column's scale, uint32; None where groups of columns follow one another."""
        if self.scales.group == 1 and self.columns > 1:
            return cast("np.ndarray", stored.kept((self.codes, 0), lambda: np.arange(self.columns, dtype=np.uint32)))  # fmt: skip
        if not self.index:
            return None
        count = -(-self.columns // self.scales.group)
        return cast(
            "np.ndarray | None",
            stored.kept(
                (self.index, 0),
                lambda: group_index(stored, self.index, self.columns, self.scales.group, count),
            ),
        )

    def _kernel(self, index: np.ndarray | None) -> KernelDescription:
        kernel = LookupKernel(self.order) if index is None else IndexedKernel(self.order)
        return kernel


def rectangles(first: int, count: int, columns: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Split elements of rows into (row, rows, column, columns, position): the rest of a row, whole rows, the start of a row.

    >>> list(rectangles(3, 9, 4))
    [(0, 1, 3, 1, 0), (1, 2, 0, 4, 1)]
    """
    at = 0
    while at < count:
        row, column = divmod(first + at, columns)
        rows = (count - at) // columns if column == 0 else 0
        width = columns if rows else min(columns - column, count - at)
        yield row, max(rows, 1), column, width, at
        at += max(rows, 1) * width


def refuse_lost_scales(
    stored: StoredTensors,
    name: str,
    scales: np.ndarray,
    out: np.ndarray,
    decode: Callable[[np.ndarray, np.ndarray], None],
) -> None:
    """Refuse scales of which some are 0 over numbers that are not 0 with any other: the scales are lost.

    ``out`` is what ``decode(scales, out)`` made, ``name`` the tensor of the scales. Errors: ModelError.
    """
    others = np.empty_like(out)
    decode(np.where(scales == 0, np.float32(1), scales), others)
    if not np.array_equal(others, out):
        stored.refuse_zero(name)


def group_index(stored: StoredTensors, name: str, inputs: int, group: int, groups: int) -> np.ndarray | None:
    """Read the group of each input, uint32; None if they follow one another as usual. Errors: ModelError for a group that is not there.

    -1 for all means that no order was chosen.
    """
    if not name:
        return None
    index = stored.integers(name)
    if (index == -1).all() or np.array_equal(index, np.arange(inputs) // group):
        return None
    if index.min() < 0 or index.max() >= groups:
        raise ModelError(
            f"{stored.label}: {name} reaches from {index.min()} to {index.max()}; expected 0 to {groups - 1}, the groups of scales. Get "
            "the model from its source."
        )
    return index.astype(np.uint32)
