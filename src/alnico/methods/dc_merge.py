"""DC-Merge: merges the largest entries of all task vectors in one basis of their singular vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alnico.methods import tsv
from alnico.methods.base import Matrices, MatrixMethod, Merge, PerModel, Proportion, Share, each, method
from alnico.methods.shared import singular_vectors
from alnico.methods.shared.elect import sum_all
from alnico.methods.shared.others import Embeddings, Others, merge_others, merge_trivially
from alnico.methods.shared.singular_vectors import (
    Calibrate,
    WeightedSum,
    distinct_factors,
    first_of,
    orthogonalize,
    scale_of,
    takes_part,
)
from alnico.methods.shared.sparsify import keep_all
from alnico.numerics.arrays import AnyArray, library_of, like, to_numpy
from alnico.numerics.low_rank import Decomposed


@method(
    space="delta",
    source="Directional consistency merging (DC-Merge) 2026, https://arxiv.org/abs/2603.06242",
    presets={"paper": {"calibrate": "none", "rank": 1.0, "density": 0.001, "least": 0.0}},
)
def dc_merge(
    *,
    weight: PerModel[float] = each(1.0),
    scale: float = 1.0,
    calibrate: Calibrate = "projection",
    rank: Share = 0.75,
    density: PerModel[Share] = each(0.001),
    least: Proportion = 0.01,
    others: Others = "mean",
    others_scale: float = 1.0,
    embeddings: Embeddings = "others",
) -> Merge | MatrixMethod:
    """Represent all task vectors in one basis of their singular vectors, keep the largest entries, and merge them there.

    For the task vectors ``D_i`` of one matrix, N models and ``r = min(rows, columns)``: ``D_i = U_i S_i V_i^T``, cut to the
    first ``k = rank * r / N`` singular vectors; ``P = polar[U_1 ... U_N]`` and ``Q = polar[V_1 ... V_N]``, where
    ``polar(X)`` is the nearest matrix with orthonormal columns; ``M_i = P^T (U_i S_i V_i^T) Q``. Of each M_i the share
    ``density`` of largest magnitude is kept. Of all kept entries at one place, those with the sign of their sum are
    averaged, each times its ``weight_i``; places outside the N diagonal blocks (k x k) are 0. With the result M,
    ``out = base + scale * c * P M Q^T``. The projection scale ``c = sum_i |D_i|^2 / sum_i <P M Q^T, D_i>`` for weights of 1 is one number
    per matrix.

    Use when: models of different tasks were tuned from one base, and you have no data to tune a merge with. With the
        projection scale it is the best untuned method on the tasks of docs/quality.md; without, it needs a scale of about 3.
    Start with: {scale: 1}

    Options:
        weight: a model's coefficient, any number: it multiplies the model's part. A model of weight 0 takes no part.
        scale: the factor on the whole merged task vector (``lambda`` in YAML), any number. With ``calibrate:
            projection``, 1 is the best scale or near it.
        calibrate: ``projection`` multiplies each matrix by its projection scale c, ``none`` (the paper) by 1.
        rank: the share of r/N singular vectors that is kept of each model, in (0, 1]; at least one is kept. The paper
            keeps 1; with the projection scale 0.75 was better by validation for three sets of eight models.
        density: the share of the (N k)^2 entries of M_i that is kept, in (0, 1]; at least as many are kept as the model
            has singular vectors, which counts for few models and for adapters: their M_i is small.
        least: directions with a smaller singular value in the stacked vectors are left out, in [0, 1]; two unit vectors
            at an angle t differ in a direction of ``sqrt(1 - cos t)``. 0 leaves out rounding errors only.
        others: how tensors that are no matrices are merged: their ``mean`` (the paper), their ``sum``, as in the ``base``,
            or by a method with its defaults, such as ``ties``.
        others_scale: a further factor on these tensors, any number.
        embeddings: ``others`` merges tables of tokens and positions, and token heads, like other tensors; ``matrix``
            as matrices.
    Presets:
        paper: no projection scale, all of r/N, a thousandth of the entries, no direction left out.
    Shapes: k matrices (rows, columns) in, one out; any number of models besides the base. A convolution kernel is a matrix
        (outputs, inputs x kernel); stacks of matrices, such as experts, are merged matrix by matrix.
    Measures: two passes over the models and the base, a decomposition per model and matrix and two polar factors, in
        float64. Memory: the singular vectors of all models twice, or once with two matrices, and eight squares of the
        number of vectors, in float64. Grain: tensor.
    Edge cases: a task vector of zeros takes no part; singular values up to a millionth of the largest count as 0; exact
        copies count as one model with the mean of their weights, near ones as two, which is said; where task vectors cancel each
        other, c cannot be computed and is 1, which is said; one model at weight 1, rank 1 and density 1 is copied.
        Entries equal to the threshold are kept; a sum of exactly 0 keeps nothing.
    Errors: MethodError for options outside their range. ResourceError for a matrix that does not fit the budget.
    Differs from the source: the projection scale (``calibrate: none`` leaves it out); null directions are left out,
        where the paper fills them with arbitrary ones; ``rank``; the fewest entries
        that are kept; weights. The paper's energy smoothing, for adapters only, is left
        out: on full fine-tunes it loses points.
    Source: DC-Merge 2026, https://arxiv.org/abs/2603.06242; the projection scale is alnico's.

    >>> dc_merge.bind({}, 2).arguments[4], dc_merge.bind({"density": 1.0}, 1).copies
    ((0.001, 0.001), 0)
    """
    if (trivial := merge_trivially(weight, scale)) is not None:
        return trivial
    if len(weight) == 1 and scale * weight[0] == rank == density[0] == others_scale == 1:
        return sum_all(keep_all(1), (1.0,), 1.0, "none")
    return MatrixMethod(
        make,
        count_numbers,
        merge_others(others, weight, scale * others_scale),
        (tuple(weight), scale, calibrate, rank, tuple(density), least),
        operations=count_operations,
        takes_tables=embeddings == "matrix",
        takes_stacks=True,
        runs_on_gpu=True,
        parts=parts,
    )


ROUNDING = 1e-12
"""Entries up to this share of the largest are rounding errors of the basis."""

EntryOptions = tuple[tuple[float, ...], float, Calibrate, float, tuple[float, ...], float]


def make(matrices: Matrices, *arguments: *EntryOptions) -> AnyArray:
    """The matrix that is added to the base."""
    return weighted_entries(matrices, *arguments).merged()


def parts(matrices: Matrices, *arguments: *EntryOptions) -> list[AnyArray]:
    """Each model's part of :func:`make`, with its weight."""
    return weighted_entries(matrices, *arguments).of_models(matrices.shape)


