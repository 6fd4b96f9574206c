"""What kernels receive: numbers, facts and noise keys in the working precision of one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.kernels.constants import CODES, WORD
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
    Side,
    Sum,
    resolve,
)
from alnico.kernels.template import ArgumentKind, Real
from alnico.methods.base import Merge
from alnico.numerics.noise import noise_key
from alnico.plan.job import Job

if TYPE_CHECKING:
    from alnico.kernels.cuda.memory import GpuMemory

RANKS = object()
"""Stands in a list of arguments for the ranks of the block at hand."""

NO_RANKS = np.empty((0, 0), np.float32)


def kind_of(argument: Argument) -> ArgumentKind:
    """Return the kind of an argument for a kernel, known before any measurement."""
    match argument:
        case Noise():
            return "noise"
        case Side():
            return "side"
        case Bernoulli(spread=spread):
            return "ranked" if spread else "bernoulli"
        case Sum(over="row") | Largest():
            return "rows"
        case tuple() | Sum() | Count() | KthLargest():
            return "numbers"
        case Derived(over="row"):
            return "rows"
        case Derived(over="column"):
            return "columns"
        case Derived(per_model=per_model):
            return "numbers" if per_model else "number"
        case Gram():
            raise TypeError("a Gram matrix is no argument of a scalar function; derive coefficients from it")
    return "number"


@dataclass
class Draws:
    """What was drawn in a tensor: a bit for each model and element, (models, words) uint64, of all elements, or of as many of the
    first leaves as there is room for.

    Kernels draw, and write the bits, until they ``are_known``; then they read them.
    """

    words: np.ndarray
    are_known: bool = False
    stay: bool = False
    """Are they kept for later merges?"""

    def have(self, stop: int) -> bool:
        """Are the draws of the elements up to ``stop`` known?"""
        return self.are_known and stop <= WORD * self.words.shape[1]


@dataclass(frozen=True)
class KernelContext:
    """The values that the arguments of one tensor's kernels are derived from: its name, the seed, and the
    facts measured so far. ``gpu`` is the memory of the GPU that computes the tensor; None on the processor.

    ``given`` are the values of some of the models, by their position, of facts that must still be measured
    for the others.
    """

    job: Job
    seed: int
    facts: Mapping[MeasuredFact, Any]
    given: Mapping[KthLargest, Mapping[int, float]] = field(default_factory=dict)
    gpu: GpuMemory | None = None
    draws: Mapping[Bernoulli, Draws] = field(default_factory=dict)
    """Where draws are kept that several kernels use; others are drawn by each."""
    _values: dict[int, tuple[Derived, Any]] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    def value(self, argument: Argument) -> Any:
        """Return the value of an argument; what is derived from facts is derived once."""
        if not isinstance(argument, Derived):
            return resolve(argument, self.facts)
        if id(argument) not in self._values:  # by identity, as 0.0 and -0.0 are equal
            self._values[id(argument)] = argument, resolve(argument, self.facts)
        return self._values[id(argument)][1]

    @property
    def real(self) -> Real:
        return self.job.real

    def flat(self, arguments: Sequence[Argument]) -> list[Any]:
        """Return what stands for ``arguments`` in a call of a kernel, as ``kernels.text.PARTS`` lists it."""
        flat: list[Any] = []
        for argument in arguments:
            if isinstance(argument, (Noise, Bernoulli)):
                flat += self._noise(argument)
                continue
            if isinstance(argument, Side):
                continue
            value, kind = self.value(argument), kind_of(argument)
            flat.append(
                np.dtype(self.real).type(value) if kind == "number" else np.array(value, self.real, order="C")
            )
            if kind in ("rows", "columns"):
                flat.append(self.job.row if kind == "rows" else self.job.columns)
        return flat

    def _noise(self, argument: Noise | Bernoulli) -> list[Any]:
        models = range(len(self.job.inputs))
        keys = np.array([noise_key(self.seed, self.job.name, model) for model in models], np.uint64)
        chance = argument.chance if isinstance(argument, Bernoulli) else (0.0,) * len(models)
        if isinstance(argument, Noise):
            return [np.array(chance, self.real), keys]
        draws = self.draws.get(argument) or Draws(np.empty((len(models), 0), np.uint64))
        if not argument.spread:
            return [np.array(chance, self.real), keys, draws.words, draws]
        spread = np.array(argument.spread)
        steps = np.array(2 * spread, self.real)
        return [np.array(np.array(chance) - spread, self.real), keys, steps, RANKS, draws.words, draws]


def needs_ranks(job: Job, draws: Mapping[Bernoulli, Draws], stop: int) -> bool:
    """Must the elements up to ``stop`` be ranked to mix them?"""
    assert job.merge is not None
    ranked = (a for a in job.merge.arguments if isinstance(a, Bernoulli) and a.spread)
    return any(a not in draws or not draws[a].have(stop) for a in ranked)


def is_of_values(merge: Merge) -> bool:
    """Does what a merge makes of an element depend on the values of this element alone, not on its tensor or its place? Then one call
    may mix the elements of several tensors."""
    return not merge.levels() and all(kind_of(a) in ("number", "numbers") for a in merge.arguments)


def codes_of(job: Job) -> tuple[np.ndarray, int]:
    """What kernels call the dtypes of a job's inputs, and of its base."""
    return np.array([CODES[i.dtype] for i in job.inputs], np.int64), CODES[job.base.dtype] if job.base else 0


def in_place(flat: Sequence[Any], ranks: Any) -> list[Any]:
    """Put the ranks of a block into flat arguments, and whether draws are known. Known draws need no ranks."""
    placed = [part.are_known if isinstance(part, Draws) else part for part in flat]
    return [(NO_RANKS if ranks is None else ranks) if part is RANKS else part for part in placed]


def keeps_equal(job: Job, context: KernelContext) -> bool:
    """Does an element on which all inputs agree keep its value in this tensor?"""
    assert job.merge is not None
    if job.merge.fixes_equal_inputs or job.merge.sums_to_one is None:
        return job.merge.fixes_equal_inputs
    values = [context.value(a) for a in job.merge.arguments if not isinstance(a, (Noise, Bernoulli, Side))]
    return job.merge.sums_to_one(*values)
