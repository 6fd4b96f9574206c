"""Parses sizes in bytes from text such as ``2GiB``, and formats them for people."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import SupportsIndex

from alnico.errors import AlnicoError

UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
         "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}  # fmt: skip


MOST_BYTES = 1 << 62
"""The largest size; a larger one counts as this. Nothing reaches it, and every computation can hold it."""


def parse_size(text: str) -> int:
    """Read a size in bytes: ``5GB`` is 5e9, ``2GiB`` is 2 * 2**30, letters of any case. Errors: ValueError
    for other text.

    >>> parse_size("5GB"), parse_size("1.5 GiB"), parse_size("4096")
    (5000000000, 1610612736, 4096)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or (size := int(Fraction(match[1]) * unit)) <= 0:
        raise ValueError(f"{text!r} is not a size; expected a number with a unit, such as 5GB or 2GiB")
    return min(size, MOST_BYTES)


def bytes_of(size: int | str) -> int:
    """Return a size that is given as a number of bytes or as text. Errors: AlnicoError for anything else, or
    a size not above 0."""
    if isinstance(size, str):
        try:
            return parse_size(size)
        except ValueError as error:
            raise AlnicoError(f"{error}.") from None
    if isinstance(size, bool) or not isinstance(size, SupportsIndex):
        raise AlnicoError(
            f"{size!r} is not a size; expected a whole number of bytes, or text such as '2GiB'."
        )
    value = min(int(size), MOST_BYTES)
    if value <= 0:
        raise AlnicoError(f"{max(value, -MOST_BYTES)} is not a size; expected a number of bytes above 0.")
    return value


def format_size(size: float) -> str:
    """Write a number of bytes for people: ``1.2 GB``; powers of 1,000, as ``--max-shard-size`` reads them.

    >>> format_size(90868376), format_size(512)
    ('90.9 MB', '512 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < (1000 if unit == "B" else 999.95):
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def count_of(number: int, what: str) -> str:
    """Return a number with its noun.

    >>> count_of(1, "tensor"), count_of(1234, "row")
    ('1 tensor', '1,234 rows')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"
