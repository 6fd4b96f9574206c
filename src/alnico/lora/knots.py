"""Represents the updates of several adapters in one basis of their outputs (KnOTS)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from alnico.lora.matching import ExpertFactors
from alnico.numerics.arrays import AnyArray, as_is, concatenate, library_of, to_numpy, zeros
from alnico.numerics.low_rank import decompose_matrix, stack_factors


@dataclass(frozen=True)
class Knots:
    """``s_i B_i A_i = left @ values[i]``: orthonormal ``left`` (m, k), and values (k, n) that a method merges entry by entry.

    Stoica et al. 2025 (https://arxiv.org/abs/2410.19735): ``[D_1 | ... | D_N] = U S [V_1^T | ... | V_N^T]`` for the
    concatenated updates ``D_i``; ``U`` is the shared basis, and the ``S V_i^T`` are merged. Linear operations give the
    same result here as on the whole matrices. As in the authors' code, the merged values include the singular values.
    That code drops singular values up to 1e-5; here they are dropped where they are rounding errors, at any scale.
    """

    left: AnyArray
    values: tuple[AnyArray, ...]

    def to_numpy(self) -> Knots:
        """The same with numpy's arrays."""
        return Knots(to_numpy(self.left), tuple(map(to_numpy, self.values)))

    def factors(self, merged: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Return the whole matrix of ``merged`` (k, n) as factors (m, k) and (k, n)."""
        return self.left, merged


def knots(
    factors: Sequence[ExpertFactors | None],
    rows: int,
    columns: int,
    place: Callable[[np.ndarray], AnyArray] = as_is,
) -> Knots:
    """Compute the shared basis from the factors; None is an update of zeros. ``place`` puts arrays where it is computed.

    The wide matrix is ``Q [S_1 T_1^T | ... | S_N T_N^T] diag(P_i^T)`` with the QR
    decompositions of the stacked ``s_i B_i`` and of each ``A_i^T``; its left singular vectors are ``Q`` times those of
    the small matrix in the middle.
    """
    updates = [f for f in factors if f is not None]
    lefts, _ = stack_factors([(f.scale, f.left, f.right) for f in updates], rows, columns)
    placed = place(lefts)
    linear = library_of(placed).linalg
    basis, small = linear.qr(placed)
    triangles, first = [zeros(small, (len(small), 0))], 0
    for f in updates:
        rank = f.left.shape[1]
        triangles.append(small[:, first : first + rank] @ linear.qr(place(f.right).T)[1].T)
        first += rank
    left = basis @ decompose_matrix(concatenate(triangles, 1)).left
    nothing = zeros(left, (left.shape[1], columns))
    values = [
        nothing if f is None else f.scale * ((left.T @ place(f.left)) @ place(f.right)) for f in factors
    ]
    return Knots(left, tuple(values))
