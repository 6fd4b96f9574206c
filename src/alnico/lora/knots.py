"""KnOTS: the updates of adapters in one basis of their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alnico.lora.matching import ExpertFactors
from alnico.numerics.low_rank import of_matrix, stacked


@dataclass(frozen=True)
class Knots:
    """``s_i B_i A_i = left @ values[i]``: orthonormal ``left`` (m, k), and values (k, n) that a method merges entry by entry.

    Stoica et al. 2025 (https://arxiv.org/abs/2410.19735): ``[D_1 | ... | D_N] = U S [V_1^T | ... | V_N^T]`` of the updates ``D_i`` beside
    one another; ``U`` is kept, and the ``S V_i^T`` are merged. What is linear is the same here as on the whole matrices. As in the authors'
    code, the singular values are in what is merged. That code leaves out singular values up to 1e-5; here they are left out where they
    are rounding, whatever the scale of the numbers.
    """

    left: np.ndarray
    values: tuple[np.ndarray, ...]

    def factors(self, merged: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The whole matrix that ``merged`` (k, n) stands for, as (m, k) times (k, n)."""
        return self.left, merged


def knots(factors: Sequence[ExpertFactors | None], rows: int, columns: int) -> Knots:
    """Find the common basis from the factors; None stands for an update of 0.

    The wide matrix is ``Q [S_1 T_1^T | ... | S_N T_N^T] diag(P_i^T)`` with the QR decompositions of the stacked ``s_i B_i`` and of each
    ``A_i^T``, so that its left singular vectors are those of the small matrix in the middle.
    """
    given = [f for f in factors if f is not None]
    lefts, _ = stacked([(f.scale, f.left, f.right) for f in given], rows, columns)
    basis, small = np.linalg.qr(lefts)
    triangles, first = [np.zeros((len(small), 0))], 0
    for f in given:
        rank = f.left.shape[1]
        triangles.append(small[:, first : first + rank] @ np.linalg.qr(f.right.T)[1].T)
        first += rank
    left = basis @ of_matrix(np.concatenate(triangles, 1)).left
    nothing = np.zeros((left.shape[1], columns))
    values = [nothing if f is None else f.scale * ((left.T @ f.left) @ f.right) for f in factors]
    return Knots(left, tuple(values))
