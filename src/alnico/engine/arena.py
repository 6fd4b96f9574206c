"""Memory that each thread reads into, used again for every block."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from alnico.checkpoint.source import Source
from alnico.engine.blocks import Span
from alnico.numerics.dtypes import DTYPES
from alnico.plan.job import Job

ALIGNMENT = 64


class Arena:
    """A buffer for each thread that asks, of at least ``least_bytes``."""

    def __init__(self, least_bytes: int) -> None:
        self.least_bytes = least_bytes
        self._own = threading.local()

    def views(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """Parts of this thread's buffer, each at a multiple of :data:`ALIGNMENT` bytes; what it held before is lost."""
        starts, position = [], 0
        for size in sizes:
            starts.append(position)
            position += -(-size // ALIGNMENT) * ALIGNMENT
        arena: np.ndarray | None = getattr(self._own, "bytes", None)
        if arena is None or arena.nbytes < position:
            # Touched once and used again for every tensor: first touch of fresh pages is slow on virtual machines.
            arena = self._own.bytes = np.empty(max(position, self.least_bytes), np.uint8)
        return [arena[s : s + size] for s, size in zip(starts, sizes, strict=True)]

    def read(self, job: Job, sources: Sequence[Source], span: Span) -> list[np.ndarray]:
        """Read a span of all inputs of a job, and of its base last."""
        widths = [DTYPES[tensor.dtype].bytes for tensor in job.read]
        views = self.views([(span[1] - span[0]) * width for width in widths])
        for tensor, view, width in zip(job.read, views, widths, strict=True):
            sources[tensor.model].read_into(tensor.name, span[0] * width, memoryview(view))
        return views
