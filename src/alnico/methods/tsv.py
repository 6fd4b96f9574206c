"""TSV-M: adds the leading singular vectors of all task vectors, made orthogonal to each other."""

from __future__ import annotations

import numpy as np

from alnico.methods.base import Matrices, MatrixMethod, Merge, PerModel, Proportion, Share, each, method
from alnico.methods.shared import singular_vectors
from alnico.methods.shared.elect import sum_all
from alnico.methods.shared.others import Embeddings, Others, merge_others, merge_trivially
from alnico.methods.shared.singular_vectors import (
    Calibrate,
    StackedVectors,
    WeightedSum,
    distinct_factors,
    first_of,
    orthogonalize,
    rank_of_each,
    scale_of,
    takes_part,
)
from alnico.methods.shared.sparsify import keep_all
from alnico.numerics.arrays import AnyArray
from alnico.numerics.decompositions import count_decomposing


@method(
    space="delta",
    source="Gargiulo et al. 2025, Task singular vectors, https://arxiv.org/abs/2412.00081, algorithm 1",
    presets={"paper": {"calibrate": "none", "rank": 1.0, "least": 0.0}},
)
def tsv(
    *,
    weight: PerModel[float] = each(1.0),
    scale: float = 1.0,
    calibrate: Calibrate = "projection",
    rank: Share = 1.0,
    least: Proportion = 0.01,
    others: Others = "mean",
    others_scale: float = 1.0,
    embeddings: Embeddings = "others",
) -> Merge | MatrixMethod:
    """Keep the leading singular vectors of each task vector, make them orthogonal to each other, and add them up.

    For the task vectors ``D_i`` of one matrix, N models and ``r = min(rows, columns)``: ``D_i = U_i S_i V_i^T``, cut to the
    first ``k = rank * r / N`` singular vectors; ``U = polar[U_1 ... U_N]`` and ``V = polar[V_1 ... V_N]``, where
    ``polar(X) = P Q^T`` for ``X = P S Q^T`` is the nearest matrix with orthonormal columns; ``T_i = U^(i) S_i V^(i)^T`` with
    the columns of model i; ``out = base + scale * c * sum_i weight_i * T_i``. The projection scale ``c = sum_i |D_i|^2 /
    sum_ij <T_j, D_i>`` is one number per matrix. It gives the sum back the length that the cut and the polar factor took.

    Use when: models of different tasks were tuned from one base, and you have no data to tune a merge with. On the tasks
        of docs/quality.md it keeps more of the specialists than every method that merges entry by entry, however
        those are tuned.
    Start with: {scale: 1}

    Options:
        weight: a model's coefficient, any number: it multiplies the model's part T_i. A model of weight 0 takes no part.
        scale: the factor on the whole merged task vector (``lambda`` in YAML), any number. With ``calibrate:
            projection``, 1 is the best scale or near it; without, papers tune it between 1 and 2.
        calibrate: ``projection`` multiplies each matrix by its projection scale c, ``none`` (the paper) by 1.
        rank: the share of r/N singular vectors that is kept of each model, in (0, 1]; at least one is kept.
        least: directions with a smaller singular value in the stacked vectors are left out, in [0, 1]; two unit vectors
            at an angle t differ in a direction of ``sqrt(1 - cos t)``. 0 leaves out rounding errors only.
        others: how tensors that are no matrices are merged: their ``mean`` (the paper), their ``sum``, as in the ``base``,
            or by a method with its defaults, such as ``ties``.
        others_scale: a further factor on these tensors, any number.
        embeddings: ``others`` merges tables of tokens and positions, and token heads, like other tensors; ``matrix``
            as matrices.
    Presets:
        paper: no projection scale, all of r/N, no direction left out.
    Shapes: k matrices (rows, columns) in, one out; any number of models besides the base. A convolution kernel is a matrix
        (outputs, inputs x kernel); stacks of matrices, such as experts, are merged matrix by matrix.
    Measures: two passes over the models and the base, a decomposition per model and matrix and two polar factors, in
        float64. Memory: the singular vectors of all models, with two matrices, or with one and five squares of the
        smaller side, in float64. Grain: tensor.
    Edge cases: a task vector of zeros takes no part; singular values up to a millionth of the largest count as 0, so that
        adapters have no arbitrary directions; exact copies count as one model with the mean of their weights, and near ones as two, which is said;
        where task vectors cancel each other, c cannot be computed and is 1, which is said; one model at weight 1 and rank
        1 is copied.
    Errors: MethodError for options outside their range. ResourceError for a matrix that does not fit the budget.
    Differs from the source: the projection scale (``calibrate: none`` leaves it out); null directions are left out,
        where the paper fills them with arbitrary ones; weights; embeddings are averaged, as everything that is no matrix.
    Source: Gargiulo et al. 2025, https://arxiv.org/abs/2412.00081, algorithm 1; the projection scale is alnico's.

    >>> tsv.bind({}, 1).copies, tsv.bind({"weight": 0.0}, 2).copies
    (0, 'base')
    """
    if (trivial := merge_trivially(weight, scale)) is not None:
        return trivial
    if len(weight) == 1 and scale * weight[0] == 1 and rank == 1 and others_scale == 1:
        return sum_all(keep_all(1), (1.0,), 1.0, "none")
    return MatrixMethod(
        make,
        count_numbers,
        merge_others(others, weight, scale * others_scale),
        (weight, scale, calibrate, rank, least),
        operations=count_operations,
        takes_tables=embeddings == "matrix",
        takes_stacks=True,
        runs_on_gpu=True,
        parts=parts,
    )


