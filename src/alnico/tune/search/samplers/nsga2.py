"""Samples with optuna's NSGA-II, for several objectives."""

from __future__ import annotations

from alnico.tune.search.samplers.optuna_study import ask_optuna, import_optuna
from alnico.tune.search.samplers.request import Point, PointRequest


def nsga2(request: PointRequest) -> Point:
    """Sample with optuna's NSGA-II: generations of ``population`` trials, parents chosen by rank and crowding distance.

    Source: Deb et al. 2002, https://doi.org/10.1109/4235.996017.
    """
    optuna = import_optuna()
    sampler = optuna.samplers.NSGAIISampler(population_size=request.population, seed=request.noise_seed)
    complete = [t for t in request.before if t.state == "complete"]
    key = "NSGAIISampler:generation"
    attributes = [{key: i // request.population} for i in range(len(complete))]
    return ask_optuna(request, sampler, complete, attributes)
