"""The textbook's orthogonal matching pursuit, for one target, by least squares; without alnico."""

from __future__ import annotations

import numpy as np


def plain_pursuit(target: np.ndarray, atoms: np.ndarray, count: int, without: int = -1) -> np.ndarray:
    """Return a weight for each atom; the atom ``without`` is not used. Shapes: (d,) and (n, d) float64; returns (n,)."""
    lengths = np.linalg.norm(atoms, axis=1)
    chosen: list[int] = []
    weights = np.zeros(len(atoms))
    residual, solution = target.copy(), np.zeros(0)
    for _ in range(count):
        cosines = np.abs(atoms @ residual) / np.where(lengths > 0, lengths, np.inf)
        cosines[[*chosen, *([without] if without >= 0 else [])]] = -1
        chosen.append(int(cosines.argmax()))
        solution = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
        residual = target - atoms[chosen].T @ solution
    weights[chosen] = solution
    return weights
