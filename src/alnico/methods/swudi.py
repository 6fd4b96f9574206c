"""SWUDI: keeps each layer's outputs near every model's, on the inputs that its task vector responds to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np

from alnico.methods.base import Between, Matrices, MatrixMethod, Merge, PerModel, Share, each, method
from alnico.methods.shared.elect import sum_all
from alnico.methods.shared.others import Embeddings, Others, merge_others, merge_trivially
from alnico.methods.shared.singular_vectors import (
    Calibrate,
    StackedVectors,
    WeightedSum,
    distinct_factors,
    first_of,
    owners_of,
    rank_of_each,
    scale_of,
    takes_part,
)
from alnico.methods.shared.sparsify import keep_all
from alnico.numerics.arrays import AnyArray, concatenate, library_of, like, reversed_columns, to_numpy
from alnico.numerics.decompositions import LEAST, UNEVEN, count_decomposing
from alnico.numerics.low_rank import Decomposed

Vectors = Literal["leading", "all"]
"""The singular vectors of each task vector: the first ``rank * r / N``, or all."""

Filter = Literal["participation", "time", "all"]
"""Which input directions are solved: as many as take part; the first, as far as gradient descent gets; or all."""

Initial = Literal["sum", "mean", "zero"]
"""What the other directions have: the sum of the task vectors, their mean, or nothing."""


@method(
    space="delta",
    source="SWUDI 2026, https://arxiv.org/abs/2606.07289",
    presets={
        "paper": {"calibrate": "none", "vectors": "all", "filter": "participation"},
        "vision": {"calibrate": "none", "vectors": "all", "filter": "time", "time": 1300.0, "share": 0.65},
        "language": {"calibrate": "none", "vectors": "all", "filter": "time", "time": 300.0, "share": 0.85},
        "adapters": {"calibrate": "none", "vectors": "all", "filter": "time", "time": 300.0, "share": 0.01},
        "wudi": {"calibrate": "none", "vectors": "all", "filter": "all"},
    },
)
def swudi(
    *,
    weight: PerModel[float] = each(1.0),
    scale: float = 1.0,
    calibrate: Calibrate = "projection",
    vectors: Vectors = "leading",
    rank: Share = 1.0,
    filter: Filter = "participation",
    time: Annotated[float, Between(0, without_low=True)] = 300.0,
    share: Share = 0.65,
    initial: Initial = "sum",
    others: Others = "mean",
    others_scale: float = 1.0,
    embeddings: Embeddings = "others",
) -> Merge | MatrixMethod:
    """Solve for the matrix that changes each task vector's own inputs as that task vector does, where this is well determined.

    For the task vectors ``D_i`` (outputs, inputs) of one matrix: ``C = sum_i D_i^T D_i / |D_i|^2 = V L V^T`` (eigenvalues L,
    descending) and ``R_i = D_i D_i^T D_i / |D_i|^2``; for a filter f in [0, 1] of each eigenvector,
    ``T_i = D_i (I - V f V^T) + R_i V (f / L) V^T`` and ``out = base + scale * c * sum_i weight_i * T_i``. Where f is 1 this
    minimises ``sum_i |(X - D_i) D_i^T|^2 / |D_i|^2`` (WUDI); where it is 0 it is the sum of the task vectors. The projection scale ``c =
    sum_i |D_i|^2 / sum_ij <T_j, D_i>`` is one number per matrix.

    Use when: models of different tasks were tuned from one base, and you have no data to tune a merge with. On the tasks of
        docs/quality.md it is near ``tsv``, and varies more from one set of tasks to another.
    Start with: {scale: 1}

    Options:
        weight: a model's coefficient, any number: it multiplies the model's part T_i. A model of weight 0 takes no part.
        scale: the factor on the whole merged task vector (``lambda`` in YAML), any number.
        calibrate: ``projection`` multiplies each matrix by its projection scale c, ``none`` (the paper) by 1.
        vectors: ``leading`` cuts each task vector D_i to its first singular vectors, ``all`` (the paper) takes it whole.
        rank: with ``vectors: leading``, the share of r/N singular vectors that is kept of each of N models, in (0, 1], for
            ``r = min(rows, columns)``; at least one is kept.
        filter: ``participation`` has f = 1 on the first ``(sum sqrt L)^2 / sum L`` eigenvectors, rounded up (SWUDI-A);
            ``time`` has ``f = 1 - exp(-time * L)`` on a ``share`` of them; ``all`` has f = 1 on all (WUDI in closed form).
        time: with ``filter: time``, how long gradient descent runs, above 0.
        share: with ``filter: time``, the share of the inputs' dimensions that is solved, in (0, 1].
        initial: what directions with f = 0 have of the D_i in T_i: their ``sum``, their ``mean`` (each D_i divided by N), or
            ``zero``.
        others: how tensors that are no matrices are merged: their ``mean`` (the paper), their ``sum``, as in the ``base``,
            or by a method with its defaults, such as ``ties``.
        others_scale: a further factor on these tensors, any number.
        embeddings: ``others`` merges tables of tokens and positions, and token heads, like other tensors; ``matrix``
            as matrices, whose inputs are the columns.
    Presets:
        paper: SWUDI-A: no projection scale, all singular vectors.
        vision: as tuned for CLIP, time 1300 and share 0.65.
        language: as tuned for language models, time 300 and share 0.85.
        adapters: as tuned for adapters of a vision-language model, time 300 and share 0.01.
        wudi: WUDI in closed form: all directions, no projection scale.
    Shapes: k matrices (rows, columns) in, one out; any number of models besides the base. A convolution kernel is a matrix
        (outputs, inputs x kernel); stacks of matrices, such as experts, are merged matrix by matrix.
    Measures: two passes over the models and the base, a decomposition per model and matrix and one of their stacked
        singular vectors, in float64: of side r with leading vectors, of ``min(N r, inputs)`` with all. Memory: two matrices, the
        singular vectors of all models three times, and eight squares of that side, in float64. Grain: tensor.
    Edge cases: a task vector of zeros takes no part; eigenvectors with less than 1e-12 of the largest eigenvalue are not solved;
        exact copies count as one model with the mean of their weights, near ones as two, which is said; where task vectors cancel
        each other, c cannot be computed and is 1, which is said; one model is itself, and copied at weight 1 and rank 1.
    Errors: MethodError for options outside their range. ResourceError for a matrix that does not fit the budget.
    Differs from the source: the projection scale and leading singular vectors (``preset: paper`` has neither); weights; eigenvalues
        that are rounding errors are left out, where the authors' code raises them to 1e-8. Leading vectors lose 0.2 points of
        accuracy on the tasks of docs/quality.md, and no matrix of the longer side is formed.
    Source: SWUDI 2026, https://arxiv.org/abs/2606.07289; Cheng et al. 2025 (WUDI), https://arxiv.org/abs/2503.08099; the projection scale is
        alnico's.

    >>> swudi.bind({}, 1).copies, swudi.bind({"weight": 0.0}, 2).copies
    (0, 'base')
    """
    if (trivial := merge_trivially(weight, scale)) is not None:
        return trivial
    is_whole = vectors == "all" or rank == 1
    if len(weight) == 1 and scale * weight[0] == others_scale == 1 and is_whole and initial != "zero":
        return sum_all(keep_all(1), (1.0,), 1.0, "none")
    return MatrixMethod(
        make,
        count_numbers,
        merge_others(others, weight, scale * others_scale),
        (tuple(weight), scale, calibrate, None if vectors == "all" else rank, filter, time, share, initial),
        operations=count_operations,
        takes_tables=embeddings == "matrix",
        takes_stacks=True,
        runs_on_gpu=True,
        parts=parts,
    )


SolveOptions = tuple[tuple[float, ...], float, Calibrate, float | None, Filter, float, float, Initial]


def make(matrices: Matrices, *arguments: *SolveOptions) -> AnyArray:
    """The matrix that is added to the base."""
    return weighted_solution(matrices, *arguments).merged()


def parts(matrices: Matrices, *arguments: *SolveOptions) -> list[AnyArray]:
    """Each model's part of :func:`make`, with its weight."""
    return weighted_solution(matrices, *arguments).of_models(matrices.shape)


