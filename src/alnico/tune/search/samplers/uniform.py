"""Samples uniformly at random."""

from __future__ import annotations

from alnico.tune.search.samplers.ranges import draw
from alnico.tune.search.samplers.request import Point, PointRequest


def uniform(request: PointRequest) -> Point:
    """Sample uniformly in every dimension, also on the simplex."""
    noise = request.noise
    return {d.name: draw(d, noise) for d in request.dimensions}