@dataclass(frozen=True)
class BlockEntries:
    """``left @ M @ right``, where M has square blocks on its diagonal and is a sum over models of single entries.

    Shapes: left (m, K), right (K, n); edges (blocks + 1,), where each block begins and ends; rows, columns, values and
    owner (entries,): the places in M, the numbers there, and the position of the model that each comes from. All but left
    and right are numpy's, wherever those are.
    """

    left: AnyArray
    right: AnyArray
    edges: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    owner: np.ndarray

    def arrays(self) -> tuple[AnyArray, ...]:
        return self.left, self.right, self.edges, self.rows, self.columns, self.values, self.owner

    def sum(self, weights: Sequence[float] | np.ndarray) -> AnyArray:
        """Add up the entries of all models, each times its model's weight."""
        entries = self.values * np.asarray(weights)[self.owner]
        scaled = library_of(self.left).zeros_like(self.left)
        for start, stop in zip(self.edges[:-1], self.edges[1:], strict=True):
            own = (self.rows >= start) & (self.rows < stop)
            block = np.zeros((stop - start, stop - start))
            np.add.at(block, (self.rows[own] - start, self.columns[own] - start), entries[own])
            scaled[:, start:stop] = self.left[:, start:stop] @ like(self.left, block)
        return scaled @ self.right

    def part(self, position: int) -> AnyArray:
        """Return the part of one model."""
        return self.sum(np.arange(len(self.edges) - 1) == position)


