"""Compares the leading singular vectors of task vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from alnico.analysis.results import Subspace
from alnico.checkpoint.source import Source
from alnico.numerics.arrays import AnyArray, as_is, library_of, like, to_numpy
from alnico.numerics.dtypes import decode
from alnico.plan.job import Input, Job

RANK = 8
"""The number of leading singular vectors to compare."""

NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest count as 0: they come from the rounding of the models."""

Spans = tuple[AnyArray, AnyArray]
"""The leading left and right singular vectors, as columns."""


def subspaces(
    sources: Sequence[Source], job: Job, place: Callable[[np.ndarray], AnyArray] = as_is
) -> list[Subspace | None]:
    """Compare the task vectors of a matrix, pair by pair; None for a pair with a zero task vector.

    Matrices are kept in memory one at a time. ``place`` puts them where their singular vectors are computed.
    """
    assert job.base is not None
    base = _matrix(sources, job, job.base)
    spans = [
        _leading(place((_matrix(sources, job, tensor) - base).astype(np.float64))) for tensor in job.inputs
    ]
    return [_overlap(first, second) for first, second in combinations(spans, 2)]


def _matrix(sources: Sequence[Source], job: Job, tensor: Input) -> np.ndarray:
    raw = np.empty(tensor.byte_size, np.uint8)
    sources[tensor.model].read_into(tensor.name, 0, memoryview(raw))
    return decode(raw, tensor.dtype).reshape(job.shape)


def decomposing_bytes(job: Job) -> int:
    """Return the bytes of a GPU's memory for the singular vectors of one task vector."""
    rows, columns = job.shape
    return 8 * (2 * rows * columns + 5 * min(rows, columns) ** 2)


def _leading(delta: AnyArray) -> Spans:
    """Return at most :data:`RANK` singular vectors, from the eigenvectors of the smaller Gram matrix."""
    rows, columns = delta.shape
    wide = delta if rows <= columns else delta.T
    squares, vectors = library_of(wide).linalg.eigh(wide @ wide.T)
    values = to_numpy(squares)
    order = np.argsort(-values)[:RANK]
    values, vectors = np.maximum(values[order], 0.0) ** 0.5, vectors[:, like(vectors, order)]
    is_large = values > NEGLIGIBLE * values[0] if values[0] > 0 else np.zeros(len(values), bool)
    near = vectors[:, like(vectors, is_large)]
    far = wide.T @ near / like(near, values[is_large])
    return (near, far) if rows <= columns else (far, near)


def _overlap(first: Spans, second: Spans) -> Subspace | None:
    rank = min(first[0].shape[1], second[0].shape[1])
    if not rank:
        return None
    left, right = (
        float(((a[:, :rank].T @ b[:, :rank]) ** 2).sum()) / rank for a, b in zip(first, second, strict=True)
    )
    return Subspace(min(left, 1.0), min(right, 1.0), rank, 1)
