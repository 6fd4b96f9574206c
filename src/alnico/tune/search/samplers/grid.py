"""Visits every combination of steps and choices once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alnico.errors import RecipeError
from alnico.tune.search.samplers.ranges import at_step, step_count
from alnico.tune.search.samplers.request import Point, PointRequest
from alnico.tune.search.space import Dimension


def grid(request: PointRequest) -> Point:
    """Visit each combination of steps and choices once, in an order drawn from the seed."""
    size = grid_size(request.dimensions)
    order = np.random.default_rng([request.seed & (2**64 - 1)]).permutation(size)
    place = int(order[request.number % size])
    point: Point = {}
    for d in request.dimensions:
        place, index = divmod(place, step_count(d))
        point[d.name] = at_step(d, index)
    return point


MAX_GRID = 1_000_000


def grid_size(dimensions: Sequence[Dimension]) -> int:
    """Return the number of points of a grid. Errors: RecipeError for dimensions without steps and for grids that are too large."""
    size = 1
    for d in dimensions:
        if d.kind == "share" or (d.kind == "number" and d.step is None):
            raise RecipeError(
                f"search.sampler is grid, and {d.name} has no steps; expected `step` for every range. Add it."
            )
        size *= step_count(d)
    if size > MAX_GRID:
        raise RecipeError(
            f"search.sampler is grid, and it has {size} points; expected at most {MAX_GRID}. Make the steps "
            "larger."
        )
    return size