def weighted_solution(
    matrices: Matrices,
    weight: tuple[float, ...],
    scale: float,
    calibrate: Calibrate,
    rank: float | None,
    filter: Filter,
    time: float,
    share: float,
    initial: Initial,
) -> WeightedSum:
    """The parts of the models that take part, and their weights. ``rank`` None takes all singular vectors."""
    used = takes_part(weight)

    def compute() -> tuple[AnyArray, ...]:
        factors, place = distinct_factors(matrices, used, rank)
        if matrices.is_transposed:
            factors = [f.turned() for f in factors]
        first = {"sum": 1.0, "mean": 1.0 / len(factors), "zero": 0.0}[initial]
        inputs = matrices.whole[0 if matrices.is_transposed else 1]
        chosen = input_directions(factors, lambda squares: filtered(squares, inputs, filter, time, share))
        solved = solve(factors, *chosen, first)
        if matrices.is_transposed:
            solved = StackedVectors(solved.right.T, solved.values, solved.left.T, solved.owner)
        factor = scale_of(
            matrices,
            calibrate,
            lambda: solved.sum([1.0] * len(factors)),
            (matrices.value(used[i]) for i in first_of(place)),
        )
        return *solved.arrays(), place, np.array(factor)

    limits = (time, share) if filter == "time" else ()
    name = ("swudi", calibrate, rank, filter, *limits, initial)
    *arrays, place, factor = matrices.kept(name, used, compute)
    return WeightedSum(StackedVectors(*arrays), weight, place, scale * float(factor))


