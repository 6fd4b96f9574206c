"""Takes out of a matrix what acts on the leading directions of some inputs, known by their Gram matrix."""

from __future__ import annotations

import numpy as np

ROWS = 1024
"""Rows or columns that are projected at a time, so that a result takes the place of the matrix."""


def leading_directions(gram: np.ndarray, energy: float) -> np.ndarray:
    """Return the fewest eigenvectors of ``G = X^T X`` that hold the share ``energy`` of the squares of X, as columns.

    ``sum_(j<=k) L_j >= energy * sum_j L_j`` for the eigenvalues L, descending. Those that are rounding, up to ``n * 2^-52`` of the
    largest, count as 0, and their eigenvectors are never among the result: also with an energy of 1 what no input has stays free.

    Shapes: (n, n) in, (n, k) out. Memory: the eigenvectors and LAPACK's work space, 4 n^2. Edge cases: a matrix of zeros has none.

    >>> leading_directions(np.diag([9.0, 1.0, 0.0]), 0.9).shape, leading_directions(np.diag([9.0, 1.0, 0.0]), 1.0).shape
    ((3, 1), (3, 2))
    """
    squares, vectors = np.linalg.eigh(gram)
    if not len(squares) or not squares[-1] > 0:
        return vectors[:, :0]
    falling = squares[::-1]
    falling = falling[falling > len(squares) * np.finfo(np.float64).eps * falling[0]] / falling[0]
    sums = np.cumsum(falling)
    count = min(int(np.searchsorted(sums, energy * sums[-1])) + 1, len(falling))
    return vectors[:, len(squares) - count :]


def remove_directions(matrix: np.ndarray, directions: np.ndarray, *, is_transposed: bool = False) -> None:
    """Replace ``D`` by ``D (I - V V^T)``, in place: it then gives 0 on the inputs in the span of the columns of V.

    ``is_transposed``: D is (inputs, outputs), and becomes ``(I - V V^T) D``. A row of outputs that is 0 stays 0. The rows are taken
    in blocks of a fixed size.

    Shapes: D (outputs, inputs), V (inputs, k), orthonormal.

    >>> changed = np.ones((1, 2))
    >>> remove_directions(changed, np.float64([[1], [0]]))
    >>> changed
    array([[0., 1.]])
    """
    rows = matrix.T if is_transposed else matrix
    if not directions.shape[1]:
        return
    for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS]
        part -= (part @ directions) @ directions.T


def count_numbers(rows: int, columns: int, inputs: int) -> int:
    """The most float64 numbers that both functions hold at once, with the matrix and a copy of it.

    >>> count_numbers(2, 3, 3)
    6201
    """
    return 2 * rows * columns + 5 * inputs**2 + 2 * ROWS * inputs


def count_operations(rows: int, columns: int, inputs: int) -> float:
    """Floating-point operations: eigenvectors of a symmetric matrix (about 9 n^3), and two products."""
    return 9.0 * inputs**3 + 4.0 * rows * columns * inputs
