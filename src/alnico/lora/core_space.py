"""Core space: the small matrices that hold all that a set of adapters can add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alnico.lora.matching import ExpertFactors
from alnico.numerics.low_rank import of_matrix, stacked


@dataclass(frozen=True)
class CoreSpace:
    """``s_i B_i A_i = left @ values[i] @ right``, with orthonormal ``left`` (m, p) and ``right`` (q, n), and small (p, q) values.

    Panariello et al. 2025 (https://arxiv.org/abs/2509.17786): nothing is lost, so what is linear is the same here as on the whole
    matrices. What goes by single entries (a trim, a vote) depends on the bases: they are the singular vectors of the stacked ``s_i B_i``
    and of the stacked ``A_i``, as in the paper, to their numerical rank, with their signs fixed. The paper takes ranks to be equal; here
    each adapter has its own.
    """

    left: np.ndarray
    right: np.ndarray
    values: tuple[np.ndarray, ...]

    def factors(self, merged: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The whole matrix that ``merged`` (p, q) stands for, as (m, p) times (p, n)."""
        return self.left, merged @ self.right


def core_space(factors: Sequence[ExpertFactors | None], rows: int, columns: int) -> CoreSpace:
    """Find the core space of the adapters' factors; None stands for an update of 0."""
    given = [f for f in factors if f is not None]
    lefts, rights = stacked([(f.scale, f.left, f.right) for f in given], rows, columns)
    left, right = of_matrix(lefts).left, of_matrix(rights).right
    nothing = np.zeros((left.shape[1], len(right)))
    values = [nothing if f is None else f.scale * ((left.T @ f.left) @ (f.right @ right.T)) for f in factors]
    return CoreSpace(left, right, tuple(values))