def unit_rows(factor: Decomposed) -> tuple[AnyArray, AnyArray]:
    """The singular values of ``D / |D|``, and the rows ``S V^T / |D|``, whose products are those of ``D / |D|``."""
    values = factor.values / factor.values[:1]
    values = values / library_of(values).linalg.norm(values)
    return values, values[:, None] * factor.right


def input_directions(
    factors: Sequence[Decomposed], chosen: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, AnyArray]:
    """Return the leading eigenvalues of ``C = sum_i D_i^T D_i / |D_i|^2``, their filter, and the eigenvectors as rows.

    ``chosen(eigenvalues)`` gives the filter of the first eigenvectors. ``C = B^T B`` with the rows ``S_i V_i^T / |D_i|`` of
    all models stacked in B, so the decomposition is of the smaller of C and ``B B^T``, which has a row per singular
    vector. Null directions are left out.
    """
    rows = concatenate([unit_rows(f)[1] for f in factors])
    inputs = rows.shape[1]
    if not len(rows):
        return np.zeros(0), np.zeros(0), rows
    is_wide = len(rows) < inputs
    linear = library_of(rows).linalg
    found, vectors = linear.eigh(rows @ rows.T if is_wide else rows.T @ rows)
    squares = to_numpy(found)
    squares = squares[squares > LEAST**2 * squares[-1]][::-1]
    kept = chosen(squares)
    squares, vectors = squares[: len(kept)], reversed_columns(vectors)[:, : len(kept)]
    if not is_wide:
        return squares, kept, vectors.T
    directions = rows.T @ vectors
    if squares.size and squares[-1] <= UNEVEN**2 * squares[0]:
        # Orthogonal only to rounding over the eigenvalue; a QR corrects each by those before it.
        directions = linear.qr(directions)[0]
    else:
        directions /= like(directions, np.sqrt(squares))
    return squares, kept, directions.T


def filtered(squares: np.ndarray, inputs: int, filter: Filter, time: float, share: float) -> np.ndarray:
    """The filter f of the eigenvectors whose f is not 0; they are the first.

    >>> filtered(np.float64([4.0, 1.0, 1.0, 0.0001]), 4, "participation", 0.0, 0.0)
    array([1., 1., 1.])
    """
    if filter == "all" or not len(squares):
        return np.ones(len(squares))
    if filter == "time":
        kept = squares[: int(share * inputs)]
        solved: np.ndarray = -np.expm1(-time * kept)
        return solved
    taking_part = float(np.sqrt(squares).sum() ** 2 / squares.sum())
    return np.ones(min(math.ceil(taking_part * (1 - 1e-9)), len(squares)))


def solve(
    factors: Sequence[Decomposed],
    squares: np.ndarray,
    kept: np.ndarray,
    directions: AnyArray,
    initial: float,
) -> StackedVectors:
    """Return ``T_i = initial * D_i (I - V f V^T) + R_i V (f / L) V^T`` of each model, as ``U_i`` times a right side.

    With ``D_i = U_i S_i V_i^T``: ``D_i V = U_i S_i Y_i`` and ``R_i V = U_i S_i^3 / |D_i|^2 Y_i`` for ``Y_i = V_i^T V``.
    """
    rights = []
    for f in factors:
        across = f.right @ directions.T
        unit, _ = unit_rows(f)
        solved, left_out = like(across, kept / squares), like(across, kept)
        change = unit[:, None] ** 2 * across * solved - initial * across * left_out
        rights.append(f.values[:, None] * (initial * f.right + change @ directions))
    right = concatenate(rights)
    return StackedVectors(
        concatenate([f.left for f in factors], 1), np.ones(len(right)), right, owners_of(factors)
    )


def count_numbers(
    rows: int,
    columns: int,
    _models: int,
    weight: tuple[float, ...],
    _scale: float,
    _calibrate: Calibrate,
    rank: float | None,
    *_: object,
) -> int:
    """The most float64 numbers held at once."""
    models = sum(w != 0 for w in weight)
    side, longer = min(rows, columns), max(rows, columns)
    stacked = models * side if rank is None else max(side, models)
    return 2 * rows * columns + 2 * (rows + columns + longer) * stacked + 8 * min(stacked, longer) ** 2


def count_operations(
    rows: int,
    columns: int,
    _models: int,
    weight: tuple[float, ...],
    _scale: float,
    _calibrate: Calibrate,
    rank: float | None,
    *_: object,
) -> float:
    """Floating-point operations: decompositions, products, and one eigenproblem of the stacked vectors."""
    models = sum(w != 0 for w in weight)
    side, longer = min(rows, columns), max(rows, columns)
    count = side if rank is None else rank_of_each(rank, rows, columns, models)
    stacked = models * count
    decompose = models * count_decomposing(rows, columns, count)
    solve = 9.0 * min(stacked, longer) ** 3 + 8.0 * longer * stacked * min(stacked, longer)
    return decompose + solve + 4.0 * rows * columns * stacked
