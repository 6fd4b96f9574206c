"""Samples with CMA-ES, replayed from the trials so far."""

from __future__ import annotations

import math

import numpy as np

from alnico.evaluation.tasks import Goal
from alnico.installation import import_extra
from alnico.tune.search.samplers.ranges import from_unit, to_unit
from alnico.tune.search.samplers.request import Point, PointRequest, Trial


def cmaes(request: PointRequest) -> Point:
    """Sample with CMA-ES in the unit cube, replayed from the earlier trials in their order, generation by generation.

    It starts at the default settings with a standard deviation of one fifth of the ranges. CMA-ES uses only ranks, so
    pruned trials rank below complete ones.

    Source: Hansen 2016, https://arxiv.org/abs/1604.00772.
    """
    cma = import_extra("cmaes", "the sampler cmaes", "search").CMA
    # The cmaes package needs two dimensions: for a single one, a second without effect is added.
    has_one_dimension = len(request.dimensions) == 1
    start = np.array([to_unit(d, d.default) for d in request.dimensions] + [0.5] * has_one_dimension)
    bounds = np.array([[0.0, 1.0]] * len(start))
    optimizer = cma(mean=np.clip(start, 0.05, 0.95), sigma=0.2, bounds=bounds, seed=0)
    done = [t for t in request.before if t.state in ("complete", "pruned")]
    size = optimizer.population_size
    for begin in range(0, len(done) - size + 1, size):
        ranked = sorted(done[begin : begin + size], key=lambda t: _rank(t, request.goals[0]))
        places = (
            np.array([to_unit(d, t.point[d.name]) for d in request.dimensions] + [0.5] * has_one_dimension)
            for t in ranked
        )
        optimizer.tell([(place, float(rank)) for rank, place in enumerate(places)])
    optimizer.reseed_rng(request.noise_seed)
    position = optimizer.ask()
    return {d.name: from_unit(d, float(u)) for d, u in zip(request.dimensions, position, strict=False)}


def _rank(trial: Trial, goal: Goal) -> tuple[int, float]:
    """Rank complete trials first, then those that reached a later rung, then by the last value."""
    sign = -1.0 if goal == "max" else 1.0
    if trial.state == "complete":
        return -1_000_000, sign * trial.values[0]
    return -len(trial.rungs), sign * trial.rungs[-1] if trial.rungs else math.inf
