"""Shows results where they are computed: a line in a shell, small tables in a notebook.

Results that people get back define ``__repr__`` with :func:`result_line`, and ``_repr_html_`` with :func:`result_html`
under :func:`never_fails`. The HTML has no style sheet and no script, so nothing in it reaches the rest of a notebook, and
its colours are those of the notebook, light or dark.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from alnico.errors import visible

MOST_ROWS = 12
"""Rows of a table in a notebook; the rest is counted."""

MOST_COLUMNS = 12

LONGEST_NAME = 60
"""Letters of a name in a table or a line; its middle is left out beyond."""

LONGEST_TEXT = 4_000
"""Letters of a recipe in a notebook."""

MOST_SVG = 150_000
"""Bytes of a picture in a notebook; a larger one is left out, so that a result stays below 200 kB."""

_LINE = "1px solid rgba(128, 128, 128, 0.35)"


@dataclass(frozen=True)
class ResultTable:
    """A table of plain text: its heading, the names of its columns, and rows of text, numbers or None.

    Numbers are written with four digits.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    heading: str = ""


def figure_text(value: Any) -> str:
    """Return a value as a table shows it.

    >>> [figure_text(v) for v in (0.123456, 3, 1234567, None, True, "a")]
    ['0.1235', '3', '1,234,567', '–', 'yes', 'a']
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def share_text(share: float | None) -> str:
    """Return a share as a percentage.

    >>> share_text(0.01234), share_text(None)
    ('1.23 %', '–')
    """
    return "–" if share is None else f"{100 * share:.3g} %"


def name_text(name: object) -> str:
    """Return a name on one line, without characters that a terminal obeys, and not too long."""
    text = visible(str(name))
    if len(text) <= LONGEST_NAME:
        return text
    return f"{text[: LONGEST_NAME // 2]}…{text[len(text) - (LONGEST_NAME - 1) // 2 :]}"


def names_text(names: Iterable[object], most: int = 4) -> str:
    """Return several names; of many, the first and how many more.

    >>> names_text("abcdef", most=2)
    'a, b and 4 more'
    """
    listed = [name_text(n) for n in names]
    if len(listed) <= most:
        return ", ".join(listed)
    return f"{', '.join(listed[:most])} and {len(listed) - most:,} more"


def result_line(what: str, *facts: str) -> str:
    """Return the text of a result in a shell: ``<what: fact, fact>``, always one line.

    >>> result_line("soup of 2 models", "accuracy 0.9", "")
    '<soup of 2 models: accuracy 0.9>'
    """
    return f"<{visible(what)}{': ' if any(facts) else ''}{visible('; '.join(f for f in facts if f))}>"


def never_fails(method: Callable[[Any], str]) -> Callable[[Any], str]:
    """Make a method that draws a result return its text if it fails: a notebook shows an object even when it is broken."""

    @functools.wraps(method)
    def draw(self: Any) -> str:
        try:
            return method(self)
        except Exception as error:
            try:
                text = repr(self)
            except Exception:
                text = f"<{type(self).__name__} that cannot be shown: {type(error).__name__}>"
            return f"<pre>{_escaped(text[:LONGEST_TEXT])}</pre>"

    return draw


def result_html(
    title: str,
    *parts: ResultTable | str,
    facts: Sequence[tuple[str, Any]] = (),
    picture: Callable[[], str | None] | None = None,
    code: str | None = None,
) -> str:
    """Return a result as HTML for a notebook.

    ``parts`` are tables and paragraphs of plain text, ``facts`` pairs of a name and a value, ``code`` a text with
    lines, such as a recipe. All are escaped. ``picture`` returns SVG from :func:`alnico.analysis.charts.inline_svg`,
    or None; it is left out if it raises or is too large.
    """
    listed = " · ".join(
        f"{_escaped(name_text(n))} <b>{_escaped(name_text(figure_text(v)))}</b>" for n, v in facts
    )
    body = [f'<p style="margin: 0 0 4px"><b>{_escaped(visible(title))}</b></p>']
    if listed:
        body.append(f'<p style="margin: 0 0 6px">{listed}</p>')
    for part in parts:
        if isinstance(part, ResultTable):
            body.append(_table(part))
        elif part:
            body.append(f'<p style="margin: 4px 0; max-width: 80ch">{_escaped(visible(part))}</p>')
    if code is not None:
        cut = (
            code
            if len(code) <= LONGEST_TEXT
            else f"{code[:LONGEST_TEXT]}\n… {len(code) - LONGEST_TEXT:,} more characters"
        )
        shown = "\n".join(map(visible, cut.split("\n")))
        body.append(
            f'<pre style="border: {_LINE}; padding: 6px 10px; max-width: 100ch; overflow-x: auto">{_escaped(shown)}</pre>'
        )
    if picture is not None:
        body.append(_picture(picture))
    return f'<div style="color: inherit; overflow-x: auto">{"".join(body)}</div>'


def _picture(picture: Callable[[], str | None]) -> str:
    try:
        drawn = picture()
    except Exception:  # a table without its picture is worth more than a traceback
        return ""
    if drawn is None or len(drawn.encode()) > MOST_SVG:
        return ""
    return f'<div style="max-width: 760px">{drawn}</div>'


def _table(table: ResultTable) -> str:
    columns = list(table.columns)[:MOST_COLUMNS]
    shown = [list(row)[:MOST_COLUMNS] for row in list(table.rows)[:MOST_ROWS]]
    numeric = [
        bool(shown)
        and all(row[i] is None or (isinstance(row[i], (int, float)) or _is_number(row[i])) for row in shown)
        for i in range(len(columns))
    ]

    def style(i: int) -> str:
        return f"padding: 3px 10px; border-bottom: {_LINE}; text-align: {'right' if numeric[i] else 'left'}"

    def cells(tag: str, values: Sequence[Any]) -> str:
        return "".join(
            f'<{tag} style="{style(i)}">{_escaped(name_text(figure_text(v)))}</{tag[:2]}>'
            for i, v in enumerate(values)
        )

    heads = cells('th scope="col"', columns)
    rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in shown)
    more = []
    if len(table.rows) > len(shown):
        more.append(f"{len(table.rows) - len(shown):,} more rows")
    if len(table.columns) > len(columns):
        more.append(f"{len(table.columns) - len(columns):,} more columns")
    heading = f'<p style="margin: 8px 0 2px">{_escaped(visible(table.heading))}</p>' if table.heading else ""
    foot = f'<p style="margin: 2px 0; opacity: 0.75">… {_escaped(", ".join(more))}</p>' if more else ""
    return (
        f'{heading}<table style="border-collapse: collapse; margin: 2px 0"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table>{foot}"
    )


def _is_number(text: Any) -> bool:
    """Is a text a number, with its sign, percent sign or interval?"""
    plain = str(text).replace(",", "").removesuffix(" %").split(" [")[0]
    try:
        float(plain)
    except ValueError:
        return str(text) == "–"
    return True


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
