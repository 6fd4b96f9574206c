"""Leading singular vectors and polar factors of whole matrices: against LAPACK's full SVD in float64, of numpy's and torch's arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from alnico.numerics import decompositions
from alnico.numerics.decompositions import is_iterated, leading_vectors, polar_factor

SIDE, COUNT = 1040, 48


def with_values(values: np.ndarray, rows: int, seed: int = 0) -> np.ndarray:
    """A matrix (rows, len(values)) with random singular vectors."""
    random = np.random.default_rng(seed)
    left = np.linalg.qr(random.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(random.standard_normal((len(values), len(values))))[0]
    product: np.ndarray = (left * values) @ right
    return product


def spectrum(kind: str) -> np.ndarray:
    places = np.arange(1.0, SIDE + 1)
    return {
        "slow": places**-0.5,
        "steep": places**-4.0,
        "pairs": np.repeat(places[: SIDE // 2], 2) ** -0.5,
        "low rank": np.where(places <= 20, places**-0.5, 0.0),
        "level": 1 + 1e-3 / places,
        "extreme": 1e150 * places**-0.5,
    }[kind]


KINDS = ("slow", "steep", "pairs", "low rank", "level", "extreme")


@pytest.mark.parametrize(
    ("kind", "library"),
    [
        *(pytest.param(kind, np, id=f"{kind}-numpy") for kind in KINDS),
        pytest.param("pairs", torch, id="pairs-torch"),
        *(pytest.param(k, torch, id=f"{k}-torch", marks=pytest.mark.nightly) for k in KINDS if k != "pairs"),
    ],
)
def test_iterated_vectors_are_those_of_a_full_svd(kind: str, library: Any) -> None:
    values = spectrum(kind)
    matrix = with_values(values, SIDE + 60)
    assert is_iterated(SIDE, COUNT)
    kept = min(COUNT, int((values > 1e-6 * values[0]).sum()))
    for turned in (matrix, matrix.T.copy()):
        found = leading_vectors(library.asarray(turned), COUNT)
        left, right = np.asarray(found.left), np.asarray(found.right)
        assert found.rank == kept
        assert np.asarray(found.values) == pytest.approx(values[:kept], rel=1e-9)
        assert np.abs(left.T @ left - np.eye(kept)).max() < 1e-9
        assert np.abs(right @ right.T - np.eye(kept)).max() < 1e-9
        if kind != "level":  # whose leading subspace no arithmetic finds
            u, s, vt = np.linalg.svd(turned, full_matrices=False)
            assert (
                np.abs((left * np.asarray(found.values)) @ right - (u[:, :kept] * s[:kept]) @ vt[:kept]).max()
                < 1e-8 * values[0]
            )
        else:
            assert np.abs(turned @ right.T - left * np.asarray(found.values)).max() < 1e-10


def test_an_iteration_that_does_not_converge_is_left_for_the_direct_way() -> None:
    matrix = np.random.default_rng(1).standard_normal((SIDE, SIDE))
    assert decompositions._some_eigenvectors(matrix, SIDE // 8) is None
    direct = np.linalg.svd(matrix, compute_uv=False)[: SIDE // 8]
    assert leading_vectors(matrix, SIDE // 8).values == pytest.approx(direct, rel=1e-12)


def test_a_matrix_of_zeros_or_without_entries_has_rank_0() -> None:
    assert [
        leading_vectors(np.zeros(s), 3).rank for s in ((SIDE, SIDE), (70, 70), (3, 4), (0, 4), (4, 0))
    ] == [0] * 5


def test_the_iteration_is_the_same_at_every_call() -> None:
    matrix = with_values(spectrum("slow"), SIDE)
    one, other = leading_vectors(matrix, COUNT), leading_vectors(matrix.copy(), COUNT)
    assert one.left.tobytes() == other.left.tobytes()
    assert one.right.tobytes() == other.right.tobytes()


@pytest.mark.parametrize("shape", [(90, 90), (120, 70), (70, 120), (6, 4), (1, 5)])
def test_a_polar_factor_leaves_out_null_directions(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(2)
    full = random.standard_normal(shape)
    thin = random.standard_normal((shape[0], 1)) @ random.standard_normal((1, shape[1]))
    for matrix in (full, thin):
        u, _, vt = np.linalg.svd(matrix, full_matrices=False)
        rank = np.linalg.matrix_rank(matrix)
        for library in (np, torch):
            found = np.asarray(polar_factor(library.asarray(matrix)))
            assert np.abs(found - u[:, :rank] @ vt[:rank]).max() < 1e-9
