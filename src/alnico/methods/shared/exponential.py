"""Computes exp and log in float64 by basic operations, which round alike on every machine."""

from __future__ import annotations

import math

import numpy as np


def exponential(x: float) -> float:
    """``e**x`` for x <= 0, to two units in the last place; 0 below -708. For equations in float64
    (``is_wide``).

    >>> exponential(0.0), abs(exponential(-1.0) * math.e - 1) < 4e-16, exponential(-1e300)
    (1.0, True, 0.0)
    """
    bounded = max(x, -1000.0)
    # Adding and taking away 1.5 * 2**52 rounds to a whole number.
    power = (bounded * 1.4426950408889634 + 6755399441055744.0) - 6755399441055744.0
    r = (bounded - power * 0.6931471803691238) - power * 1.9082149292705877e-10
    series = 1.0 + r * (
        1.0
        + r
        / 2.0
        * (1.0 + r / 3.0 * (1.0 + r / 4.0 * (1.0 + r / 5.0 * (1.0 + r / 6.0 * (1.0 + r / 7.0 * higher(r))))))
    )
    left = -power
    scale = 1.0
    if left >= 512.0:
        left -= 512.0
        scale *= 7.458340731200207e-155
    if left >= 256.0:
        left -= 256.0
        scale *= 8.636168555094445e-78
    if left >= 128.0:
        left -= 128.0
        scale *= 2.938735877055719e-39
    if left >= 64.0:
        left -= 64.0
        scale *= 5.421010862427522e-20
    if left >= 32.0:
        left -= 32.0
        scale *= 2.3283064365386963e-10
    if left >= 16.0:
        left -= 16.0
        scale *= 1.52587890625e-05
    if left >= 8.0:
        left -= 8.0
        scale *= 0.00390625
    if left >= 4.0:
        left -= 4.0
        scale *= 0.0625
    if left >= 2.0:
        left -= 2.0
        scale *= 0.25
    if left >= 1.0:
        scale *= 0.5
    return series * scale if x > -708.0 else 0.0


def higher(r):
    """The rest of the series after seven terms, over the eighth's factor."""
    return 1.0 + r / 8.0 * (
        1.0
        + r
        / 9.0
        * (1.0 + r / 10.0 * (1.0 + r / 11.0 * (1.0 + r / 12.0 * (1.0 + r / 13.0 * (1.0 + r / 14.0)))))
    )


def logarithm(x: np.ndarray) -> np.ndarray:
    """``log(x)`` of an array of numbers above 0, to two units in the last place of numbers that are not near
    1, by its series.

    >>> bool(np.abs(logarithm(np.array([0.5, 1.0, 10.0])) - [-math.log(2), 0.0, math.log(10)]).max() < 1e-15)
    True
    """
    part, power = np.frexp(x)
    below = part < math.sqrt(0.5)
    part, power = np.where(below, 2 * part, part), power - below
    s = (part - 1) / (part + 1)
    square, series = s * s, np.zeros_like(s)
    for odd in range(23, 0, -2):
        series = series * square + 1 / odd
    result: np.ndarray = power * 0.6931471803691238 + (power * 1.9082149292705877e-10 + 2 * s * series)
    return result
