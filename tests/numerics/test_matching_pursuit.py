"""Orthogonal matching pursuit: the atoms and weights of a plain reference, whatever is computed at the same time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from alnico.numerics import matching_pursuit
from alnico.numerics.matching_pursuit import pursue
from made_pursuit import plain_pursuit


class Held:
    """Atoms in memory."""

    def __init__(self, rows: np.ndarray, block: int = 16) -> None:
        self.held = rows
        self.block = block
        self.lengths = np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1))

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for first in range(0, len(self.held), self.block):
            yield first, self.held[first : first + self.block]

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        return self.held[numbers].astype(np.float64)


def dense(numbers: np.ndarray, weights: np.ndarray, atoms: int) -> np.ndarray:
    result = np.zeros((len(numbers), atoms))
    for target, (places, values) in enumerate(zip(numbers, weights, strict=True)):
        np.add.at(result[target], places, values)
    return result


@pytest.fixture
def made() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    atoms = random.standard_normal((60, 12)) * np.exp(random.standard_normal((60, 1)))
    return random.standard_normal((30, 12)), atoms.astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_atoms_and_weights_are_those_of_a_plain_reference(
    made: tuple[np.ndarray, np.ndarray], dtype: type
) -> None:
    targets, atoms = made[0], made[1].astype(dtype)
    numbers, weights = pursue(targets, Held(atoms), 5)
    expected = [plain_pursuit(target, atoms.astype(np.float64), 5) for target in targets]
    assert np.allclose(dense(numbers, weights, len(atoms)), expected, rtol=1e-9, atol=1e-12)
    assert ((weights != 0).sum(axis=1) == 5).all()


def test_a_target_may_not_use_the_atom_that_is_excluded(made: tuple[np.ndarray, np.ndarray]) -> None:
    _, atoms = made
    numbers, weights = pursue(atoms.astype(np.float64), Held(atoms), 3, np.arange(len(atoms)))
    expected = [
        plain_pursuit(a.astype(np.float64), atoms.astype(np.float64), 3, i) for i, a in enumerate(atoms)
    ]
    assert np.allclose(dense(numbers, weights, len(atoms)), expected, rtol=1e-9, atol=1e-12)
    free, ones = pursue(atoms.astype(np.float64), Held(atoms), 3)
    assert np.allclose(dense(free, ones, len(atoms)), np.eye(len(atoms)), atol=1e-12)


def test_what_is_computed_at_the_same_time_changes_no_bit(made: tuple[np.ndarray, np.ndarray]) -> None:
    targets, atoms = made
    whole = pursue(targets, Held(atoms), 6)
    for step, block in ((1, 16), (7, 60), (30, 5)):
        parts = [
            pursue(targets[first : first + step], Held(atoms, block), 6)
            for first in range(0, len(targets), step)
        ]
        for one, many in zip(whole, zip(*parts, strict=True), strict=True):
            assert np.concatenate(many).tobytes() == one.tobytes()


def test_atoms_that_float32_cannot_tell_apart_are_compared_in_float64() -> None:
    target = np.array([[1.0, 0.0, 0.0]])
    atoms = np.array([[1.0, 2e-5, 0.0], [1.0, 1e-5, 0.0], [0.0, 0.0, 1.0]])
    # The cosines are 1 - 2e-10 and 1 - 5e-11: one float32 number.
    for order in ([0, 1, 2], [1, 0, 2]):
        numbers, _ = pursue(target, Held(atoms[order]), 1)
        assert order[numbers[0, 0]] == 1
    numbers, _ = pursue(target, Held(atoms[[1, 1, 2]]), 1)
    assert numbers[0, 0] == 0  # of equal ones the first


def test_a_pursuit_ends_where_nothing_is_left_or_no_atom_helps() -> None:
    atoms = np.array([[2.0, 0, 0], [0, 3.0, 0], [0, 0, 0], [4.0, 3.0, 0]], np.float32)
    targets = np.array([[6.0, 0, 0], [0, 0, 0], [1.0, 2.0, 5.0], [0, 0, 1.0]])
    numbers, weights = pursue(targets, Held(atoms), 4)
    reached = np.einsum("nk,nkd->nd", weights, atoms[numbers].astype(np.float64))
    assert np.allclose(reached, [[6, 0, 0], [0, 0, 0], [1, 2, 0], [0, 0, 0]])
    assert (weights != 0).sum(axis=1).tolist() == [1, 0, 2, 0]
    assert np.isfinite(weights).all()


def test_the_size_of_numbers_does_not_matter(made: tuple[np.ndarray, np.ndarray]) -> None:
    targets, atoms = made
    numbers, weights = pursue(targets, Held(atoms), 4)
    for scale in (2.0**-60, 2.0**60):
        others, scaled = pursue(targets * scale, Held((atoms * np.float32(2.0**20)).astype(np.float32)), 4)
        assert (others == numbers).all()
        assert np.allclose(scaled * 2.0**20 / scale, weights, rtol=1e-12)


def test_many_equal_atoms_are_compared_in_parts(
    made: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, atoms = made
    expected = pursue(targets, Held(atoms), 2)
    monkeypatch.setattr(matching_pursuit, "COMPARED", 3)
    many = pursue(targets, Held(np.repeat(atoms, 4, axis=0)), 2)
    assert (many[0] == expected[0] * 4).all()
    assert many[1].tobytes() == expected[1].tobytes()
