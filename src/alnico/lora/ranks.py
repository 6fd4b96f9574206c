"""Chooses the rank of each matrix: by a share of energy, or by a budget of bytes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spectrum:
    """The leading singular values of a matrix (the largest first), the sum of all squares, and the bytes of one rank."""

    values: np.ndarray
    squares: float
    bytes_per_rank: int


def ranks_of_energy(spectra: Sequence[Spectrum], energy: float) -> list[int]:
    """Return the least rank of each matrix that keeps a share of its energy, or all known values where they fall short.

    >>> ranks_of_energy([Spectrum(np.array([3.0, 1.0]), 10.0, 1)], 0.9)
    [1]
    """
    ranks = []
    for spectrum in spectra:
        energies = np.cumsum(spectrum.values**2)
        enough = np.flatnonzero(energies >= energy * spectrum.squares * (1 - 1e-12))
        ranks.append(int(enough[0]) + 1 if len(enough) else len(energies))
    return ranks


def ranks_of_size(spectra: Sequence[Spectrum], budget_bytes: int) -> list[int]:
    """Assign ranks within a budget, one at a time, each to the matrix with the largest square per byte.

    Squares decrease within a matrix, so the result is optimal for the bytes it spends. The remainder is less than one
    rank of the next matrix, and goes to other matrices that still fit. On a tie, the first matrix wins.

    >>> ranks_of_size([Spectrum(np.array([3.0, 1.0]), 10.0, 4), Spectrum(np.array([2.0]), 4.0, 2)], 6)
    [1, 1]
    """
    ranks = [0] * len(spectra)

    def entry(i: int) -> tuple[float, int]:
        return -(float(spectra[i].values[ranks[i]]) ** 2) / spectra[i].bytes_per_rank, i

    queue = [entry(i) for i, spectrum in enumerate(spectra) if len(spectrum.values)]
    heapq.heapify(queue)
    left = budget_bytes
    while queue:
        _, i = heapq.heappop(queue)
        if spectra[i].bytes_per_rank > left:
            continue
        left -= spectra[i].bytes_per_rank
        ranks[i] += 1
        if ranks[i] < len(spectra[i].values):
            heapq.heappush(queue, entry(i))
    return ranks
