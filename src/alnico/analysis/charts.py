"""Draws with matplotlib in the look of the pages: canvas, colours, marks, PNG and inline SVG."""

from __future__ import annotations

import io
import itertools
import math
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alnico.analysis.page import SERIES, colour, escape, has_report, ink_on, series, shorten
from alnico.errors import AlnicoError, near_name
from alnico.folders import open_to_write
from alnico.installation import import_extra
from alnico.libraries import without_local_settings

DPI = 120

MARKS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "cross": "P",
    "triangle-down": "v",
    "star": "*",
    "x": "X",
}
"""Matplotlib's marks for those of the page."""

HATCHES = ("", "////", "xxxx")
"""What fills the bars of the first eight models, of the next eight, and so on: as :func:`alnico.analysis.page.bar_marker`."""

Inches = tuple[float, float]
"""Width and height in inches."""


@dataclass(frozen=True)
class ChartTheme:
    """Colours of a picture: background, text, quiet text, lines and grid. As ``page.css`` has them."""

    paper: str
    ink: str
    quiet: str
    line: str
    grid: str


LIGHT = ChartTheme("#ffffff", "#1d2327", "#5b6670", "#b9beb9", "#e8e9e5")
DARK = ChartTheme("#1b2126", "#e6e9ea", "#a3adb5", "#4d5861", "#2a3239")
INLINE = ChartTheme("none", "#010203", "#010204", "#010205", "#010206")
"""Colours that :func:`inline_svg` replaces with the text colour of the notebook, in four strengths."""

STRENGTHS = {"#010203": 1.0, "#010204": 0.75, "#010205": 0.4, "#010206": 0.15}


@dataclass(frozen=True)
class ChartCanvas:
    """Axes to draw in. ``is_own`` if alnico made the figure; otherwise its look is the caller's."""

    figure: Any
    axes: tuple[Any, ...]
    theme: ChartTheme
    is_own: bool

    def frame(
        self, axes: Any, *, title: str = "", x: str = "", y: str = "", grid: str = "y", is_boxed: bool = False
    ) -> None:
        """Give axes their title, labels and grid (``x``, ``y``, ``both`` or none) in the colours of the theme."""
        theme = self.theme
        if title:
            axes.set_title(
                plain(title, 90), loc="left", fontsize=11, **({"color": theme.ink} if self.is_own else {})
            )
        for label, set_label in ((x, axes.set_xlabel), (y, axes.set_ylabel)):
            if label:
                set_label(plain(label, 80))
        axes.set_axisbelow(True)
        if grid:
            axes.grid(axis=grid, color=theme.grid, linewidth=0.8)
        if not is_boxed:
            axes.spines[["top", "right"]].set_visible(False)
        if self.is_own:
            axes.set_facecolor(theme.paper)
            axes.xaxis.label.set_color(theme.quiet)
            axes.yaxis.label.set_color(theme.quiet)
            axes.tick_params(color=theme.line, labelcolor=theme.ink, labelsize=9)
            for spine in axes.spines.values():
                spine.set_color(theme.line)

    def note(self, axes: Any, words: str) -> None:
        """Say in the middle of empty axes why nothing is drawn."""
        axes.text(
            0.5,
            0.5,
            plain(words, 90),
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=self.theme.quiet,
        )
        axes.set_axis_off()

    def legend(self, axes: Any = None, *, is_below: bool = False) -> None:
        """Show the labels of everything drawn: next to the axes or below them, and inside the caller's axes."""
        axes = self.axes[0] if axes is None else axes
        handles, labels = axes.get_legend_handles_labels()
        if not labels:
            return
        style = {"fontsize": 8, "frameon": False}
        if self.is_own:
            place = {"loc": "outside lower left", "ncols": 2} if is_below else {"loc": "outside right upper"}
            self.figure.legend(handles, labels, labelcolor=self.theme.ink, **place, **style)
        else:
            axes.legend(handles, labels, loc="best", **style)


