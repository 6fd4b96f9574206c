"""RegMean: merges linear layers by least squares."""

from typing import Annotated, Literal

import numpy as np

from alnico.errors import MethodError
from alnico.methods.base import (
    Between,
    MatrixMethod,
    MatrixReader,
    Merge,
    PerModel,
    Recorded,
    Side,
    Statistics,
    combine,
    each,
    method,
    total_weight,
)  # fmt: skip
from alnico.numerics.arrays import AnyArray, copy_of, library_of, set_diagonal


@method(
    space="weight",
    source="Jin et al. 2023, Dataless knowledge fusion by merging weights of language models, https://arxiv.org/abs/2212.09849",
)
def regmean(
    *,
    gram: PerModel[Statistics],
    weight: PerModel[Annotated[float, Between(0)]] = each(1.0),
    alpha: Annotated[float, Between(0, 1)] = 0.9,
    ridge: Annotated[float, Between(0, 1)] = 1e-6,
    normalize: bool = False,
    vectors: Literal["mean", "inputs"] = "mean",
) -> MatrixMethod:
    """Merge each linear layer so that its outputs stay near those of every model, on that model's own inputs.

    ``out = (sum_i weight_i * W_i G_i) (sum_i weight_i * G_i)^-1`` for matrices W (outputs, inputs), where
    ``G_i = alpha * X_i^T X_i + (1 - alpha) * diag(X_i^T X_i) + ridge * mean(diag(X_i^T X_i)) * I`` and X_i
    are the inputs of that layer in model i, measured on its data by ``alnico statistics gram``. Everything
    else is the weighted mean. With the statistics of ``alnico statistics gram --plus`` it is RegMean++.

    With ``vectors: inputs`` (LOT) the same least squares merge scales of norms, and biases of norms and linear layers, entry
    by entry: ``out = (sum_i weight_i * s_i * v_i) / (sum_i weight_i * s_i)``, where v_i is the entry in model i and s_i the
    sum of the squares of what it multiplies: normalised inputs for a scale, 1 for a bias.

    Use when: models of different tasks were tuned from one base, and you have some data of each, without
        labels. Papers find it better than Fisher merging and task arithmetic on encoders; MergeBench ranks it
        among the best for large language models.

    Options:
        gram: the directory that ``alnico statistics gram`` wrote for the model.
        weight: a model's coefficient, at least 0.
        alpha: how much the entries off the diagonal count, in [0, 1]; the paper uses 0.9, and 0.1 for DeBERTa
            and T5. 0 weighs each column of a matrix on its own.
        ridge: the number added to the diagonal, as a share of its mean, in [0, 1]; without it, inputs in a
            subspace have no unique solution.
        normalize: divide each model's matrix by its number of rows (tokens), so that more data does not weigh
            more.
        vectors: how scales of norms and biases are merged: by their mean (RegMean), or by their inputs (LOT), which needs
            statistics of ``alnico statistics gram --vectors``.
    Shapes: k matrices (rows, columns) and k Gram matrices (inputs, inputs) in, one matrix out; any number of
        models.
    Measures: one pass over the models and their statistics, and one linear system per matrix, in
        float64. Memory: three matrices and two Gram matrices in float64. Grain: tensor.
    Edge cases: matrices that are equal in all models keep their bits; the weighted mean is used where all
        Gram matrices are 0, for entries whose sums of squares are 0 in all models, and for tensors that the
        statistics of a model lack (embeddings, and without vectors norms and biases). A column whose inputs
        are always 0 is a mean weighted by the models' ridges.
    Errors: MethodError if all weights are 0. MismatchError for statistics of another model.
        ResourceError for a matrix that does not fit the budget.
    Differs from the source: a ridge is added; the authors' code inverts the sum without it. It is part of
        each model's G, so that equal models stay as they are. LOT merges task vectors, which gives the same: the base
        cancels. Matrix and bias of a layer are merged one by one, not as one system.
    Source: Jin et al. 2023, https://arxiv.org/abs/2212.09849, equation 2 and section 3.3; Nguyen et al. 2025
        (RegMean++), https://arxiv.org/abs/2508.03121; Sun et al. 2025 (LOT), https://arxiv.org/abs/2505.23859.

    >>> regmean.bind({"gram": ("one", "other"), "weight": (1.0, 3.0)}, 2).otherwise.arguments
    ((0.25, 0.75),)
    """
    total = total_weight(weight, " of regmean")
    mean = combine(tuple(w / total for w in weight), fixes_equal_inputs=True)
    rows = Recorded("gram", "rows") if normalize else (1.0,) * len(weight)
    return MatrixMethod(
        solve,
        lambda rows, columns, _models, _weight, _rows, is_transposed, *_: (
            3 * rows * columns + 2 * (rows if is_transposed[0] else columns) ** 2
        ),
        mean,
        (tuple(weight), rows, Recorded("gram", "is_transposed"), alpha, ridge),
        sides=("gram",),
        fixes_equal_inputs=True,
        runs_on_gpu=True,
        vectors=_by_inputs(weight, rows, mean) if vectors == "inputs" else None,
    )


def _by_inputs(weight: tuple[float, ...], rows: tuple[float, ...] | Recorded, mean: Merge) -> Merge:
    """The least squares of one entry of a vector; the side inputs are the sums of the squares of what it multiplies."""

    def mix(value, squares, weight, rows, share):
        weighted = 0.0
        total = 0.0
        plain = 0.0
        for i in range(len(value)):
            part = weight[i] * squares[i] / rows[i]
            weighted += part * value[i]
            total += part
            plain += share[i] * value[i]
        return weighted / total if total > 0 else plain

    return Merge(
        mix,
        (Side("gram"), tuple(weight), rows, tuple(w / sum(weight) for w in weight)),
        fixes_equal_inputs=True,
        is_wide=True,
        otherwise=mean,
    )


def solve(
    matrices: MatrixReader,
    weight: tuple[float, ...],
    rows: tuple[float, ...],
    is_transposed: tuple[float, ...],
    alpha: float,
    ridge: float,
) -> AnyArray:
    """The merged matrix, from k matrices and k Gram matrices. ``is_transposed``: matrices are (inputs,
    outputs), as in GPT-2."""
    inner: AnyArray = np.zeros(())
    outer: AnyArray = np.zeros(())
    for i in range(matrices.models):
        gram = matrices.side("gram", i)
        diagonal = copy_of(gram.diagonal())
        gram *= weight[i] / rows[i] * alpha
        set_diagonal(gram, weight[i] / rows[i] * (diagonal + ridge * diagonal.mean()))
        value = matrices.value(i)
        product = gram @ value if is_transposed[i] else value @ gram
        del value
        if i:
            inner += gram
            outer += product
        else:
            inner, outer = gram, product
        del gram, product
    if not inner.any():
        for i in range(matrices.models):
            outer += weight[i] / sum(weight) * matrices.value(i)
        return outer
    linear = library_of(inner).linalg
    try:
        # LU: numpy has no triangular solve, and without it Cholesky is not faster.
        return linear.solve(inner, outer) if is_transposed[0] else linear.solve(inner, outer.T).T
    except linear.LinAlgError:
        raise MethodError(
            f"the sum of the Gram matrices has no inverse; ridge is {ridge:g}, alpha {alpha:g}. Raise ridge, or measure more examples."
        ) from None
