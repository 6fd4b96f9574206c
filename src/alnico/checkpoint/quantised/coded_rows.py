"""Decodes rows of codes with scales for groups of columns: ``(table[code] - zero) * scale``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np

from alnico.checkpoint.quantised.stored_tensors import StoredTensors
from alnico.errors import ModelError
from alnico.kernels.build import Description
from alnico.kernels.choice import kernel_for
from alnico.kernels.lookup_kernel import CodeOrder, LookupKernel
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
        if not first:
            prepare_kernel(self.order, math.prod(self.shape))
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
        group = self.scales.group
        if group == 1 and self.columns > 1:
            self._decode_by_columns(stored, codes, row, rows, column, out)
            return
        if self.index and self._decode_by_index(stored, codes, row, rows, column, out):
            return
        first, last = column // group, -(-(column + width) // group)
        scales = self.scales.part(stored, row, rows, first, last)
        zeros = (
            np.zeros_like(scales) if self.zeros is None else self.zeros.part(stored, row, rows, first, last)
        )
        offset = column - first * group
        decode_groups(
            stored, self.scales.name, self.order, codes, self.table, zeros, scales, group, offset, out,
            may_be_zero=self.may_be_zero,
        )  # fmt: skip

    def _decode_by_columns(
        self, stored: StoredTensors, codes: np.ndarray, row: int, rows: int, column: int, out: np.ndarray
    ) -> None:
        """Decode a rectangle whose columns have a scale each."""
        scales = self.scales.part(stored, row, rows, column, column + out.shape[1])
        decode_columns(stored, self.scales.name, self.order, codes, self.table, None, scales, out)

    def _decode_by_index(
        self, stored: StoredTensors, codes: np.ndarray, row: int, rows: int, column: int, out: np.ndarray
    ) -> bool:
        """Decode a rectangle whose columns name their groups. Returns False if the groups follow one another."""
        count = -(-self.columns // self.scales.group)
        index = stored.kept(
            (self.index, 0),
            lambda: group_index(stored, self.index, self.columns, self.scales.group, count),
        )
        if index is None:
            return False
        groups = index[column : column + out.shape[1]]
        zeros = None if self.zeros is None else self.zeros.part(stored, row, rows, 0, count)[:, groups]
        scales = self.scales.part(stored, row, rows, 0, count)[:, groups]
        decode_columns(stored, self.scales.name, self.order, codes, self.table, zeros, scales, out)
        return True


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


def prepare_kernel(order: CodeOrder, elements: int) -> None:
    """Say how many elements are about to be decoded, so that the kernel is compiled where that is worth it."""
    kernel_for(_kernel(order), elements)


def run_lookup(
    order: CodeOrder,
    codes: np.ndarray,
    table: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    group: int,
    offset: int,
    out: np.ndarray,
) -> None:
    """Fill ``out`` (rows, columns) from codes (rows, bytes), see :class:`LookupKernel`."""
    kernel_for(_kernel(order))(
        np.ascontiguousarray(codes),
        table,
        np.ascontiguousarray(zeros),
        np.ascontiguousarray(scales),
        group,
        offset,
        out,
    )


def look_up(order: CodeOrder, codes: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Fill ``out`` (rows, columns) with the numbers that a table has for codes."""
    rows, columns = out.shape
    zeros, ones = np.zeros((rows, 1), np.float32), np.ones((rows, 1), np.float32)
    run_lookup(order, codes, table, zeros, ones, columns, 0, out)


def decode_columns(
    stored: StoredTensors,
    name: str,
    order: CodeOrder,
    codes: np.ndarray,
    table: np.ndarray,
    zeros: np.ndarray | None,
    scales: np.ndarray,
    out: np.ndarray,
) -> None:
    """Decode codes whose columns have a scale each, and may have a zero point. ``name`` is the tensor of the scales. Errors: ModelError for
    a scale of 0 over a number that is not 0."""
    look_up(order, codes, table, out)
    if zeros is not None:
        out -= zeros
    if not scales.all() and bool((out[scales == 0] != 0).any()):
        stored.refuse_zero(name)
    out *= scales


def decode_groups(
    stored: StoredTensors,
    name: str,
    order: CodeOrder,
    codes: np.ndarray,
    table: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    group: int,
    offset: int,
    out: np.ndarray,
    *,
    may_be_zero: bool = False,
) -> None:
    """Decode codes with a scale and a zero point for each group of columns. ``name`` is the tensor of the scales.

    Errors: ModelError for a scale of 0 over numbers that are not 0 with any other: the scales are lost.
    """
    run_lookup(order, codes, table, zeros, scales, group, offset, out)
    if may_be_zero or scales.all():
        return
    others = np.empty_like(out)
    changed = np.where(scales == 0, np.float32(1), scales)
    run_lookup(order, codes, table, zeros, changed, group, offset, others)
    if not np.array_equal(others, out):
        stored.refuse_zero(name)


def group_index(stored: StoredTensors, name: str, inputs: int, group: int, groups: int) -> np.ndarray | None:
    """Read the group of each input; None if they follow one another as usual. Errors: ModelError for a group that is not there.

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
    return index


def _kernel(order: CodeOrder) -> Description:
    return cast("Description", LookupKernel(order))  # has everything that is asked of a description
