"""ResMerge: averages directions of task vectors without their leading singular vectors, for models tuned by RL."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np

from alnico.errors import MethodError
from alnico.methods.base import Between, Matrices, MatrixMethod, Merge, PerModel, each, method
from alnico.methods.shared.others import Embeddings, Others, merge_others, merge_trivially
from alnico.methods.shared.singular_vectors import takes_part
from alnico.numerics.arrays import AnyArray, inner_product, largest, norm, zeros
from alnico.numerics.decompositions import count_decomposing
from alnico.numerics.low_rank import Decomposed


@method(
    space="delta",
    source="Sun et al. 2026, ResMerge, https://arxiv.org/abs/2606.02252",
)
def resmerge(
    *,
    weight: PerModel[float] = each(1.0),
    scale: float = 1.0,
    head: Annotated[int, Between(1, 100_000)] = 1,
    budget: Annotated[float, Between(0)] = 0.2,
    beta_min: Annotated[float, Between(0)] = 0.7,
    beta_max: Annotated[float, Between(0)] = 1.0,
    others: Others = "mean",
    others_scale: float = 1.0,
    embeddings: Embeddings = "others",
) -> Merge | MatrixMethod:
    """Merge what is left of task vectors without their leading singular vectors, and add a little of those where they agree.

    For the task vectors ``D_i = weight_i * (model_i - base)`` of one matrix and N models: ``H_i`` are the first ``head`` singular
    vectors of D_i, ``R_i = D_i - H_i``, ``q_i = R_i / |R_i|``. With the coherence ``c = |sum_i q_i| / N`` and the mean cosine s of all
    pairs of the q_i: ``beta = beta_max - (beta_max - beta_min) * ((s + 1) / 2 + (c + 1) / 2) / 2`` and the residual
    ``A = c^beta * mean_i |R_i| * sum_i q_i / |sum_i q_i|``, or the mean of the R_i where ``c <= 1 / sqrt(N)`` (random directions).
    The head ``C = budget * a * |A| * mean_i H_i / |mean_i H_i|``, where a is the mean over all pairs of ``max(0, cos(H_i, H_j))``.
    ``out = base + scale * (A + C)``.

    Use when: models were tuned by reinforcement learning from one base, each for another ability. The authors find that the tail of the
        singular values carries their skills, which ``tsv`` and ``iso_c`` cut, and that the leading vectors conflict: better than both on
        groups of experts of 4 and 7 G parameters. For models tuned by examples start with ``tsv``.

    Options:
        weight: a model's coefficient, any number: it multiplies the model's task vector. A model of weight 0 takes no part.
        scale: the factor on the whole merged task vector (``lambda`` in YAML), any number.
        head: how many leading singular vectors are the head of a task vector, a whole number of at least 1.
        budget: the length of the head's part, as a share of the residual's, if all heads agree; at least 0.
        beta_min: the power of the coherence where the residuals agree, at least 0.
        beta_max: its power where they oppose each other, at least ``beta_min``. The larger the power, the shorter the merge of
            residuals that disagree.
        others: how tensors that are no matrices are merged: their ``mean`` (the paper), their ``sum``, as in the ``base``,
            or by a method with its defaults, such as ``ties``.
        others_scale: a further factor on these tensors, any number.
        embeddings: ``others`` merges tables of tokens and positions, and token heads, like other tensors (the paper); ``matrix``
            as matrices.
    Shapes: k matrices (rows, columns) in, one out; any number of models besides the base. A convolution kernel is a matrix
        (outputs, inputs x kernel); stacks of matrices, such as experts, are merged matrix by matrix.
    Measures: two passes over the models and the base, and the leading singular vectors of each model and matrix, in float64. Memory:
        four matrices, five squares of the smaller side and the heads of all models, in float64. Grain: tensor.
    Edge cases: a task vector of rank ``head`` or less has a residual of zeros, up to a millionth of it, which has no direction and counts in
        the means; where all are, the base stays, which is said. Task vectors of zeros have no head and do not count in a; copies count as
        often as they are listed. One model is not itself: its head gets the length ``budget * |R|``.
    Errors: MethodError for options outside their range, and for a ``beta_min`` above ``beta_max``. ResourceError for a matrix that does
        not fit the budget.
    Differs from the source: weights and a scale. The authors' program takes beta_max for matrices outside of attention and feed-forward
        layers, by their names; here all matrices are treated alike. It adds 1e-8 to lengths.
    Source: Sun et al. 2026, https://arxiv.org/abs/2606.02252, and the authors' program, https://github.com/sunyd0303-cpu/ResMerge-release.

    >>> resmerge.bind({}, 2).arguments
    ((1.0, 1.0), 1.0, 1, 0.2, 0.7, 1.0)
    """
    if beta_min > beta_max:
        raise MethodError(
            f"resmerge.beta_min is {beta_min:g} and beta_max {beta_max:g}; expected beta_min to be at most beta_max. Change one."
        )
    if (trivial := merge_trivially(weight, scale)) is not None:
        return trivial
    return MatrixMethod(
        make,
        count_numbers,
        merge_others(others, weight, scale * others_scale),
        (tuple(weight), scale, int(head), budget, beta_min, beta_max),
        operations=count_operations,
        takes_tables=embeddings == "matrix",
        takes_stacks=True,
        runs_on_gpu=True,
    )


def make(
    matrices: Matrices,
    weight: tuple[float, ...],
    scale: float,
    head: int,
    budget: float,
    beta_min: float,
    beta_max: float,
) -> AnyArray:
    """The matrix that is added to the base."""
    used = takes_part(weight)

    def compute() -> tuple[AnyArray, ...]:
        heads = [matrices.leading(i, head) for i in used]
        weights = [weight[i] for i in used]
        merged = _merged_residuals(matrices, used, weights, heads, beta_min, beta_max)
        length = budget * _agreement(heads, weights) * _length(merged)
        if length:
            total = zeros(merged, merged.shape)
            for w, found in zip(weights, heads, strict=True):
                if found.rank:
                    total += (found.left * (w * found.values)) @ found.right
            if size := _length(total):
                merged += total * (length / size)
        return (merged,)

    name = ("resmerge", head, budget, beta_min, beta_max, tuple(weight[i] for i in used))
    (merged,) = matrices.kept(name, used, compute)
    return merged * scale


def _merged_residuals(
    matrices: Matrices,
    used: tuple[int, ...],
    weights: list[float],
    heads: list[Decomposed],
    beta_min: float,
    beta_max: float,
) -> AnyArray:
    """The mean direction of the residuals at the length that their agreement gives it, or their mean."""
    directions: AnyArray = None
    mean: AnyArray = None
    lengths = []
    for i, w, found in zip(used, weights, heads, strict=True):
        residual = matrices.value(i)
        whole = _length(residual)
        if found.rank:
            residual -= (found.left * found.values) @ found.right
        residual *= w
        length = _length(residual)
        if not length > ROUNDING * (abs(w) * whole):  # the task vector is its head
            residual, length = zeros(residual, residual.shape), 0.0
        lengths.append(length)
        if directions is None:
            directions, mean = zeros(residual, residual.shape), zeros(residual, residual.shape)
        if length:
            directions += residual / length
        mean += residual / len(used)
        del residual
    if not any(lengths) and any(found.rank for found in heads):
        matrices.note("the task vectors are their heads alone, without a residual, so the base stays")
    models = len(used)
    along = _length(directions)
    coherence = min(along / models, 1.0)
    if coherence <= 1.0 / math.sqrt(models) and models > 1:
        return mean
    del mean
    pairs = models * (models - 1)
    directed = sum(length > 0 for length in lengths)
    # |sum q|^2 is the number of directions and twice the cosine of each pair.
    cosine = (along**2 - directed) / pairs if pairs else 1.0
    score = 0.5 * (0.5 * (min(max(cosine, -1.0), 1.0) + 1.0) + 0.5 * (coherence + 1.0))
    beta = beta_max - (beta_max - beta_min) * score
    return directions * (coherence**beta * float(np.mean(lengths)) / along if along else 0.0)


ROUNDING = 1e-6
"""A residual up to this share of its task vector is rounding, as are singular values up to this share of the largest."""


def _length(matrix: AnyArray) -> float:
    """The root of the sum of squares, of entries of any size."""
    most = largest(matrix)
    if not most or 1e-100 < most < 1e100:
        return norm(matrix)
    return norm(matrix / most) * most


def _agreement(heads: list[Decomposed], weights: list[float]) -> float:
    """The mean over pairs of the positive cosines of the heads that are not zeros; 1 for a single one, 0 for none."""
    there = [(h, math.copysign(1.0, w)) for h, w in zip(heads, weights, strict=True) if h.rank]
    lengths = [_length(h.values) for h, _ in there]
    if len(there) < 2:
        return float(len(there))
    total = 0.0
    for i, (one, sign) in enumerate(there):
        for j, (other, other_sign) in enumerate(there[:i]):
            inside = (one.left.T @ other.left) * (other.values / lengths[j])
            outside = (one.right @ other.right.T) * (one.values / lengths[i])[:, None]
            total += max(sign * other_sign * inner_product(inside, outside), 0.0)
    return min(total / (len(there) * (len(there) - 1) / 2), 1.0)


def count_numbers(
    rows: int, columns: int, _models: int, weight: tuple[float, ...], _scale: float, head: int, *_: object
) -> int:
    """The most float64 numbers held at once."""
    side = min(rows, columns)
    heads = sum(w != 0 for w in weight) * (rows + columns) * min(head, side)
    return 4 * rows * columns + 5 * side**2 + 2 * heads


def count_operations(
    rows: int, columns: int, _models: int, weight: tuple[float, ...], _scale: float, head: int, *_: object
) -> float:
    """Floating-point operations: the leading singular vectors of each model, and products with them."""
    models = sum(w != 0 for w in weight)
    count = min(head, rows, columns)
    return models * (count_decomposing(rows, columns, count) + 4.0 * rows * columns * count)
