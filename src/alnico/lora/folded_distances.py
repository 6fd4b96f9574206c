"""Measures how far an adapter folded into its base is from the fine-tune, by runs of elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from alnico.checkpoint.source import Source
from alnico.engine.arena import Arena
from alnico.events import Advanced
from alnico.lora.extract_deltas import CHECKED_ELEMENTS
from alnico.numerics.blas import one_blas_thread
from alnico.numerics.dtypes import DTYPES, decode, decode_into
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
        with one_blas_thread():
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
        widths = [DTYPES[m.tensors[name].dtype].bytes for m in (self._folded, self._tuned)]
        # Reuses memory: fresh pages for each block took two thirds of the time.
        rest, *views = self._arena.views(
            [8 * count, *(count * width for width in widths), 4 * count, 4 * count]
        )
        values = []
        for model, raw, narrow, width in zip(
            (self._folded, self._tuned), views[:2], views[2:], widths, strict=True
        ):
            model.read_into(name, first * width, memoryview(raw))
            if width >= 4:
                values.append(decode(raw, model.tensors[name].dtype))
            else:
                decode_into(raw, model.tensors[name].dtype, narrow.view(np.float32))
                values.append(narrow.view(np.float32))
        folded_values, tuned_values = values
        wide = rest.view(np.float64)
        np.subtract(folded_values, tuned_values, out=wide, dtype=np.float64)
        return float(wide @ wide), float(tuned_values @ tuned_values)
