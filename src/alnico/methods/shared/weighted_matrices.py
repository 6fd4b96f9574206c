"""Finds models that are copies of each other in one matrix, and adds up the weighted task vectors of all others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from alnico.methods.base import Matrices
from alnico.methods.shared.singular_vectors import (
    say_equal,
    say_near,
    takes_part,
)
from alnico.numerics.arrays import AnyArray, are_equal, copy_of, to_numpy, zeros

SAMPLED = 1 << 18
"""How many numbers of each matrix are compared with those of the others; matrices that agree there are compared whole."""


@dataclass(frozen=True)
class WeightedMatrices:
    """The distinct task vectors of one matrix, each times its weight; iterating reads them."""

    matrices: Matrices
    models: tuple[int, ...]
    weights: tuple[float, ...]

    def __iter__(self) -> Iterator[AnyArray]:
        for i, w in zip(self.models, self.weights, strict=True):
            value = self.matrices.value(i)
            yield value if w == 1 else value * w

    def sum(self) -> AnyArray:
        total: AnyArray = None
        for value in self:
            total = zeros(value, value.shape) if total is None else total
            total += value
        return np.zeros(self.matrices.shape) if total is None else total


def weighted_matrices(matrices: Matrices, weight: Sequence[float]) -> WeightedMatrices:
    """Leave out models of weight 0; exact copies are one model with the mean of their weights, which is said."""
    used = takes_part(weight)
    samples = [_sample(matrices.value(i)) for i in used]
    first: dict[int, list[int]] = {}
    for place, i in enumerate(used):
        alike = (j for j in first if np.array_equal(samples[used.index(j)], samples[place]))
        copy = next((j for j in alike if _are_equal(matrices.value(i), matrices.value(j))), None)
        if copy is None:
            first[i] = [i]
        else:
            say_equal(matrices, copy, i)
            first[copy].append(i)
    distinct = list(first)
    for at, i in enumerate(distinct):
        for j in distinct[:at]:
            cosine = _cosine(samples[used.index(i)], samples[used.index(j)])
            say_near(matrices, j, i, cosine)
    weights = tuple(math.fsum(weight[j] for j in first[i]) / len(first[i]) for i in distinct)
    kept = [(i, w) for i, w in zip(distinct, weights, strict=True) if w]
    return WeightedMatrices(matrices, tuple(i for i, _ in kept), tuple(w for _, w in kept))


def _sample(matrix: AnyArray) -> np.ndarray:
    size = math.prod(matrix.shape)
    step = -(-size // SAMPLED) if size else 1
    # A step that divides the number of columns would take the same columns of every row.
    while step > 1 and math.gcd(step, matrix.shape[1]) > 1:
        step += 1
    return to_numpy(copy_of(matrix.reshape(-1)[::step]))


def _are_equal(one: AnyArray, other: AnyArray) -> bool:
    """Are they equal, and not zeros?"""
    return bool(one.any()) and are_equal(one, other)


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    one, other = (x / (np.abs(x).max(initial=0.0) or 1.0) for x in (one, other))
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths else 0.0
