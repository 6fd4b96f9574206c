"""How large each matrix's rank is: one for all, by the share of energy, or by where bytes help most."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spectrum:
    """The leading singular values of a matrix (the largest first), the sum of all squares, and what one rank takes."""

    values: np.ndarray
    squares: float
    bytes_a_rank: int


def ranks_of_energy(spectra: Sequence[Spectrum], energy: float) -> list[int]:
    """The least rank of each matrix that keeps a share of its energy; all that is known of a spectrum that falls short.

    >>> ranks_of_energy([Spectrum(np.array([3.0, 1.0]), 10.0, 1)], 0.9)
    [1]
    """
    found = []
    for spectrum in spectra:
        kept = np.cumsum(spectrum.values**2)
        enough = np.flatnonzero(kept >= energy * spectrum.squares * (1 - 1e-12))
        found.append(int(enough[0]) + 1 if len(enough) else len(kept))
    return found


def ranks_of_size(spectra: Sequence[Spectrum], budget_bytes: int) -> list[int]:
    """Spend bytes where they keep most energy: rank after rank, each time the one with the largest square for its bytes.

    Squares fall within a matrix, so this is the best that can be had for the bytes it spends; what is left over is less than one
    rank of the matrix that would have come next, and goes to others that still fit. Equal gains go to the matrix that comes first.

    >>> ranks_of_size([Spectrum(np.array([3.0, 1.0]), 10.0, 4), Spectrum(np.array([2.0]), 4.0, 2)], 6)
    [1, 1]
    """
    ranks = [0] * len(spectra)

    def entry(i: int) -> tuple[float, int]:
        return -(float(spectra[i].values[ranks[i]]) ** 2) / spectra[i].bytes_a_rank, i

    queue = [entry(i) for i, spectrum in enumerate(spectra) if len(spectrum.values)]
    heapq.heapify(queue)
    left = budget_bytes
    while queue:
        _, i = heapq.heappop(queue)
        if spectra[i].bytes_a_rank > left:
            continue
        left -= spectra[i].bytes_a_rank
        ranks[i] += 1
        if ranks[i] < len(spectra[i].values):
            heapq.heappush(queue, entry(i))
    return ranks
