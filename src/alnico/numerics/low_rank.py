"""Decomposes sums of products of thin matrices without forming the large matrix.

``sum_i c_i B_i A_i`` is ``L R`` with the ``B_i`` side by side in ``L`` and the ``A_i`` stacked in ``R``. With
the QR decompositions ``L = Q S`` and ``R^T = P T`` the singular values of ``L R`` are those of the small ``S
T^T``, and its singular vectors come from ``Q`` and ``P``. The best approximation of rank k keeps the k
largest (Eckart and Young 1936, https://doi.org/10.1007/BF02288367). All in float64: a float32 QR loses
singular values below 1e-7 of the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alnico.numerics.arrays import AnyArray, lengths, library_of, like, to_numpy

ROUNDING = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Decomposed:
    """A matrix as ``left * values @ right``: left (m, k) and right (k, n) are orthonormal, values (k,)
    positive and descending.

    ``rest`` is the sum of squares of singular values that are not among them, where not all were computed. All three arrays
    are of one library, on one device. What uses them as numbers wants numpy's: :meth:`to_numpy`.
    """

    left: AnyArray
    values: AnyArray
    right: AnyArray
    rest: float = 0.0

    @property
    def rank(self) -> int:
        """The numerical rank: singular values that are only rounding are not here."""
        return len(self.values)

    @property
    def total(self) -> float:
        """The sum of squares of all entries."""
        return float(np.sum(self.values[::-1] ** 2)) + self.rest

    def left_out(self, rank: int) -> float:
        """The sum of squares of what the best approximation of this rank leaves out."""
        return float(np.sum(self.values[rank:][::-1] ** 2)) + self.rest

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """The best approximation of this rank as (m, rank) times (rank, n), the root of each singular value
        in both.

        So neither factor is much larger than the other, and half precision holds both. Beyond the numerical
        rank are zeros.
        """
        count = min(rank, self.rank)
        root = np.sqrt(self.values[:count])
        left, right = np.zeros((len(self.left), rank)), np.zeros((rank, self.right.shape[1]))
        left[:, :count], right[:count] = self.left[:, :count] * root, root[:, None] * self.right[:count]
        return left, right

    def to_numpy(self) -> Decomposed:
        """The same with numpy's arrays."""
        return Decomposed(to_numpy(self.left), to_numpy(self.values), to_numpy(self.right), self.rest)

    def turned(self) -> Decomposed:
        """The decomposition of the transposed matrix."""
        return Decomposed(self.right.T, self.values, self.left.T, self.rest)


def stack_factors(
    parts: Sequence[tuple[float, np.ndarray, np.ndarray]], rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """``L`` (rows, R) and ``R`` (R, columns) of ``sum_i c_i left_i @ right_i``; parts are (c, left,
    right)."""
    lefts = [c * left for c, left, _ in parts] or [np.zeros((rows, 0))]
    rights = [right for _, _, right in parts] or [np.zeros((0, columns))]
    return np.concatenate(lefts, 1), np.concatenate(rights, 0)


def decompose_product(left: AnyArray, right: AnyArray) -> Decomposed:
    """Decompose ``left @ right``, (m, R) times (R, n); R may be larger than m and n.

    >>> decompose_product(np.float64([[3], [4]]), np.float64([[0, 2]])).values
    array([10.])
    """
    linear = library_of(left).linalg
    first, small_left = linear.qr(left)
    second, small_right = linear.qr(right.T)
    # Does not depend on how the factors share the product's scale; cancellation leaves rounding of this size.
    size = float(lengths(left, 0) @ lengths(right, 1)) if left.shape[1] else 0.0
    small = decompose_matrix(small_left @ small_right.T, size)
    return _fix_signs(Decomposed(first @ small.left, small.values, small.right @ second.T))


def decompose_matrix(matrix: AnyArray, size: float | None = None) -> Decomposed:
    """Decompose a matrix by a full SVD.

    Singular values below the rounding of numbers of ``size`` (default: the largest singular value) count as
    0.
    """
    left, values, right = library_of(matrix).linalg.svd(matrix, full_matrices=False)
    largest = float(values[0]) if len(values) else 0.0
    rank = int((values > ROUNDING * max(matrix.shape) * max(largest, size or 0.0)).sum())
    return _fix_signs(Decomposed(left[:, :rank], values[:rank], right[:rank]))


def _fix_signs(svd: Decomposed) -> Decomposed:
    """Choose the signs of singular vectors, which are free: the largest entry of each left one is
    positive."""
    if not svd.rank:
        return svd
    largest = abs(svd.left).argmax(0)
    entries = to_numpy(svd.left[largest, like(svd.left, np.arange(svd.rank))])
    signs = like(svd.left, np.where(entries < 0, -1.0, 1.0))
    return Decomposed(svd.left * signs, svd.values, signs[:, None] * svd.right, svd.rest)


def choose_rank(svd: Decomposed, most: int | None, energy: float | None) -> int:
    """The rank to keep: the smallest whose squared singular values are the share ``energy`` of all, and
    ``most`` at most.

    >>> choose_rank(decompose_matrix(np.diag([3.0, 1.0, 1.0])), None, 0.8)
    1
    """
    rank = svd.rank
    if energy is not None and energy < 1:
        # Summed from the smallest up, so that small tails keep their digits.
        tails = np.cumsum(np.concatenate([[svd.rest], svd.values[::-1] ** 2]))[::-1]
        reached = tails <= (1 - energy) * svd.total
        rank = int(np.argmax(reached)) if reached.any() else svd.rank
    return rank if most is None else min(rank, most)
