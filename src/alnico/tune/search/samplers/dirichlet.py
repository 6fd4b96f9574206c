"""Samples weights on the simplex from a Dirichlet distribution."""

from __future__ import annotations

import math

from alnico.tune.search.samplers.ranges import draw
from alnico.tune.search.samplers.request import Point, PointRequest


def dirichlet(request: PointRequest) -> Point:
    """Sample weights on the simplex from a Dirichlet distribution, and other dimensions uniformly.

    A weight is ``g_i / sum g`` with g_i from the gamma distribution; its share is ``exp(-g_i)``. A concentration above 1
    favours equal weights, below 1 single models.
    """
    noise = request.noise
    point: Point = {}
    for d in request.dimensions:
        if d.kind == "share":
            share = math.exp(-float(noise.gamma(request.concentration)))
            point[d.name] = min(max(share, d.low), d.high)
        else:
            point[d.name] = draw(d, noise)
    return point
