"""Measures the facts of one tensor, level by level and pass by pass, over blocks in any order.

Sums have one part per leaf and are added exactly (``math.fsum``), counts and histograms are integers, so the
order of blocks and the number of threads do not change the result.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from alnico.engine.arena import Arena
from alnico.engine.blocks import Block, Span
from alnico.engine.kernel_arguments import Draws, KernelContext, codes_of, in_place, kind_of
from alnico.kernels.choice import kernel_for
from alnico.kernels.constants import LEAF, WORD
from alnico.kernels.facts import Bernoulli, Count, Gram, KthLargest, Largest, MeasuredFact, Sum
from alnico.kernels.measure_kernels import (
    MOST_SEARCHED,
    ColumnGramKernel,
    GramKernel,
    MeasureKernel,
    Reduction,
)
from alnico.kernels.selection_kernel import SelectionKernel
from alnico.plan.job import Job
from alnico.plan.memory import DRAWN_BYTES, SELECTION_BYTES

SMALL = 65_536
"""In tensors of at most so many elements, a kth largest value is selected from all values."""

SAMPLED_RUNS = 64
"""Places of a sample, evenly spread over a tensor."""

SAMPLED_RUN = 1024
"""Most consecutive elements that a sample takes at a place. All runs together are a leaf, which any block has
room for."""

MOST_INSIDE = 1 << 20
"""Most elements of a block that a bracket keeps."""

FactKernel = MeasureKernel | GramKernel | ColumnGramKernel | SelectionKernel


class LevelMeasurement:
    """The facts of one level.

    First ``sample`` is called with the elements of ``runs``, if there are any; then ``fold`` for every block
    of every pass, and ``turn`` after each pass, until done.
    """

    def __init__(self, facts: Sequence[MeasuredFact], context: KernelContext) -> None:
        self.states = _states(facts, context)

    @property
    def done(self) -> bool:
        return all(state.done for state in self.states)

    @property
    def ordered(self) -> bool:
        """Must the blocks of a pass come one after the other?"""
        return any(state.ordered for state in self.states)

    @property
    def runs(self) -> list[Span]:
        """The spans of the sample, in order, all of one length."""
        samplers = [s for s in self.states if isinstance(s, _ByBracket) and not s.done]
        return samplers[0].runs if samplers else []

    def sample(self, block: Block) -> None:
        """Add the elements of all ``runs``, joined."""
        for state in self.states:
            if isinstance(state, _ByBracket) and not state.done:
                state.sample(block)

    def fold(self, start: int, stop: int, block: Block) -> None:
        """Add elements ``start`` to ``stop``. Safe for threads."""
        for state in self.states:
            if not state.done:
                state.fold(start, stop, block)

    def turn(self) -> None:
        """End a pass."""
        for state in self.states:
            if not state.done:
                state.turn()

    def results(self) -> dict[MeasuredFact, Any]:
        return {fact: value for state in self.states for fact, value in state.results().items()}


def are_finite(facts: Mapping[MeasuredFact, Any]) -> bool:
    """Are all sums, products and largest values finite? A threshold may be infinite: then nothing is as
    large."""
    return all(np.isfinite(value).all() for fact, value in facts.items() if not isinstance(fact, KthLargest))


def kept_draws(
    job: Job, threads: int, memory: Arena, stored: Mapping[Bernoulli, Draws] = MappingProxyType({})
) -> dict[Bernoulli, Draws]:
    """Make room for the draws of a job that are measured and then mixed, on so many threads. Those that are ``stored`` have
    room."""
    assert job.merge is not None
    measured = {a for level in job.merge.levels() for f in level for a in getattr(f, "arguments", ())}
    models, words = len(job.inputs), -(-job.elements // WORD)
    room = min(words, threads * DRAWN_BYTES // 8)
    kept = [a for a in drawn(job) if a in measured and a not in stored]
    views = memory.views([8 * models * room] * len(kept))
    fresh = {
        a: Draws(view.view(np.uint64).reshape(models, room)) for a, view in zip(kept, views, strict=True)
    }
    return fresh | dict(stored)


def drawn(job: Job) -> list[Bernoulli]:
    """What is drawn to mix a job."""
    assert job.merge is not None
    return [a for a in dict.fromkeys(job.merge.arguments) if isinstance(a, Bernoulli)]


class _FactState:
    """The measurement of one fact so far."""

    ordered = False

    def __init__(self, fact: MeasuredFact, context: KernelContext) -> None:
        self.fact = fact
        self.job = context.job
        self.done = False
        self.result: Any = None
        self.codes, self.base_code = codes_of(context.job)
        self.arguments = context.flat(fact.arguments) if not isinstance(fact, Gram) else []

    def fold(self, start: int, stop: int, block: Block) -> None:
        raise NotImplementedError

    def turn(self) -> None:
        raise NotImplementedError

    def results(self) -> dict[MeasuredFact, Any]:
        return {self.fact: self.result}

    def call(self, run: Callable[..., Any], start: int, block: Block, *rest: Any) -> None:
        run(
            tuple(block.raws[: len(self.codes)]),
            self.codes,
            block.base,
            self.base_code,
            start,
            *rest,
            *in_place(self.arguments, block.ranks),
        )


class _ByLeaf(_FactState):
    """Sum and Count: one number per leaf and model."""

    def __init__(self, fact: Sum | Count, context: KernelContext) -> None:
        super().__init__(fact, context)
        self.run = kernel_for(_kernel(fact, context.job), gpu=context.gpu)
        self.draws = [
            context.draws[a] for a in fact.arguments if isinstance(a, Bernoulli) and a in context.draws
        ]
        self.chosen = np.arange(1 if fact.across and isinstance(fact, Count) else len(self.codes))
        leaves = -(-self.job.elements // LEAF)
        self.parts = np.zeros((self.chosen.size, leaves), np.float64 if isinstance(fact, Sum) else np.int64)

    def fold(self, start: int, stop: int, block: Block) -> None:
        first, last = start // LEAF, -(-stop // LEAF)
        leaves = np.zeros((self.chosen.size, last - first), self.parts.dtype)
        self.call(self.run, start, block, self.chosen, leaves)
        self.parts[:, first:last] = leaves

    def turn(self) -> None:
        totals = [_exact_sum(p) if isinstance(self.fact, Sum) else int(p.sum()) for p in self.parts]
        self.result = tuple(totals * (len(self.codes) // len(totals)))
        self.done = True
        if self.chosen.size == len(self.codes):
            for draws in self.draws:
                draws.are_known = True


class _ByRow(_FactState):
    """Gram of the tensor or of its rows: the products of each row in each leaf."""

    def __init__(self, fact: Gram, context: KernelContext) -> None:
        super().__init__(fact, context)
        k = len(self.codes)
        self.run = kernel_for(_kernel(fact, context.job), gpu=context.gpu)
        self.row = self.job.row if fact.over == "row" else max(self.job.elements, 1)
        self.parts = np.zeros((self._segment(self.job.elements - 1) + 1, k * (k + 1) // 2))

    def _segment(self, element: int) -> int:
        return element // self.row + element // LEAF if element >= 0 else -1

    def fold(self, start: int, stop: int, block: Block) -> None:
        if stop > start:
            self.call(
                self.run,
                start,
                block,
                self.row,
                self.parts[self._segment(start) : self._segment(stop - 1) + 1],
            )

    def turn(self) -> None:
        assert isinstance(self.fact, Gram)
        if self.fact.over == "row":
            rows = np.arange(self.job.elements // self.row)
            sums = np.add.reduceat(self.parts, rows + rows * self.row // LEAF) if rows.size else self.parts
            self.result = sums[:, _square(len(self.codes))]
        else:
            sums = np.array([_exact_sum(pair) for pair in self.parts.T])
            self.result = tuple(tuple(row) for row in sums[_square(len(self.codes))].tolist())
        self.done = True


class _OfRows(_FactState):
    """Sum or Largest of rows: one number for the part of each row in each leaf."""

    def __init__(self, fact: Sum | Largest, context: KernelContext) -> None:
        super().__init__(fact, context)
        self.run = kernel_for(_kernel(fact, context.job), gpu=context.gpu)
        self.chosen = np.arange(len(self.codes))
        self.parts = np.zeros((self.chosen.size, _segment(self.job, self.job.elements - 1) + 1))

    def fold(self, start: int, stop: int, block: Block) -> None:
        if stop > start:
            first, last = _segment(self.job, start), _segment(self.job, stop - 1) + 1
            parts = np.zeros((self.chosen.size, last - first))
            self.call(self.run, start, block, self.chosen, self.job.row, parts)
            self.parts[:, first:last] = parts

    def turn(self) -> None:
        rows = np.arange(self.job.elements // self.job.row)
        reduce = np.add if isinstance(self.fact, Sum) else np.maximum
        self.result = (
            reduce.reduceat(self.parts, _segment(self.job, rows * self.job.row), axis=1)
            if rows.size
            else self.parts
        )
        self.done = True


class _ByColumn(_FactState):
    """Gram of the columns, added up in the order of the rows."""

    ordered = True

    def __init__(self, fact: Gram, context: KernelContext) -> None:
        super().__init__(fact, context)
        k = len(self.codes)
        self.run = kernel_for(_kernel(fact, context.job), gpu=context.gpu)
        self.sums = np.zeros((k * (k + 1) // 2, self.job.columns))

    def fold(self, start: int, stop: int, block: Block) -> None:
        self.call(self.run, start, block, self.sums)

    def turn(self) -> None:
        self.result = self.sums.T[:, _square(len(self.codes))]
        self.done = True


class _KthLargestSearch(_FactState):
    """What the ways to a kth largest value share: ``chosen`` models are searched, for the values at ``rank``."""

    def __init__(self, fact: KthLargest, context: KernelContext) -> None:
        super().__init__(fact, context)
        self.fact: KthLargest = fact
        self.real = np.dtype(context.real)
        n, models = self.job.elements, len(fact.share) if fact.across else len(self.codes)
        among = context.facts[fact.among] if fact.among is not None else (None,) * models
        rank = {i: fact.place(i, n, among[i]) for i in range(models)}
        nothing = math.inf if fact.end == "first" else 0.0
        everything = {i for i in rank if fact.share[i] >= 1 or n == 0}
        self.values_by_model = {
            i: nothing if i in everything else math.inf for i in rank if i in everything or rank[i] == 0
        }
        self.values_by_model |= context.given.get(fact, {})
        searched = [i for i in rank if i not in self.values_by_model]
        self.chosen = np.array(searched, np.int64)
        self.rank = np.array([rank[i] for i in searched], np.int64)
        if not searched:
            self.finish([])

    def finish(self, values: Sequence[float]) -> None:
        self.values_by_model |= dict(zip(self.chosen.tolist(), values, strict=True))
        values = [self.values_by_model[i] for i in range(len(self.values_by_model))]
        self.result = tuple(values * (len(self.codes) // len(values)) if self.fact.across else values)
        self.done = True


class _BySelection(_KthLargestSearch):
    """KthLargest of a small tensor: the values are gathered and selected from."""

    def __init__(self, fact: KthLargest, context: KernelContext) -> None:
        super().__init__(fact, context)
        self.run = kernel_for(_kernel(fact, context.job), gpu=context.gpu)
        self.gathered = np.zeros((self.chosen.size, self.job.elements), self.real)

    def fold(self, start: int, stop: int, block: Block) -> None:
        values = np.empty((self.chosen.size, stop - start), self.real)
        self.call(self.run, start, block, self.chosen, values)
        self.gathered[:, start:stop] = values

    def turn(self) -> None:
        self.finish(_select(self.gathered, self.job.elements - self.rank))


class _ByHistogram(_KthLargestSearch):
    """KthLargest of a large tensor, by counting."""

    def __init__(self, fact: KthLargest, context: KernelContext, unplanned_elements: int = 0) -> None:
        super().__init__(fact, context)
        kernel = _kernel(fact, context.job, "histogram")
        self.run = kernel_for(kernel, unplanned_elements, gpu=context.gpu)
        self.digits = _Digits(self.rank, self.real)
        self.lock = threading.Lock()

    def fold(self, start: int, stop: int, block: Block) -> None:
        bins = np.zeros_like(self.digits.bins)
        self.call(self.run, start, block, self.chosen, self.digits.shift, self.digits.prefix, bins)
        with self.lock:
            self.digits.bins += bins

    def turn(self) -> None:
        if (values := self.digits.turn()) is not None:
            self.finish(values)


class _Digits:
    """Kth largest values, found 16 bits per pass: the bits of a float that is not negative order as the float
    does, so counting by the upper 16 bits, then by the next 16 among those that share them, finds them
    exactly."""

    def __init__(self, rank: np.ndarray, real: np.dtype[Any]) -> None:
        self.rank = rank.copy()
        self.real = real
        self.shift = 8 * real.itemsize - 16
        self.prefix = np.zeros(rank.size, np.uint64)
        self.bins = np.zeros((rank.size, 65_536), np.int64)

    def turn(self) -> list[float] | None:
        """Continue from ``bins``, one histogram per value, with the next bits. Returns the values when all
        bits are known."""
        for n, bins in enumerate(self.bins):
            above = np.cumsum(bins[::-1])
            place = int(np.searchsorted(above, self.rank[n]))
            self.rank[n] -= int(above[place - 1]) if place else 0
            self.prefix[n] = int(self.prefix[n]) << 16 | (65_535 - place)
        self.bins[:] = 0
        self.shift -= 16
        values: list[float] = self.prefix.astype(f"u{self.real.itemsize}").view(self.real).tolist()
        return values if self.shift < 0 else None


@dataclass(frozen=True)
class OverModel:
    """A fact over all tensors that ``models`` (and ``base``) give to merges with that fact: positions in
    ``Plan.sources``."""

    fact: KthLargest
    models: tuple[int, ...]
    base: int | None


def over_model(jobs: Iterable[Job]) -> dict[OverModel, list[Job]]:
    """Map the facts of the whole model that jobs need to the jobs they are measured over, in order."""
    jobs_of: dict[OverModel, list[Job]] = {}
    for job in jobs:
        if (mixed := job.mixed) is not None:
            for fact in of_model(mixed):
                jobs_of.setdefault(fact, []).append(mixed)
    return jobs_of


def of_model(job: Job) -> list[OverModel]:
    """Return the facts of the whole model that a job needs."""
    facts = job.merge.of_model if job.kind == "mix" and job.merge is not None else ()
    return [
        OverModel(f, tuple(i.model for i in job.inputs), job.base.model if job.base else None) for f in facts
    ]


def model_kernel(fact: OverModel, jobs: Sequence[Job]) -> MeasureKernel:
    """Describe the kernel that measures a fact over all ``jobs``, in the widest of their precisions."""
    real = max(job.real for job in jobs)  # "float64" is also the greater string
    return MeasureKernel("histogram", fact.fact.of, len(fact.models), fact.base is not None, (), real)


def histogram_passes(real: np.dtype[Any] | str) -> int:
    """The number of passes that find a value of a dtype by 16 of its bits at a time."""
    return 8 * np.dtype(real).itemsize // 16


def model_passes(fact: OverModel, jobs: Sequence[Job]) -> int:
    """The number of passes over all ``jobs`` that measure a fact."""
    is_measured = any(share < 1 for share in fact.fact.share) and any(job.elements for job in jobs)
    return histogram_passes(model_kernel(fact, jobs).real) if is_measured else 0


class ModelMeasurement:
    """One fact over many tensors: ``fold`` for every block of every tensor, and ``turn`` after each pass,
    until ``result``.

    ``given`` are the answers for some models, by their position, which are not measured.
    """

    def __init__(self, fact: OverModel, jobs: Sequence[Job], given: Mapping[int, float]) -> None:
        kernel = model_kernel(fact, jobs)
        self.kernel = kernel
        elements = sum(job.elements for job in jobs)
        shares = fact.fact.share
        nothing = math.inf if fact.fact.end == "first" else 0.0
        self.chosen = np.array(
            [i for i, share in enumerate(shares) if share < 1 and elements and i not in given], np.int64
        )
        rank = np.array([fact.fact.place(i, elements) for i in self.chosen.tolist()], np.int64)
        self.digits = _Digits(rank, np.dtype(kernel.real))
        self.values_by_model = [given.get(i, nothing) for i in range(len(shares))]
        self.result: tuple[float, ...] | None = None if self.chosen.size else tuple(self.values_by_model)
        self.own = threading.local()
        self.bins: list[np.ndarray] = []
        self.lock = threading.Lock()

    @property
    def digits_so_far(self) -> tuple[int, np.ndarray]:
        """What the passes so far have found, for a process that counts for the next one: see :meth:`follow`."""
        return self.digits.shift, self.digits.prefix

    def follow(self, so_far: tuple[int, np.ndarray]) -> None:
        """Count for the pass of another process, instead of the first one."""
        self.digits.shift, self.digits.prefix = so_far

    @property
    def counts(self) -> np.ndarray:
        """What was counted in this pass: integers, which another process adds to its own by :meth:`add`."""
        return sum(self.bins, np.zeros_like(self.digits.bins))

    def add(self, counts: np.ndarray) -> None:
        """Add what another process counted in this pass."""
        self.digits.bins += counts

    def fold(self, job: Job, start: int, block: Block) -> None:
        """Add a block of ``job`` that begins at ``start``. Safe for threads: each has its own counts."""
        bins = getattr(self.own, "bins", None)
        if bins is None:
            bins = self.own.bins = np.zeros_like(self.digits.bins)
            with self.lock:
                self.bins.append(bins)
        codes, base_code = codes_of(job)
        raws = tuple(block.raws)
        kernel_for(self.kernel, gpu=block.gpu)(
            raws,
            codes,
            block.base,
            base_code,
            start,
            self.chosen,
            self.digits.shift,
            self.digits.prefix,
            bins,
        )

    def turn(self) -> None:
        """End a pass."""
        for bins in self.bins:
            self.digits.bins += bins
            bins[:] = 0
        if (values := self.digits.turn()) is not None:
            for i, value in zip(self.chosen.tolist(), values, strict=True):
                self.values_by_model[i] = value
            self.result = tuple(self.values_by_model)


class _ByBracket(_FactState):
    """KthLargest facts of one function of a large tensor, mostly in one pass: a sample says between which two values each kth
    largest should lie; the pass counts what is above and keeps what is between, and the kth largest is selected from that.

    The sample decides the speed alone. Where the kth largest is not between, or too much is, the histogram finds it.
    """

    def __init__(self, facts: Sequence[KthLargest], context: KernelContext) -> None:
        super().__init__(facts[0], context)
        self.context = context
        self.real = np.dtype(context.real)
        self.run = kernel_for(_kernel(facts[0], context.job))
        self.sampling = kernel_for(_kernel(facts[0], context.job, "values"))
        self.searches = [_KthLargestSearch(fact, context) for fact in facts]
        # All values of one model next to each other: then it is decoded once.
        pairs = [(i, r, s) for s in self.searches for i, r in zip(s.chosen, s.rank, strict=True)]
        searched = sorted(pairs, key=lambda pair: pair[:2])
        self.chosen = np.array([i for i, _, _ in searched], np.int64)
        self.rank = np.array([r for _, r, _ in searched], np.int64)
        self.owner = [s for _, _, s in searched]
        self.parts: list[list[np.ndarray]] = [[] for _ in self.chosen]
        self.counts = np.zeros((self.chosen.size, 2), np.int64)
        self.low = self.high = np.empty(0, self.real)
        self.gathers = True
        self.room = SELECTION_BYTES // self.real.itemsize // max(self.chosen.size, 1)
        self.lock = threading.Lock()
        self.done = not searched

    @property
    def runs(self) -> list[Span]:
        stride = self.job.elements // SAMPLED_RUNS
        return [(i * stride, i * stride + min(stride, SAMPLED_RUN)) for i in range(SAMPLED_RUNS)]

    def sample(self, block: Block) -> None:
        models = np.unique(self.chosen)
        values = np.empty(
            (models.size, SAMPLED_RUNS, min(self.job.elements // SAMPLED_RUNS, SAMPLED_RUN)), self.real
        )
        self.call(self.sampling, 0, block, models, values.reshape(models.size, -1))
        own = np.searchsorted(models, self.chosen)
        shares = self.rank / self.job.elements
        bounds = [self._bracket(values[m], share) for m, share in zip(own, shares, strict=True)]
        self.low, self.high = (np.array(side, self.real) for side in zip(*bounds, strict=True))

    def fold(self, start: int, stop: int, block: Block) -> None:
        if self.gathers:
            return self._gather(start, stop, block)
        for search in self.searches:
            if not search.done:
                search.fold(start, stop, block)

    def _gather(self, start: int, stop: int, block: Block) -> None:
        inside = np.empty((self.chosen.size, min((stop - start) // 4, MOST_INSIDE) + 4096), self.real)
        counts = np.zeros_like(self.counts)
        self.call(self.run, start, block, self.chosen, self.low, self.high, counts, inside)
        with self.lock:
            self.counts += counts
            for n, part in enumerate(self.parts):
                count = int(counts[n, 1])
                if (
                    self.low[n] != self.high[n]
                    and self.counts[n, 1] <= self.room
                    and count + WORD <= inside.shape[1]
                ):
                    part.append(inside[n, :count].copy())
                else:
                    part.clear()

    def turn(self) -> None:
        if self.gathers:
            self.gathers = False
            values = [self._selected(n) for n in range(self.chosen.size)]
            for n, search in enumerate(self.searches):
                own = [value for value, owner in zip(values, self.owner, strict=True) if owner is search]
                if None in own:
                    elements = histogram_passes(self.real) * self.job.elements
                    self.searches[n] = _ByHistogram(search.fact, self.context, unplanned_elements=elements)
                elif own:
                    search.finish([value for value in own if value is not None])
        else:
            for search in self.searches:
                if not search.done:
                    search.turn()
        self.done = all(search.done for search in self.searches)

    def results(self) -> dict[MeasuredFact, Any]:
        return {search.fact: search.result for search in self.searches}

    def _bracket(self, sample: np.ndarray, share: float) -> tuple[Any, Any]:
        """Between which values of the sample (runs, elements) the kth largest lies: four standard deviations
        of its rank to both sides, by the spread between the runs where that is larger, since rows of a tensor
        differ in size."""
        row = sample.reshape(1, -1)
        middle = _select(row, [max(0, sample.size - 1 - int(share * sample.size))])[0]
        above = (sample > self.real.type(middle)).mean(axis=1)
        deviation = max(
            math.sqrt(share * (1 - share) / sample.size), float(above.std()) / math.sqrt(len(sample))
        )
        margin = 4 * deviation * sample.size + SAMPLED_RUNS
        first, last = int(share * sample.size - margin), int(share * sample.size + margin)
        places = [max(0, sample.size - 1 - last), min(sample.size - 1, sample.size - 1 - first)]
        low = _select(row, places[:1])[0] if last < sample.size else 0.0
        high = _select(row, places[1:])[0] if first >= 0 else math.inf
        return low, high

    def _selected(self, n: int) -> float | None:
        """Return the kth largest value, if it is in the bracket and all values in the bracket were kept."""
        above, inside = self.counts[n].tolist()
        place = int(self.rank[n]) - above
        if not 0 < place <= inside:
            return None
        if self.low[n] == self.high[n]:
            return float(self.low[n])
        if sum(part.size for part in self.parts[n]) < inside:
            return None
        return _select(np.concatenate(self.parts[n])[None], [inside - place])[0]


def _select(values: np.ndarray, places: Sequence[int] | np.ndarray) -> list[float]:
    """The value at a place of each row of values that are not negative; the smallest has place 0."""
    bits = values.view(f"u{values.itemsize}")
    found = np.empty(len(bits), bits.dtype)
    run = kernel_for(SelectionKernel("float64" if values.itemsize == 8 else "float32"))
    run(bits, np.asarray(places, np.int64), np.empty(bits.shape[1], bits.dtype), found)
    selected: list[float] = found.view(values.dtype).tolist()
    return selected


def kernels(job: Job, *, on_gpu: bool = False) -> set[FactKernel]:
    """Describe the kernels that measure a job."""
    assert job.merge is not None
    return kernels_of([fact for level in job.merge.levels() for fact in level], job, on_gpu=on_gpu)


def kernels_of(facts: Sequence[MeasuredFact], job: Job, *, on_gpu: bool = False) -> set[FactKernel]:
    """Describe the kernels that measure some facts of a job."""
    searches = [f for f in facts if isinstance(f, KthLargest)]
    selecting: set[FactKernel] = {SelectionKernel(job.real)} if searches else set()
    if on_gpu:
        return {_kernel(f, job, _counted(f, job)) for f in facts} | selecting
    sampled = [f for f in searches if is_bracketed(f, job)]
    return {_kernel(f, job) for f in facts} | {_kernel(f, job, "values") for f in sampled} | selecting


def _counted(fact: MeasuredFact, job: Job) -> Reduction | None:
    """How a GPU searches a kth largest: it counts all values of a large tensor, as it reads them faster than it would pick some."""
    return "histogram" if isinstance(fact, KthLargest) and job.elements > SMALL else None


def values_kernel(fact: KthLargest, job: Job) -> MeasureKernel:
    """Describe the kernel that gives the values that a fact compares."""
    kernel = _kernel(fact, job, "values")
    assert isinstance(kernel, MeasureKernel)
    return kernel


def _segment(job: Job, element: Any) -> Any:
    """The number of the part of a leaf in one row that an element lies in; -1 for none."""
    return element // job.row + element // LEAF if np.all(element >= 0) else -1


def _exact_sum(parts: np.ndarray) -> float:
    # An infinity or a NaN in an input is named when the block is mixed, whatever the facts are.
    return math.fsum(parts) if np.isfinite(parts).all() else math.nan


def _square(models: int) -> np.ndarray:
    """Which pair each entry of a symmetric matrix is, for the pairs (0, 0), (0, 1), ... (1, 1), ... of its
    upper half."""
    places = np.zeros((models, models), np.int64)
    upper = np.triu_indices(models)
    places[upper] = np.arange(upper[0].size)
    return np.maximum(places, places.T)


def is_bracketed(fact: KthLargest, job: Job) -> bool:
    """A sample cannot be drawn where values depend on an element's place."""
    return job.elements > SMALL and all(kind_of(a) in ("number", "numbers") for a in fact.arguments)


