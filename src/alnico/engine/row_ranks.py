"""Ranks task-vector magnitudes in their rows, for methods that draw by rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alnico.engine.blocks import Span
from alnico.engine.kernel_arguments import codes_of
from alnico.kernels.choice import kernel_for
from alnico.kernels.facts import magnitude
from alnico.kernels.measure_kernels import MeasureKernel, RankKernel
from alnico.plan.job import Job


def kernels(job: Job) -> set[MeasureKernel | RankKernel]:
    """Describe the kernels that rank the rows of a job; none if it uses no ranks."""
    assert job.merge is not None
    return {_magnitudes(job), RankKernel(job.real)} if job.merge.uses_ranks else set()


def whole_rows(job: Job, span: Span) -> Span:
    """The smallest span of whole rows around a span."""
    row = job.row
    return span[0] // row * row, min(-(-span[1] // row) * row, job.elements)


def ranks(job: Job, rows: Span, raws: Sequence[np.ndarray], base: np.ndarray, span: Span) -> np.ndarray:
    """Rank elements in their rows: float32 (models, elements of ``span``). The inputs are the raw bytes of
    ``rows``."""
    real, row = job.real, job.row
    count = rows[1] - rows[0]
    magnitudes = np.empty((len(raws), count), real)
    codes, base_code = codes_of(job)
    kernel_for(_magnitudes(job))(tuple(raws), codes, base, base_code, 0, np.arange(len(raws)), magnitudes)
    ranked = np.empty((count // row, row), np.float32)
    result = np.empty((len(raws), span[1] - span[0]), np.float32)
    keys, shares = np.empty(ranked.shape, np.uint64), shares_of(row)
    for model, values in enumerate(magnitudes):
        sort_rows(values.reshape(ranked.shape), keys)
        kernel_for(RankKernel(real))(keys, shares, ranked)
        result[model] = ranked.reshape(-1)[span[0] - rows[0] : span[1] - rows[0]]
    return result


def sort_rows(magnitudes: np.ndarray, keys: np.ndarray) -> None:
    """Sort rows of magnitudes as keys, uint64 of the same shape: the upper 32 bits order as the magnitudes do, the lower are the
    column that each came from."""
    if magnitudes.dtype == np.float32:  # its bits order as it does
        keys[:] = magnitudes.view(np.uint32)
        keys <<= np.uint64(32)
        keys |= np.arange(keys.shape[1], dtype=np.uint64)
        # numpy's sort of integers is vectorised, and takes a third of the time of an argsort.
        keys.sort(axis=1)
        return
    places = np.argsort(magnitudes, axis=1)
    ordered = np.take_along_axis(magnitudes, places, axis=1)
    keys[:, :1] = 0
    np.cumsum(ordered[:, 1:] != ordered[:, :-1], axis=1, out=keys[:, 1:])
    keys <<= np.uint64(32)
    keys |= places.view(np.uint64)


def shares_of(row: int) -> np.ndarray:
    """Half of each number below twice a row's length, as a share of its last rank; 1/2 for a row of one element."""
    return (np.arange(2 * row - 1) / (2.0 * (row - 1)) if row > 1 else np.array([0.5])).astype(np.float32)


def _magnitudes(job: Job) -> MeasureKernel:
    return MeasureKernel("values", magnitude, len(job.inputs), job.base is not None, (), job.real)
