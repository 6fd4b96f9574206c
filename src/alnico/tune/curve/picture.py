"""Draws a curve with matplotlib: lines with bands, a surface with contours, a path with its barrier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alnico.analysis.charts import (
    ChartCanvas,
    ChartTheme,
    color_map,
    inline_picture,
    line_style,
    open_canvas,
    plain,
    write_png,
)
from alnico.analysis.page import CIVIDIS, series
from alnico.analysis.scores import Estimate
from alnico.notebook import ResultTable, result_html
from alnico.tune.curve.result import Curve
from alnico.tune.curve.words import axis_words, best_words, corners_of, summary_rows
from alnico.tune.search.objective import MEAN

GREY = "#7F7F7F"

BEST_MARK = {"marker": "*", "markersize": 15, "linestyle": "none", "markeredgewidth": 0.8, "zorder": 5}

DASHED, DOTTED, STRAIGHT = (0, (6, 3)), (0, (1.5, 2)), (0, (3, 1.5))
"""How the lines of the base, of the models, and between the ends of a path are drawn."""


def draw_curve(
    curve: Curve,
    task: str | None,
    *,
    ax: Any = None,
    figsize: tuple[float, float] | None = None,
    dark: bool | ChartTheme = False,
) -> Any:
    """Return a figure of a curve; see :meth:`alnico.tune.curve.result.Curve.plot`."""
    if task is None and curve.kind != "surface":
        panels = _panels(curve)
    else:
        panels = [[curve.check_view(task or curve.objective)]]
    canvas = open_canvas(
        len(panels),
        default=(7.6, 4.4 * len(panels)) if curve.kind != "surface" else (6.6, 5.2),
        figsize=figsize,
        ax=ax,
        dark=dark,
        purpose="a picture of a curve",
    )
    for axes, names in zip(canvas.axes, panels, strict=True):
        if curve.kind == "surface":
            _surface(canvas, axes, curve, names[0])
        else:
            _lines(canvas, axes, curve, names)
    return canvas.figure


def write_picture(curve: Curve, path: Path) -> None:
    """Write ``curve.png``. Errors: OSError, AlnicoError without matplotlib."""
    write_png(draw_curve(curve, None), path)


def curve_html(curve: Curve) -> str:
    """Return a curve as HTML for a notebook: the picture, and the best points next to the base and the models."""
    heads, *rows = summary_rows(curve)
    return result_html(
        axis_words(curve)[1],
        best_words(curve),
        ResultTable(heads, rows),
        facts=[("points", len(curve.points)), ("method", curve.method)],
        picture=inline_picture(lambda theme: draw_curve(curve, None, dark=theme), best_words(curve)),
    )


def _panels(curve: Curve) -> list[list[str]]:
    """Return what is drawn together: the mean and its tasks; every other task alone, as it has another unit."""
    if not curve.averaged:
        return [[name] for name in curve.views]
    others = [name for name in curve.views if name not in (MEAN, *curve.averaged)]
    return [[MEAN, *curve.averaged], *([name] for name in others)]


def _lines(canvas: ChartCanvas, axes: Any, curve: Curve, names: Sequence[str]) -> None:
    x = list(curve.axes[0])
    for index, name in enumerate(names):
        estimates = [point.on(name) for point in curve.points]
        style = line_style(index, len(x))
        if index == 0 and len(names) > 1:
            style |= {"linewidth": 3.2}
        axes.plot(x, [e.value for e in estimates], label=plain(name, 28), **style)
        _band(axes, x, estimates, series(index)[0])
    first = names[0]
    has_one = len(names) == 1
    shown: set[str] = set()
    for place, line in enumerate(curve.lines):
        value = line.mean if first == MEAN and line.mean is not None else line.scores[first]
        is_base = line.role == "base"
        label = line.name if has_one else "base: mean" if is_base else "models: mean"
        axes.axhline(
            value.value,
            color=series(place)[0] if has_one and not is_base else GREY,
            linestyle=DASHED if is_base else DOTTED,
            linewidth=1.3,
            label="_" if label in shown else plain(label, 28),
        )
        shown.add(label)
    best = curve.best_on(first)
    color = series(0)[0]
    axes.plot(
        [best.scales[0]],
        [best.on(first).value],
        color=color,
        markeredgecolor=canvas.theme.paper if canvas.theme.paper != "none" else color,
        label=plain(f"best: {curve.place(best.scales)}"),
        **BEST_MARK,
    )
    if curve.kind == "path":
        _chord(axes, curve, first)
    word, title = axis_words(curve)
    canvas.frame(axes, x=word, y=curve.metric_of(first), title=title, grid="both")
    canvas.legend(axes)


def _band(axes: Any, x: Sequence[float], estimates: Sequence[Estimate], color: str) -> None:
    known = [(t, e.low, e.high) for t, e in zip(x, estimates, strict=True) if e.low is not None]
    if known:
        places, low, high = zip(*known, strict=True)
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)


def _chord(axes: Any, curve: Curve, name: str) -> None:
    """Draw the straight line between the ends of a path, and the barrier as a vertical line."""
    ends = [next(p for p in curve.points if p.scales[0] == t).on(name).value for t in (0.0, 1.0)]
    axes.plot([0, 1], ends, color=GREY, linewidth=1.2, linestyle=STRAIGHT, label="straight line")
    barrier = curve.barriers[name]
    if barrier.at is not None:
        top = (1 - barrier.at) * ends[0] + barrier.at * ends[1]
        bottom = next(p for p in curve.points if p.scales[0] == barrier.at).on(name).value
        axes.plot(
            [barrier.at] * 2,
            [top, bottom],
            color=series(1)[0],
            linewidth=2.5,
            label=f"barrier {barrier.height.value:.3g}",
        )


def _surface(canvas: ChartCanvas, axes: Any, curve: Curve, name: str) -> None:
    """Draw the scores as filled contours over the two scales, with the base, the models and the best."""
    x, y = curve.axes
    rows = [[curve.points[i * len(y) + j].on(name).value for i in range(len(x))] for j in range(len(y))]
    theme = canvas.theme
    if min(len(x), len(y)) > 1:
        filled = axes.contourf(x, y, rows, levels=14, cmap=color_map(CIVIDIS))
        axes.contour(x, y, rows, levels=filled.levels, colors="white", linewidths=0.5, alpha=0.7)
    else:
        filled = axes.scatter(
            [a for a in x for _ in y],
            [b for _ in x for b in y],
            c=[p.on(name).value for p in curve.points],
            cmap=color_map(CIVIDIS),
        )
    bar = canvas.figure.colorbar(filled, ax=axes, shrink=0.85)
    bar.set_label(plain(curve.metric_of(name)), color=theme.quiet)
    bar.ax.tick_params(color=theme.line, labelcolor=theme.ink, labelsize=9)
    bar.outline.set_edgecolor(theme.line)
    best = curve.best_on(name)
    axes.plot(
        [best.scales[0]],
        [best.scales[1]],
        color=series(1)[0],
        markeredgecolor="white",
        clip_on=False,
        **BEST_MARK,
    )
    for label, place in corners_of(curve).items():
        axes.plot(
            *place, marker="o", color="white", markeredgecolor="black", markersize=7, clip_on=False, zorder=4
        )
        axes.annotate(
            plain(label, 18),
            place,
            xytext=(-7 if place[0] else 7, -10 if place[1] else 8),
            textcoords="offset points",
            ha="right" if place[0] else "left",
            va="center",
            fontsize=8,
            color="black",
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )
    word, title = axis_words(curve)
    canvas.frame(
        axes,
        x=word.partition(" | ")[0],
        y=word.partition(" | ")[2],
        title=f"{title}: {name}, best at {curve.place(best.scales)}",
        grid="",
    )
