"""Builds a self-contained HTML page from sections of text, tables and figures."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from alnico.installation import import_extra

SERIES = (
    ("#0072B2", "circle"),
    ("#D55E00", "square"),
    ("#009E73", "diamond"),
    ("#CC79A7", "triangle-up"),
    ("#E69F00", "cross"),
    ("#56B4E9", "triangle-down"),
    ("#7F7F7F", "star"),
    ("#B5A400", "x"),
)
"""Colour and marker of the first model, the second, ...: the palette of Okabe and Ito, which colour-blind
readers can tell apart, with grey instead of black, visible on both backgrounds, and a darker yellow."""

CIVIDIS = (
    "#00224E",
    "#123570",
    "#3B496C",
    "#575D6D",
    "#707173",
    "#8A8678",
    "#A59C74",
    "#C3B369",
    "#E1CC55",
    "#FEE838",
)
"""Small to large: Nuñez, Anderton and Renslow 2018, https://doi.org/10.1371/journal.pone.0199239."""

DIVERGING = (
    "#B35806",
    "#E08214",
    "#FDB863",
    "#FEE0B6",
    "#F7F7F7",
    "#D1E5F0",
    "#92C5DE",
    "#4393C3",
    "#2166AC",
)
"""From opposed (orange) through unrelated to aligned (blue)."""

SEQUENTIAL = (*DIVERGING[4:], "#0B3C73")
"""From little to much, where it appears next to the diverging scale."""

INK, PAPER = "#000000", "#ffffff"
"""Text colours on a coloured background: one of them has a contrast of 4.5:1 or more with any colour."""

LONG_HEADING = 24
"""Letters of a table's heading from which it takes several lines."""

EXTRA = ("plotly", "matplotlib")
"""Packages of the extra [report]."""


@dataclass(frozen=True)
class Figure:
    """A plotly drawing with choices above it, and a legend and a table of its numbers below it.

    ``views`` holds ``{"data": traces, "layout": ...}`` for every combination of the choices' options: "0|2"
    is the first option of the first choice and the third of the second, "" a figure without choices. A layout
    has its ``height`` and its own settings; the page sets the colours of text and grid. Next to these two,
    ``narrow`` changes keys of the layout on a phone, and ``table`` (columns and rows) is shown if the traces
    do not contain the numbers. Names in traces and ticks are :func:`escape`.
    """

    name: str
    label: str
    views: Mapping[str, Mapping[str, Any]]
    choices: Sequence[tuple[str, Sequence[str]]] = ()
    heading: str = ""


@dataclass(frozen=True)
class PageSection:
    """A section of the page: a heading, paragraphs of plain text, and an HTML body with its figures.

    ``body`` is built with the functions of this file and :func:`escape`; :func:`figure_html` returns a
    figure's placeholder.
    """

    anchor: str
    heading: str
    words: Sequence[str]
    body: str
    figures: Sequence[Figure] = field(default=())


def has_report() -> bool:
    """Is the extra [report] installed, so that pages and pictures can be written?"""
    return all(importlib.util.find_spec(name) is not None for name in EXTRA)


def page(
    title: str, kind: str, facts: Sequence[tuple[str, str]], sections: Sequence[PageSection], foot: str
) -> str:
    """Return the page: ``title`` as heading, ``facts`` (name, value), the sections and a footer.

    Everything except the bodies of sections is plain text. Errors: AlnicoError without plotly.
    """
    plotly = import_extra("plotly.offline", "report.html", "report").get_plotlyjs()
    own = resources.files("alnico.analysis")
    style, script = own.joinpath("page.css").read_text("utf-8"), own.joinpath("page.js").read_text("utf-8")
    scripts = (f"\n{plotly}\n", f"\n{script}\n")
    allowed = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts
    )
    links = "".join(f'<li><a href="#{s.anchor}">{escape(s.heading)}</a></li>' for s in sections)
    listed = "".join(f"<li>{escape(name)} <b>{escape(value)}</b></li>" for name, value in facts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing is fetched, and only the scripts of this file run.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        f'script-src {allowed}; img-src data: blob:">\n'
        f'<title>{escape(title)} · {escape(kind)}</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n'
        f'<div class="frame">\n<header>\n<p class="kind">{escape(kind)}</p>\n<h1>{escape(title)}</h1>\n<ul class="facts">{listed}</ul>\n</header>\n'
        f'<nav aria-label="Contents"><ol>{links}</ol></nav>\n<main>\n{"".join(map(_section, sections))}</main>\n'
        f"<footer><noscript><p>The figures need JavaScript; the tables and the text do not.</p></noscript><p>{escape(foot)}</p></footer>\n</div>\n"
        f"{''.join(f'<script>{s}</script>' for s in scripts)}\n</body>\n</html>\n"
    )


