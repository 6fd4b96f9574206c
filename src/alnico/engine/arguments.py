"""What kernels receive: numbers, facts and noise keys in the working precision of one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.kernels.facts import Argument, Bernoulli, Count, Derived, Gram, KthLargest, Measured, Noise, Sum, resolve
from alnico.kernels.text import Kind, Real
from alnico.numerics.noise import noise_key
from alnico.plan.job import Job


def working_precision(job: Job) -> Real:
    """float32; float64 if an input or the output is F64."""
    return "float64" if "F64" in {job.dtype, *(i.dtype for i in job.read)} else "float32"


def kind_of(argument: Argument) -> Kind:
    """What an argument is to a kernel, known before anything is measured."""
    match argument:
        case Noise():
            return "noise"
        case Bernoulli():
            return "bernoulli"
        case tuple() | Sum() | Count() | KthLargest():
            return "numbers"
        case Derived(per_model=per_model):
            return "numbers" if per_model else "number"
        case Gram():
            raise TypeError("a Gram matrix is no argument of a scalar function; derive coefficients from it")
    return "number"


@dataclass(frozen=True)
class MeasureArguments:
    """The arguments of facts, one model at a time. ``known`` holds the facts of earlier levels."""

    job: Job
    seed: int
    known: Mapping[Measured, Any]

    @property
    def real(self) -> Real:
        return working_precision(self.job)

    def kinds(self, fact: Sum | Count | KthLargest) -> tuple[Kind, ...]:
        """As a kernel of one model sees them: a number a model is one number."""
        return tuple("number" if kind_of(a) == "numbers" else kind_of(a) for a in fact.arguments)

    def values(self, fact: Measured, model: int) -> list[Any]:
        """Return the flat arguments of ``fact`` for one model."""
        assert not isinstance(fact, Gram)
        cast = np.dtype(self.real).type
        flat: list[Any] = []
        for argument in fact.arguments:
            if isinstance(argument, (Noise, Bernoulli)):
                chance = argument.chance[model] if isinstance(argument, Bernoulli) else 0.0
                flat += [cast(chance), np.uint64(noise_key(self.seed, self.job.name, model))]
            else:
                value = resolve(argument, dict(self.known))
                flat.append(cast(value[model] if isinstance(value, tuple) else value))
        return flat


def mix_arguments(job: Job, seed: int, known: Mapping[Measured, Any]) -> tuple[list[Any], bool]:
    """Return the flat arguments of a mix kernel, and whether elements on which all inputs agree are kept."""
    assert job.merge is not None
    real = working_precision(job)
    models = len(job.inputs)
    flat: list[Any] = []
    resolved: list[Any] = []
    for argument in job.merge.arguments:
        if isinstance(argument, (Noise, Bernoulli)):
            chance = argument.chance if isinstance(argument, Bernoulli) else (0.0,) * models
            keys = [noise_key(seed, job.name, model) for model in range(models)]
            flat += [np.array(chance, real), np.array(keys, np.uint64)]
            continue
        value = resolve(argument, dict(known))
        resolved.append(value)
        flat.append(np.array(value, real) if kind_of(argument) == "numbers" else np.dtype(real).type(value))
    keeps = job.merge.fixes_equal_inputs
    if not keeps and job.merge.sums_to_one is not None:
        keeps = job.merge.sums_to_one(*resolved)
    return flat, keeps
