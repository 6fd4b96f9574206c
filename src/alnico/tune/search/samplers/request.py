"""Defines trials, and what a sampler receives and returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from alnico.evaluation.tasks import Goal
from alnico.tune.search.space import Dimension, Value

TrialState = Literal["complete", "pruned", "failed", "running", "waiting"]


@dataclass(frozen=True)
class Trial:
    """One point of a search and its state.

    ``values`` are the objectives of a complete trial; ``rungs`` are the objective after each rung of the halving so far.
    ``scores`` are by task; ``reason`` states why the trial failed.
    """

    number: int
    state: TrialState
    point: dict[str, Value]
    values: tuple[float, ...] = ()
    rungs: tuple[float, ...] = ()
    scores: tuple[tuple[str, float], ...] = ()
    reason: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class PointRequest:
    """A request for the next point of a search."""

    dimensions: Sequence[Dimension]
    goals: Sequence[Goal]
    seed: int
    number: int
    before: Sequence[Trial]
    """The trials with smaller numbers; some may still be running in other workers."""
    population: int
    concentration: float

    @property
    def noise(self) -> np.random.Generator:
        """A random generator for this trial only."""
        return np.random.default_rng([self.seed & (2**64 - 1), self.number])

    @property
    def noise_seed(self) -> int:
        """A 32-bit seed for this trial only, for other programs."""
        return int(np.random.SeedSequence([self.seed & (2**64 - 1), self.number]).generate_state(1)[0])


Point = dict[str, Value]


Sampler = Callable[[PointRequest], Point]
