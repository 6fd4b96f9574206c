"""Gives each thread one buffer to read into, reused for every block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.files import read_spans
from alnico.checkpoint.resident_model import ResidentModel, resident_bytes
from alnico.checkpoint.source import Source
from alnico.engine.blocks import Span
from alnico.engine.differences import source_of
from alnico.plan.job import Job

ALIGNMENT = 64

NO_BYTES = np.empty(0, np.uint8)


class _InputBytes(NamedTuple):
    """A tensor that a job reads: its source, its name there, the bytes of an element, and whether it stays in memory."""

    source: Source
    name: str
    width: int
    stays: bool


def plain_memory(byte_size: int) -> np.ndarray:
    return np.empty(byte_size, np.uint8)


class Arena:
    """One buffer per thread, of at least ``least_bytes``. ``make`` makes a buffer of so many bytes: of the processor's
    memory, or of a GPU's."""

    def __init__(self, least_bytes: int, make: Callable[[int], Any] = plain_memory) -> None:
        self.least_bytes = least_bytes
        self._make = make
        self._own = threading.local()

    def views(self, sizes: Sequence[int]) -> list[Any]:
        """Return parts of this thread's buffer, each at a multiple of :data:`ALIGNMENT` bytes. Earlier
        content is lost."""
        starts, position = [], 0
        for size in sizes:
            starts.append(position)
            position += -(-size // ALIGNMENT) * ALIGNMENT
        if not position:
            return [NO_BYTES] * len(starts)
        arena: Any = getattr(self._own, "bytes", None)
        if arena is None or arena.nbytes < position:
            # Reused for every tensor: the first touch of fresh pages is slow on virtual machines.
            arena = self._own.bytes = self._make(max(position, self.least_bytes))
        return [arena[s : s + size] for s, size in zip(starts, sizes, strict=True)]

    def read(
        self, job: Job, sources: Sequence[Source], *spans: Span, out_bytes: int | None = None
    ) -> list[np.ndarray]:
        """Return the bytes of some spans of each tensor that a job reads, one span after the other; the base
        is last.

        With ``out_bytes``, one more view of that size follows, for the output. One span of a model that stays
        in memory is a view of its memory; everything else is read into this thread's buffer.
        """
        inputs = self._inputs(job, sources)
        elements = sum(stop - start for start, stop in spans)
        one = spans[0] if len(spans) == 1 else None
        resident = [resident_bytes(i.source, i.name) if one and i.stays else None for i in inputs]
        own = [elements * i.width if whole is None else 0 for i, whole in zip(inputs, resident, strict=True)]
        views = self.views(own if out_bytes is None else [*own, out_bytes])
        for i, (tensor, whole) in enumerate(zip(inputs, resident, strict=True)):
            width = tensor.width
            if one is None:
                _read_spans(tensor, spans, memoryview(views[i]))
            elif whole is None:
                tensor.source.read_into(tensor.name, one[0] * width, memoryview(views[i]))
            else:
                views[i] = whole[one[0] * width : one[1] * width]
        return views

    def _inputs(self, job: Job, sources: Sequence[Source]) -> list[_InputBytes]:
        """What a job reads. A thread reads many blocks of one job in a row, so the last answer is kept."""
        if getattr(self._own, "job", None) is not job or self._own.sources is not sources:
            self._own.inputs = [
                _InputBytes(
                    source := source_of(i, sources), i.name, i.width, isinstance(source, ResidentModel)
                )
                for i in job.read
            ]
            self._own.job, self._own.sources = job, sources
        inputs: list[_InputBytes] = self._own.inputs
        return inputs


def _read_spans(tensor: _InputBytes, spans: Sequence[Span], buffer: memoryview) -> None:
    parts = [(start * tensor.width, stop * tensor.width) for start, stop in spans]
    if isinstance(tensor.source, FileModel):
        tensor.source.read_spans(tensor.name, parts, buffer)
        return
    read_spans(lambda start, part: tensor.source.read_into(tensor.name, start, part), parts, buffer)
