"""Gives each thread one buffer to read into, reused for every block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alnico.checkpoint.resident_model import resident_bytes
from alnico.checkpoint.source import Source
from alnico.engine.blocks import Span
from alnico.engine.differences import source_of
from alnico.plan.job import Job

ALIGNMENT = 64

NO_BYTES = np.empty(0, np.uint8)


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
        sizes = [sum(stop - start for start, stop in spans) * tensor.width for tensor in job.read]
        resident = [
            resident_bytes(source_of(tensor, sources), tensor.name) if len(spans) == 1 else None
            for tensor in job.read
        ]
        own = [size if whole is None else 0 for size, whole in zip(sizes, resident, strict=True)]
        views = self.views(own if out_bytes is None else [*own, out_bytes])
        for i, (tensor, whole) in enumerate(zip(job.read, resident, strict=True)):
            if whole is not None:
                start, stop = spans[0]
                views[i] = whole[start * tensor.width : stop * tensor.width]
                continue
            place = 0
            for start, stop in spans:
                end = place + (stop - start) * tensor.width
                part = memoryview(views[i][place:end])
                source_of(tensor, sources).read_into(tensor.name, start * tensor.width, part)
                place = end
        return views