def _section(section: PageSection) -> str:
    words = "".join(f'<p class="words">{escape(text)}</p>\n' for text in section.words)
    data = "".join(
        f'<script type="application/json" id="{f.name}">{inline_json({"choices": [{"label": c, "options": o} for c, o in f.choices], "views": f.views})}</script>\n'
        for f in section.figures
    )
    return (
        f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-heading">\n'
        f'<h2 id="{section.anchor}-heading">{escape(section.heading)}</h2>\n{words}{section.body}\n{data}</section>\n'
    )


def figure_html(figure: Figure) -> str:
    """Return the placeholder of a figure in its section's body."""
    heading = f"<h3>{escape(figure.heading)}</h3>" if figure.heading else ""
    return (
        f'<figure class="card">{heading}<div class="plot" data-figure="{figure.name}" role="img" aria-label="{escape(figure.label)}"></div>'
        '<ul class="legend" aria-label="Shown; press to hide"></ul>'
        f"<details><summary>The numbers</summary>{scroller('', f'Numbers: {figure.label}')}</details></figure>\n"
    )


def inline_json(data: Any) -> str:
    """Return JSON for a script element: nothing in it ends the element or opens a comment.

    Infinities and NaN become null.
    """
    text = json.dumps(_finite(data), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return float(f"{data:.6g}") if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


def escape(text: str) -> str:
    """Return text as HTML, for elements, attributes and plotly's labels.

    >>> escape('<"&')
    '&lt;&#34;&amp;'
    """
    return html.escape(text, quote=True).replace("&quot;", "&#34;")  # plotly knows quotes only as a number


def breakable(text: str) -> str:
    """Return text as HTML in which a line may break after a dot, a slash or an underscore."""
    return re.sub("(?<=[./_])(?=.)", "<wbr>", escape(text))


def name(text: str) -> str:
    """Return a name of a tensor or a model as HTML."""
    return f'<bdi class="name">{breakable(text)}</bdi>'


def shorten(text: str, length: int) -> str:
    """Return text of at most this length, with its middle left out.

    >>> shorten("wizardlm-13b-uncensored", 12)
    'wizard…sored'
    """
    if len(text) <= length:
        return text
    return text[: length // 2] + "…" + text[len(text) - (length - 1) // 2 :]


def short_labels(names: Sequence[str], length: int) -> list[str]:
    """Return names of at most this length: without what all begin and end with, if they would be alike otherwise.

    >>> short_labels(["news", "spam"], 8), short_labels(["glue_news_accuracy", "glue_spam_accuracy"], 8)
    (['news', 'spam'], ['…news…', '…spam…'])
    """
    labels = [shorten(name, length) for name in names]
    if len(set(labels)) == len(set(names)):
        return labels
    begin = _alike(names)
    end = _alike([name[begin:][::-1] for name in names])
    return [f"…{shorten(name[begin : len(name) - end], length - 2)}…" for name in names]


def _alike(names: Sequence[str]) -> int:
    """Return with how many equal letters the names begin."""
    letters = enumerate(zip(*names, strict=False))
    return next((i for i, those in letters if len(set(those)) > 1), min(map(len, names)))


def number(value: float | None) -> str:
    """Return a number with three digits, and with a power of ten if it is very large or small.

    >>> [number(v) for v in (0.0, 1.25, 4321.0, -0.00002, 123456.0, None)]
    ['0', '1.25', '4321', '−2.00×10⁻⁵', '1.23×10⁵', '–']
    """
    if value is None:
        return "–"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".replace("-", "−", 1 if value < 0 else 0).split("e")
    if -4 < int(exponent) < 4:
        return f"{value:.{max(2 - int(exponent), 0)}f}".replace("-", "−")
    return f"{mantissa}×10{superscript(int(exponent))}"


def superscript(exponent: int) -> str:
    """Return an exponent in superscript digits."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def percent(share: float | None) -> str:
    """Return a share as a percentage.

    >>> [percent(s) for s in (0.0123, 0.5, 1.0, 0.0, 0.00001, None)]
    ['1.23\xa0%', '50.0\xa0%', '100\xa0%', '0\xa0%', '0.00100\xa0%', '–']
    """
    return "–" if share is None else f"{number(100 * share)}\N{NO-BREAK SPACE}%"


def format_count(count: int) -> str:
    """Return a count with separators between thousands.

    >>> format_count(1234567)
    '1,234,567'
    """
    return f"{count:,}"


def colour(value: float, scale: Sequence[str]) -> str:
    """Return the colour of a value in [0, 1] on a scale, as #rrggbb."""
    place = min(max(value, 0.0), 1.0) * (len(scale) - 1)
    low = min(int(place), len(scale) - 2)
    share = place - low
    return "#" + "".join(
        f"{round((1 - share) * start + share * end):02x}"
        for start, end in zip(_rgb(scale[low]), _rgb(scale[low + 1]), strict=True)
    )


def ink_on(ground: str) -> str:
    """Return the text colour with the better contrast on a background (WCAG)."""
    red, green, blue = (
        c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in _rgb(ground)
    )
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else PAPER


def _rgb(hexadecimal: str) -> tuple[int, int, int]:
    return int(hexadecimal[1:3], 16), int(hexadecimal[3:5], 16), int(hexadecimal[5:7], 16)


def series(index: int) -> tuple[str, str]:
    """Return the colour and marker of a model by its position. The ninth has the first colour again, and a hollow marker."""
    again, place = divmod(index, len(SERIES))
    ground, mark = SERIES[place]
    return ground, mark + "-open" * bool(again)


def bar_marker(index: int) -> dict[str, Any]:
    """Return how Plotly fills the bars of a model by its position: from the ninth, in stripes of the same colours."""
    ground, _ = series(index)
    again = index // len(SERIES)
    if not again:
        return {"color": ground}
    return {
        "color": ground,
        "pattern": {"shape": "/" if again % 2 else "x", "size": 6, "solidity": 0.6},
    }


def badge(index: int) -> str:
    """Return a model's number on its colour, as HTML."""
    ground, _ = series(index)
    return f'<span class="badge" style="background:{ground};color:{ink_on(ground)}">{index + 1}</span>'


def tinted_cell(value: float | None, share: float, text: str, scale: Sequence[str]) -> str:
    """Return a table cell with the colour of ``share`` (in [0, 1]) on a scale; a dash without a value."""
    if value is None:
        return '<td class="none">–</td>'
    ground = colour(share, scale)
    return f'<td class="tint" style="background:{ground};color:{ink_on(ground)}">{text}</td>'


def ramp(scale: Sequence[str], least: str, most: str) -> str:
    """Return a colour bar with a label at each end, as HTML."""
    bar = f'<i style="background:linear-gradient(90deg,{",".join(scale)})"></i>'
    return f'<p class="ramp"><span>{escape(least)}</span>{bar}<span>{escape(most)}</span></p>\n'


def scatter_view(
    traces: Sequence[Mapping[str, Any]], x: str, y: str, behind: Mapping[str, Any], *, height: int = 440
) -> dict[str, Any]:
    """Return a view of points or lines: its axes are named ``x`` and ``y``, ``behind`` is the table of its numbers."""

    def across(length: int, ticks: int) -> dict[str, Any]:
        title = {"text": escape(shorten(x, length)), "standoff": 6}
        return {"title": title, "nticks": ticks, "showgrid": False, "zeroline": False}

    return {
        "data": traces,
        "layout": {
            "height": height,
            "hovermode": "closest",
            "xaxis": across(70, 12),
            "yaxis": {
                "title": {"text": escape(shorten(y, 36)), "standoff": 8},
                "zeroline": False,
                "nticks": 8,
            },
        },
        "narrow": {"xaxis": across(34, 6)},
        "table": behind,
    }


def copyable(text: str, label: str) -> str:
    """Return text to copy, such as a recipe: with a button for it, and selectable where no script runs."""
    return f'<div class="copy">{scroller(f"<pre>{escape(text)}</pre>", label)}</div>\n'


def scroller(content: str, label: str, *, is_tall: bool = False) -> str:
    """Return HTML content in a part that scrolls where it is too wide, or higher than a screen if ``is_tall``.

    The page's script says so in words below it, and lets the keyboard reach it.
    """
    kind = "scroll tall" if is_tall else "scroll"
    return (
        f'<div class="scroller"><div class="{kind}" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"{content}</div></div>\n"
    )


def select_box(label: str, shows: str, options: Sequence[str]) -> str:
    """Return a select box that shows one of the children of the element ``shows``."""
    listed = "".join(f"<option>{escape(option)}</option>" for option in options)
    return f'<div class="choices"><label>{escape(label)}<select data-shows="{shows}">{listed}</select></label></div>\n'


def table(
    columns: Sequence[tuple[str, str]],
    rows: Sequence[str],
    *,
    label: str,
    anchor: str = "",
    sortable: bool = False,
) -> str:
    """Return an HTML table of columns (heading, "text" or "number") and rows (``<tr>...``).

    If it is ``sortable``, a click on a heading sorts it. ``label`` is what a screen reader calls it.
    """

    def style(heading: str, kind: str) -> str:
        classes = [*(["n"] if kind == "number" else []), *(["long"] if len(heading) > LONG_HEADING else [])]
        return f' class="{" ".join(classes)}"' if classes else ""

    headings = "".join(
        f'<th scope="col"{style(heading, kind)}{f" data-sorts={kind}" if sortable else ""}>{breakable(heading)}</th>'
        for heading, kind in columns
    )
    own = f" id={anchor}" if anchor else ""
    return scroller(
        f'<table class="list"{own}><thead><tr>{headings}</tr></thead><tbody>\n{"".join(rows)}</tbody></table>',
        label,
        is_tall=True,
    )


def cell(text: str, value: float | None = None) -> str:
    """Return a table cell of a number: its text and its sort value. Cells without a value sort lowest."""
    return f'<td class="n" data-value="{-1e300 if value is None else value!r}">{text}</td>'
