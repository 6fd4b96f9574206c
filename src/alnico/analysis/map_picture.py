"""Draws the map of models with matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from alnico.analysis.charts import ChartCanvas, open_canvas, plain, write_png
from alnico.analysis.map_section import (
    BASE_MARK,
    axis_titles,
    is_worth_showing,
    map_range,
    origin_label,
    origin_name,
)
from alnico.analysis.model_map import ModelMap
from alnico.analysis.page import ink_on, number, percent, series, shorten

MAP_SIZE = (6.4, 5.2)
INLINE_MAP_SIZE = (5.6, 4.2)


def plot_map(places: ModelMap, **options: Any) -> Any:
    """Draw a map in axes of its own, or in the caller's; ``options`` are those of :func:`open_canvas`."""
    canvas = open_canvas(default=MAP_SIZE, **options)
    draw_map(canvas, canvas.axes[0], places)
    return canvas.figure


def write_map(places: ModelMap, path: Path) -> None:
    """Write ``map.png``; write nothing if there is nothing to see. Errors: AlnicoError without the extra [report]."""
    if is_worth_showing(places):
        write_png(plot_map(places, purpose="map.png"), path)


def draw_map(canvas: ChartCanvas, axes: Any, places: ModelMap) -> None:
    """Draw base, models and merge as points and arrows, with equal axes; the legend says what is off the plane."""
    xs, ys = map_range(places.points)
    nearest = 0.045 * max(xs[1] - xs[0], ys[1] - ys[0])
    shown = [(0.0, 0.0)]
    for point in places.points:
        ground, _ = series(point.index)
        off = f", {number(point.outside)} off the plane" if point.outside else ""
        is_merge = point.role == "merged"
        kind = " (merge)" if is_merge and point.name != "merged" else ""
        label = plain(f"{point.index + 1} {shorten(point.name, 28)}{kind}{off}", 70)
        if math.hypot(point.x, point.y) > 0:
            axes.annotate(
                "",
                (point.x, point.y),
                (0.0, 0.0),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": ground,
                    "linewidth": 1.6,
                    "linestyle": "--" if point.outside else "-",
                    "shrinkA": 0,
                    "shrinkB": 6,
                },
                zorder=2,
            )
        has_room = all(math.dist((point.x, point.y), other) >= nearest for other in shown)
        axes.scatter(
            [point.x],
            [point.y],
            s=150 if has_room else 40,
            marker="s" if is_merge else "o",
            facecolor=ground,
            linewidth=0,
            label=label,
            zorder=4 if has_room else 3,
        )
        if has_room:
            shown.append((point.x, point.y))
            axes.annotate(
                str(point.index + 1),
                (point.x, point.y),
                ha="center",
                va="center",
                fontsize=8,
                color=ink_on(ground),
                zorder=5,
            )
    axes.scatter([0.0], [0.0], s=46, color=BASE_MARK, zorder=3.5, linewidth=0, label=plain(origin_name(places), 36))  # fmt: skip
    axes.annotate(
        origin_label(places),
        (0.0, 0.0),
        (0, -11),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=8,
        zorder=6,
        **({"color": canvas.theme.ink} if canvas.is_own else {}),
    )
    axes.margins(0)
    axes.update_datalim([(xs[0], ys[0]), (xs[1], ys[1])])
    axes.autoscale_view()
    axes.set_aspect("equal", adjustable="datalim")
    across, upwards = axis_titles(places)
    canvas.frame(axes, title=_title(places), x=across, y=upwards, grid="both")
    canvas.legend(axes, is_below=True)


def _title(places: ModelMap) -> str:
    if places.kind == "plane":
        return f"The plane of {shorten(places.spanned_by[0], 24)} and {shorten(places.spanned_by[1], 24)}"
    if places.kind == "directions":
        return f"The two main directions: {percent(places.share)} of the squared length"
    return "All on one line"
