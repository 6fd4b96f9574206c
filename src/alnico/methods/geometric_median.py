"""Geometric median: the point with the least sum of distances to the models."""

import math
from functools import partial
from typing import Annotated

import numpy as np

from alnico.kernels.facts import Derived, Gram
from alnico.methods.base import Between, Merge, PerModel, combine, each, method, total_weight

NOTHING = 1e-14
"""Squared distances up to this share of the squared lengths are rounding: the inner products are in float64."""

SURELY = 1.0 - 1e-9
"""A model is the median if the others pull with less than this share of its weight. Two models of equal weight
pull each other with exactly their weights, and the middle is the median, too."""

Squares = list[list[float]]


@method(
    space="weight",
    source="Weiszfeld 1937, https://doi.org/10.1007/s10479-008-0352-z (translation); Vardi and Zhang 2000, https://doi.org/10.1073/pnas.97.4.1423",
)
def geometric_median(
    *,
    weight: PerModel[Annotated[float, Between(0)]] = each(1.0),
    max_iter: Annotated[int, Between(0, 100_000)] = 100,
    tol: Annotated[float, Between(0, 1)] = 1e-12,
) -> Merge:
    """Take the point whose distances to the models have the least sum, tensor by tensor.

    ``out = argmin_m sum_i weight_i * |m - x_i|`` for the tensors ``x_i`` as flat vectors. Weiszfeld's steps ``m = sum_i b_i x_i``,
    ``b_i ~ weight_i / |m - x_i|`` begin at the weighted mean. All are taken in the coefficients: with ``S_ij = |x_i - x_j|^2`` from
    the Gram matrix and ``sum_i b_i = 1``, ``|m - x_i|^2 = (S b)_i - b^T S b / 2``, in float64.

    Use when: you average several models of one task or one family, and some of them may be far off: the median moves by a bounded
        distance, however far they are, as long as they hold less than half of the weight. For models at equal distances it is the
        mean. Merges on the hub use it; we know of no paper that compares it.

    Options:
        weight: a model's coefficient, at least 0; only the ratios count. A model with more than half of all weights is the result.
        max_iter: the most steps of the iteration, in [0, 100000]; 0 gives the weighted mean.
        tol: the iteration ends when no coefficient changes by more than this, in [0, 1].
    Shapes: one value per model in, one number out; any number of models.
    Measures: the Gram matrix, one pass; then one to mix. Memory: blocks. Grain: element.
    Edge cases: whether a model itself is the median is decided before the first step, so a step never divides by 0: it is, if the unit
        vectors from it to the others, each times its weight, add up to less than its own weight. Equal models count as one with the sum
        of their weights. Of two models of equal weight every point between them is a median; the middle is taken. An element on which
        all models agree keeps its bits.
    Errors: MethodError if all weights are 0.
    Differs from the source: the programs that merge by it (sd-mecha, and cards on the hub) bound distances from below by a fixed number,
        so that a model that is the median is only approached; some begin half way to the median of each element, which changes nothing,
        as there is one minimum.
    Source: Weiszfeld 1937; Vardi and Zhang 2000, https://doi.org/10.1073/pnas.97.4.1423; the form in coefficients is derived here.

    >>> gram = [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 100.0]]
    >>> coefficients((1.0, 1.0, 1.0), 100, 1e-12, gram).round(2).tolist()
    [0.71, 0.26, 0.03]
    >>> coefficients((1.0, 0.2, 0.2), 100, 1e-12, gram).tolist()
    [1.0, 0.0, 0.0]
    """
    total = total_weight(weight, " of geometric_median")
    parts = tuple(w / total for w in weight)
    alone = next((i for i, part in enumerate(parts) if part > 0.5), None)
    derived = Derived(partial(coefficients, parts, int(max_iter), tol), (Gram(),))
    copies = 0 if len(parts) == 1 else alone if max_iter else None
    return combine(derived, copies=copies, fixes_equal_inputs=True)


def coefficients(
    weight: tuple[float, ...], steps: int, tolerance: float, gram: tuple[tuple[float, ...], ...]
) -> np.ndarray:
    """The coefficients of the median, which sum to 1. Exact sums, so that no processor gives other bits."""
    models = range(len(weight))
    total = math.fsum(weight)
    found = [w / total for w in weight]
    largest = max(gram[i][i] for i in models)
    if not steps or not largest or not math.isfinite(largest):
        return np.array(found)
    squares = [[_square(gram, i, j, largest) for j in models] for i in models]
    pulls = [_pull(weight, squares, j) for j in models]
    for j, (pull, own) in enumerate(pulls):
        if pull < SURELY * own:
            return np.array([float(i == j) for i in models])
    least = NOTHING * max(map(max, squares))
    for _ in range(steps):
        half = 0.5 * math.fsum(found[i] * found[j] * squares[i][j] for i in models for j in models)
        from_here = [math.fsum(found[j] * squares[i][j] for j in models) - half for i in models]
        nearness = [weight[i] / math.sqrt(s) if s > least else 0.0 for i, s in enumerate(from_here)]
        total = math.fsum(nearness)
        new = [n / total for n in nearness]
        here = next((i for i, s in enumerate(from_here) if s <= least), None)
        if (
            here is not None
        ):  # the mean lies on a model that is not the median: away from it, by Vardi and Zhang
            pull, own = pulls[here]
            stays = min(own / pull, 1.0)
            new = [(1.0 - stays) * n + stays * (i == here) for i, n in enumerate(new)]
        change = max(abs(a - b) for a, b in zip(new, found, strict=True))
        found = new
        if change <= tolerance:
            break
    return np.array(found)


def _square(gram: tuple[tuple[float, ...], ...], i: int, j: int, largest: float) -> float:
    """The squared distance of two models, as a share of the largest squared length; 0 if it is rounding."""
    own, other = gram[i][i] / largest, gram[j][j] / largest
    square = math.fsum((own, other, -2.0 * (gram[i][j] / largest)))
    return square if square > NOTHING * (own + other) else 0.0


def _pull(weight: tuple[float, ...], squares: Squares, at: int) -> tuple[float, float]:
    """How strongly the other models pull at the place of one, ``|sum_i w_i (x_i - x)/|x_i - x||``, and the weight of
    all models at that place."""
    apart = [i for i in range(len(weight)) if squares[at][i]]
    lengths = {i: math.sqrt(squares[at][i]) for i in apart}
    square = math.fsum(
        weight[i]
        * weight[j]
        * (squares[at][i] + squares[at][j] - squares[i][j])
        / (2.0 * lengths[i] * lengths[j])
        for i in apart
        for j in apart
    )
    own = math.fsum(w for i, w in enumerate(weight) if i not in lengths)
    return math.sqrt(max(square, 0.0)), own
