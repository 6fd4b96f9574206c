"""Computes the barrier of a path: how far it drops below the straight line between its ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alnico.analysis.scores import Estimate
from alnico.evaluation.scorecard import ResampledScores
from alnico.evaluation.tasks import Goal
from alnico.tune.curve.result import Barrier
from alnico.tune.search.objective import MEAN

Drops = Mapping[str, Estimate]
"""By task, and of the mean."""


def barriers_of(
    drawn: ResampledScores, labels: Mapping[float, str], goals: Mapping[str, Goal]
) -> dict[str, Barrier]:
    """Return the barrier of every task, and of the mean. ``labels`` are the models at each t in [0, 1], ends included.

    The drop at t is ``(1 - t) * score(0) + t * score(1) - score(t)``; its sign is turned for tasks where
    lower is better (``goals``, by task and for the mean).
    """
    drops = {t: _drops(drawn, t, labels) for t in labels}
    return {
        name: _highest({t: _turned(drops[t][name], goal) for t in drops})
        for name, goal in goals.items()
        if name in drops[0.0]
    }


def _drops(drawn: ResampledScores, t: float, labels: Mapping[float, str]) -> Drops:
    if t in (0.0, 1.0):
        factors = {labels[t]: 0.0}
    else:
        factors = {labels[0.0]: 1.0 - t, labels[1.0]: t, labels[t]: -1.0}
    scores, mean = drawn.combined(factors)
    return scores if mean is None else {MEAN: mean, **scores}


def _turned(drop: Estimate, goal: Goal) -> Estimate:
    if goal == "max":
        return drop
    low, high = (None if end is None else 0.0 - end for end in (drop.high, drop.low))
    return Estimate(0.0 - drop.value, low, high)


def _highest(drops: Mapping[float, Estimate]) -> Barrier:
    inside: Sequence[float] = [t for t in drops if 0 < t < 1]
    if not inside:
        return Barrier(Estimate(0.0), None, drops)
    at = max(inside, key=lambda t: drops[t].value)
    highest = drops[at]
    value, low, high = (
        None if v is None else max(v, 0.0) for v in (highest.value, highest.low, highest.high)
    )
    assert value is not None
    return Barrier(Estimate(value, low, high), at if value > 0 else None, drops)
