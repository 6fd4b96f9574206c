"""Computes what LoRA, LoHa and LoKr add to a weight, from their factors: ``scale * left @ right``, exactly.

LoHa is the product of two low ranks, entry by entry. Its rank is at most the product of theirs, and the factors of that rank are the products of
columns and of rows (Khatri and Rao):
``((A1 B1) * (A2 B2))[i, j] = sum over k, l of (A1[i, k] A2[i, l]) (B1[k, j] B2[l, j])``.

LoKr is a Kronecker product, and ``kron(A1 B1, A2 B2) = kron(A1, A2) kron(B1, B2)``. A factor that is stored whole is its product with a unit
matrix.

A Tucker core T of a convolution, (p, q, *kernel), is a part of the right factor: ``right[p, i, kernel] = sum over q of T[p, q, kernel] B[q, i]``.

Source: Hyeon-Woo et al. 2021 (https://arxiv.org/abs/2108.06098) for LoHa, Edalati et al. 2022 (https://arxiv.org/abs/2212.10650) and Yeh et
al. 2023 (https://arxiv.org/abs/2309.14859) for LoKr and the cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from alnico.kernels.choice import kernel_for
from alnico.kernels.constants import CODES
from alnico.kernels.low_rank_kernel import FoldKernel

ReadFactor = Callable[[str], np.ndarray]
"""Returns a stored tensor in float64."""
FactorPair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class StoredProduct:
    """A matrix as a file stores it: ``left @ right``, or ``right`` alone where ``left`` is ''.

    ``core`` is a Tucker core. ``is_turned``: ``left`` is stored as (rank, rows), as LyCORIS does beside a core.
    """

    left: str
    right: str
    core: str
    rows: int
    rank: int
    right_shape: tuple[int, ...]
    """The shape of the right factor after the rank: the columns, or inputs and kernel."""
    is_turned: bool = False

    @property
    def columns(self) -> int:
        return math.prod(self.right_shape)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.left, self.right, self.core) if name)

    def factors(self, read: ReadFactor) -> FactorPair:
        """Return left (rows, rank) and right (rank, columns)."""
        right = read(self.right)
        if not self.left:
            whole = right.reshape(self.rows, self.columns)
            unit = np.eye(self.rank)
            return (whole, unit) if self.columns <= self.rows else (unit, whole)
        left = read(self.left)
        left = left.reshape(left.shape[0], -1)
        if self.core:
            right = _with_core(read(self.core), right.reshape(right.shape[0], -1))
        return left.T if self.is_turned else left, right.reshape(self.rank, self.columns)

    def matrix(self, read: ReadFactor) -> np.ndarray:
        """Return the matrix, (rows, columns)."""
        if not self.left:
            return read(self.right).reshape(self.rows, self.columns)
        left, right = self.factors(read)
        out = np.empty(self.rows * self.columns)
        add_product(left, right, 0, out)
        return out.reshape(self.rows, self.columns)


def stored_whole(name: str, shape: tuple[int, ...]) -> StoredProduct:
    """Return a matrix that is stored as one tensor of a ``shape``."""
    columns = math.prod(shape[1:])
    return StoredProduct("", name, "", shape[0], min(shape[0], columns), shape[1:])


def _with_core(core: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiply a core (p, q, *kernel) by (q, inputs): (p, inputs, *kernel), summed in the order of q."""
    product = np.zeros((core.shape[0], right.shape[1], *core.shape[2:]))
    extra = (None,) * (core.ndim - 2)
    for q in range(core.shape[1]):
        product += core[:, None, q] * right[(None, q, slice(None), *extra)]
    return product


def add_product(left: np.ndarray, right: np.ndarray, first: int, out: np.ndarray) -> None:
    """Fill ``out`` with the elements from ``first`` on of ``left @ right``, in float64, summed in the order of the rank."""
    kernel = kernel_for(FoldKernel("float64"), out.size * right.shape[0])
    zeros = np.zeros(out.size * 4, np.uint8)
    kernel(zeros, CODES["F32"], np.ascontiguousarray(left), np.ascontiguousarray(right), 1.0, first, out)


