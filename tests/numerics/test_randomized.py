"""Leading singular vectors by blocks of rows, against numpy's SVD in float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest

from alnico.numerics.blas import one_blas_thread
from alnico.numerics.randomized import (
    ITERATIONS,
    LowRankFactors,
    exact_svd,
    is_whole,
    randomized_svd,
    row_blocks,
)

SPECTRA = {
    "flat": np.ones(240),
    "slow": np.arange(1, 241.0) ** -0.3,
    "root": np.arange(1, 241.0) ** -0.5,
    "harmonic": 1 / np.arange(1, 241.0),
    "exponential": np.exp(-np.arange(240) / 30),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with one_blas_thread():
        yield


@cache
def orthonormal(rows: int, columns: int) -> np.ndarray:
    random = np.random.default_rng(rows)
    return np.linalg.qr(random.standard_normal((rows, columns)))[0]


def with_spectrum(values: np.ndarray, rows: int, columns: int, dtype: type = np.float32) -> np.ndarray:
    left, right = orthonormal(rows, len(values)), orthonormal(columns, len(values))
    made: np.ndarray = ((left * values) @ right.T).astype(dtype)
    return made


class Read:
    """A matrix by blocks of rows, which counts how often it is read."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix
        self.readings = 0

    def __call__(self) -> Iterator[np.ndarray]:
        self.readings += 1
        return (self.matrix[first:last] for first, last in row_blocks(*self.matrix.shape))


def product(factors: LowRankFactors) -> np.ndarray:
    made: np.ndarray = factors.left.astype(np.float64) @ factors.right
    return made


@pytest.mark.parametrize("shape", [(360, 240), (240, 360)], ids=["tall", "wide"])
@pytest.mark.parametrize("rank", [4, 32, 64])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_error_is_within_one_per_cent_of_the_best_of_the_rank(
    name: str, rank: int, shape: tuple[int, int]
) -> None:
    matrix = with_spectrum(SPECTRA[name], *shape)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    best = np.sqrt(np.sum(values[rank:] ** 2))
    found = randomized_svd(Read(matrix), shape, rank)
    error = np.linalg.norm(product(found) - matrix)
    assert found.rank == rank
    assert error <= 1.01 * best
    assert found.squares == pytest.approx(np.sum(values**2), rel=1e-9)
    assert np.sqrt(found.squares - np.sum(found.values**2)) == pytest.approx(error, rel=1e-4), (
        "the error that the values tell is another"
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1000, 240), (240, 1000), (240, 240), (3, 700), (700, 1)])
def test_the_exact_way_gives_numpys_singular_values_and_the_matrix(
    shape: tuple[int, int], dtype: type
) -> None:
    count = min(shape)
    matrix = with_spectrum(SPECTRA["root"][:count], *shape, dtype)
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    found = exact_svd(Read(matrix), shape)
    assert found.left.dtype == found.right.dtype == dtype
    assert np.allclose(found.values, values, rtol=1e-6, atol=0)
    largest = np.abs(matrix).max()
    assert np.abs(product(found) - matrix).max() <= (1e-6 if dtype == np.float32 else 1e-13) * largest
    some = exact_svd(Read(matrix), shape, min(count, 7))
    of_rank = (left[:, :7] * values[:7]) @ right[:7]
    assert np.abs(product(some) - of_rank).max() <= 2e-6 * largest


def test_factors_share_the_singular_values_by_their_roots() -> None:
    matrix = with_spectrum(SPECTRA["harmonic"], 360, 240)
    found = randomized_svd(Read(matrix), matrix.shape, 20)
    for factor, axis in ((found.left, 0), (found.right, 1)):
        assert np.allclose(np.linalg.norm(factor, axis=axis) ** 2, found.values, rtol=1e-4)


def test_a_matrix_of_low_rank_gives_its_rank_and_itself() -> None:
    matrix = with_spectrum(np.array([3.0, 2.0, 1.0, 0.5, 0.25]), 700, 300)
    found = randomized_svd(Read(matrix), matrix.shape, 32)
    assert found.rank == 5
    assert np.abs(product(found) - matrix).max() <= 1e-6 * np.abs(matrix).max()


def test_a_matrix_of_zeros_has_rank_nought_and_one_of_nan_says_so() -> None:
    for shape in ((500, 300), (10, 12)):
        zeros = np.zeros(shape, np.float32)
        assert (randomized_svd(Read(zeros), shape, 8).rank, exact_svd(Read(zeros), shape).rank) == (0, 0)
        zeros[3, 4] = np.nan
        assert np.isnan(randomized_svd(Read(zeros), shape, 8).squares)
        assert np.isnan(exact_svd(Read(zeros.T), shape[::-1]).squares)


def test_the_matrix_is_read_once_for_each_power_and_once_more() -> None:
    read = Read(with_spectrum(SPECTRA["slow"], 360, 240))
    assert not is_whole(read.matrix.shape, 16)
    randomized_svd(read, read.matrix.shape, 16)
    assert read.readings == ITERATIONS + 1


def test_the_seed_decides_the_bits() -> None:
    matrix = with_spectrum(SPECTRA["slow"], 360, 240)
    one, same, other = (
        randomized_svd(Read(matrix), matrix.shape, 16, seed=s) for s in ((1, 2), (1, 2), (1, 3))
    )
    assert one.left.tobytes() == same.left.tobytes()
    assert one.left.tobytes() != other.left.tobytes()
