"""Methods that merge task singular vectors, made where they cost little: on the core matrices of adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.errors import MethodError
from alnico.methods.base import Between, Option
from alnico.numerics.low_rank import of_matrix, polar


def tsv(
    cores: Sequence[np.ndarray],
    weights: Sequence[float],
    side: int,
    *,
    scale: float = 1.0,
    least: float = 0.1,
) -> np.ndarray:
    """Put the leading singular vectors of all adapters beside one another, straighten them, and sum (TSV-Merge).

    With ``M_i = U_i S_i V_i^T`` to rank k, ``U = [U_1 ... U_N]``, ``V = [V_1 ... V_N]`` and ``S`` the weighted singular values on a
    diagonal: ``out = scale * polar(U) S polar(V)^T``, where ``polar(X) = P Q^T`` for ``X = P D Q^T`` is the nearest matrix with
    orthonormal columns.

    Use when: adapters of different tasks use overlapping directions. The authors of Core Space report it as the best of the methods
        that they tried there, with Llama-3-8B adapters of six inference tasks.
    Start with: {scale: 1}

    Options:
        scale: the factor on the result, any number; the paper's alpha is 1.
        least: a direction that the stacked vectors have less of than this is left out, in [0, 1]; 1 is one vector of its own, and two at
            an angle t leave ``sqrt(1 - cos t)`` of what they differ in. 0 leaves out rounding alone.
    Shapes: cores (p, q) float64, one an adapter, with its scale in it; ``side`` is the smaller side of the whole matrix; (p, q) out.
    Memory: a few matrices of p or q by the sum of ranks.
    Edge cases: equal adapters come out as one of them, not as their sum; an adapter of zeros, or of weight 0, takes no part; the
        decomposition's free signs and turns cancel.
    Errors: MethodError if ``least`` is outside [0, 1].
    Differs from the source: k is the numerical rank of each adapter, and ``side // N`` at most, as of the whole matrix; the paper takes
        ``side // N`` of every task, which for an adapter are mostly vectors of singular values that are 0, arbitrary, and straightened
        all the same. Directions below ``least`` are left out, where the paper blows each up to length 1: of nearly equal adapters, half
        of the merged energy came from there. Biases are averaged with their weights, as the paper averages all that is no matrix.
    Source: Gargiulo et al. 2025, Task Singular Vectors, https://arxiv.org/abs/2412.00081, in the Core Space of Panariello et al. 2025,
        https://arxiv.org/abs/2509.17786.

    >>> tsv([np.diag([2.0, 0.0]), np.diag([0.0, 1.0])], [1.0, 1.0], 2)
    array([[2., 0.],
           [0., 1.]])
    """
    most = max(side // max(len(cores), 1), 1)
    lefts, rights, values = [], [], []
    for core, weight in zip(cores, weights, strict=True):
        found = of_matrix(core)
        kept = min(found.rank, most) if weight != 0 else 0
        lefts.append(found.left[:, :kept])
        rights.append(found.right[:kept].T)
        values.append(weight * found.values[:kept])
    left, right = polar(np.concatenate(lefts, 1), least), polar(np.concatenate(rights, 1), least)
    merged: np.ndarray = scale * ((left * np.concatenate(values)) @ right.T)
    return merged


def iso_c(
    cores: Sequence[np.ndarray],
    weights: Sequence[float],
    side: int,  # noqa: ARG001 (one call for all methods)
    *,
    scale: float = 1.0,
) -> np.ndarray:
    """Sum the updates, and give all singular values of the sum their mean (Iso-C).

    ``sum_i weight_i M_i = U S V^T``; ``out = scale * mean(S) * U V^T``.

    Use when: the sum of many tasks is ruled by a few directions that most tasks share, and those of single tasks drown. On language
        models found in the wild it does worse than a sum (arXiv 2511.21437).
    Start with: {scale: 1}

    Options:
        scale: the factor on the result, any number; the paper tunes its alpha on validation data, and others use 1.5.
    Shapes: cores (p, q) float64, one an adapter, with its scale in it; ``side`` is not used; (p, q) out.
    Memory: a few matrices (p, q).
    Edge cases: updates that cancel give 0; the decomposition's free signs and turns cancel.
    Errors: none.
    Differs from the source: only the numerical rank of the sum counts, for the mean and for ``U V^T``. The paper takes all ``side``
        directions of the matrix, most of which are arbitrary for adapters, and whose zeros make the mean small. Biases are averaged with
        their weights, as the paper averages all that is no matrix.
    Source: Marczak et al. 2025, No Task Left Behind, https://arxiv.org/abs/2502.04959, in the Core Space of Panariello et al. 2025,
        https://arxiv.org/abs/2509.17786.

    >>> iso_c([np.diag([3.0, 0.0]), np.diag([0.0, 1.0])], [1.0, 1.0], 2)
    array([[2., 0.],
           [0., 2.]])
    """
    total: np.ndarray = np.sum([w * core for core, w in zip(cores, weights, strict=True)], axis=0)
    size = float(sum(abs(w) * np.linalg.norm(core) for core, w in zip(cores, weights, strict=True)))
    found = of_matrix(total, size)
    if not found.rank:
        return np.zeros_like(total)
    merged: np.ndarray = scale * float(np.mean(found.values)) * (found.left @ found.right)
    return merged


@dataclass(frozen=True)
class Spectral:
    """A method on core matrices, and its options beside the weights."""

    make: Callable[..., np.ndarray]
    ranges: Mapping[str, Between]

    def checked(self, options: Mapping[str, Any]) -> dict[str, float]:
        """All options, with their defaults. Errors: MethodError, worded as for the methods of recipes."""
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
"""By name; both are made in core space, where they give what they would on whole matrices cut to their numerical rank."""