@dataclass(frozen=True)
class EntrywiseProduct:
    """LoHa: ``first * second``, entry by entry."""

    first: StoredProduct
    second: StoredProduct

    @property
    def rows(self) -> int:
        return self.first.rows

    @property
    def right_shape(self) -> tuple[int, ...]:
        return self.first.right_shape

    @property
    def rank(self) -> int:
        return min(self.first.rank * self.second.rank, self.rows, math.prod(self.right_shape))

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.first.names, *self.second.names)

    @property
    def operand_elements(self) -> int:
        """How many numbers :meth:`operands` returns."""
        sides = self.rows + math.prod(self.right_shape)
        return (self.first.rank + self.second.rank) * sides

    def operands(self, read: ReadFactor) -> tuple[np.ndarray, ...]:
        """Return what :meth:`fill` computes with."""
        return (*self.first.factors(read), *self.second.factors(read))

    def fill(self, operands: tuple[np.ndarray, ...], first: int, out: np.ndarray) -> None:
        """Fill ``out``, float64, with the elements from ``first`` on of the difference."""
        other = np.empty_like(out)
        left, right, other_left, other_right = operands
        add_product(left, right, first, out)
        add_product(other_left, other_right, first, other)
        out *= other

    def factors(self, read: ReadFactor) -> FactorPair:
        """Return left (rows, rank) and right (rank, columns)."""
        left, right, other_left, other_right = self.operands(read)
        if self.first.rank * self.second.rank > self.rank:
            whole = np.empty(self.rows * math.prod(self.right_shape))
            self.fill((left, right, other_left, other_right), 0, whole)
            return _with_unit(whole.reshape(self.rows, -1))
        rows, columns = left.shape[0], right.shape[1]
        return (
            (left[:, :, None] * other_left[:, None, :]).reshape(rows, -1),
            (right[:, None, :] * other_right[None, :, :]).reshape(-1, columns),
        )


def _with_unit(whole: np.ndarray) -> FactorPair:
    """Return a matrix as its product with the smaller unit matrix."""
    rows, columns = whole.shape
    return (whole, np.eye(columns)) if columns <= rows else (np.eye(rows), whole)


@dataclass(frozen=True)
class KroneckerProduct:
    """LoKr: ``kron(first, second)``. The kernel of a convolution belongs to the second."""

    first: StoredProduct
    second: StoredProduct

    @property
    def rows(self) -> int:
        return self.first.rows * self.second.rows

    @property
    def right_shape(self) -> tuple[int, ...]:
        inputs, *kernel = self.second.right_shape
        return (self.first.columns * inputs, *kernel)

    @property
    def rank(self) -> int:
        return self.first.rank * self.second.rank

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.first.names, *self.second.names)

    @property
    def operand_elements(self) -> int:
        """How many numbers :meth:`operands` returns."""
        return sum(m.rows * m.columns for m in (self.first, self.second))

    def operands(self, read: ReadFactor) -> tuple[np.ndarray, ...]:
        """Return what :meth:`fill` computes with."""
        return self.first.matrix(read), self.second.matrix(read)

    def fill(self, operands: tuple[np.ndarray, ...], first: int, out: np.ndarray) -> None:
        """Fill ``out``, float64, with the elements from ``first`` on of the difference."""
        outer, inner = operands
        height, width = inner.shape
        columns = outer.shape[1] * width
        done = 0
        while done < out.size:
            row, column = divmod(first + done, columns)
            count = min(columns - column, out.size - done)
            block, begin = divmod(column, width)
            blocks = -(-(begin + count) // width)
            numbers = outer[row // height, block : block + blocks]
            product = numbers[:, None] * inner[row % height]
            out[done : done + count] = product.reshape(-1)[begin : begin + count]
            done += count

    def factors(self, read: ReadFactor) -> FactorPair:
        """Return left (rows, rank) and right (rank, columns)."""
        left, right = self.first.factors(read)
        other_left, other_right = self.second.factors(read)
        return np.kron(left, other_left), np.kron(right, other_right)


Algebra = EntrywiseProduct | KroneckerProduct
