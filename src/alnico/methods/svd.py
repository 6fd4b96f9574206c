"""SVD: adds up task vectors that are cut to their leading singular vectors."""

from __future__ import annotations

import numpy as np

from alnico.methods.base import Matrices, MatrixMethod, Merge, PerModel, Share, each, method
from alnico.methods.shared.elect import sum_all
from alnico.methods.shared.others import Embeddings, Others, merge_others, merge_trivially
from alnico.methods.shared.singular_vectors import (
    Calibrate,
    StackedVectors,
    WeightedSum,
    distinct_factors,
    first_of,
    scale_of,
    stack_vectors,
    takes_part,
)
from alnico.methods.shared.sparsify import keep_all
from alnico.numerics.arrays import AnyArray, to_numpy
from alnico.numerics.low_rank import Decomposed, choose_rank


@method(space="delta", source="Eckart and Young 1936, https://doi.org/10.1007/BF02288367")
def svd(
    *,
    weight: PerModel[float] = each(1.0),
    scale: float = 1.0,
    calibrate: Calibrate = "none",
    rank: Share = 1.0,
    energy: Share = 1.0,
    others: Others = "sum",
    others_scale: float = 1.0,
    embeddings: Embeddings = "others",
) -> Merge | MatrixMethod:
    """Cut each task vector to its leading singular vectors, and add them up.

    For the task vectors ``D_i`` of one matrix, N models and ``r = min(rows, columns)``: ``D_i = U_i S_i V_i^T``, cut to the
    first ``k = rank * r / N`` singular vectors, or to as few as have the share ``energy`` of ``sum S_i^2``; with these ``T_i``, ``out = base +
    scale * c * sum_i weight_i * T_i``. The projection scale ``c = sum_i |D_i|^2 / sum_ij <T_j, D_i>`` is one number per matrix.

    Use when: you want to know what the leading singular vectors alone do, without the rest of ``tsv``; or a model should be cut to a low rank: one
        model with ``rank: 0.1`` is its base and a tenth of its singular vectors. As a merge it is task arithmetic of cut task vectors.
    Start with: {scale: 0.5}

    Options:
        weight: a model's coefficient, any number: it multiplies the model's part T_i. A model of weight 0 takes no part.
        scale: the factor on the whole merged task vector (``lambda`` in YAML), any number; as in ``task_arithmetic``, the more models, the
            smaller the best scale.
        calibrate: ``projection`` multiplies each matrix by its projection scale c, ``none`` by 1.
        rank: the share of r/N singular vectors that is kept of each model, in (0, 1]; at least one is kept.
        energy: the share of the squares of the singular values that is kept of each model, in (0, 1]; at least one vector is kept, and at most those of ``rank``.
        others: how tensors that are no matrices are merged: their ``mean``, their ``sum`` (as in task arithmetic), as in the ``base``, or by a method
            with its defaults, such as ``ties``.
        others_scale: a further factor on these tensors, any number.
        embeddings: ``others`` merges tables of tokens and positions, and token heads, like other tensors; ``matrix``
            as matrices.
    Shapes: k matrices (rows, columns) in, one out; any number of models besides the base. A convolution kernel is a matrix
        (outputs, inputs x kernel); stacks of matrices, such as experts, are merged matrix by matrix.
    Measures: one pass over the models and the base (two with ``calibrate: projection``), and a decomposition per model and matrix, in
        float64. Memory: two matrices, the singular vectors of all models twice, and five squares of the smaller side, in float64.
        Grain: tensor.
    Edge cases: a task vector of zeros adds nothing; singular values up to a millionth of the largest count as 0; exact
        copies count as one model with the mean of their weights, near ones as two, which is said; where task vectors cancel each
        other, c cannot be computed and is 1, which is said; one model at weight 1, rank 1 and energy 1 is copied.
    Errors: MethodError for options outside their range. ResourceError for a matrix that does not fit the budget.
    Differs from the source: it is about one matrix, which this adds up over models.
    Source: Eckart and Young 1936, The approximation of one matrix by another of lower rank, https://doi.org/10.1007/BF02288367.

    >>> svd.bind({}, 1).copies, svd.bind({"scale": 0.0}, 2).copies
    (0, 'base')
    """
    if (trivial := merge_trivially(weight, scale)) is not None:
        return trivial
    if len(weight) == 1 and scale * weight[0] == rank == energy == others_scale == 1:
        return sum_all(keep_all(1), (1.0,), 1.0, "none")
    return MatrixMethod(
        make,
        count_numbers,
        merge_others(others, weight, scale * others_scale),
        (tuple(weight), scale, calibrate, rank, energy),
        operations=count_operations,
        takes_tables=embeddings == "matrix",
        takes_stacks=True,
        runs_on_gpu=True,
        parts=parts,
    )


CutOptions = tuple[tuple[float, ...], float, Calibrate, float, float]


def make(matrices: Matrices, *arguments: *CutOptions) -> AnyArray:
    """The matrix that is added to the base."""
    return weighted_cuts(matrices, *arguments).merged()


def parts(matrices: Matrices, *arguments: *CutOptions) -> list[AnyArray]:
    """Each model's part of :func:`make`, with its weight."""
    return weighted_cuts(matrices, *arguments).of_models(matrices.shape)


def weighted_cuts(
    matrices: Matrices,
    weight: tuple[float, ...],
    scale: float,
    calibrate: Calibrate,
    rank: float,
    energy: float,
) -> WeightedSum:
    """The leading singular vectors of the models that take part, and their weights."""
    used = takes_part(weight)

    def compute() -> tuple[AnyArray, ...]:
        factors, place = distinct_factors(matrices, used, rank)
        first = [used[i] for i in first_of(place)]
        if energy < 1:
            factors = [cut(f, matrices.value(i), energy) for f, i in zip(factors, first, strict=True)]
        vectors = stack_vectors(factors)
        factor = scale_of(
            matrices, calibrate, lambda: vectors.sum([1.0] * len(factors)), map(matrices.value, first)
        )
        return *vectors.arrays(), place, np.array(factor)

    *arrays, place, factor = matrices.kept(("svd", calibrate, rank, energy), used, compute)
    return WeightedSum(StackedVectors(*arrays), weight, place, scale * float(factor))


def cut(found: Decomposed, matrix: AnyArray, energy: float) -> Decomposed:
    """Keep as few of the leading singular vectors as have the share ``energy`` of the squares of the whole matrix."""
    if not found.rank:
        return found
    values = to_numpy(found.values)
    unit = values[0]
    rest = max(float(((matrix / float(unit)) ** 2).sum()) - float(np.sum((values / unit) ** 2)), 0.0)
    count = max(choose_rank(Decomposed(found.left, values / unit, found.right, rest), None, energy), 1)
    return Decomposed(found.left[:, :count], found.values[:count], found.right[:count])


def count_numbers(rows: int, columns: int, _models: int, weight: tuple[float, ...], *_: object) -> int:
    """The most float64 numbers held at once."""
    side = max(min(rows, columns), sum(w != 0 for w in weight))
    return 2 * rows * columns + 3 * (rows + columns) * side + 5 * side**2


def count_operations(rows: int, columns: int, _models: int, weight: tuple[float, ...], *_: object) -> float:
    """Floating-point operations: products, and eigenvectors of symmetric matrices (about 9 n^3)."""
    models = sum(w != 0 for w in weight)
    side = min(rows, columns)
    return models * (2.0 * rows * columns * side + 9.0 * side**3) + 6.0 * rows * columns * side
