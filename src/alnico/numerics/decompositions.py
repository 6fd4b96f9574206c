"""Decomposes whole matrices: leading singular vectors, polar factors, numerical ranks. For numpy and torch.

Singular vectors come from eigenvectors of the smaller product, ``M^T M`` or ``M M^T``, in the dtype of the matrix, which
should be float64. A product resolves singular values down to the root of the rounding, 1e-8 of the largest. Directions
at or below ``least`` of the largest count as null. Null directions are left out everywhere and never filled: their
singular vectors are arbitrary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from alnico.numerics.arrays import library_of
from alnico.numerics.low_rank import Decomposed

LEAST = 1e-6
"""Singular values up to this share of the largest are null. Products of float64 matrices resolve 1e-8; a difference of
float32 weights has rounding at about 1e-7 of the weights."""

SMALL = 64
"""Up to this smaller side a full SVD takes no longer than the product and its eigenvectors."""

UNEVEN = 1e-3
"""Below this ratio of the smallest to the largest singular value, vectors from a product are refined: they are
orthogonal only to rounding divided by the square of the ratio."""

LEAST_ITERATED, MOST_ITERATED = 1024, 8
"""Eigenvectors are iterated for matrices of at least this smaller side, if at most one in so many is asked for."""

BLOCK = 16
"""Vectors of one iteration. Larger blocks need a larger basis for the same accuracy, and took longer."""

RESIDUAL = 1e-11
"""Residual of an iterated eigenvector, as a share of the largest eigenvalue: subspaces then agree to 1e-11 to 1e-9."""

POLAR_ROWS = 1024
"""Rows that are multiplied at a time, so that a result can take the place of the matrix."""

MOST = 1e100
"""Matrices with larger entries are scaled before their product is taken, and those without entries above 1/MOST."""


def leading_vectors(matrix: Any, count: int, *, least: float = LEAST) -> Decomposed:
    """Return the leading ``count`` singular values and vectors of a matrix; fewer if its numerical rank is lower.

    ``M = U S V^T``. With the eigenvectors V of ``M^T M`` (for a wide matrix, U of ``M M^T``) the other side is ``M V / S``.
    Singular values up to ``least`` times the largest count as 0. Where :func:`is_iterated` says so, the eigenvectors come from a
    block Lanczos iteration, which stops at the accuracy of the direct way.

    Shapes: (m, n) in; left (m, k), values (k,), right (k, n) with k at most ``count``.
    Memory: the product, its eigenvectors and LAPACK's work space, 5 min(m, n)^2; the result.
    Edge cases: a matrix of zeros, or with a side of 0, has rank 0. The signs of a pair of vectors are those of LAPACK.

    >>> import numpy as np
    >>> leading_vectors(np.diag([3.0, 2.0, 0.0]), 3).values
    array([3., 2.])
    """
    linear = library_of(matrix).linalg
    rows, columns = matrix.shape
    count = min(count, rows, columns)
    if rows < columns:
        turned = leading_vectors(matrix.T, count, least=least)
        return turned.turned()
    if count < 1:
        return Decomposed(matrix[:, :0], matrix[0, :0] if rows else matrix.reshape(-1)[:0], matrix[:0])
    if columns <= SMALL:
        left, values, right = linear.svd(matrix, full_matrices=False)
    else:
        largest = float(abs(matrix).max())
        if largest > MOST or 0 < largest < 1 / MOST:
            unit = 2.0 ** math.frexp(largest)[1]  # so that the product is within float64
            scaled = leading_vectors(matrix / unit, count, least=least)
            return Decomposed(scaled.left, scaled.values * unit, scaled.right)
        squares, vectors = (
            _some_eigenvectors(matrix, count) if is_iterated(columns, count) else None
        ) or linear.eigh(matrix.T @ matrix)
        found, largest = len(squares), float(squares[-1])
        # Eigenvalues ascend; rounding makes null ones slightly negative.
        kept = int((squares[-count:] > least**2 * largest).sum())
        # Indexed, not sliced: a slice would hold the memory of all eigenvectors.
        right = vectors[:, list(range(found - 1, found - kept - 1, -1))].T
        del vectors
        left = matrix @ right.T
        values = (left * left).sum(0) ** 0.5
        if kept and float(squares[found - kept]) > UNEVEN**2 * largest:
            left = left / values
        elif kept:
            basis, triangle = linear.qr(left)
            inner, values, turn = linear.svd(triangle)
            left, right = basis @ inner, turn @ right
    values = values[:count]
    rank = int((values > least * values[0]).sum()) if len(values) and float(values[0]) > 0 else 0
    return Decomposed(left[:, :rank], values[:rank], right[:rank])


def is_iterated(side: int, count: int) -> bool:
    """Whether the leading ``count`` of ``side`` eigenvectors are iterated: where that is faster than finding all.

    >>> is_iterated(4096, 256), is_iterated(4096, 1024), is_iterated(512, 8)
    (True, False, False)
    """
    return side >= LEAST_ITERATED and count * MOST_ITERATED <= side


def count_decomposing(rows: int, columns: int, count: int) -> float:
    """Floating-point operations of :func:`leading_vectors`: products, and eigenvectors of symmetric matrices (about 9 n^3)."""
    side = min(rows, columns)
    if is_iterated(side, count):
        size = 4.5 * count + BLOCK  # measured: 3.6 to 5 times the count
        return (
            4.0 * rows * columns * size
            + 6.0 * side * size**2
            + 2 * 9.0 * size**3
            + 2.0 * rows * columns * count
        )
    return (
        1.0 * rows * columns * (side + 2 * count) + 9.0 * side**3
    )  # half of a product with its own transpose


def _some_eigenvectors(matrix: Any, count: int) -> tuple[Any, Any] | None:
    """Return the largest ``count`` eigenvalues of ``M^T M`` and their eigenvectors, as ``eigh`` does: ascending.

    Block Lanczos with full reorthogonalisation from a fixed random block: ``A Q_j = Q T_j + Q_(j+1) B`` for ``A = M^T M``. The
    residual of an eigenvector ``Q s`` of the basis is ``|B s_j|`` with the last rows of s. None if it does not reach
    :data:`RESIDUAL` within half of the dimensions, as for spectra that hardly fall.
    """
    library, side = library_of(matrix), matrix.shape[1]
    linear = library.linalg
    most = side // 2 // BLOCK * BLOCK
    start = np.random.default_rng(0).standard_normal((side, BLOCK))
    block = linear.qr(library.asarray(start, dtype=matrix.dtype, device=matrix.device))[0]
    basis = (
        library.empty_like(matrix[:1], shape=(most, side))
        if library is np
        else matrix.new_empty((most, side))
    )
    inner = library.zeros_like(basis[:, :most])
    size, check = 0, 2 * count
    while size < most:
        basis[size : size + BLOCK] = block.T
        first, size = size, size + BLOCK
        spanned = basis[:size]
        image = matrix.T @ (matrix @ block)
        for _ in range(2):  # the second time removes what rounding left
            within = spanned @ image
            image = image - spanned.T @ within
            inner[:size, first:size] += within
        block, rest = linear.qr(image)
        # A column of rounding has an arbitrary direction, which must be orthogonal to the basis, too.
        block = linear.qr(block - spanned.T @ (spanned @ block))[0]
        if size < check:
            continue
        squares, turn = linear.eigh(inner[:size, :size], UPLO="U")
        squares, turn = squares[-count:], turn[:, -count:]
        residuals = ((rest @ turn[-BLOCK:]) ** 2).sum(0) ** 0.5
        if float(residuals.max()) <= RESIDUAL * float(squares[-1]):
            return squares, spanned.T @ turn
        check = size + max(size // 7, BLOCK)
    return None


def polar_factor(matrix: Any, *, least: float = LEAST, overwrite: bool = False) -> Any:
    """Return ``P Q^T`` of ``M = P S Q^T``: the matrix with orthonormal columns (or rows) that is nearest to M.

    Singular values up to ``least`` are null and left out. The singular values here are not relative: the matrices that
    are orthogonalised are orthonormal blocks side by side, where a single direction has 1, and the difference of two
    unit vectors at an angle t has ``sqrt(1 - cos t)``.
    From the eigenvectors of the smaller product, ``M (M^T M)^(-1/2)``.

    Shapes: (m, n) in, (m, n) out. Memory: the product, its eigenvectors and LAPACK's work space, 5 min(m, n)^2; the result,
    unless it may ``overwrite`` the matrix.

    >>> import numpy as np
    >>> polar_factor(np.diag([3.0, 0.0]))
    array([[1., 0.],
           [0., 0.]])
    """
    rows, columns = matrix.shape
    if rows < columns:
        return polar_factor(matrix.T, least=least, overwrite=overwrite).T
    if not columns:
        return matrix
    library = library_of(matrix)
    if columns <= SMALL:
        left, values, right = library.linalg.svd(matrix, full_matrices=False)
        kept = values > max(least, float(values[0]) * LEAST)
        return left[:, kept] @ right[kept]
    squares, vectors = library.linalg.eigh(matrix.T @ matrix)
    null = int((squares <= max(least**2, float(squares[-1]) * LEAST**2)).sum())
    halves = vectors[:, null:] * squares[null:] ** -0.25
    del vectors
    root = halves @ halves.T  # the product of a matrix and its own transpose takes half the time of another
    del halves
    result = matrix if overwrite else library.empty_like(matrix)
    for first in range(0, rows, POLAR_ROWS):
        result[first : first + POLAR_ROWS] = matrix[first : first + POLAR_ROWS] @ root
    return result
