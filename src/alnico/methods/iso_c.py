"""Iso-C: gives all directions of the sum of the task vectors the same length."""

from __future__ import annotations

import numpy as np

from alnico.methods.base import Matrices, MatrixMethod, Merge, PerModel, each, method
from alnico.methods.shared.others import Embeddings, Others, merge_others, merge_trivially
from alnico.methods.shared.singular_vectors import Calibrate, scale_of
from alnico.methods.shared.weighted_matrices import weighted_matrices
from alnico.numerics.arrays import AnyArray, library_of
from alnico.numerics.decompositions import leading_vectors


@method(
    space="delta",
    source="Marczak et al. 2025, No task left behind, https://arxiv.org/abs/2502.04959, algorithm 1",
    presets={"paper": {"calibrate": "none", "scale": 1.0}},
)
def iso_c(
    *,
    weight: PerModel[float] = each(1.0),
    scale: float = 2.0,
    calibrate: Calibrate = "projection",
    others: Others = "mean",
    others_scale: float = 0.5,
    embeddings: Embeddings = "others",
) -> Merge | MatrixMethod:
    """Add up the task vectors, and replace all singular values of the sum by their mean.

    For the task vectors ``D_i`` of one matrix: ``sum_i weight_i * D_i = U S V^T``, ``X = mean(S) * U V^T`` and
    ``out = base + scale * c * X``. The projection scale ``c = sum_i |weight_i D_i|^2 / sum_i <X, weight_i D_i>`` is one number per matrix.

    Use when: many models of different tasks were tuned from one base, and the cost counts: it needs one decomposition per
        matrix, where ``tsv`` needs one per model. On the tasks of docs/quality.md it is a point behind ``tsv``; on public language models
        it does worse than a sum (arXiv 2511.21437).
    Start with: {scale: 2}

    Options:
        weight: a model's coefficient, any number: it multiplies the model's task vector. A model of weight 0 takes no part.
        scale: the factor on the whole merged task vector (``lambda`` in YAML), any number. A scale of 1 is a trap: on the eight
            tasks of docs/quality.md it is 3 points below the default of 2 with ``calibrate: projection``, and 10 points below
            the best scale, 3.8, without. Papers tune it.
        calibrate: ``projection`` multiplies each matrix by its projection scale c, ``none`` (the paper) by 1.
        others: how tensors that are no matrices are merged: their ``mean`` (the paper), their ``sum``, as in the ``base``,
            or by a method with its defaults, such as ``ties``.
        others_scale: a further factor on these tensors, any number; 0.5 takes the default of ``scale`` off them.
        embeddings: ``others`` merges tables of tokens and positions, and token heads, like other tensors; ``matrix``
            as matrices.
    Presets:
        paper: no projection scale, and a scale of 1, which the paper then tunes on validation data.
    Shapes: k matrices (rows, columns) in, one out; any number of models besides the base. A convolution kernel is a matrix
        (outputs, inputs x kernel); stacks of matrices, such as experts, are merged matrix by matrix.
    Measures: three passes over the models and the base, and one decomposition per matrix, in float64. Memory: four matrices, their
        singular vectors twice, and five squares of the smaller side, in float64. Grain: tensor.
    Edge cases: task vectors that cancel each other give the base; singular values up to a millionth of the largest count as 0; exact
        copies count as one model with the mean of their weights, near ones as two, which is said; where c cannot be computed it is 1,
        which is said. A single model is not itself: its singular values become equal.
    Errors: MethodError for options outside their range. ResourceError for a matrix that does not fit the budget.
    Differs from the source: the projection scale, and a scale of 2 (``preset: paper`` has neither); the mean and ``U V^T`` are over the numerical
        rank of the sum, where the paper takes all directions, of which those of zeros are arbitrary; weights.
    Source: Marczak et al. 2025, https://arxiv.org/abs/2502.04959, algorithm 1; the projection scale is alnico's.

    >>> iso_c.bind({}, 2).arguments, iso_c.bind({"scale": 0.0}, 2).copies
    (((1.0, 1.0), 2.0, 'projection'), 'base')
    """
    if (trivial := merge_trivially(weight, scale)) is not None:
        return trivial
    return MatrixMethod(
        make,
        lambda rows, columns, *_: (
            4 * rows * columns + 2 * (rows + columns) * min(rows, columns) + 5 * min(rows, columns) ** 2
        ),
        merge_others(others, weight, scale * others_scale),
        (tuple(weight), scale, calibrate),
        operations=count_operations,
        takes_tables=embeddings == "matrix",
        takes_stacks=True,
        runs_on_gpu=True,
    )


def make(matrices: Matrices, weight: tuple[float, ...], scale: float, calibrate: Calibrate) -> AnyArray:
    """The matrix that is added to the base."""

    def compute() -> tuple[AnyArray, ...]:
        weighted = weighted_matrices(matrices, weight)
        merged = isotropic(weighted.sum())
        return merged, np.array(scale_of(matrices, calibrate, lambda: merged, weighted))

    used = tuple(i for i, w in enumerate(weight) if w)
    merged, factor = matrices.kept(("iso_c", calibrate, tuple(weight[i] for i in used)), used, compute)
    return merged * (scale * float(factor))


def isotropic(matrix: AnyArray) -> AnyArray:
    """Return ``mean(S) * U V^T`` of a matrix ``U S V^T``, over its numerical rank.

    >>> isotropic(np.diag([3.0, 1.0, 0.0])).tolist()
    [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    """
    found = leading_vectors(matrix, min(matrix.shape))
    if not found.rank:
        return library_of(matrix).zeros_like(matrix)
    return (found.left * float(found.values.mean())) @ found.right


def count_operations(rows: int, columns: int, *_: object) -> float:
    """Floating-point operations: products, and eigenvectors of a symmetric matrix (about 9 n^3)."""
    side = min(rows, columns)
    return 6.0 * rows * columns * side + 9.0 * side**3
