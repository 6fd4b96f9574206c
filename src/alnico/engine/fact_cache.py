"""Facts that outlive a run: of the same tensors of models that stay open, measured once for many recipes.

A fact is known by what it says, by the tensors that it is about and by the precision of its kernel; where noise is behind it, also
by what the noise comes from. What each model has for itself (a threshold at some density, a sum) is kept a model at a time, so that a
new density of one model leaves the others' thresholds known.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from alnico.checkpoint.resident_model import SharedBudget, resident_bytes
from alnico.checkpoint.source import Source
from alnico.engine.kernel_arguments import KernelContext
from alnico.engine.measure import OverModel
from alnico.engine.sorted_values import MOST_ELEMENTS, SortedValues, order
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
"""Facts that are kept; the one that was not asked for the longest goes first. A number with its key takes half a kilobyte."""

MOST_BYTES = 16 << 20
"""A fact of many rows or columns that is larger is measured anew."""


class FactStore:
    """What was measured, by key. Safe for threads."""

    def __init__(self, room: SharedBudget, most: int = MOST_FACTS) -> None:
        self._room = room
        self._most = most
        self._ordered: dict[Hashable, SortedValues | Literal["asked"] | None] = {}
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

    def ordered(self, key: Hashable, make: Callable[[], SortedValues | None]) -> SortedValues | None:
        """The values of a tensor in order, made when they are asked for again, and kept if there is room."""
        with self._lock:
            if key not in self._ordered:
                self._ordered[key] = (
                    "asked"  # who asks once may never ask again, and sorting takes longer than searching
                )
                return None
            known = self._ordered[key]
        if known != "asked":
            return known
        found = make()
        is_kept = found is not None and self._room.take(found.byte_size)
        with self._lock:
            self._ordered[key] = found if is_kept else None
        return found


@dataclass(frozen=True)
class CachedFacts:
    """What is known of some facts: all of it, or for some models, by their position."""

    whole: Mapping[MeasuredFact, Any] = field(default_factory=dict)
    given: Mapping[KthLargest, Mapping[int, float]] = field(default_factory=dict)


class FactCache:
    """The facts in a store that are about the sources of one plan."""

    def __init__(self, sources: Sequence[Source], store: FactStore) -> None:
        self._sources = sources
        self._store = store

    def of_tensor(self, level: Sequence[MeasuredFact], known: KernelContext) -> CachedFacts:
        """What is known of the facts of one level."""
        whole: dict[MeasuredFact, Any] = {}
        given: dict[KthLargest, Mapping[int, float]] = {}
        for fact in level:
            if not _is_of_each(fact):
                if (value := self._store.get(self._key(fact, known))) is not None:
                    whole[fact] = value
                continue
            models = range(len(known.job.inputs))
            found = {i: v for i in models if (v := self._of_one(fact, i, known)) is not None}
            if len(found) == len(models):
                whole[fact] = tuple(found.values())
            elif isinstance(fact, KthLargest) and found:
                given[fact] = found
        return CachedFacts(whole, given)

    def _of_one(self, fact: MeasuredFact, model: int, known: KernelContext) -> Any:
        """What is known of a fact of one model, from an earlier answer or from its values in order."""
        value = self._store.get(self._key_of_one(fact, model, known))
        job = known.job
        if (
            value is not None
            or not isinstance(fact, KthLargest)
            or fact.share[model] >= 1
            or not 0 < job.elements <= MOST_ELEMENTS
        ):
            return value
        values = self._store.ordered(
            ("ordered", fact.of, self._about(job.inputs[model : model + 1]), self._base(job), known.real),
            lambda: self._order(fact, model, known),
        )
        return values.largest(fact.place(model, job.elements)) if values is not None else None

    def _order(self, fact: KthLargest, model: int, known: KernelContext) -> SortedValues | None:
        """Put the values of a tensor in order, if all that is read for it lies in memory."""
        held = [resident_bytes(self._sources[tensor.model], tensor.name) for tensor in known.job.read]
        raws = [raw for raw in held if raw is not None]
        if len(raws) < len(held):
            return None
        inputs = len(known.job.inputs)
        return order(fact, model, known, raws[:inputs], raws[-1] if known.job.base is not None else None)

    def keep(self, found: Mapping[MeasuredFact, Any], known: KernelContext) -> None:
        """Keep what was measured of one tensor."""
        for fact, value in found.items():
            if _is_of_each(fact):
                for i, one in enumerate(value):
                    self._store.put(self._key_of_one(fact, i, known), one)
            else:
                self._store.put(self._key(fact, known), value)

    def of_model(self, fact: OverModel, jobs: Sequence[Job]) -> dict[int, float]:
        """What is known of a fact over all ``jobs``: the answers for some models, by their position."""
        keys = self._keys_over(fact, jobs)
        return {i: value for i, key in enumerate(keys) if (value := self._store.get(key)) is not None}

    def keep_of_model(self, fact: OverModel, jobs: Sequence[Job], found: Sequence[float]) -> None:
        for key, value in zip(self._keys_over(fact, jobs), found, strict=True):
            self._store.put(key, value)

    def norms(self, key: Sequence[Job]) -> Any:
        """The norms of task vectors over ``jobs``, if they are known."""
        return self._store.get(self._norms_key(key))

    def keep_norms(self, jobs: Sequence[Job], norms: tuple[float, ...]) -> None:
        self._store.put(self._norms_key(jobs), norms)

    def _norms_key(self, jobs: Sequence[Job]) -> Hashable:
        return "norms", tuple(self._about(job.read) for job in jobs)

    def _key(self, fact: MeasuredFact, known: KernelContext) -> Hashable:
        noise = (known.seed, known.job.name) if _has_noise(fact) else None
        return fact, self._about(known.job.inputs), self._base(known.job), known.real, noise

    def _key_of_one(self, fact: MeasuredFact, model: int, known: KernelContext) -> Hashable:
        return (
            _of_one(fact, model),
            self._about(known.job.inputs[model : model + 1]),
            self._base(known.job),
            known.real,
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
        # The source itself is part of the key: it stays, so that its identity cannot become another's.
        return tuple((self._sources[tensor.model], tensor.name) for tensor in inputs)


def _is_of_each(fact: MeasuredFact) -> bool:
    """Is a fact a number a model, of that model's tensor (and the base's) alone?"""
    if isinstance(fact, KthLargest):
        return not (fact.arguments or fact.across or fact.among)
    return (
        isinstance(fact, (Sum, Count))
        and not (fact.arguments or fact.across)
        and getattr(fact, "over", "tensor") == "tensor"
    )


def _of_one(fact: MeasuredFact, model: int) -> MeasuredFact:
    """What a fact asks of one model."""
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