def weighted_entries(
    matrices: Matrices,
    weight: tuple[float, ...],
    scale: float,
    calibrate: Calibrate,
    rank: float,
    density: tuple[float, ...],
    least: float,
) -> WeightedSum:
    """The merged entries of the models that take part, and their weights."""
    used = takes_part(weight)
    shares = tuple(density[i] for i in used)

    def compute() -> tuple[AnyArray, ...]:
        factors, place = distinct_factors(matrices, used, rank)
        first = first_of(place)
        entries = merge_entries(factors, [shares[i] for i in first], least)
        distinct = len(factors)
        del factors
        factor = scale_of(
            matrices,
            calibrate,
            lambda: entries.sum([1.0] * distinct),
            (matrices.value(used[i]) for i in first),
        )
        return *entries.arrays(), place, np.array(factor)

    *arrays, place, factor = matrices.kept(("dc_merge", calibrate, rank, shares, least), used, compute)
    return WeightedSum(BlockEntries(*arrays), weight, place, scale * float(factor))


def merge_entries(factors: list[Decomposed], density: Sequence[float], least: float) -> BlockEntries:
    """Keep the largest entries of each matrix in the common basis, and average those that agree in sign, in the blocks."""
    basis = orthogonalize(factors, least)
    edges = np.cumsum([0, *(f.rank for f in factors)])
    block_of = basis.owner
    places, values = [], []
    for f, share in zip(factors, density, strict=True):
        inner = to_numpy(((basis.left.T @ f.left) * f.values) @ (f.right @ basis.right.T))
        found = _largest(inner, share, f.rank, block_of)
        places.append(found)
        values.append(inner.reshape(-1)[found])
    place, value = np.concatenate(places), np.concatenate(values)
    owner = np.repeat(np.arange(len(factors)), [len(p) for p in places])
    unique, at = np.unique(place, return_inverse=True)
    total = np.bincount(at, value, len(unique))
    agrees = np.sign(value) == np.sign(total)[at]
    count = np.bincount(at[agrees], minlength=len(unique))
    size = max(int(edges[-1]), 1)
    return BlockEntries(
        basis.left,
        basis.right,
        edges,
        place[agrees] // size,
        place[agrees] % size,
        value[agrees] / count[at[agrees]],
        owner[agrees],
    )


def _largest(inner: np.ndarray, share: float, fewest: int, block_of: np.ndarray) -> np.ndarray:
    """The flat positions of the ``share`` largest entries, at least ``fewest``, that are not rounding and are in a block on the diagonal."""
    size = inner.size
    if not size:
        return np.zeros(0, np.intp)
    magnitudes = np.abs(inner).reshape(-1)
    kept = max(int(share * size), fewest, 1)
    threshold = float(np.partition(magnitudes, size - kept)[size - kept])
    # Rounding would count as models that agree.
    threshold = max(threshold, ROUNDING * float(magnitudes.max()))
    is_kept = (np.abs(inner) >= threshold) & (inner != 0) & (block_of[:, None] == block_of)
    return np.flatnonzero(is_kept)


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
    vectors = singular_vectors.count_numbers(
        rows, columns, sum(w != 0 for w in weight), rank, keeps_factors=True
    )
    return vectors + 3 * int(rank * min(rows, columns)) ** 2


def count_operations(
    rows: int,
    columns: int,
    models: int,
    weight: tuple[float, ...],
    scale: float,
    calibrate: Calibrate,
    rank: float,
    *_: object,
) -> float:
    """Floating-point operations: those of TSV-M, and each model's matrix in the common basis."""
    side = min(rows, columns)
    return tsv.count_operations(rows, columns, models, weight, scale, calibrate, rank) + side**2 * (
        2.0 * (rows + columns) + 2.0 * side
    )
