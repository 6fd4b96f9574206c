"""Iso-CTS: gives the common directions of the task vectors and those of single ones the same length."""

from __future__ import annotations

import numpy as np

from alnico.methods.base import Matrices, MatrixMethod, Merge, PerModel, Proportion, Share, each, method
from alnico.methods.shared.others import Embeddings, Others, merge_others, merge_trivially
from alnico.methods.shared.singular_vectors import Calibrate, orthogonalize, scale_of, takes_part
from alnico.methods.shared.weighted_matrices import WeightedMatrices, weighted_matrices
from alnico.numerics.arrays import AnyArray, largest, norm, zeros
from alnico.numerics.decompositions import LEAST, count_decomposing, leading_vectors
from alnico.numerics.low_rank import Decomposed


@method(
    space="delta",
    source="Marczak et al. 2025, No task left behind, https://arxiv.org/abs/2502.04959, algorithm 2",
    presets={"paper": {"calibrate": "none", "scale": 1.0, "common": 0.8, "least": 0.0}},
)
def iso_cts(
    *,
    weight: PerModel[float] = each(1.0),
    scale: float = 2.0,
    calibrate: Calibrate = "projection",
    common: Share = 0.8,
    least: Proportion = 0.01,
    others: Others = "mean",
    others_scale: float = 0.5,
    embeddings: Embeddings = "others",
) -> Merge | MatrixMethod:
    """Take the leading directions of the sum and those of each task vector that they lack, and make all equally long.

    For the task vectors ``D_i`` (outputs, inputs) of one matrix, each times its weight, N models and ``r = min(rows, columns)``: the
    first ``common * r`` singular vectors ``U_0, V_0`` and values of ``sum_i D_i``, a few more so that the rest divides by N; the first ``(1 -
    common) * r / N`` singular vectors ``U_i, V_i`` and values of each ``D_i - U_0 U_0^T D_i``; ``U = polar[U_1 ... U_N U_0]`` and
    ``V = polar[V_1 ... V_N V_0]``, where ``polar(X)`` is the nearest matrix with orthonormal columns; ``X = mean(S) * U V^T`` with the mean
    of all these singular values, and ``out = base + scale * c * X``. The projection scale ``c = sum_i |D_i|^2 / sum_i <X, D_i>`` is one number per
    matrix.

    Use when: many models of different tasks were tuned from one base, and single tasks are lost in ``iso_c``. It takes longest of
        these methods. On the tasks of docs/quality.md it is near ``tsv`` with the right scale.
    Start with: {scale: 2}

    Options:
        weight: a model's coefficient, any number: it multiplies the model's task vector. A model of weight 0 takes no part.
        scale: the factor on the whole merged task vector (``lambda`` in YAML), any number. A scale of 1 is a trap: on the eight
            tasks of docs/quality.md it is 4 points below the default of 2 with ``calibrate: projection``, and 13 points below
            the best scale, 3.8, without. Papers tune it.
        calibrate: ``projection`` multiplies each matrix by its projection scale c, ``none`` (the paper) by 1.
        common: the share of r singular vectors that come from the sum, in (0, 1]; the paper uses 0.8.
        least: directions with a smaller singular value in the stacked vectors are left out, in [0, 1]. 0 leaves out rounding
            errors only.
        others: how tensors that are no matrices are merged: their ``mean`` (the paper), their ``sum``, as in the ``base``,
            or by a method with its defaults, such as ``ties``.
        others_scale: a further factor on these tensors, any number; 0.5 takes the default of ``scale`` off them.
        embeddings: ``others`` merges tables of tokens and positions, and token heads, like other tensors; ``matrix``
            as matrices.
    Presets:
        paper: no projection scale, no direction left out, and a scale of 1, which the paper then tunes on validation data.
    Shapes: k matrices (rows, columns) in, one out; any number of models besides the base. A convolution kernel is a matrix
        (outputs, inputs x kernel); stacks of matrices, such as experts, are merged matrix by matrix.
    Measures: four passes over the models and the base, a decomposition per model and matrix, one of the sum and two polar factors,
        in float64. Memory: four matrices, twice the smaller side of singular vectors, and six squares of that side, in float64.
        Grain: tensor.
    Edge cases: task vectors that cancel each other leave the directions of each; a task vector within the common directions adds
        none; singular values up to a millionth of the largest count as 0; exact copies count as one model with the mean of their
        weights, near ones as two, which is said; where c cannot be computed it is 1, which is said. A single model is not itself.
    Errors: MethodError for options outside their range. ResourceError for a matrix that does not fit the budget.
    Differs from the source: the projection scale, and a scale of 2 (``preset: paper`` has neither); null directions are left out, where the paper
        fills them with arbitrary ones; weights. The first singular vectors that are left out of the outputs are those of the model's outputs
        for weights that are stored transposed, too.
    Source: Marczak et al. 2025, https://arxiv.org/abs/2502.04959, algorithm 2; the projection scale is alnico's.

    >>> iso_cts.bind({}, 2).arguments[3:], iso_cts.bind({"scale": 0.0}, 2).copies
    ((0.8, 0.01), 'base')
    """
    if (trivial := merge_trivially(weight, scale)) is not None:
        return trivial
    return MatrixMethod(
        make,
        count_numbers,
        merge_others(others, weight, scale * others_scale),
        (tuple(weight), scale, calibrate, common, least),
        operations=count_operations,
        takes_tables=embeddings == "matrix",
        takes_stacks=True,
        runs_on_gpu=True,
    )


