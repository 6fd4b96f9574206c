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
    ranked = np.empty(count, np.float32)
    result = np.empty((len(raws), span[1] - span[0]), np.float32)
    for model, values in enumerate(magnitudes):
        places = np.argsort(values.reshape(-1, row), axis=1)
        ordered = np.take_along_axis(values.reshape(-1, row), places, axis=1)
        kernel_for(RankKernel(real))(ordered, places, ranked.reshape(-1, row))
        result[model] = ranked[span[0] - rows[0] : span[1] - rows[0]]
    return result


def _magnitudes(job: Job) -> MeasureKernel:
    return MeasureKernel("values", magnitude, len(job.inputs), job.base is not None, (), job.real)
