"""Checks numbers that a caller passes: returns a plain int or float, or raises an error."""

from __future__ import annotations

import math
from decimal import Context, Decimal
from numbers import Real
from typing import Any, SupportsIndex

from alnico.errors import AlnicoError


def whole_number(value: Any, name: str, least: int | None, error: type[AlnicoError] = AlnicoError) -> int:
    """Return a whole number of at least ``least`` and at most 64 bits, as an int. Errors: ``error``.

    >>> whole_number(3, "rank", 1)
    3
    """
    expected = "a whole number of at most 64 bits" if least is None else f"a whole number of {least} or more"
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise error(f"{name} is {quote_value(value)}; expected {expected}.")
    number = int(value)
    if not -(1 << 63) <= number < 1 << 63 or (least is not None and number < least):
        raise error(f"{name} is {quote_value(number)}; expected {expected}.")
    return number


def finite_number(
    value: Any, name: str, expected: str = "a finite number", error: type[AlnicoError] = AlnicoError
) -> float:
    """Return a finite number as float. Errors: ``error``.

    >>> finite_number(1, "weight")
    1.0
    """
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        number = math.nan
    if not math.isfinite(number):
        raise error(f"{name} is {quote_value(value)}; expected {expected}.")
    return number


def quote_value(value: Any) -> str:
    """Return a value as messages quote it, in at most 100 characters.

    >>> quote_value(10**5000), quote_value("x" * 200)[-3:]
    ('a number of more than 60 digits', '...')
    """
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number of more than 60 digits"
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


_DECIMAL = Context(prec=50)


def complement(share: float) -> float:
    """Return 1 - ``share`` as people write it: of the shortest decimals that name the two numbers.

    >>> [complement(share) for share in (0.1, 0.2, 0.9)], 1 - 0.9
    ([0.9, 0.8, 0.1], 0.09999999999999998)
    """
    return float(_DECIMAL.subtract(Decimal(1), Decimal(repr(float(share)))))
