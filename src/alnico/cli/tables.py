"""Tables of plain text: columns as wide as their longest cell, each separated by two spaces."""

from __future__ import annotations

from collections.abc import Sequence

from alnico.errors import visible

WIDEST = 60
"""Letters of a cell; the rest is cut, but for the last column where that is whole."""


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], *, whole: bool = False) -> list[str]:
    """Return the lines of a table: the names of its columns, then its rows. With ``whole`` the last column is not cut.

    >>> table_lines(["name", "size"], [["sql", "2 kB"], ["medical", "1 MB"]])
    ['name     size', 'sql      2 kB', 'medical  1 MB']
    """
    last = len(columns) - 1 if whole else len(columns)
    cells = [
        [_cut(visible(c)) if i < last else visible(c) for i, c in enumerate(row)] for row in (columns, *rows)
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."
