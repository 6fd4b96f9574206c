"""Arcs between vectors, from their inner products alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

PARALLEL = 0.9995
"""|cosine| above which the straight line is taken instead of the arc, as in mergekit."""


def arc_coefficients(gram: Sequence[Sequence[float]], t: float) -> tuple[float, float]:
    """Coefficients of two vectors at place ``t`` of the arc from the first (0) to the second (1).

    ``sin((1-t) theta) / sin(theta)`` and ``sin(t theta) / sin(theta)``, with the angle theta from the 2 x 2 ``gram``. The
    straight line ``1-t, t`` where |cos theta| > 0.9995 or a vector is 0.

    >>> arc_coefficients([[1.0, 0.0], [0.0, 4.0]], 0.5) == (math.sin(math.pi / 4),) * 2
    True
    >>> arc_coefficients([[1.0, 2.0], [2.0, 4.0]], 0.25)
    (0.75, 0.25)
    """
    lengths = math.sqrt(gram[0][0]) * math.sqrt(gram[1][1])
    if lengths == 0:
        return 1.0 - t, t
    cosine = max(-1.0, min(1.0, gram[0][1] / lengths))
    if abs(cosine) > PARALLEL:
        return 1.0 - t, t
    theta = math.acos(cosine)
    return math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