BoundOptions = tuple[tuple[float, ...], float, Calibrate, float, float]


def make(matrices: Matrices, *arguments: *BoundOptions) -> AnyArray:
    """The matrix that is added to the base."""
    return weighted_vectors(matrices, *arguments).merged()


def parts(matrices: Matrices, *arguments: *BoundOptions) -> list[AnyArray]:
    """Each model's part of :func:`make`, with its weight."""
    return weighted_vectors(matrices, *arguments).of_models(matrices.shape)


def weighted_vectors(
    matrices: Matrices,
    weight: tuple[float, ...],
    scale: float,
    calibrate: Calibrate,
    rank: float,
    least: float,
) -> WeightedSum:
    """The orthogonal singular vectors of the models that take part, and their weights."""
    used = takes_part(weight)

    def compute() -> tuple[AnyArray, ...]:
        factors, place = distinct_factors(matrices, used, rank)
        distinct = len(factors)
        vectors = orthogonalize(factors, least, clear=True)
        factor = scale_of(
            matrices,
            calibrate,
            lambda: vectors.sum([1.0] * distinct),
            (matrices.value(used[i]) for i in first_of(place)),
        )
        return *vectors.arrays(), place, np.array(factor)

    *arrays, place, factor = matrices.kept(("tsv", calibrate, rank, least), used, compute)
    return WeightedSum(StackedVectors(*arrays), weight, place, scale * float(factor))


def count_numbers(
    rows: int,
    columns: int,
    _models: int,
    weight: tuple[float, ...],
    _scale: float,
    _calibrate: Calibrate,
    rank: float,
    *_: object,
) -> int:
    """The most float64 numbers held at once."""
    return singular_vectors.count_numbers(rows, columns, sum(w != 0 for w in weight), rank)


def count_operations(
    rows: int,
    columns: int,
    _models: int,
    weight: tuple[float, ...],
    _scale: float,
    _calibrate: Calibrate,
    rank: float,
    *_: object,
) -> float:
    """Floating-point operations: decompositions, products, and two polar factors."""
    models = sum(w != 0 for w in weight)
    side = min(rows, columns)
    count = rank_of_each(rank, rows, columns, models)
    stacked = min(models * count, max(side, models))
    decompose = models * count_decomposing(rows, columns, count)
    polar = (rows + columns) * 3.0 * stacked**2 + 2 * 10.0 * stacked**3
    return decompose + polar + 4.0 * rows * columns * stacked
