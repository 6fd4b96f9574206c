"""Chooses the sampler of a search by its name, and suggests the next point.

A sampler is a pure function of the seed, the trial's number and the earlier trials. It keeps no state between suggestions,
in memory or in the study, so an interrupted search continues as if it had not been interrupted, and the file of a study
holds no state that would have to be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence

from alnico.errors import RecipeError
from alnico.evaluation.tasks import Goal
from alnico.tune.search.samplers.cmaes import cmaes
from alnico.tune.search.samplers.dirichlet import dirichlet
from alnico.tune.search.samplers.grid import grid, grid_size
from alnico.tune.search.samplers.nsga2 import nsga2
from alnico.tune.search.samplers.request import Point, PointRequest, Sampler
from alnico.tune.search.samplers.tpe import tpe
from alnico.tune.search.samplers.uniform import uniform
from alnico.tune.search.space import Dimension

SAMPLERS: dict[str, Sampler] = {
    "tpe": tpe,
    "cmaes": cmaes,
    "nsga2": nsga2,
    "random": uniform,
    "dirichlet": dirichlet,
    "grid": grid,
}


def check_sampler(name: str, dimensions: Sequence[Dimension], goals: Sequence[Goal]) -> None:
    """Refuse a sampler that cannot search these dimensions. Errors: RecipeError."""
    choices = [d.name for d in dimensions if d.kind == "choice"]
    if name == "cmaes" and choices:
        raise RecipeError(
            f"search.sampler is cmaes, which searches only numbers, and {choices[0]} is a choice. Use tpe."
        )
    if name == "cmaes" and len(goals) > 1:
        raise RecipeError(
            f"search.sampler is cmaes, which has one objective, and there are {len(goals)}. Use nsga2 or tpe."
        )
    if name == "dirichlet" and not any(d.kind == "share" for d in dimensions):
        raise RecipeError(
            "search.sampler is dirichlet, but no value is on the simplex; expected {search: simplex}. Use "
            "random."
        )
    if name == "grid":
        grid_size(dimensions)


def suggest(name: str, request: PointRequest) -> Point:
    """Return the point of a trial: the default settings for trial 0 (except for a grid), then the sampler's suggestion."""
    if request.number == 0 and name != "grid":
        return {d.name: d.default for d in request.dimensions}
    return SAMPLERS[name](request)