def _kernel(fact: MeasuredFact, job: Job, reduction: Reduction | None = None) -> FactKernel:
    of_deltas, models, real = job.base is not None, len(job.inputs), job.real
    if isinstance(fact, Gram):
        return (ColumnGramKernel if fact.over == "column" else GramKernel)(models, of_deltas, real)
    if reduction is None:
        if isinstance(fact, KthLargest):
            reduction = (
                "values" if job.elements <= SMALL else "bracket" if is_bracketed(fact, job) else "histogram"
            )
        elif isinstance(fact, Largest):
            reduction = "largest of rows"
        elif isinstance(fact, Sum):
            reduction = "sum of rows" if fact.over == "row" else "sum"
        else:
            reduction = "count"
    kinds = tuple(kind_of(a) for a in fact.arguments)
    return MeasureKernel(reduction, fact.of, models, of_deltas, kinds, real, fact.across)


def _states(facts: Sequence[MeasuredFact], context: KernelContext) -> list[_FactState]:
    """Return what measures the facts. Thresholds of one function are searched together."""
    together: dict[Any, list[KthLargest]] = {}
    states = []
    for fact in facts:
        if isinstance(fact, KthLargest) and context.gpu is None and is_bracketed(fact, context.job):
            together.setdefault((fact.of, fact.arguments, fact.across), []).append(fact)
        else:
            states.append(_state(fact, context))
    groups = (g[n : n + MOST_SEARCHED] for g in together.values() for n in range(0, len(g), MOST_SEARCHED))
    return [*states, *(_ByBracket(group, context) for group in groups)]


def _state(fact: MeasuredFact, context: KernelContext) -> _FactState:
    if isinstance(fact, Gram):
        return _ByColumn(fact, context) if fact.over == "column" else _ByRow(fact, context)
    if isinstance(fact, KthLargest):
        if context.job.elements <= SMALL:
            return _BySelection(fact, context)
        return _ByHistogram(fact, context)
    if isinstance(fact, Largest) or (isinstance(fact, Sum) and fact.over == "row"):
        return _OfRows(fact, context)
    return _ByLeaf(fact, context)
