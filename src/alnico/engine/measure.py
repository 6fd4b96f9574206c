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
from alnico.kernels.build import compiled
from alnico.kernels.facts import Bernoulli, Count, Gram, KthLargest, Measured, Noise, Sum
from alnico.kernels.measuring import GramKernel, MeasureKernel
from alnico.kernels.shape import CODES, LEAF
from alnico.plan.job import Job
from alnico.plan.memory import SELECTION_BYTES

SMALL = 65_536
"""Up to this many elements a kth largest value is selected from the values themselves."""

SAMPLED_GROUP = 64
"""Consecutive elements a sample takes together; a cache line or more of any dtype."""

SAMPLED_GROUPS = 2048
"""Groups of a sample: 131,072 elements, so that a bracket holds some 1 % of a tensor. In BF16 models that is often one value."""

SAMPLED_WHOLE = 1 << 24
"""Up to this many elements a sample is spread over all leaves; above, over every SAMPLED_LEAVES-th."""

SAMPLED_LEAVES = 16

MOST_INSIDE = 1 << 20
"""Most elements of a block that a bracket keeps."""


Reduction = Literal["sum", "count", "values", "histogram", "bracket"]


class LevelMeasurement:
    """The facts of one level. Call ``fold`` for every block of every pass, and ``turn`` after each pass, until done."""

    def __init__(self, facts: Sequence[Measured], job: Job, arguments: MeasureArguments) -> None:
        self.states = [_state(fact, job, arguments) for fact in facts]

    @property
    def done(self) -> bool:
        return all(state.done for state in self.states)

    def wants(self, start: int) -> bool:
        """Does this pass need the block that begins at element ``start``? A pass that samples skips most of a large tensor."""
        return any(state.wants(start) for state in self.states if not state.done)

    def fold(self, start: int, stop: int, raws: Sequence[np.ndarray], base: np.ndarray) -> None:
        """Take in elements ``start`` to ``stop``: raw bytes (uint8) of all inputs. Safe for threads."""
        for state in self.states:
            if not state.done and state.wants(start):
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

    reduction: Reduction | None = None

    def __init__(self, fact: Measured, job: Job, arguments: MeasureArguments) -> None:
        self.fact = fact
        self.job = job
        self.arguments = arguments
        self.done = False
        self.result: Any = None
        self.codes = [CODES[i.dtype] for i in job.inputs]
        self.base_code = CODES[job.base.dtype] if job.base else 0
        self.leaves = -(-job.elements // LEAF)

        self.run = compiled(_kernel(fact, job, arguments, self.reduction))

    def wants(self, start: int) -> bool:
        return True

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

    reduction = "histogram"

    def __init__(self, fact: KthLargest, job: Job, arguments: MeasureArguments, searched: Sequence[int]) -> None:
        super().__init__(fact, job, arguments)
        self.width = 32 if arguments.real == "float32" else 64
        self.shift = self.width - 16
        self.searched = searched
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


class _ByBracket(_State):
    """KthLargest of a large tensor, mostly in one pass: a sample says between which two values the kth largest should lie;
    the pass counts what is above and keeps what is between, and the kth largest is selected from that.

    The sample decides the speed alone. Where the kth largest is not between, or too much is, the histogram finds it.
    """

    def __init__(self, fact: KthLargest, job: Job, arguments: MeasureArguments) -> None:
        super().__init__(fact, job, arguments)
        self.fact: KthLargest = fact
        self.sampling = compiled(_kernel(fact, job, arguments, "values"))
        self.real = np.dtype(arguments.real)
        self.searched = [i for i, share in enumerate(fact.share) if share < 1]
        self.rank = {i: kth(fact.share[i], job.elements) for i in self.searched}
        self.parts: dict[int, list[np.ndarray]] = {i: [] for i in self.searched}
        self.counts = {i: np.zeros(2, np.int64) for i in self.searched}
        self.bounds: dict[int, tuple[Any, Any]] = {}
        self.found = {i: 0.0 for i, share in enumerate(fact.share) if share >= 1}
        self.fallback: _ByHistogram | None = None
        self.room = SELECTION_BYTES // self.real.itemsize // max(len(self.searched), 1)
        self.lock = threading.Lock()

    def wants(self, start: int) -> bool:
        return bool(self.bounds) or self.job.elements <= SAMPLED_WHOLE or start // LEAF % SAMPLED_LEAVES == 0

    def fold(self, start: int, stop: int, raws: Sequence[np.ndarray], base: np.ndarray) -> None:
        if self.fallback is not None:
            self.fallback.fold(start, stop, raws, base)
        elif self.bounds:
            self._gather(start, stop, raws, base)
        else:
            self._sample(stop - start, raws, base)

    def _sample(self, elements: int, raws: Sequence[np.ndarray], base: np.ndarray) -> None:
        """Groups of consecutive elements, evenly spread, so that rows of different size all have their part."""
        seen = self.job.elements if self.job.elements <= SAMPLED_WHOLE else self.job.elements // SAMPLED_LEAVES
        stride = max(2 * SAMPLED_GROUP, seen // SAMPLED_GROUPS)
        few = _spread(base, elements, stride) if base.size else base
        for i in self.searched:
            raw = _spread(raws[i], elements, stride)
            values = np.empty(raw.size // (raws[i].size // max(elements, 1)), self.real)
            self.sampling(raw, self.codes[i], few, self.base_code, 0, values, *self.arguments.values(self.fact, i))
            with self.lock:
                self.parts[i].append(values)

    def _gather(self, start: int, stop: int, raws: Sequence[np.ndarray], base: np.ndarray) -> None:
        for i in self.searched:
            low, high = self.bounds[i]
            inside = np.empty(min((stop - start) // 8, MOST_INSIDE) + 4096, self.real)
            counts = np.zeros(2, np.int64)
            extra = self.arguments.values(self.fact, i)
            self.run(raws[i], self.codes[i], base, self.base_code, start, low, high, counts, inside, *extra)
            with self.lock:
                self.counts[i] += counts
                if low != high and self.counts[i][1] <= self.room:
                    self.parts[i].append(inside[: counts[1]].copy())
                else:
                    self.parts[i].clear()

    def turn(self) -> None:
        if self.fallback is not None:
            self.fallback.turn()
            if self.fallback.done:
                self.found |= {i: self.fallback.result[i] for i in self.fallback.searched}
                self._finish()
        elif self.bounds:
            missed = [i for i in self.searched if not self._selected(i)]
            if missed:
                self.fallback = _ByHistogram(self.fact, self.job, self.arguments, missed)
            else:
                self._finish()
        else:
            for i in self.searched:
                self.bounds[i] = self._bracket(np.concatenate(self.parts[i]), self.rank[i] / self.job.elements)
                self.parts[i] = []

    def _bracket(self, sample: np.ndarray, share: float) -> tuple[Any, Any]:
        """Between which values of the sample the kth largest lies, five standard deviations of its rank to both sides."""
        margin = 5 * math.sqrt(sample.size * share * (1 - share)) + SAMPLED_GROUP
        first, last = int(share * sample.size - margin), int(share * sample.size + margin)
        places = [max(0, sample.size - 1 - last), min(sample.size - 1, sample.size - 1 - first)]
        ordered = np.sort(sample)  # vectorised in numpy, where a partition of many equal values is not
        low = ordered[places[0]] if last < sample.size else self.real.type(0)
        high = ordered[places[1]] if first >= 0 else self.real.type(np.inf)
        return low, high

    def _selected(self, i: int) -> bool:
        above, inside = (int(n) for n in self.counts[i])
        wanted = self.rank[i] - above
        low, high = self.bounds[i]
        if not 0 < wanted <= inside:
            return False
        if low == high:
            self.found[i] = float(low)
            return True
        if sum(part.size for part in self.parts[i]) < inside:
            return False
        kept = np.concatenate(self.parts[i])
        self.found[i] = float(np.partition(kept, inside - wanted)[inside - wanted])
        return True

    def _finish(self) -> None:
        self.result = tuple(self.found[i] for i in range(len(self.fact.share)))
        self.done = True


def _spread(raw: np.ndarray, elements: int, stride: int) -> np.ndarray:
    """Raw bytes of SAMPLED_GROUP elements of every ``stride``; of the first ones if there are fewer than one stride."""
    width = raw.size // max(elements, 1)
    rows = elements // stride
    if rows == 0:
        return raw[: SAMPLED_GROUP * width]
    return np.ascontiguousarray(raw[: rows * stride * width].reshape(rows, stride * width)[:, : SAMPLED_GROUP * width]).reshape(-1)


def kth(share: float, elements: int) -> int:
    """Which largest value bounds the kept share: ``max(1, int(share * elements))``, as mergekit counts."""
    return max(1, int(share * elements))


def kernels(job: Job, arguments: MeasureArguments) -> set[MeasureKernel | GramKernel]:
    """Describe the kernels that measuring a job needs."""
    assert job.merge is not None
    facts = [fact for level in job.merge.levels() for fact in level]
    sampled = [f for f in facts if isinstance(f, KthLargest) and _is_bracketed(f, job)]
    return {_kernel(f, job, arguments) for f in facts} | {_kernel(f, job, arguments, "values") for f in sampled}


def _exact_sum(parts: np.ndarray) -> float:
    # An infinity or a NaN in an input is named when the block is mixed, whatever the facts are.
    return math.fsum(parts) if np.isfinite(parts).all() else math.nan


def _is_bracketed(fact: KthLargest, job: Job) -> bool:
    """A sample cannot be drawn where values depend on noise, which belongs to an element's place."""
    return job.elements > SMALL and not any(isinstance(a, (Noise, Bernoulli)) for a in fact.arguments)


def _kernel(
    fact: Measured, job: Job, arguments: MeasureArguments, reduction: Reduction | None = None
) -> MeasureKernel | GramKernel:
    of_deltas = job.base is not None
    if isinstance(fact, Gram):
        return GramKernel(len(job.inputs), of_deltas, arguments.real)
    if reduction is None:
        if isinstance(fact, KthLargest):
            reduction = "values" if job.elements <= SMALL else "bracket" if _is_bracketed(fact, job) else "histogram"
        else:
            reduction = "sum" if isinstance(fact, Sum) else "count"
    return MeasureKernel(reduction, fact.of, of_deltas, arguments.kinds(fact), arguments.real)


def _state(fact: Measured, job: Job, arguments: MeasureArguments) -> _State:
    if isinstance(fact, Gram):
        return _ByPair(fact, job, arguments)
    if isinstance(fact, KthLargest):
        if job.elements <= SMALL:
            return _BySelection(fact, job, arguments)
        searched = [i for i, share in enumerate(fact.share) if share < 1]
        return _ByBracket(fact, job, arguments) if _is_bracketed(fact, job) else _ByHistogram(fact, job, arguments, searched)
    return _ByLeaf(fact, job, arguments)
