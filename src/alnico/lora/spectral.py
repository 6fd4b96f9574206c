"""Merge methods for task singular vectors, computed cheaply on the core matrices of adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.errors import MethodError
from alnico.methods.base import Between, Option
from alnico.numerics.low_rank import decompose_matrix, polar_factor


def tsv(
    cores: Sequence[np.ndarray],
    weights: Sequence[float],
    side: int,
    *,
    scale: float = 1.0,
    least: float = 0.1,
) -> np.ndarray:
    """Concatenate the leading singular vectors of all adapters, orthogonalise them, and sum (TSV-Merge).

    With ``M_i = U_i S_i V_i^T`` to rank k, ``U = [U_1 ... U_N]``, ``V = [V_1 ... V_N]`` and ``S`` the weighted singular values on a
    diagonal: ``out = scale * polar(U) S polar(V)^T``, where ``polar(X) = P Q^T`` for ``X = P D Q^T`` is the nearest matrix with
    orthonormal columns.

    Use when: adapters of different tasks use overlapping directions. The authors of Core Space report it as the best
        method they tried, with Llama-3-8B adapters of six inference tasks.
    Start with: {scale: 1}

    Options:
        scale: the factor on the result, any number; the paper's alpha is 1.
        least: directions with a smaller singular value in the stacked vectors are dropped, in [0, 1]. A single vector
            has 1; the difference of two vectors at an angle t has ``sqrt(1 - cos t)``. 0 drops only rounding errors.
    Shapes: cores (p, q) float64, one per adapter, including its scale; ``side`` is the smaller side of the whole matrix;
        returns (p, q).
    Memory: a few matrices of p or q by the sum of ranks.
    Edge cases: equal adapters give one of them, not their sum; an adapter of zeros or of weight 0 is ignored; the
        arbitrary signs and rotations of the decomposition cancel.
    Errors: MethodError if ``least`` is outside [0, 1].
    Differs from the source: k is the numerical rank of each adapter, at most ``side // N``. The paper always takes
        ``side // N``; for an adapter most of these singular values are 0 and their vectors arbitrary, yet they would be
        orthogonalised too. Directions below ``least`` are dropped; the paper scales each to length 1, which gave half of
        the merged energy for nearly equal adapters. Biases are averaged with their weights, as the paper averages
        everything that is not a matrix.
    Source: Gargiulo et al. 2025, Task Singular Vectors, https://arxiv.org/abs/2412.00081, in the Core Space of Panariello et al. 2025,
        https://arxiv.org/abs/2509.17786.

    >>> tsv([np.diag([2.0, 0.0]), np.diag([0.0, 1.0])], [1.0, 1.0], 2)
    array([[2., 0.],
           [0., 1.]])
    """
    most = max(side // max(len(cores), 1), 1)
    lefts, rights, values = [], [], []
    for core, weight in zip(cores, weights, strict=True):
        svd = decompose_matrix(core)
        rank = min(svd.rank, most) if weight != 0 else 0
        lefts.append(svd.left[:, :rank])
        rights.append(svd.right[:rank].T)
        values.append(weight * svd.values[:rank])
    left, right = (
        polar_factor(np.concatenate(lefts, 1), least),
        polar_factor(np.concatenate(rights, 1), least),
    )
    merged: np.ndarray = scale * ((left * np.concatenate(values)) @ right.T)
    return merged


def iso_c(
    cores: Sequence[np.ndarray],
    weights: Sequence[float],
    side: int,  # noqa: ARG001 (one call for all methods)
    *,
    scale: float = 1.0,
) -> np.ndarray:
    """Sum the updates and replace all singular values of the sum by their mean (Iso-C).

    ``sum_i weight_i M_i = U S V^T``; ``out = scale * mean(S) * U V^T``.

    Use when: a few shared directions dominate the sum of many tasks and hide those of single tasks. On public language
        models it does worse than a sum (arXiv 2511.21437).
    Start with: {scale: 1}

    Options:
        scale: the factor on the result, any number; the paper tunes its alpha on validation data, others use 1.5.
    Shapes: cores (p, q) float64, one per adapter, including its scale; ``side`` is not used; returns (p, q).
    Memory: a few matrices (p, q).
    Edge cases: updates that cancel give 0; the arbitrary signs and rotations of the decomposition cancel.
    Errors: none.
    Differs from the source: the mean and ``U V^T`` use only the numerical rank of the sum. The paper uses all ``side``
        directions of the matrix, most of which are arbitrary for adapters, and whose zeros make the mean small. Biases
        are averaged with their weights, as the paper averages everything that is not a matrix.
    Source: Marczak et al. 2025, No Task Left Behind, https://arxiv.org/abs/2502.04959, in the Core Space of Panariello et al. 2025,
        https://arxiv.org/abs/2509.17786.

    >>> iso_c([np.diag([3.0, 0.0]), np.diag([0.0, 1.0])], [1.0, 1.0], 2)
    array([[2., 0.],
           [0., 2.]])
    """
    total: np.ndarray = np.sum([w * core for core, w in zip(cores, weights, strict=True)], axis=0)
    size = float(sum(abs(w) * np.linalg.norm(core) for core, w in zip(cores, weights, strict=True)))
    svd = decompose_matrix(total, size)
    if not svd.rank:
        return np.zeros_like(total)
    merged: np.ndarray = scale * float(np.mean(svd.values)) * (svd.left @ svd.right)
    return merged


@dataclass(frozen=True)
class Spectral:
    """A method on core matrices, and its options other than weights."""

    make: Callable[..., np.ndarray]
    ranges: Mapping[str, Between]

    def checked(self, options: Mapping[str, Any]) -> dict[str, float]:
        """Return all options with their defaults. Errors: MethodError, worded as for methods of recipes."""
        name = self.make.__name__
        for option in options:
            if option not in self.ranges:
                raise MethodError(f"{name} has no option {option!r}; it has {', '.join(self.ranges)}.")
        defaults = {n: inspect.signature(self.make).parameters[n].default for n in self.ranges}
        for option, value in options.items():
            problem = Option(option, "number", False, defaults[option], self.ranges[option]).problem(value)
            if problem is not None:
                raise MethodError(f"{name}.{option} {problem}.")
        return {**defaults, **{n: float(v) for n, v in options.items()}}


SPECTRAL: Mapping[str, Spectral] = {
    "tsv": Spectral(tsv, {"scale": Between(), "least": Between(0, 1)}),
    "iso_c": Spectral(iso_c, {"scale": Between()}),
}
"""By name. In core space both give the result for whole matrices cut to their numerical rank."""
