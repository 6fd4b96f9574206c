"""Keeps measured facts of models that stay open, so that many recipes measure them once.

The key of a fact is its definition, its tensors and the precision of its kernel; for facts that depend on
noise, also the source of the noise. Facts of single models (a threshold at some density, a sum) have one
entry per model, so that a new density of one model keeps the thresholds of the others.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from alnico.checkpoint.resident_model import SharedBudget, resident_bytes
from alnico.checkpoint.source import Source
from alnico.engine.draw_store import DrawStore
from alnico.engine.kernel_arguments import Draws, KernelContext
from alnico.engine.measure import OverModel, drawn
from alnico.engine.sorted_values import MOST_ELEMENTS, SortedValues, sort_values
from alnico.kernels.constants import WORD
from alnico.kernels.facts import (
    Argument,
    Bernoulli,
    Count,
    Derived,
    Gram,
    KthLargest,
    Largest,
    MeasuredFact,
    Noise,
    Sum,
)
from alnico.plan.job import Input, Job

MOST_FACTS = 200_000
"""Most facts that are kept; the least recently used one goes first. A number with its key takes half a
kilobyte."""

MOST_REDUCED = 1024
"""Most facts whose part for one model is kept: every tensor asks for it."""

MOST_BYTES = 16 << 20
"""A larger fact (of many rows or columns) is not kept."""


class FactStore:
    """Measured facts, by key. Safe for threads."""

    def __init__(self, room: SharedBudget, most: int = MOST_FACTS) -> None:
        self._room = room
        self._most = most
        self.draws = DrawStore(room)
        self._sorted: dict[Hashable, SortedValues | Literal["requested once"] | None] = {}
        self._facts: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        with self._lock:
            if key in self._facts:
                self._facts.move_to_end(key)
            return self._facts.get(key)

    def put(self, key: Hashable, value: Any) -> None:
        if isinstance(value, np.ndarray) and value.nbytes > MOST_BYTES:
            return
        with self._lock:
            self._facts[key] = value
            if len(self._facts) > self._most:
                self._facts.popitem(last=False)

    def sorted_values(self, key: Hashable, make: Callable[[], SortedValues | None]) -> SortedValues | None:
        """Return the sorted values of a tensor. They are sorted at the second request, and kept if there is
        room."""
        with self._lock:
            if key not in self._sorted:
                # There may never be a second request, and sorting takes longer than one search.
                self._sorted[key] = "requested once"
                return None
            values = self._sorted[key]
        if values != "requested once":
            return values
        values = make()
        fits = values is not None and self._room.take(values.byte_size)
        with self._lock:
            self._sorted[key] = values if fits else None
        return values


@dataclass(frozen=True)
class CachedFacts:
    """Known facts: ``whole`` for all models; ``given`` for some models, by their position."""

    whole: Mapping[MeasuredFact, Any] = field(default_factory=dict)
    given: Mapping[KthLargest, Mapping[int, float]] = field(default_factory=dict)


class FactCache:
    """The facts in a store of the sources of one plan."""

    def __init__(self, sources: Sequence[Source], store: FactStore) -> None:
        self._sources = sources
        self._store = store

    def of_tensor(self, level: Sequence[MeasuredFact], context: KernelContext) -> CachedFacts:
        """Look up the facts of one level."""
        whole: dict[MeasuredFact, Any] = {}
        given: dict[KthLargest, Mapping[int, float]] = {}
        for fact in level:
            if not _is_of_each(fact):
                if (value := self._store.get(self._key(fact, context))) is not None:
                    whole[fact] = value
                continue
            models = range(len(context.job.inputs))
            values = {i: v for i in models if (v := self._of_one(fact, i, context)) is not None}
            if len(values) == len(models):
                whole[fact] = tuple(values.values())
            elif isinstance(fact, KthLargest) and values:
                given[fact] = values
        return CachedFacts(whole, given)

    def _of_one(self, fact: MeasuredFact, model: int, context: KernelContext) -> Any:
        """Look up a fact of one model, or derive it from sorted values."""
        value = self._store.get(self._key_of_one(fact, model, context))
        job = context.job
        if (
            value is not None
            or not isinstance(fact, KthLargest)
            or context.gpu is not None  # it counts all values in the time that looking one up takes
            or fact.share[model] >= 1
            or not 0 < job.elements <= MOST_ELEMENTS
        ):
            return value
        values = self._store.sorted_values(
            (
                "sorted values",
                fact.of,
                self._about(job.inputs[model : model + 1]),
                self._base(job),
                context.real,
            ),
            lambda: self._sort(fact, model, context),
        )
        return values.largest(fact.place(model, job.elements)) if values is not None else None

    def _sort(self, fact: KthLargest, model: int, context: KernelContext) -> SortedValues | None:
        """Sort the values of a tensor, if all its inputs are in memory."""
        held = [resident_bytes(self._sources[tensor.model], tensor.name) for tensor in context.job.read]
        raws = [raw for raw in held if raw is not None]
        if len(raws) < len(held):
            return None
        inputs = len(context.job.inputs)
        return sort_values(
            fact, model, context, raws[:inputs], raws[-1] if context.job.base is not None else None
        )

    def keep(self, facts: Mapping[MeasuredFact, Any], context: KernelContext) -> None:
        """Keep the measured facts of one tensor."""
        for fact, value in facts.items():
            if _is_of_each(fact):
                for i, of_model in enumerate(value):
                    self._store.put(self._key_of_one(fact, i, context), of_model)
            else:
                self._store.put(self._key(fact, context), value)

    def draws(self, context: KernelContext) -> dict[Bernoulli, Draws]:
        """Look up what is drawn to mix one tensor on the processor, known or not, where it is kept."""
        job = context.job
        models, words = len(job.inputs), -(-job.elements // WORD)
        about = context.seed, job.name, context.real, self._about(job.inputs), self._base(job)
        found = {a: self._store.draws.draws((a, *about), models, words) for a in drawn(job)}
        return {a: draws for a, draws in found.items() if draws is not None}

    def of_model(self, fact: OverModel, jobs: Sequence[Job]) -> dict[int, float]:
        """Look up a fact over all ``jobs``: the values of the models that have one, by their position."""
        keys = self._keys_over(fact, jobs)
        return {i: value for i, key in enumerate(keys) if (value := self._store.get(key)) is not None}

    def keep_of_model(self, fact: OverModel, jobs: Sequence[Job], values: Sequence[float]) -> None:
        for key, value in zip(self._keys_over(fact, jobs), values, strict=True):
            self._store.put(key, value)

    def norms(self, jobs: Sequence[Job]) -> Any:
        """Look up the norms of task vectors over ``jobs``."""
        return self._store.get(self._norms_key(jobs))

    def keep_norms(self, jobs: Sequence[Job], norms: tuple[float, ...]) -> None:
        self._store.put(self._norms_key(jobs), norms)

    def _norms_key(self, jobs: Sequence[Job]) -> Hashable:
        return "norms", tuple(self._about(job.read) for job in jobs)

    def _key(self, fact: MeasuredFact, context: KernelContext) -> Hashable:
        noise = (context.seed, context.job.name) if _has_noise(fact) else None
        return fact, self._about(context.job.inputs), self._base(context.job), context.real, noise

    def _key_of_one(self, fact: MeasuredFact, model: int, context: KernelContext) -> Hashable:
        return (
            _of_one(fact, model),
            self._about(context.job.inputs[model : model + 1]),
            self._base(context.job),
            context.real,
        )

    def _keys_over(self, fact: OverModel, jobs: Sequence[Job]) -> list[Hashable]:
        precisions = tuple(sorted({KernelContext(job, 0, {}).real for job in jobs}))
        return [
            (
                _of_one(fact.fact, i),
                precisions,
                tuple((self._about(job.inputs[i : i + 1]), self._base(job)) for job in jobs),
            )
            for i in range(len(fact.models))
        ]

    def _base(self, job: Job) -> Hashable:
        return self._about([job.base]) if job.base is not None else ()

    def _about(self, inputs: Iterable[Input]) -> Hashable:
        # The key holds the source itself, so that no other object gets its identity.
        return tuple((self._sources[tensor.model], tensor.name) for tensor in inputs)


def _is_of_each(fact: MeasuredFact) -> bool:
    """Is a fact one number per model that depends on no other model but the base?"""
    if isinstance(fact, KthLargest):
        return not (fact.arguments or fact.across or fact.among)
    return (
        isinstance(fact, (Sum, Count))
        and not (fact.arguments or fact.across)
        and getattr(fact, "over", "tensor") == "tensor"
    )


@functools.lru_cache(maxsize=MOST_REDUCED)
def _of_one(fact: MeasuredFact, model: int) -> MeasuredFact:
    """Reduce a fact to one model."""
    if isinstance(fact, KthLargest):
        return dataclasses.replace(
            fact, share=fact.share[model : model + 1], skip=fact.skip[model : model + 1]
        )
    return fact


def _has_noise(argument: Argument | None) -> bool:
    match argument:
        case Noise() | Bernoulli():
            return True
        case KthLargest(arguments=arguments, among=among):
            return _has_noise(among) or any(map(_has_noise, arguments))
        case (
            Sum(arguments=arguments)
            | Count(arguments=arguments)
            | Largest(arguments=arguments)
            | Derived(arguments=arguments)
        ):
            return any(map(_has_noise, arguments))
        case Gram():
            return False
    return False
