"""Orthogonalises the singular vectors of several task vectors, and scales their sum by projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, Protocol

import numpy as np

from alnico.methods.base import Matrices
from alnico.numerics.arrays import (
    AnyArray,
    are_equal,
    concatenate,
    inner_product,
    is_numpy,
    largest,
    library_of,
    like,
    to_numpy,
)
from alnico.numerics.decompositions import polar_factor
from alnico.numerics.low_rank import Decomposed

Calibrate = Literal["projection", "none"]
"""The factor on a merged matrix: :func:`projection_scale`, or 1."""

MOST_SCALE = 100.0
"""A larger projection scale means that the task vectors cancel each other."""

NEAR_DUPLICATE = 0.95
"""Cosine of two task vectors from which they count as one model twice."""


def rank_of_each(share: float, rows: int, columns: int, models: int) -> int:
    """Return how many singular vectors each of several models keeps: ``share`` of ``min(rows, columns) / models``, at least 1.

    >>> rank_of_each(1.0, 100, 40, 3), rank_of_each(0.25, 100, 40, 3), rank_of_each(1.0, 2, 2, 5)
    (13, 3, 1)
    """
    return max(int(share * min(rows, columns) / models), 1)


def takes_part(weight: Sequence[float]) -> tuple[int, ...]:
    """The models whose weight is not 0.

    >>> takes_part((1.0, 0.0, -0.5))
    (0, 2)
    """
    return tuple(i for i, w in enumerate(weight) if w)


def first_of(place: np.ndarray) -> list[int]:
    """The first model of each place."""
    return [int(i) for i in np.unique(place, return_index=True)[1]]


class PartSum(Protocol):
    """A sum over distinct models: with a weight for each, or one part of it."""

    def sum(self, weights: Sequence[float] | np.ndarray) -> AnyArray: ...

    def part(self, position: int) -> AnyArray: ...


@dataclass(frozen=True)
class WeightedSum:
    """``factor * sum_i weight_i * part_i`` over the models. Exact copies have one place in the sum.

    ``weight`` has one number per model, and ``place`` the position in ``parts`` of each model whose weight is not 0. Each
    of several exact copies has its share of their one part.
    """

    parts: PartSum
    weight: tuple[float, ...]
    place: np.ndarray
    factor: float

    def weights(self) -> np.ndarray:
        """The weight of each model that takes part."""
        given = np.array([self.weight[i] for i in takes_part(self.weight)])
        shared: np.ndarray = self.factor * given / np.bincount(self.place)[self.place]
        return shared

    def merged(self) -> AnyArray:
        return self.parts.sum(np.bincount(self.place, self.weights(), int(self.place.max()) + 1))

    def of_models(self, shape: tuple[int, int]) -> list[AnyArray]:
        """The part of every model; zeros for a weight of 0."""
        weighted = zip(takes_part(self.weight), self.weights().tolist(), self.place, strict=True)
        parts = {i: w * self.parts.part(int(p)) for i, w, p in weighted}
        return [parts[i] if i in parts else np.zeros(shape) for i in range(len(self.weight))]


@dataclass(frozen=True)
class StackedVectors:
    """Pairs of left and right vectors of several matrices, side by side: their sum is ``left * values @ right``.

    ``owner`` is the position of the matrix that each pair of vectors comes from. Values and owners are numpy's, wherever
    the vectors are.
    """

    left: AnyArray
    values: np.ndarray
    right: AnyArray
    owner: np.ndarray

    def arrays(self) -> tuple[AnyArray, ...]:
        return self.left, self.values, self.right, self.owner

    def sum(self, weights: Sequence[float] | np.ndarray) -> AnyArray:
        """Add up the parts of all matrices, each times its weight."""
        return (self.left * like(self.left, self.values * np.asarray(weights)[self.owner])) @ self.right

    def part(self, position: int) -> AnyArray:
        """Return the part of one matrix."""
        is_own = self.owner == position
        own = like(self.left, is_own)
        return (self.left[:, own] * like(self.left, self.values[is_own])) @ self.right[own]


def orthogonalize(factors: list[Decomposed], least: float, *, clear: bool = False) -> StackedVectors:
    """Replace the stacked left and right singular vectors by their polar factors.

    ``U = polar[U_1 ... U_N]``, ``V = polar[V_1 ... V_N]``. Directions whose singular value in a stack is at most ``least``
    are left out. ``clear`` empties the list when the vectors are copied, so that they need not be held twice.
    """
    stacked = stack_vectors(factors)
    left, right = stacked.left, stacked.right
    if clear:
        factors.clear()
    left = polar_factor(left, least=least, overwrite=True)
    right = polar_factor(right, least=least, overwrite=True)
    return StackedVectors(left, stacked.values, right, stacked.owner)


def stack_vectors(factors: Sequence[Decomposed]) -> StackedVectors:
    """Copy the singular vectors of several matrices side by side."""
    return StackedVectors(
        concatenate([f.left for f in factors], 1),
        np.concatenate([to_numpy(f.values) for f in factors]),
        concatenate([f.right for f in factors], 0),
        owners_of(factors),
    )


def owners_of(factors: Sequence[Decomposed]) -> np.ndarray:
    """The position of the matrix that each pair of stacked vectors comes from."""
    return np.repeat(np.arange(len(factors)), [f.rank for f in factors])


def projection_scale(merged: AnyArray, matrices: Iterable[AnyArray]) -> tuple[float, bool]:
    """Return ``c = sum_i |D_i|^2 / sum_i <X, D_i>`` for a merged matrix X, and whether it could be computed.

    Times c, the merge has the same inner products with the D_i, in sum, as they have with themselves: it takes back
    what orthogonalising and cutting took. c is 1 where the sum in the denominator is not clearly positive, as for
    matrices that cancel each other.

    >>> projection_scale(np.float64([[1]]), [np.float64([[2]])]), projection_scale(np.float64([[0]]), [np.float64([[2]])])
    ((2.0, True), (1.0, False))
    """
    squares = products = 0.0
    unit = largest(merged)
    unit = 1.0 if 1e-100 < unit < 1e100 or not unit else 2.0 ** math.frexp(unit)[1]
    scaled = merged if unit == 1 else merged / unit
    for matrix in matrices:
        values = matrix if unit == 1 else matrix / unit
        squares += inner_product(values, values)
        products += inner_product(scaled, values)
        del matrix, values  # before the next one is read
    if not squares or not products * MOST_SCALE > squares:
        return 1.0, not squares
    return squares / products, True


def scale_of(
    matrices: Matrices,
    calibrate: Calibrate,
    merged: Callable[[], AnyArray],
    values: Iterable[AnyArray],
) -> float:
    """Return the factor on a merge of the matrices ``values``; where they cancel each other it is 1, which is said."""
    if calibrate == "none":
        return 1.0
    factor, is_known = projection_scale(merged(), values)
    if not is_known:
        matrices.note("the task vectors cancel each other, so there is no projection scale; 1 is used")
    return factor


def say_equal(matrices: Matrices, one: int, other: int) -> None:
    matrices.note("{} and {} change equally, and count as one model", one, other)


def say_near(matrices: Matrices, one: int, other: int, cosine: float) -> None:
    """Tell the user of two models, if their task vectors are nearly equal."""
    if cosine > NEAR_DUPLICATE:
        matrices.note(
            "{} and {} change almost equally (cosine {:.2f}); each counts, as if they were two tasks",
            one,
            other,
            cosine,
        )


def distinct_factors(
    matrices: Matrices, models: Sequence[int], rank: float | None
) -> tuple[list[Decomposed], np.ndarray]:
    """Return the leading singular vectors of the models' matrices, and the position among them of each model's.

    ``rank`` is the share of :func:`rank_of_each`; None takes all singular vectors.
    Exact copies share one entry, as if they were one model, which is said; near duplicates are said, too. A matrix of zeros
    has an entry of rank 0.
    """
    sides = matrices.whole
    count = min(sides) if rank is None else rank_of_each(rank, *sides, len(models))
    factors = [matrices.leading(i, count) for i in models]
    place = np.arange(len(models))
    for i in range(len(models)):
        for j in range(i):
            if factors[i].rank and _are_equal(matrices, (models[i], models[j]), factors[i], factors[j]):
                place[i] = place[j]
                say_equal(matrices, models[j], models[i])
                break
    distinct, place = np.unique(place, return_inverse=True)
    if rank is not None and len(distinct) < len(models):
        count = rank_of_each(rank, *sides, len(distinct))
        del factors  # before others take their place
        factors = [matrices.leading(models[i], count) for i in distinct]
    else:
        factors = [factors[i] for i in distinct]
    _note_near_duplicates(matrices, [models[i] for i in distinct], factors)
    return factors, place


def count_numbers(rows: int, columns: int, models: int, rank: float, *, keeps_factors: bool = False) -> int:
    """Return the most float64 numbers held by :func:`distinct_factors`, :func:`orthogonalize`, a sum and its scale.

    ``keeps_factors``: the singular vectors are used after :func:`orthogonalize`.
    """
    side, long, matrix = min(rows, columns), max(rows, columns), rows * columns
    stacked = max(int(rank * side), min(models, side))
    each = -(-stacked // models)
    held = (rows + columns) * stacked
    work = max(5 * side**2, (3 * long + side) * each + 8 * each**2)
    decompose = matrix + held - held // models + work
    polar = max(2 * held, (2 if keeps_factors else 1) * held + 5 * stacked**2)
    return max(decompose, polar, held + 2 * matrix)


NEARLY = 1e-9
"""Singular values of one matrix, found twice on a GPU, differ by less than this share."""


def _are_equal(matrices: Matrices, models: tuple[int, int], one: Decomposed, other: Decomposed) -> bool:
    """Are two models' matrices equal? On a processor equal matrices have equal singular vectors; a GPU does not promise
    it, so there the matrices are compared if their singular values are nearly equal."""
    if is_numpy(one.left):
        return all(
            are_equal(a, b)
            for a, b in ((one.values, other.values), (one.left, other.left), (one.right, other.right))
        )
    if one.rank != other.rank or largest(one.values - other.values) > NEARLY * float(one.values[0]):
        return False
    return are_equal(*map(matrices.value, models))


def _note_near_duplicates(matrices: Matrices, models: Sequence[int], factors: Sequence[Decomposed]) -> None:
    """Tell the user of task vectors that are nearly equal, by the singular vectors that are kept of them."""
    lengths = [
        float(f.values[0] * library_of(f.values).linalg.norm(f.values / f.values[0])) if f.rank else 0.0
        for f in factors
    ]
    for i, j in combinations(range(len(factors)), 2):
        one, other = factors[i], factors[j]
        if not lengths[i] or not lengths[j]:
            continue
        across = (one.left.T @ other.left) * (other.values / lengths[j]) @ (other.right @ one.right.T)
        cosine = float(one.values / lengths[i] @ across.diagonal())
        say_near(matrices, models[i], models[j], cosine)
