"""Cuts tensors into chunks of whole pieces and leaves, so that cuts change no bit and no digest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from alnico.kernels.constants import LEAF
from alnico.numerics.digest import PIECE
from alnico.plan.job import Job

Span = tuple[int, int]
"""Elements [start, stop) of a job's tensors; bytes for jobs that copy."""


@dataclass(frozen=True)
class Block:
    """Some elements in memory: raw bytes (uint8) of each input and of the base, and the ranks if they are
    used."""

    raws: Sequence[np.ndarray]
    base: np.ndarray
    ranks: np.ndarray | None = None


def units(job: Job) -> int:
    """The number of units that a job is cut into: its elements if they are computed, its bytes if they are
    copied."""
    return job.elements if job.is_computed else job.byte_size


def chunks(job: Job) -> list[Span]:
    """Cut a job into spans for different threads.

    A span of a mix is a multiple of 4 MiB in the narrowest dtype of the job, so pieces and leaves stay whole
    for each of its tensors. An empty tensor has one empty span; a matrix has one span.
    """
    if job.kind == "matrix":
        return [(0, job.elements)]
    if job.kind == "mix":
        narrowest = min(job.width, *(tensor.width for tensor in job.read))
        size = PIECE // narrowest
        assert size % LEAF == 0
    else:
        size = 4 * PIECE
    return _cut((0, units(job)), size)


def blocks(span: Span, size: int) -> Iterator[Span]:
    """Cut a span into blocks of ``size`` (a multiple of LEAF), the last one shorter."""
    return iter(_cut(span, size))


def _cut(span: Span, size: int) -> list[Span]:
    start, stop = span
    return [(s, min(s + size, stop)) for s in range(start, stop, size)] or [span]
