"""Measures the norms that weights follow from, before the first tensor is merged: one pass over the task vectors."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from alnico.engine.arena import Arena
from alnico.engine.blocks import Block, Span, blocks, chunks
from alnico.engine.fetch import fetch_weights
from alnico.engine.kernel_arguments import KernelContext
from alnico.engine.measure import LevelMeasurement
from alnico.engine.mix import refuse_inputs
from alnico.engine.relatedness import check_relatedness
from alnico.errors import MethodError, NonFiniteError
from alnico.events import Event, Measuring
from alnico.kernels.facts import Sum
from alnico.plan.job import Job, Norms, Plan
from alnico.plan.norm_weights import with_norms
from alnico.recipe.schema import NormWeight
from alnico.threads import WorkItem, check, do_all, workers


def square(x: float) -> float:
    """x^2"""
    return x * x


SQUARES = Sum(square)


def measure_norm_weights(
    plan: Plan,
    known: Mapping[int, Norms],
    watch: Callable[[Event], None] | None = None,
    note: Callable[[Mapping[int, Norms]], None] | None = None,
) -> Plan:
    """Return the plan with the weights that follow from norms; ``known`` are those that an interrupted run has measured, by the
    position of their weighing, and ``note`` is told of the others.

    Sums are in float64 over fixed leaves and then exact: no thread and no block is seen in them.
    Errors: MismatchError for a model at distance 0 where it cannot be, MethodError, NonFiniteError, and those of reading.
    """
    found = dict(known)
    missing = {i: w for i, w in enumerate(plan.weighings) if w.norms is None and i not in found}
    if missing:
        if watch:
            watch(Measuring(sum(len(w.tensors) for w in missing.values())))
        squares = _Squares(plan, [t.delta for w in missing.values() for t in w.tensors.values()]).all()
        for i, weighing in missing.items():
            sums = [squares[name] for name in weighing.tensors]
            found[i] = tuple(math.sqrt(math.fsum(parts)) for parts in zip(*sums, strict=True))
        if note:
            note({i: found[i] for i in missing})
    return with_norms(plan, found) if found else plan


class _TensorNorms:
    """One tensor being measured."""

    def __init__(self, job: Job, spans: int) -> None:
        self.facts = LevelMeasurement([SQUARES], KernelContext(job, 0, {}))
        self.remaining = spans


class _Squares:
    """The threads that sum the squares of task vectors."""

    def __init__(self, plan: Plan, jobs: list[Job]) -> None:
        self.plan = plan
        self.jobs = jobs
        self.found: dict[str, tuple[float, ...]] = {}
        self._open: dict[str, _TensorNorms] = {}
        self._lock = threading.Lock()
        self._arena = Arena(plan.memory.worker_bytes)
        self._stop = threading.Event()

    def all(self) -> dict[str, tuple[float, ...]]:
        """The sums of each tensor, a number a model."""
        calls: list[WorkItem] = [
            (self._measure, (job, span, len(spans)))
            for job in self.jobs
            for spans in [chunks(job)]
            for span in spans
        ]
        with workers(self.plan.memory.threads) as pool:
            do_all(pool, self._stop, calls)
        return self.found

    def _measure(self, job: Job, span: Span, spans: int) -> None:
        with self._lock:
            state = self._open.get(job.name) or self._open.setdefault(job.name, _TensorNorms(job, spans))
        for start, stop in blocks(span, self.plan.memory.block_elements):
            check(self._stop)
            state.facts.fold(start, stop, self._block(job, start, stop))
        with self._lock:
            state.remaining -= 1
            if state.remaining:
                return
            del self._open[job.name]
        state.facts.turn()
        sums = state.facts.results()[SQUARES]
        if not all(map(math.isfinite, sums)):
            self._refuse(job)
        self.found[job.name] = sums

    def _block(self, job: Job, start: int, stop: int) -> Block:
        views = self._arena.read(job, self.plan.sources, (start, stop))
        return Block(views[:-1], views[-1])

    def _refuse(self, job: Job) -> None:
        """Name the first number of a tensor that is not finite. Errors: NonFiniteError."""
        for start, stop in blocks((0, job.elements), self.plan.memory.block_elements):
            refuse_inputs(job, self.plan.sources, start, self._block(job, start, stop))
        raise NonFiniteError(
            f"{job.name}: the L2 norm of a task vector is beyond float64; expected a finite number. Leave the model out, or give weights."
        )


@dataclass(frozen=True)
class NormWeights:
    """What models would weigh: ``norms`` and ``weights`` have a row for each of ``places``, layers or tensors, and in it one number
    a model. The one place of the whole model is called ''."""

    setting: NormWeight
    base: str
    models: tuple[str, ...]
    places: tuple[str, ...]
    norms: tuple[Norms, ...]
    weights: tuple[tuple[float, ...], ...]
    notes: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        """All of it as plain data, for ``--json``."""
        rows = zip(self.places, self.norms, self.weights, strict=True)
        parts = [{**({"place": p} if p else {}), "l2_norms": [*n], "weights": [*w]} for p, n, w in rows]
        return {
            "weight": self.setting.data(),
            "base": self.base,
            "models": [*self.models],
            "parts": parts,
            "notes": [*self.notes],
        }


def weights_of(plan: Plan) -> NormWeights:
    """Measure what the models of a plan weigh, and merge nothing. Errors: MethodError where nothing is weighed; see :func:`weigh`."""
    if not plan.weighings:
        raise MethodError(
            "weights: nothing depends on them; expected two models or more, with tensors to merge, and a scale other than 0."
        )
    if plan.to_measure:
        fetch_weights(plan)
        plan = measure_norm_weights(check_relatedness(plan), {})
    done = plan.weighings
    first = done[0]
    labels = tuple(plan.sources[m].label for m in first.models)
    norms = tuple(w.norms or () for w in done)
    weights = tuple(w.weights or () for w in done)
    return NormWeights(
        first.setting,
        plan.sources[first.base].label,
        labels,
        tuple(w.place for w in done),
        norms,
        weights,
        plan.notes,
    )
