"""Computes leading singular vectors of a matrix read in blocks of rows, randomized or exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.numerics.arrays import (
    AnyArray,
    concatenate,
    dtype_of,
    empty,
    in_dtype,
    is_numpy,
    library_of,
    like,
    reversed_columns,
    to_numpy,
    zeros,
)

Blocks = Callable[[], Iterator[AnyArray]]
"""Begins a reading of a matrix: its rows in order, in blocks that are the same at every reading. Where these are torch's,
everything is computed on their device."""

SquaresOf = Callable[[AnyArray], float]
"""Returns the sum of the squares of the block that was read last, in float64: what reads it may have summed them on the way."""

BLOCK_ELEMENTS = 1 << 19
"""Elements in a block of rows: as float32 it stays in the second-level cache between its two products, which
made them 2 to 3 times as fast as products with the whole matrix (1,536 x 4,096, rank 32, one thread)."""

OVERSAMPLE = 16
ITERATIONS = 2

SMALL = 128
"""Up to this smaller side, all singular vectors take no longer than some of them."""

WHOLE = 0.75
"""From this share of the smaller side on, a basis spans nearly all of it, and the exact decomposition is
used."""


@dataclass(frozen=True)
class LowRankFactors:
    """A matrix of rank k near another: ``left @ right``, (m, k) and (k, n), each with the square root of the
    singular values.

    ``values`` are these singular values, the largest first, in float64; ``squares`` is the sum of the squares
    of the other matrix. The first r columns and rows are the factors of rank r.
    """

    left: np.ndarray
    right: np.ndarray
    values: np.ndarray
    squares: float

    @property
    def rank(self) -> int:
        return len(self.values)


def row_blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Cut rows into blocks on the processor. The cut depends only on the shape, so no budget, thread count or storage of the
    matrix changes a bit.

    >>> row_blocks(5, 1 << 18)
    [(0, 2), (2, 4), (4, 5)]
    """
    height = max(1, BLOCK_ELEMENTS // max(columns, 1))
    height -= height % 16 if height > 16 else 0
    return [(first, min(first + height, rows)) for first in range(0, rows, height)]


def width_of(rank: int, *, oversample: int = OVERSAMPLE) -> int:
    """The number of random directions for a rank: ``oversample`` more, or a quarter more if that is
    larger."""
    return rank + max(oversample, rank // 4)


def is_whole(
    shape: tuple[int, int], rank: int, *, oversample: int = OVERSAMPLE, iterations: int = ITERATIONS
) -> bool:
    """Whether the exact decomposition is used: it costs no more, or the basis would span nearly
    everything."""
    side = min(shape)
    return side <= SMALL or iterations * width_of(rank, oversample=oversample) >= WHOLE * side


def squares_of(block: AnyArray) -> float:
    """Return the sum of the squares of a block, in float64."""
    wide = in_dtype(block, np.float64).reshape(-1)
    return float(wide @ wide)


def randomized_svd(
    blocks: Blocks,
    shape: tuple[int, int],
    rank: int,
    *,
    oversample: int = OVERSAMPLE,
    iterations: int = ITERATIONS,
    seed: int | tuple[int, ...] = 0,
    squares_of: SquaresOf = squares_of,
) -> LowRankFactors:
    """Return the leading ``rank`` singular vectors of a matrix D, nearly: ``D @ Q @ Q.T``, truncated.

    Q spans a block Krylov space: ``D.T D X``, ``(D.T D)^2 X``, ... for a Gaussian X (n, l), ``iterations`` of
    them, each made orthogonal before the next; ``l`` is :func:`width_of`. Each power reads the matrix once,
    since a block of rows is multiplied twice while it is in the cache; one more reading computes ``D Q``.
    Products are in the dtype of the blocks, small matrices in float64. Where :func:`is_whole` says so, the
    result is :func:`exact_svd`'s.

    The factors project D on a space, so the error is known exactly: its square is ``squares -
    sum(values**2)``. Measured as the excess of that error over the best of the rank, at ranks 4 to 128,
    largest over 12 encoder matrices of all-MiniLM-L6-v2's fine-tune and synthetic spectra (powers 0 to -1.5,
    exponentials): 0.6 % with the default of 2 powers and 16 more directions. With the subspace iteration of
    Halko et al., which keeps only the last power, 3.0 % on MiniLM alone; with one power 14 %; with 8 more
    directions in the Krylov space 1.2 %.

    Shapes: ``blocks`` gives D (m, n); left (m, k), right (k, n), values (k,), k at most ``rank``: values that
        are only rounding are left out.
    Memory: X and its powers, (n, iterations l) three times; ``D Q``, (m, iterations l); the factors.
    Edge cases: a matrix of zeros has rank 0. With a NaN or an infinity, ``squares`` is not finite and the
        rank is 0.
    Differs from the source: Krylov space by blocks of rows, smaller factorisations by eigenvalues instead of
        SVD.
    Source: Halko, Martinsson, Tropp 2011, https://arxiv.org/abs/0909.4061; Musco, Musco 2015,
        https://arxiv.org/abs/1504.05477.
    """
    if is_whole(shape, rank, oversample=oversample, iterations=iterations):
        return exact_svd(blocks, shape, rank, squares_of=squares_of)
    width = width_of(rank, oversample=oversample)
    basis: AnyArray = np.random.default_rng(seed).standard_normal((shape[1], width), np.float32)
    powers: list[AnyArray] = []
    squares = 0.0
    for i in range(iterations):
        total: AnyArray = None
        for block in blocks():
            if i == 0:
                squares += squares_of(block)
                if not np.isfinite(squares):
                    return _nothing(shape, squares, dtype_of(block))
            basis = like(block, basis) if is_numpy(basis) else basis
            basis = in_dtype(basis, dtype_of(block))
            product = block.T @ (block @ basis)
            if total is None:
                total = product
            else:
                total += product
        if total is None or not np.isfinite(squares) or squares == 0:
            return _nothing(shape, squares, dtype_of(basis))
        basis = _orthonormal(total)
        powers.append(basis)
    span = _orthonormal(concatenate(powers, 1)) if iterations > 1 else basis
    return _projected(blocks, shape, span, rank, squares)


def exact_svd(
    blocks: Blocks, shape: tuple[int, int], rank: int | None = None, *, squares_of: SquaresOf = squares_of
) -> LowRankFactors:
    """Return the leading ``rank`` singular vectors of a matrix, or all, by eigenvectors of its smaller
    product.

    The product is summed in float64: it resolves singular values above 1e-8 of the largest; a float32 matrix
    already has rounding at 1e-7. The factors are a projection on these vectors as in :func:`randomized_svd`,
    so that all of them give the matrix back. Memory: the square of the smaller side in float64, about five
    times; a pair of blocks.
    """
    rows, columns = shape
    squares = 0.0
    count = min(rows, columns) if rank is None else min(rank, rows, columns)
    gram: AnyArray = None
    real: np.dtype[Any] = np.dtype(np.float32)
    if rows >= columns:
        for block in blocks():
            wide, real = _wide_copy(block), dtype_of(block)
            squares += squares_of(wide)
            if not np.isfinite(squares):
                return _nothing(shape, squares, real)
            gram = zeros(wide, (columns, columns)) if gram is None else gram
            gram += wide.T @ wide
        if not np.isfinite(squares) or squares == 0:
            return _nothing(shape, squares, real)
        vectors = reversed_columns(library_of(gram).linalg.eigh(gram)[1])[:, :count]
        return _projected(blocks, shape, vectors, count, squares)
    for (first, last), block in _placed(blocks):
        wide, real = _wide_copy(block), dtype_of(block)
        squares += squares_of(wide)
        if not np.isfinite(squares):
            return _nothing(shape, squares, real)
        gram = zeros(wide, (rows, rows)) if gram is None else gram
        gram[first:last, first:last] = wide @ wide.T
        for (begin, end), other in _placed(blocks) if first else ():
            if begin >= first:
                break
            gram[first:last, begin:end] = wide @ _wide_copy(other).T  # eigh reads only the lower half
    if not np.isfinite(squares) or squares == 0:
        return _nothing(shape, squares, real)
    library = library_of(gram)
    left = reversed_columns(library.linalg.eigh(gram)[1])[:, :count]
    right = zeros(gram, (count, columns))
    for (first, last), block in _placed(blocks):
        right += left[first:last].T @ _wide_copy(block)
    values = np.sqrt(to_numpy(library.einsum("ij,ij->i", right, right)))
    order = np.argsort(-values, kind="stable")
    order = order[_is_more(values[order], shape, real)]
    roots = np.sqrt(values[order])
    chosen, lengths = like(gram, order), like(gram, roots)
    return LowRankFactors(
        to_numpy(in_dtype(left[:, chosen] * lengths, real)),
        to_numpy(in_dtype(right[chosen] / lengths[:, None], real)),
        values[order],
        squares,
    )


def _placed(blocks: Blocks) -> Iterator[tuple[tuple[int, int], AnyArray]]:
    """Read the blocks, each with its first row and the one after its last."""
    first = 0
    for block in blocks():
        yield (first, first + len(block)), block
        first += len(block)


def _wide_copy(block: AnyArray) -> AnyArray:
    """Return a block in float64."""
    return block.astype(np.float64) if is_numpy(block) else in_dtype(block, np.float64)


def _orthonormal(matrix: AnyArray) -> AnyArray:
    """Return the orthonormal factor of a QR decomposition, which is computed in float64 for any dtype, as numpy does."""
    if is_numpy(matrix):
        return np.linalg.qr(matrix)[0]
    return in_dtype(library_of(matrix).linalg.qr(matrix.double())[0], dtype_of(matrix))


def _projected(
    blocks: Blocks, shape: tuple[int, int], span: AnyArray, rank: int, squares: float
) -> LowRankFactors:
    """The factors of ``D @ span @ span.T`` for orthonormal columns, truncated to ``rank``."""
    product: AnyArray = None
    gram = in_dtype(zeros(span, (span.shape[1], span.shape[1])), np.float64)
    for (first, last), block in _placed(blocks):
        part = (
            block @ in_dtype(span, dtype_of(block))
            if dtype_of(span) != np.float64
            else _wide_copy(block) @ span
        )
        if product is None:
            real = dtype_of(block)
            product = empty(span, (shape[0], span.shape[1]), real)
        product[first:last] = part
        wide = _wide_copy(part)
        gram += wide.T @ wide
    assert product is not None
    eigenvalues, turn = library_of(gram).linalg.eigh(gram)
    values = np.sqrt(np.maximum(to_numpy(eigenvalues)[::-1][:rank], 0.0))
    values = values[_is_more(values, shape, real)]
    turn = reversed_columns(turn)[:, : len(values)]
    roots = like(turn, np.sqrt(values))
    left = product @ in_dtype(turn / roots, real)
    right = ((span if is_numpy(span) else span.double()) @ (turn * roots)).T
    return LowRankFactors(
        to_numpy(left), np.ascontiguousarray(to_numpy(in_dtype(right, real))), values, squares
    )


def _is_more(values: np.ndarray, shape: tuple[int, int], real: np.dtype[Any]) -> np.ndarray:
    """Which of the descending singular values are more than rounding."""
    if not len(values) or values[0] == 0:
        return np.zeros(len(values), bool)
    more: np.ndarray = values > np.finfo(real).eps * np.sqrt(max(shape)) / 4 * values[0]
    return more


def _nothing(shape: tuple[int, int], squares: float, real: np.dtype[Any]) -> LowRankFactors:
    return LowRankFactors(np.zeros((shape[0], 0), real), np.zeros((0, shape[1]), real), np.zeros(0), squares)
