"""Builds the core space: small matrices for every linear combination of a set of adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from alnico.lora.matching import ExpertFactors
from alnico.numerics.arrays import AnyArray, as_is, to_numpy, zeros
from alnico.numerics.low_rank import decompose_matrix, stack_factors


@dataclass(frozen=True)
class CoreSpace:
    """``s_i B_i A_i = left @ values[i] @ right``, with orthonormal ``left`` (m, p) and ``right`` (q, n), and small (p, q) values.

    Panariello et al. 2025 (https://arxiv.org/abs/2509.17786). No information is lost, so linear operations give the
    same result here as on the whole matrices. Operations on single entries (a trim, a vote) depend on the bases: the
    singular vectors of the stacked ``s_i B_i`` and of the stacked ``A_i``, as in the paper, up to their numerical rank
    and with fixed signs. The paper assumes equal ranks; here each adapter has its own.
    """

    left: AnyArray
    right: AnyArray
    values: tuple[AnyArray, ...]

    def to_numpy(self) -> CoreSpace:
        """The same with numpy's arrays."""
        return CoreSpace(to_numpy(self.left), to_numpy(self.right), tuple(map(to_numpy, self.values)))

    def factors(self, merged: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Return the whole matrix of ``merged`` (p, q) as factors (m, p) and (p, n)."""
        return self.left, merged @ self.right


def core_space(
    factors: Sequence[ExpertFactors | None],
    rows: int,
    columns: int,
    place: Callable[[np.ndarray], AnyArray] = as_is,
) -> CoreSpace:
    """Compute the core space of the adapters' factors; None is an update of zeros. ``place`` puts arrays where it is computed."""
    updates = [f for f in factors if f is not None]
    lefts, rights = stack_factors([(f.scale, f.left, f.right) for f in updates], rows, columns)
    left, right = decompose_matrix(place(lefts)).left, decompose_matrix(place(rights)).right
    nothing = zeros(left, (left.shape[1], len(right)))
    values = [
        nothing if f is None else f.scale * ((left.T @ place(f.left)) @ (place(f.right) @ right.T))
        for f in factors
    ]
    return CoreSpace(left, right, tuple(values))
