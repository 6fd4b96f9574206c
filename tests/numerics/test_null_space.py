"""Directions of inputs, and matrices without them: against singular vectors of the inputs themselves."""

from __future__ import annotations

import numpy as np
import pytest

from alnico.numerics import null_space


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("rows", [3, 40, 200])
def test_the_fewest_directions_hold_the_share_of_the_squares(energy: float, rows: int) -> None:
    x = np.random.default_rng(rows).standard_normal((rows, 60)) * np.linspace(0.01, 3, 60)
    found = null_space.leading_directions(x.T @ x, energy)
    held = np.sum((x @ found) ** 2)
    total = np.sum(x**2)
    assert found.shape[1] <= min(rows, 60)
    assert held >= energy * total * (1 - 1e-9)
    fewer = np.sum((x @ found[:, 1:]) ** 2)  # the smallest eigenvalue of those comes first
    assert fewer < energy * total * (1 - 1e-12)
    np.testing.assert_allclose(found.T @ found, np.eye(found.shape[1]), atol=1e-12)


def test_zeros_and_no_inputs_protect_nothing() -> None:
    assert null_space.leading_directions(np.zeros((5, 5)), 1.0).shape == (5, 0)
    assert null_space.leading_directions(np.zeros((0, 0)), 1.0).shape == (0, 0)
    matrix = np.ones((3, 5))
    null_space.remove_directions(matrix, np.zeros((5, 0)))
    assert matrix.tolist() == np.ones((3, 5)).tolist()


@pytest.mark.parametrize("is_transposed", [False, True])
def test_nothing_acts_on_the_directions_and_all_else_stays(is_transposed: bool) -> None:
    random = np.random.default_rng(0)
    matrix = random.standard_normal((2500, 40))  # more rows than a block has
    directions = np.linalg.qr(random.standard_normal((40, 7)))[0]
    changed = matrix.T.copy() if is_transposed else matrix.copy()
    null_space.remove_directions(changed, directions, is_transposed=is_transposed)
    changed = changed.T if is_transposed else changed
    assert np.abs(changed @ directions).max() < 1e-13
    other = np.linalg.qr(np.concatenate([directions, np.eye(40)], 1))[0][:, 7:]
    np.testing.assert_allclose(changed @ other, matrix @ other, atol=1e-12)
