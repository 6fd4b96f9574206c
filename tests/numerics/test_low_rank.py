"""Products of thin matrices against the dense matrix that they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from alnico.numerics.low_rank import (
    Decomposed,
    choose_rank,
    decompose_matrix,
    decompose_product,
    stack_factors,
)


def thin(rows: int, columns: int, rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal((rows, rank)), random.standard_normal((rank, columns))


def whole(found: Decomposed) -> np.ndarray:
    return found.left * found.values @ found.right


@pytest.mark.parametrize(
    "shape", [(30, 20, 5), (20, 30, 5), (6, 5, 40), (5, 60, 12), (1, 1, 3), (9, 9, 9)], ids=str
)
def test_singular_values_are_those_of_the_dense_matrix(shape) -> None:
    left, right = thin(*shape)
    found = decompose_product(left, right)
    dense = np.linalg.svd(left @ right, compute_uv=False)[: found.rank]
    assert found.rank == min(shape)
    np.testing.assert_allclose(found.values, dense, rtol=1e-12)
    np.testing.assert_allclose(whole(found), left @ right, atol=1e-12 * dense[0])
    np.testing.assert_allclose(found.left.T @ found.left, np.eye(found.rank), atol=1e-12)
    np.testing.assert_allclose(found.right @ found.right.T, np.eye(found.rank), atol=1e-12)


@pytest.mark.parametrize("size", [1e-150, 1e-20, 1.0, 1e20, 1e150], ids=str)
def test_the_rank_is_told_at_any_size(size) -> None:
    left, right = thin(30, 20, 3)
    assert (
        decompose_product(size * np.concatenate([left, left], 1), np.concatenate([right, 2 * right])).rank
        == 3
    )
    assert (
        decompose_product(np.concatenate([left, size * left], 1), np.concatenate([right, -right / size])).rank
        == 0
    )


@pytest.mark.parametrize("shape", [(4, 0, 3), (4, 2, 3)], ids=str)
def test_nothing_and_zeros_have_rank_0(shape) -> None:
    rows, rank, columns = shape
    found = decompose_product(np.zeros((rows, rank)), np.zeros((rank, columns)))
    assert (found.rank, found.total, found.left_out(0)) == (0, 0.0, 0.0)
    left, right = found.factors(1)
    assert not left.any()
    assert not right.any()
    assert (left.shape, right.shape) == ((rows, 1), (1, columns))


def test_signs_do_not_depend_on_the_signs_of_the_factors() -> None:
    left, right = thin(8, 6, 3)
    one, other = decompose_product(left, right), decompose_product(-left, -right)
    np.testing.assert_allclose(one.left, other.left, atol=1e-12)
    largest = np.argmax(np.abs(one.left), 0)
    assert (one.left[largest, range(3)] > 0).all()


def test_the_factors_of_a_rank_are_the_best_and_what_is_left_out_is_known() -> None:
    left, right = thin(12, 9, 6)
    found = decompose_product(left, right)
    for rank in range(1, 8):
        b, a = found.factors(rank)
        np.testing.assert_allclose(
            np.sum((left @ right - b @ a) ** 2), found.left_out(rank), rtol=1e-9, atol=1e-20
        )
        np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1), rtol=1e-12)


def test_a_sum_is_stacked() -> None:
    parts = [(0.5, *thin(7, 5, 2, 1)), (-2.0, *thin(7, 5, 3, 2))]
    left, right = stack_factors(parts, 7, 5)
    np.testing.assert_allclose(
        left @ right, 0.5 * parts[0][1] @ parts[0][2] - 2 * parts[1][1] @ parts[1][2], atol=1e-12
    )
    left, right = stack_factors([], 7, 5)
    assert (left.shape, right.shape) == ((7, 0), (0, 5))


@pytest.mark.parametrize(
    ("energy", "most", "rank"),
    [
        (None, None, 4),
        (None, 2, 2),
        (0.5, None, 1),
        (0.64, None, 1),
        (0.65, None, 2),
        (0.98, None, 3),
        (1, None, 4),
        (0.98, 2, 2),
    ],
)
def test_energy_is_the_share_of_squares(energy, most, rank) -> None:
    assert (
        choose_rank(decompose_matrix(np.diag([8.0, 5.0, 3.0, np.sqrt(2.0)])), most, energy) == rank
    )  # squares 64, 25, 9, 2


def test_what_was_not_computed_counts_for_energy() -> None:
    found = decompose_matrix(np.diag([3.0, 1.0]))
    known = Decomposed(found.left, found.values, found.right, rest=10.0)
    assert (known.total, known.left_out(1)) == (20.0, 11.0)
    assert choose_rank(known, None, 0.45) == 1
    assert choose_rank(known, None, 0.9) == 2