def make(
    matrices: Matrices,
    weight: tuple[float, ...],
    scale: float,
    calibrate: Calibrate,
    common: float,
    least: float,
) -> AnyArray:
    """The matrix that is added to the base."""

    def compute() -> tuple[AnyArray, ...]:
        weighted = weighted_matrices(matrices, weight)
        merged = make_isotropic(weighted, common, least)
        return merged, np.array(scale_of(matrices, calibrate, lambda: merged, weighted))

    used = takes_part(weight)
    name = ("iso_cts", calibrate, common, least, tuple(weight[i] for i in used))
    merged, factor = matrices.kept(name, used, compute)
    return merged * (scale * float(factor))


def make_isotropic(weighted: WeightedMatrices, common: float, least: float) -> AnyArray:
    """Return ``mean(S) * U V^T`` over the common directions and those of single matrices."""
    matrices = weighted.matrices
    of_all, of_each = common_and_own(common, min(matrices.whole), len(weighted.models))
    shared = leading_vectors(weighted.sum(), of_all)
    outputs = shared.turned().left if matrices.is_transposed else shared.left
    factors = []
    for value in weighted:
        value = value.T if matrices.is_transposed else value
        size = largest(value) or 1.0
        size *= norm(value / size)
        found = leading_vectors(value - outputs @ (outputs.T @ value), of_each)
        # What is left of a matrix within the common directions is rounding.
        rank = int((found.values > LEAST * size).sum())
        found = Decomposed(found.left[:, :rank], found.values[:rank], found.right[:rank])
        factors.append(found.turned() if matrices.is_transposed else found)
    factors.append(shared)
    vectors = orthogonalize(factors, least)
    if not len(vectors.values):
        return zeros(vectors.left, matrices.shape)
    return (vectors.left * float(vectors.values.mean())) @ vectors.right


def common_and_own(common: float, side: int, models: int) -> tuple[int, int]:
    """Return how many singular vectors come from the sum, and how many from each of the models.

    >>> common_and_own(0.8, 100, 8), common_and_own(1.0, 100, 8), common_and_own(0.8, 1, 3)
    ((84, 2), (100, 0), (1, 0))
    """
    own = (side - int(common * side)) // max(models, 1)
    return side - own * models, own


def count_numbers(rows: int, columns: int, _models: int, weight: tuple[float, ...], *_: object) -> int:
    """The most float64 numbers held at once."""
    side = max(min(rows, columns), sum(w != 0 for w in weight))
    return 4 * rows * columns + 3 * (rows + columns) * side + 6 * side**2


def count_operations(
    rows: int,
    columns: int,
    _models: int,
    weight: tuple[float, ...],
    _scale: float,
    _calibrate: Calibrate,
    common: float,
    *_: object,
) -> float:
    """Floating-point operations: decompositions, projections on the common directions, and two polar factors."""
    models = sum(w != 0 for w in weight)
    side = min(rows, columns)
    of_all, of_each = common_and_own(common, side, models)
    decompose = count_decomposing(rows, columns, of_all) + models * count_decomposing(rows, columns, of_each)
    projected = 4.0 * models * rows * columns * of_all
    return (
        decompose
        + projected
        + (rows + columns) * 4.0 * side**2
        + 2 * 9.0 * side**3
        + 4.0 * rows * columns * side
    )
