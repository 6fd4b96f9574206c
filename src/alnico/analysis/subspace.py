"""Leading singular vectors of task vectors, and how far they span the same space."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from alnico.analysis.results import Subspace
from alnico.checkpoint.source import Source
from alnico.numerics.dtypes import decode
from alnico.plan.job import Input, Job

RANK = 8
"""Leading singular vectors that are compared."""

NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest count as 0: what is left of the rounding of the models."""

Spans = tuple[np.ndarray, np.ndarray]
"""The leading left and right singular vectors, as columns."""


def subspaces(sources: Sequence[Source], job: Job) -> list[Subspace | None]:
    """Compare the task vectors of a matrix, pair by pair; None for a pair of which one is 0. The matrices are held, one at a time."""
    assert job.base is not None
    base = _matrix(sources, job, job.base)
    spans = [_leading((_matrix(sources, job, tensor) - base).astype(np.float64)) for tensor in job.inputs]
    return [_aligned(one, other) for one, other in combinations(spans, 2)]


def _matrix(sources: Sequence[Source], job: Job, tensor: Input) -> np.ndarray:
    raw = np.empty(tensor.byte_size, np.uint8)
    sources[tensor.model].read_into(tensor.name, 0, memoryview(raw))
    return decode(raw, tensor.dtype).reshape(job.shape)


def _leading(delta: np.ndarray) -> Spans:
    """At most :data:`RANK` singular vectors, from the eigenvectors of the product of the smaller side."""
    rows, columns = delta.shape
    wide = delta if rows <= columns else delta.T
    values, vectors = np.linalg.eigh(wide @ wide.T)
    order = np.argsort(-values)[:RANK]
    values, vectors = np.maximum(values[order], 0.0) ** 0.5, vectors[:, order]
    kept = values > NEGLIGIBLE * values[0] if values[0] > 0 else np.zeros(len(values), bool)
    near = vectors[:, kept]
    far = wide.T @ near / values[kept]
    return (near, far) if rows <= columns else (far, near)


def _aligned(one: Spans, other: Spans) -> Subspace | None:
    rank = min(one[0].shape[1], other[0].shape[1])
    if not rank:
        return None
    left, right = (
        float(np.sum((a[:, :rank].T @ b[:, :rank]) ** 2)) / rank for a, b in zip(one, other, strict=True)
    )
    return Subspace(min(left, 1.0), min(right, 1.0), rank, 1)
