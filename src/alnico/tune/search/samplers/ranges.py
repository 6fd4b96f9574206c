"""Maps values of a dimension to the unit interval, to steps, and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from alnico.tune.search.space import Dimension, Value


def to_unit(d: Dimension, value: Value) -> float:
    """Map a number to its position in the range, from 0 to 1; a whole number maps to the middle of its bin."""
    number = float(value)
    if d.kind == "whole":
        number, low, high = number + 0.5, d.low, d.high + 1
    else:
        low, high = d.low, d.high
    if d.is_log:
        return (math.log(number) - math.log(low)) / (math.log(high) - math.log(low))
    return (number - low) / (high - low)


def from_unit(d: Dimension, unit: float) -> Value:
    low, high = (d.low, d.high + 1) if d.kind == "whole" else (d.low, d.high)
    number = (
        math.exp(math.log(low) + unit * (math.log(high) - math.log(low)))
        if d.is_log
        else low + unit * (high - low)
    )
    if d.kind == "whole":
        step = int(d.step or 1)
        return min(int(d.low) + int((number - d.low) // step) * step, int(d.high))
    if d.step is not None:
        number = d.low + round((number - d.low) / d.step) * d.step
    return min(max(number, d.low), d.high)


def draw(d: Dimension, noise: np.random.Generator) -> Value:
    unit = float(noise.random())
    if d.kind == "choice":
        return d.choices[int(unit * len(d.choices))]
    if d.step is not None:
        return at_step(d, int(unit * step_count(d)))
    return from_unit(d, unit)


def step_count(d: Dimension) -> int:
    if d.kind == "choice":
        return len(d.choices)
    return round((d.high - d.low) / (d.step or 1)) + 1


def at_step(d: Dimension, index: int) -> Value:
    if d.kind == "choice":
        return d.choices[index]
    number = min(d.low + index * (d.step or 1.0), d.high)
    return round(number) if d.kind == "whole" else number


def plain_value(d: Dimension, value: Any) -> Value:
    return value if d.kind == "choice" else int(value) if d.kind == "whole" else float(value)
