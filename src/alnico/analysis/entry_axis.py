"""The axis of a task vector's entries: linear around 0 and logarithmic further out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alnico.analysis.results import DeltaStatistics


def axis_unit(changes: Sequence[DeltaStatistics]) -> float:
    """Return where the axis turns from linear to logarithmic.

    This is a power of ten below the smallest box, within four decades of the largest entry.
    """
    far = max((c.max_abs for c in changes), default=0.0) or 1.0
    least = min((abs(q) for c in changes for q in (c.quantiles[4], c.quantiles[6]) if q), default=far)
    return float(10.0 ** math.floor(math.log10(max(least, far * 1e-4))))


def axis_place(value: float, unit: float) -> float:
    """Return where a value is on the axis.

    >>> [round(axis_place(v, 1.0), 3) for v in (0.0, 10.0, 100.0)]
    [0.0, 1.004, 2.0]
    """
    return math.asinh(value / (2 * unit)) / math.log(10)


def axis_exponents(unit: float, far: float) -> list[int]:
    """Return the powers of ten for ticks; without the unit itself, which is close to 0, if there is another."""
    least = round(math.log10(unit))
    most = max(math.floor(math.log10(far)) if far else least, least)
    return list(range(min(least + 1, most), most + 1))
