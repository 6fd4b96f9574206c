"""Measures how far an adapter folded into its base is from the fine-tune, by runs of elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from alnico.checkpoint.source import Source
from alnico.engine.arena import Arena
from alnico.events import Advanced
from alnico.kernels.constants import CODES
from alnico.lora.extract_deltas import CHECKED_ELEMENTS, difference_kernel, real_of
from alnico.numerics.dtypes import DTYPES
from alnico.threads import Crew

RunsOfTensor = tuple[str, range]
"""A tensor, and runs of :data:`CHECKED_ELEMENTS` elements in it."""

RUNS = 8
"""Runs that a thread takes at a time."""


def runs_of(elements: int) -> int:
    """Return how many runs a tensor has."""
    return -(-elements // CHECKED_ELEMENTS)


class FoldedDistances:
    """Compares a folded adapter with the fine-tune, with the threads of ``crew``.

    ``put`` gets a tensor, a run and the sums of squares of (folded - fine-tune) and of the fine-tune, in any order and any thread.
    """

    def __init__(
        self,
        folded: Source,
        tuned: Source,
        crew: Crew,
        arena: Arena,
        put: Callable[[str, int, tuple[float, float]], None],
    ) -> None:
        self._folded = folded
        self._tuned = tuned
        self._crew = crew
        self._arena = arena
        self._put = put

    def measure(self, tensors: Sequence[RunsOfTensor]) -> None:
        calls = [
            (self._measure, (name, runs[i : i + RUNS]))
            for name, runs in tensors
            for i in range(0, len(runs), RUNS)
        ]
        for name, runs in tensors:
            difference_kernel(real_of(self._folded, self._tuned, name), CHECKED_ELEMENTS * len(runs))
        self._crew.run(calls)

    def _measure(self, name: str, runs: range) -> None:
        tensor = self._tuned.tensors[name]
        both = tensor.byte_size + self._folded.tensors[name].byte_size
        for run in runs:
            self._crew.check()
            first, last = run * CHECKED_ELEMENTS, min((run + 1) * CHECKED_ELEMENTS, tensor.elements)
            self._put(name, run, self._distance(name, first, last))
            self._crew.report(Advanced(name, both * (last - first) // tensor.elements))

    def _distance(self, name: str, first: int, last: int) -> tuple[float, float]:
        """Return the sums of squares of (folded - fine-tune) and of the fine-tune over some elements."""
        count = last - first
        models = self._folded, self._tuned
        dtypes = [model.tensors[name].dtype for model in models]
        # Reuses memory: fresh pages for each block took two thirds of the time.
        raws = self._arena.views([count * DTYPES[dtype].bytes for dtype in dtypes])
        for model, raw, dtype in zip(models, raws, dtypes, strict=True):
            model.read_into(name, first * DTYPES[dtype].bytes, memoryview(raw))
        real, sums = real_of(*models, name), np.empty(2)
        difference_kernel(real)(raws[0], CODES[dtypes[0]], raws[1], CODES[dtypes[1]], np.empty(0, real), sums)
        return float(sums[0]), float(sums[1])
