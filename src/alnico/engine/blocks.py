"""Cuts tensors into chunks of whole pieces and leaves, so that cuts change no bit and no digest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.kernels.constants import LEAF
from alnico.numerics.digest import PIECE
from alnico.plan.job import Job

if TYPE_CHECKING:
    from alnico.kernels.cuda.memory import GpuMemory

Span = tuple[int, int]
"""Elements [start, stop) of a job's tensors; bytes for jobs that copy."""


@dataclass(frozen=True)
class Block:
    """Some elements in the memory of the device that computes with them: raw bytes (uint8) of each input and of the base, and
    the ranks if they are used.

    On a GPU, ``gpu`` is its memory, and ``host`` has the same bytes in the processor's memory, of the inputs and then of the
    base, where they were read or asked for.
    """

    raws: Sequence[Any]
    base: Any
    ranks: Any = None
    gpu: GpuMemory | None = None
    host: Sequence[np.ndarray | None] = ()

    def bytes_read(self, has_base: bool) -> list[np.ndarray]:
        """Return the bytes of the inputs, and of the base if there is one, in the processor's memory."""
        device = [*self.raws, self.base] if has_base else list(self.raws)
        if self.gpu is None:
            return device
        known = self.host or (None,) * len(device)
        return [
            host if host is not None else on_host(raw, self.gpu)
            for raw, host in zip(device, known, strict=True)
        ]


def on_host(raw: Any, gpu: GpuMemory | None) -> np.ndarray:
    """Return bytes in the processor's memory: themselves, or a copy of those on a GPU."""
    if gpu is None:
        return raw  # type: ignore[no-any-return]
    copy = np.empty(raw.size, np.uint8)
    if copy.size:
        gpu.download(raw, copy)
        gpu.finish()
    return copy


def units(job: Job) -> int:
    """The number of units that a job is cut into: its elements if they are computed, its bytes if they are
    copied."""
    return job.elements if job.is_computed else job.byte_size


def whole(job: Job) -> list[Span]:
    """Leave a job in one span, for a device that computes all of it at once."""
    return [(0, units(job))]


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
