"""Where bytes go: against every way of spending them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from alnico.lora.ranks import Spectrum, ranks_of_energy, ranks_of_size


def kept(spectra: list[Spectrum], ranks: list[int]) -> float:
    return sum(float(np.sum(s.values[:r] ** 2)) for s, r in zip(spectra, ranks, strict=True))


def spent(spectra: list[Spectrum], ranks: list[int]) -> int:
    return sum(s.bytes_per_rank * r for s, r in zip(spectra, ranks, strict=True))


def made(seed: int, sizes: list[int]) -> list[Spectrum]:
    random = np.random.default_rng(seed)
    falling = [np.sort(random.exponential(size=4))[::-1] for _ in sizes]
    return [
        Spectrum(values, float(np.sum(values**2)) + 1, size)
        for values, size in zip(falling, sizes, strict=True)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_no_way_of_spending_bytes_keeps_more(seed: int) -> None:
    spectra = made(seed, [10, 10, 10])
    for budget in range(0, 130, 7):
        ways = [list(w) for w in product(range(5), repeat=3) if spent(spectra, list(w)) <= budget]
        ranks = ranks_of_size(spectra, budget)
        assert spent(spectra, ranks) <= budget
        assert kept(spectra, ranks) == pytest.approx(max(kept(spectra, w) for w in ways))


@pytest.mark.parametrize("seed", range(8))
def test_with_unequal_matrices_no_way_of_the_same_bytes_keeps_more_but_for_one_rank(seed: int) -> None:
    spectra = made(seed, [7, 10, 16])
    for budget in range(0, 140, 5):
        ranks = ranks_of_size(spectra, budget)
        assert spent(spectra, ranks) <= budget
        ways = [list(w) for w in product(range(5), repeat=3) if spent(spectra, list(w)) <= budget]
        best = max(kept(spectra, w) for w in ways)
        one_rank = (
            max(float(s.values[r]) ** 2 for s, r in zip(spectra, [*ranks], strict=True) if r < 4)
            if min(ranks) < 4
            else 0.0
        )
        assert best - kept(spectra, ranks) <= one_rank + 1e-12


def test_what_counts_is_the_energy_for_the_bytes() -> None:
    dear, cheap = Spectrum(np.array([3.0]), 9.0, 100), Spectrum(np.full(20, 2.0), 80.0, 10)
    assert ranks_of_size([dear, cheap], 100) == [0, 10]


def test_the_least_rank_that_keeps_the_energy_is_taken() -> None:
    spectrum = Spectrum(np.array([2.0, 1.0, 1.0]), 8.0, 1)
    assert [ranks_of_energy([spectrum], e)[0] for e in (0.5, 0.51, 0.625, 0.75, 0.9)] == [1, 2, 2, 3, 3]