def open_canvas(
    panels: int = 1,
    *,
    default: Inches,
    figsize: Inches | None = None,
    ax: Any = None,
    dark: bool | ChartTheme = False,
    columns: int = 1,
    polar: bool = False,
    purpose: str = "plot()",
) -> ChartCanvas:
    """Return axes: the caller's (``ax``, one or a sequence), or those of a new figure.

    The figure is none of pyplot's, so nothing collects it and no backend is chosen; a notebook draws it.
    ``default`` is its size where the caller gives none. Errors: AlnicoError without the extra [report], and
    if ``ax`` has another number of axes than ``panels``.
    """
    with without_local_settings():
        figure_of: Any = import_extra("matplotlib.figure", purpose, "report").Figure
    theme = dark if isinstance(dark, ChartTheme) else DARK if dark else LIGHT
    if ax is not None:
        given = tuple(_flat(ax))
        if len(given) != panels:
            raise AlnicoError(
                f"ax: has {len(given)} axes; this picture has {panels} panels, expected as many axes. Give a sequence of "
                f"{panels} axes, or choose models."
                if panels > 1
                else f"ax: has {len(given)} axes; expected one. Give one."
            )
        return ChartCanvas(given[0].figure, given, theme, is_own=False)
    figure = figure_of(figsize=figsize or default, dpi=DPI, layout="constrained", facecolor=theme.paper)
    columns = min(columns, panels)
    rows = -(-panels // columns)
    axes = tuple(
        figure.add_subplot(rows, columns, i + 1, **({"projection": "polar"} if polar else {}))
        for i in range(panels)
    )
    # IPython draws figures only after pyplot was imported; this one draws itself.
    figure._repr_png_ = partial(png_bytes, figure)
    return ChartCanvas(figure, axes, theme, is_own=True)


def _flat(ax: Any) -> Iterator[Any]:
    if hasattr(ax, "plot") and hasattr(ax, "figure"):
        yield ax
    else:
        try:
            parts = iter(ax)
        except TypeError:
            raise AlnicoError(
                f"ax: is of type {type(ax).__name__}; expected matplotlib axes, or a sequence of them. Make them with "
                "`figure, ax = matplotlib.pyplot.subplots()`."
            ) from None
        for part in parts:
            yield from _flat(part)


def plain(text: str, length: int = 40) -> str:
    """Return text for matplotlib: short, on one line, and never as a formula.

    >>> plain("a$b$ and a very long name", 12)
    'a\\\\$b\\\\$ a… name'
    """
    shown = shorten(" ".join(text.split()), length)
    return "".join(c if c.isprintable() else "?" for c in shown).replace("$", r"\$")


def bar_style(index: int, theme: ChartTheme = LIGHT) -> dict[str, Any]:
    """Return how matplotlib draws the bars of a model by its position: from the ninth, in stripes of the same colours."""
    ground, _ = series(index)
    again = index // len(SERIES)
    if not again:
        return {"color": ground}
    return {
        "facecolor": theme.paper,
        "edgecolor": ground,
        "hatch": HATCHES[1 if again % 2 else 2],
        "linewidth": 0.8,
    }


def mark_style(index: int) -> dict[str, Any]:
    """Return the colour and mark of a model's points: from the ninth, hollow marks of the same colours."""
    ground, mark = series(index)
    hollow = mark.endswith("-open")
    return {
        "color": ground,
        "marker": MARKS[mark.removesuffix("-open")],
        "markerfacecolor": "none" if hollow else ground,
        "markeredgecolor": ground,
        "markeredgewidth": 1.2 if hollow else 0,
    }


def line_style(index: int, points: int = 1) -> dict[str, Any]:
    """Return how a model's line is drawn, with about 20 marks on it."""
    return {
        **mark_style(index),
        "linewidth": 1.8,
        "markersize": 5.5,
        "markevery": max(1, -(-points // 20)),
    }


def color_map(scale: Sequence[str]) -> Any:
    """Return a scale of the page as matplotlib's."""
    with without_local_settings():
        colors: Any = import_extra("matplotlib.colors", "plot()", "report")
    return colors.LinearSegmentedColormap.from_list("alnico", list(scale))


def drawn_by(name: str, pictures: Mapping[str, Callable[..., Any]], of: str) -> Callable[..., Any]:
    """Return the function that draws a picture. Errors: AlnicoError with the nearest name and all names."""
    if isinstance(name, str) and name in pictures:
        return pictures[name]
    near = near_name(name, pictures) if isinstance(name, str) else None
    listed = ", ".join(map(repr, pictures))
    guess = f"Did you mean {near!r}?" if near else "Choose one of them."
    raise AlnicoError(f"plot: {of} has no picture {name!r}; expected one of {listed}. {guess}")


def chosen_positions(models: Any, names: Sequence[str], argument: str = "models") -> list[int]:
    """Return the positions of models given by position or name, one or several; all of them for None.

    Errors: AlnicoError for one that is not there, and for none at all.
    """
    if models is None:
        return list(range(len(names)))
    given = [models] if isinstance(models, (str, int)) or not isinstance(models, Collection) else list(models)
    positions: list[int] = []
    for one in given:
        if isinstance(one, str) and one in names:
            positions.append(names.index(one))
        elif isinstance(one, int) and not isinstance(one, bool) and -len(names) <= one < len(names):
            positions.append(one % len(names))
        else:
            near = near_name(one, names) if isinstance(one, str) else None
            raise AlnicoError(
                f"{argument}: {one!r} is not one of the models; expected a position below {len(names)} or one of "
                f"{', '.join(map(repr, names))}. {f'Did you mean {near!r}?' if near else 'Correct it.'}"
            )
    if not positions:
        raise AlnicoError(f"{argument}: is empty; expected one model or more. Leave it out to draw all.")
    return list(dict.fromkeys(positions))


@dataclass(frozen=True)
class BarSeries:
    """Bars of one colour, with one value per category; ``low`` and ``high`` end the whiskers."""

    label: str
    index: int
    values: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    ends: str = ""
    """Text at the ends of the bars."""


def bars_size(categories: int, series_count: int) -> Inches:
    """Return the size of a figure for bars of this many categories and series."""
    return 7.2, max(categories * (0.17 * series_count + 0.18), 0.6) + 1.0


def draw_bars(canvas: ChartCanvas, axes: Any, categories: Sequence[str], drawn: Sequence[BarSeries]) -> None:
    """Draw horizontal bars, the first category at the top and the first series above the others."""
    width = 0.82 / max(len(drawn), 1)
    ink = canvas.theme.ink
    for place, one in enumerate(drawn):
        at = [i - 0.41 + (place + 0.5) * width for i in range(len(categories))]
        lengths = [0.0 if v is None else v for v in one.values]
        bars = axes.barh(
            at, lengths, width * 0.9, label=plain(one.label), **bar_style(one.index, canvas.theme)
        )
        known = [
            (y, v, lo, hi)
            for y, v, lo, hi in zip(at, one.values, one.low, one.high, strict=False)
            if v is not None and lo is not None and hi is not None
        ]
        if known:
            arms = [[max(v - lo, 0.0) for _, v, lo, _ in known], [max(hi - v, 0.0) for _, v, _, hi in known]]
            axes.errorbar(
                [k[1] for k in known],
                [k[0] for k in known],
                xerr=arms,
                fmt="none",
                ecolor=ink,
                elinewidth=1,
                capsize=2,
            )
        if one.ends:
            texts = [plain(one.ends, 16) if v is not None else "" for v in one.values]
            axes.bar_label(bars, texts, fontsize=7, padding=3, **({"color": ink} if canvas.is_own else {}))
    axes.set_yticks(range(len(categories)), [plain(c, 30) for c in categories])
    axes.set_ylim(len(categories) - 0.5, -0.5)
    if any(one.ends for one in drawn):
        axes.margins(x=0.16)


def draw_lines(
    axes: Any,
    x: Sequence[float],
    lines: Sequence[tuple[str, int, Sequence[float | None]]],
) -> None:
    """Draw lines (label, position of the colour, values); a value of None leaves a gap."""
    for label, index, values in lines:
        axes.plot(
            list(x),
            [math.nan if v is None else v for v in values],
            label=plain(label, 60),
            **line_style(index, len(x)),
        )
    if len(x) <= 12 and all(float(v).is_integer() for v in x):
        axes.set_xticks(list(x))


def draw_matrix(
    canvas: ChartCanvas,
    axes: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    scale: Sequence[str],
    ends: tuple[float, float],
    text: Callable[[float], str] | None = None,
) -> None:
    """Draw values as coloured fields, with their text in them if ``text`` is given; None leaves a field empty."""
    least, most = ends
    shown = [[math.nan if v is None else v for v in row] for row in values]
    axes.imshow(
        shown, cmap=color_map(scale), vmin=least, vmax=most or 1.0, aspect="auto", interpolation="nearest"
    )
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is not None and text is not None:
                ground = colour((value - least) / ((most - least) or 1.0), scale)
                axes.text(j, i, text(value), ha="center", va="center", fontsize=8, color=ink_on(ground))
    axes.set_xticks(range(len(columns)), [plain(c, 24) for c in columns])
    axes.set_yticks(range(len(rows)), [plain(r, 30) for r in rows])
    canvas.frame(axes, grid="", is_boxed=True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def best_so_far(values: Sequence[float], goal: str = "max") -> list[float]:
    """Return the best value up to each one.

    >>> best_so_far([1.0, 3.0, 2.0]), best_so_far([1.0, 3.0, 0.5], "min")
    ([1.0, 3.0, 3.0], [1.0, 1.0, 0.5])
    """
    return list(itertools.accumulate(values, max if goal == "max" else min))


def draw_trials(
    canvas: ChartCanvas,
    axes: Any,
    numbers: Sequence[int],
    values: Sequence[float],
    *,
    goal: str = "max",
    title: str = "",
    x: str = "trial",
    y: str = "score",
    has_legend: bool = True,
) -> None:
    """Draw the value of each trial as a point, the best so far as a line, and a ring around the best of all."""
    axes.plot(numbers, values, linestyle="none", markersize=5.5, label="trials", **mark_style(0))
    axes.step(
        numbers,
        best_so_far(values, goal),
        where="post",
        color=series(1)[0],
        linewidth=1.8,
        label="best so far",
    )
    if values:
        best = values.index((max if goal == "max" else min)(values))
        axes.plot(
            [numbers[best]], [values[best]], linestyle="none", marker="o", markersize=12, markerfacecolor="none",
            markeredgecolor=series(1)[0], markeredgewidth=1.6, label=f"best: {values[best]:.4g}",
        )  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
    canvas.frame(axes, title=title, x=x, y=y)
    if has_legend:
        canvas.legend(axes)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of letters that the font lacks: they are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ ")
        yield


def png_bytes(figure: Any) -> bytes:
    """Return a figure as PNG."""
    file = io.BytesIO()
    with _quietly():
        figure.savefig(file, format="png")
    return file.getvalue()


def write_png(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file; a link of that name is replaced, not followed. Errors: OSError."""
    data = png_bytes(figure)
    path.unlink(missing_ok=True)
    with os.fdopen(open_to_write(path, flags=os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(data)


def inline_picture(draw: Callable[[ChartTheme], Any], label: str) -> Callable[[], str | None]:
    """Return what draws the picture of a result in a notebook: SVG, or None without the extra [report].

    ``draw`` gets the theme and returns a figure.
    """
    return lambda: inline_svg(draw(INLINE), label) if has_report() else None


def inline_svg(figure: Any, label: str) -> str:
    """Return a figure that was drawn with the theme ``INLINE`` as SVG inside HTML.

    Its text and lines take the text colour of their surroundings, so it suits a dark notebook too. It has no
    style sheet, which would apply to the whole notebook, no script, and nothing from elsewhere.
    """
    import matplotlib

    file = io.StringIO()
    # Its ids come from the contents with any fixed salt: a figure has the same bytes in every run.
    with _quietly(), matplotlib.rc_context({"svg.hashsalt": "alnico"}):
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    for sentinel, strength in STRENGTHS.items():
        for role in ("fill", "stroke"):
            text = text.replace(
                f"{role}: {sentinel}",
                f"{role}: currentColor" + (f"; {role}-opacity: {strength}" if strength < 1 else ""),
            )
    return text.replace(
        "<svg ",
        f'<svg role="img" aria-label="{escape(label)}" style="max-width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt" ',
        1,
    )
