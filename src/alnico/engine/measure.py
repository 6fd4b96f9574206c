"""Measures the facts of one tensor, level by level and pass by pass, over blocks that come in any order.

Sums are kept a leaf each and added exactly (``math.fsum``), counts and histograms are integers: the order of blocks and
the number of threads cannot be seen in the result.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from alnico.engine.arguments import MeasureArguments
from alnico.kernels.build import GramKernel, MeasureKernel, compiled
from alnico.kernels.facts import Count, Gram, KthLargest, Measured, Sum
from alnico.kernels.shape import CODES, LEAF
from alnico.plan.job import Job

SMALL = 65_536
"""Up to this many elements a kth largest value is selected from the values themselves."""


class LevelMeasurement:
    """The facts of one level. Call ``fold`` for every block of every pass, and ``turn`` after each pass, until done."""

    def __init__(self, facts: Sequence[Measured], job: Job, arguments: MeasureArguments) -> None:
        self.states = [_state(fact, job, arguments) for fact in facts]

    @property
    def done(self) -> bool:
        return all(state.done for state in self.states)

    def fold(self, start: int, stop: int, raws: Sequence[np.ndarray], base: np.ndarray) -> None:
        """Take in elements ``start`` to ``stop``: raw bytes (uint8) of all inputs. Safe for threads."""
        for state in self.states:
            if not state.done:
                state.fold(start, stop, raws, base)

    def turn(self) -> None:
        """End a pass."""
        for state in self.states:
            if not state.done:
                state.turn()

    def results(self) -> dict[Measured, Any]:
        return {state.fact: state.result for state in self.states}


class _State:
    """What is known of one fact so far."""

    def __init__(self, fact: Measured, job: Job, arguments: MeasureArguments) -> None:
        self.fact = fact
        self.job = job
        self.arguments = arguments
        self.done = False
        self.result: Any = None
        self.codes = [CODES[i.dtype] for i in job.inputs]
        self.base_code = CODES[job.base.dtype] if job.base else 0
        self.leaves = -(-job.elements // LEAF)

        self.run = compiled(_kernel(fact, job, arguments))

    def fold(self, start: int, stop: int, raws: Sequence[np.ndarray], base: np.ndarray) -> None:
        raise NotImplementedError

    def turn(self) -> None:
        raise NotImplementedError


class _ByLeaf(_State):
    """Sum and Count: one number a leaf and model."""

    def __init__(self, fact: Sum | Count, job: Job, arguments: MeasureArguments) -> None:
        super().__init__(fact, job, arguments)
        self.parts = np.zeros((len(job.inputs), self.leaves), np.float64 if isinstance(fact, Sum) else np.int64)

    def fold(self, start: int, stop: int, raws: Sequence[np.ndarray], base: np.ndarray) -> None:
        first, last = start // LEAF, -(-stop // LEAF)
        for i, raw in enumerate(raws):
            extra = self.arguments.values(self.fact, i)
            self.run(raw, self.codes[i], base, self.base_code, start, self.parts[i, first:last], *extra)

    def turn(self) -> None:
        self.result = tuple(_exact_sum(p) if isinstance(self.fact, Sum) else int(p.sum()) for p in self.parts)
        self.done = True


class _ByPair(_State):
    """Gram: one matrix a leaf."""

    def __init__(self, fact: Gram, job: Job, arguments: MeasureArguments) -> None:
        super().__init__(fact, job, arguments)
        k = len(job.inputs)
        self.parts = np.zeros((self.leaves, k, k), np.float64)
        self.code_array = np.array(self.codes, np.int64)

    def fold(self, start: int, stop: int, raws: Sequence[np.ndarray], base: np.ndarray) -> None:
        first, last = start // LEAF, -(-stop // LEAF)
        self.run(tuple(raws), self.code_array, base, self.base_code, stop - start, self.parts[first:last])

    def turn(self) -> None:
        k = len(self.codes)
        upper = {(i, j): _exact_sum(self.parts[:, i, j]) for i in range(k) for j in range(i, k)}
        self.result = tuple(tuple(upper[min(i, j), max(i, j)] for j in range(k)) for i in range(k))
        self.done = True


class _BySelection(_State):
    """KthLargest of a small tensor: the values are gathered and selected from."""

    def __init__(self, fact: KthLargest, job: Job, arguments: MeasureArguments) -> None:
        super().__init__(fact, job, arguments)
        self.gathered = np.zeros((len(job.inputs), job.elements), arguments.real)

    def fold(self, start: int, stop: int, raws: Sequence[np.ndarray], base: np.ndarray) -> None:
        for i, raw in enumerate(raws):
            extra = self.arguments.values(self.fact, i)
            self.run(raw, self.codes[i], base, self.base_code, start, self.gathered[i, start:stop], *extra)

    def turn(self) -> None:
        assert isinstance(self.fact, KthLargest)
        n = self.job.elements
        self.result = tuple(
            0.0 if share >= 1 or n == 0 else float(np.partition(row, n - kth(share, n))[n - kth(share, n)])
            for share, row in zip(self.fact.share, self.gathered, strict=True)
        )
        self.done = True


class _ByHistogram(_State):
    """KthLargest of a large tensor: the bits of a float that is not negative order as the float does, so counting by
    the upper 16 bits, then by the next 16 among those that share them, finds the kth largest exactly."""

    def __init__(self, fact: KthLargest, job: Job, arguments: MeasureArguments) -> None:
        super().__init__(fact, job, arguments)
        self.width = 32 if arguments.real == "float32" else 64
        self.shift = self.width - 16
        self.searched = [i for i, share in enumerate(fact.share) if share < 1]
        self.prefix = dict.fromkeys(self.searched, 0)
        self.rank = {i: kth(fact.share[i], job.elements) for i in self.searched}
        self.bins = {i: np.zeros(65_536, np.int64) for i in self.searched}
        self.lock = threading.Lock()

    def fold(self, start: int, stop: int, raws: Sequence[np.ndarray], base: np.ndarray) -> None:
        for i in self.searched:
            bins = np.zeros(65_536, np.int64)
            extra = self.arguments.values(self.fact, i)
            self.run(raws[i], self.codes[i], base, self.base_code, start, self.shift, self.prefix[i], bins, *extra)
            with self.lock:
                self.bins[i] += bins

    def turn(self) -> None:
        for i in self.searched:
            above = np.cumsum(self.bins[i][::-1])
            place = int(np.searchsorted(above, self.rank[i]))
            self.rank[i] -= int(above[place - 1]) if place else 0
            self.prefix[i] = self.prefix[i] << 16 | (65_535 - place)
            self.bins[i][:] = 0
        self.shift -= 16
        if self.shift < 0:
            assert isinstance(self.fact, KthLargest)
            bits, real = (np.uint32, np.float32) if self.width == 32 else (np.uint64, np.float64)
            found = {i: float(np.array(self.prefix[i], bits).view(real)) for i in self.searched}
            self.result = tuple(found.get(i, 0.0) for i in range(len(self.fact.share)))
            self.done = True


def kth(share: float, elements: int) -> int:
    """Which largest value bounds the kept share: ``max(1, int(share * elements))``, as mergekit counts."""
    return max(1, int(share * elements))


def kernels(job: Job, arguments: MeasureArguments) -> set[MeasureKernel | GramKernel]:
    """Describe the kernels that measuring a job needs."""
    assert job.merge is not None
    return {_kernel(fact, job, arguments) for level in job.merge.levels() for fact in level}


def _exact_sum(parts: np.ndarray) -> float:
    # An infinity or a NaN in an input is named when the block is mixed, whatever the facts are.
    return math.fsum(parts) if np.isfinite(parts).all() else math.nan


def _kernel(fact: Measured, job: Job, arguments: MeasureArguments) -> MeasureKernel | GramKernel:
    of_deltas = job.base is not None
    if isinstance(fact, Gram):
        return GramKernel(len(job.inputs), of_deltas, arguments.real)
    reduction: Literal["sum", "count", "values", "histogram"]
    if isinstance(fact, KthLargest):
        reduction = "values" if job.elements <= SMALL else "histogram"
    else:
        reduction = "sum" if isinstance(fact, Sum) else "count"
    return MeasureKernel(reduction, fact.of, of_deltas, arguments.kinds(fact), arguments.real)


def _state(fact: Measured, job: Job, arguments: MeasureArguments) -> _State:
    if isinstance(fact, Gram):
        return _ByPair(fact, job, arguments)
    if isinstance(fact, KthLargest):
        return _BySelection(fact, job, arguments) if job.elements <= SMALL else _ByHistogram(fact, job, arguments)
    return _ByLeaf(fact, job, arguments)
