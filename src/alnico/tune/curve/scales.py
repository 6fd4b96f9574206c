"""Reads scales: ``0:2:0.1`` with exact decimal steps, ``0,0.5,1``, or numbers."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from alnico.errors import RecipeError
from alnico.recipe.from_options import plain_list

DEFAULT_SCALE, DEFAULT_SURFACE, DEFAULT_PATH = "0:2:0.1", "0:1:0.1", "0:1:0.05"

MOST_SCALES, MOST_POINTS = 1_001, 10_201
"""The most values of a range, and the most points of a curve: a surface of 101 by 101."""

Scales = tuple[float, ...]

FORM = "expected LOW:HIGH:STEP, such as 0:2:0.1, or a list, such as 0,0.5,1"


def scale_axes(scale: Any, name: str = "scale") -> tuple[Scales, ...]:
    """Return the values of each axis: one for text or numbers, several for a list of texts or lists.

    Errors: RecipeError.

    >>> scale_axes("0:1:0.5"), scale_axes([0, 0.5]), scale_axes(["0:1:1", [0.5]])
    (((0.0, 0.5, 1.0),), ((0.0, 0.5),), ((0.0, 1.0), (0.5,)))
    """
    scale = plain_list(scale)
    if isinstance(scale, Sequence) and not isinstance(scale, str):
        if not scale:
            raise RecipeError(f"{name}: is an empty list; {FORM}. Give at least one number.")
        if not any(isinstance(one, numbers.Real) for one in scale):
            return tuple(read_scales(one, name) for one in scale)
    return (read_scales(scale, name),)


def read_scales(scale: Any, name: str = "scale") -> Scales:
    """Return the values of one axis, the smallest first. A range ends at HIGH, or at the last step before it.

    Steps are exact: 0.1 three times is 0.3. Errors: RecipeError.

    >>> read_scales("0:0.3:0.1"), read_scales("1,0.5"), read_scales(0.4)
    ((0.0, 0.1, 0.2, 0.3), (0.5, 1.0), (0.4,))
    """
    scale = plain_list(scale)
    if isinstance(scale, str):
        values = (
            _of_range(scale, name) if ":" in scale else [_decimal(v, scale, name) for v in scale.split(",")]
        )
    elif isinstance(scale, numbers.Real):
        values = [_decimal(repr(float(scale)), scale, name)]
    elif isinstance(scale, Iterable):
        values = [_decimal(_text_of(one, name), one, name) for one in map(plain_list, scale)]
    else:
        raise RecipeError(f"{name} is of type {type(scale).__name__}; {FORM}. Write it as text or as a list.")
    found = sorted(float(v) for v in values)
    if not found:
        raise RecipeError(f"{name}: is empty; {FORM}. Give at least one number.")
    twice = next((v for v, w in itertools.pairwise(found) if v == w), None)
    if twice is not None:
        raise RecipeError(f"{name}: has {twice:g} twice; expected different numbers. Remove one.")
    return tuple(v + 0.0 for v in found)  # -0.0 is 0.0


def _text_of(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RecipeError(f"{name}: {value!r} is not a number; expected numbers. Give a list of numbers.")
    return repr(float(value))


def _of_range(text: str, name: str) -> list[Decimal]:
    parts = text.split(":")
    if len(parts) != 3:
        raise RecipeError(f"{name}: {text!r} has {len(parts)} parts; {FORM}. Write all three numbers.")
    low, high, step = (_decimal(part, text, name) for part in parts)
    if step <= 0:
        raise RecipeError(f"{name}: {text!r} has the step {step}; expected a step above 0. Correct it.")
    if low > high:
        raise RecipeError(
            f"{name}: {text!r} goes from {low} down to {high}; expected LOW below HIGH. Swap them."
        )
    if (high - low) / step >= MOST_SCALES:
        raise RecipeError(
            f"{name}: {text!r} has more than {MOST_SCALES:,} values; expected fewer. Choose a larger step."
        )
    return [low + i * step for i in range(int((high - low) / step) + 1)]


def _decimal(text: str, whole: Any, name: str) -> Decimal:
    try:
        value = Decimal(text.strip())
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite() or not math.isfinite(float(value)):
        raise RecipeError(
            f"{name}: {text.strip()!r} in {str(whole)!r} is not a finite number; {FORM}. Correct it."
        )
    return value


def scale_text(value: float) -> str:
    """Return a scale as people write it.

    >>> scale_text(0.3), scale_text(2.0)
    ('0.3', '2')
    """
    return f"{value:.10g}"
