"""The section of a page with the map of models: base, models and merge as points and arrows to scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from alnico.analysis.model_map import MapPoint, ModelMap
from alnico.analysis.page import (
    Figure,
    PageSection,
    escape,
    figure_html,
    ink_on,
    number,
    percent,
    series,
    shorten,
)
from alnico.numerics.sizes import count_of

BASE_MARK = "#808b93"
"""The colour of the base's mark, visible on both backgrounds."""

MARK, GAP = 20, 24
"""Pixels of a mark with a number in it, and between the centres of two that do not touch."""

NARROW_PLOT = (270, 270)
"""Pixels of the plot on a phone, width and height: what fits there fits everywhere."""


def map_section(places: ModelMap) -> PageSection | None:
    """Build the section; None if nothing can be seen on it: a single model, or none that moved."""
    if not is_worth_showing(places):
        return None
    figure = Figure(
        "map-drawing",
        "Map: models as points, with arrows from "
        + ("the base" if places.has_base else "the merged model")
        + "; distances are to scale",
        {"": _view(places)},
    )
    body = f'<div class="maps" style="--least:420px;--most:820px">\n{figure_html(figure)}</div>\n'
    return PageSection("map", "A map of the models", map_words(places), body, [figure])


def is_worth_showing(places: ModelMap) -> bool:
    """Can anything be seen on a map: two models or more, of which one moved?"""
    return len(places.points) > 1 and any(p.length for p in places.points)


def map_words(places: ModelMap) -> list[str]:
    """Return what the map shows, as sentences: its plane, its scale, and how far models are from the plane."""
    origin = "the base" if places.has_base else "the merged model"
    names = [shorten(name, 40) for name in places.spanned_by]
    if places.kind == "plane":
        words = (
            f"The plane of the task vectors of {names[0]} and {names[1]}, to scale. Distances and angles among {origin} and "
            "these two are exact."
            if places.has_base
            else f"The plane of {origin}, {names[0]} and {names[1]}, to scale. Distances and angles among these three are exact."
        )
    elif places.kind == "directions":
        words = (
            f"The plane of the two main directions of {count_of(len(names), 'task vector')}, to scale. It shows "
            f"{percent(places.share)} of their squared length."
            if places.has_base
            else f"The plane through {origin} of the two main directions to its {count_of(len(names), 'parent')}, to scale. "
            f"It shows {percent(places.share)} of the squared distances."
        )
    else:
        words = f"All models are on one line through {origin}, to scale."
    off = [p for p in places.points if p.outside]
    listed = [words, f"Arrows begin at {origin}{'; a dashed one leaves the plane' if off else ''}."]
    if off and len(off) <= 3:
        listed += [
            f"{shorten(p.name, 40)} is {number(p.outside)} off the plane, {percent(p.outside / p.length)} of its distance from {origin}."
            for p in off
        ]
    elif off:
        far = max(off, key=lambda p: p.outside / p.length)
        listed.append(
            f"Models are off the plane by up to {percent(far.outside / far.length)} of their distance from {origin} "
            f"({shorten(far.name, 40)}); the numbers say how far each is."
        )
    merged = [p for p in places.points if p.role == "merged"]
    listed += [f"{shorten(p.name, 40)} is in the plane." for p in merged if not p.outside and p.length]
    if places.tensors < places.all_tensors:
        listed.append(
            f"Only the {count_of(places.tensors, 'tensor')} of {places.all_tensors:,} that all these models have count."
        )
    if places.left_out:
        listed.append(
            f"Left out, as nothing of them could be compared: {', '.join(shorten(n, 40) for n in places.left_out)}."
        )
    return [" ".join(listed)]


def axis_titles(places: ModelMap) -> tuple[str, str]:
    """Return the titles of the map's axes."""
    if places.kind == "directions":
        return "first direction (L2 norm)", "second direction (L2 norm)"
    if places.kind == "plane":
        return f"along {shorten(places.spanned_by[0], 30)} (L2 norm)", "across (L2 norm)"
    return "distance (L2 norm)", ""


def origin_label(places: ModelMap) -> str:
    """Return what is at (0, 0)."""
    return "base" if places.has_base else "merged"


def origin_name(places: ModelMap) -> str:
    """Return what is at (0, 0), with its name if that says more.

    >>> origin_name(ModelMap("llama", "line", (), (), None, 1, 1)), origin_name(ModelMap("base", "line", (), (), None, 1, 1))
    ('base llama', 'base')
    """
    label = origin_label(places)
    return label if places.origin == label else f"{label} {places.origin}"


def map_range(points: Sequence[MapPoint]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the ranges of x and y that show the origin and all points, with room for their marks."""
    xs, ys = [0.0, *(p.x for p in points)], [0.0, *(p.y for p in points)]
    span = max(max(xs) - min(xs), max(ys) - min(ys)) or 1.0
    room = 0.11 * span
    low, high = min(ys), max(ys)
    if high - low < 0.3 * span:  # all near one line: neither a sliver, nor a square
        middle = (low + high) / 2
        low, high = middle - 0.15 * span, middle + 0.15 * span
    return (min(xs) - room, max(xs) + room), (low - room, high + room)


def _view(places: ModelMap) -> dict[str, Any]:
    xs, ys = map_range(places.points)
    scale = min(NARROW_PLOT[0] / (xs[1] - xs[0]), NARROW_PLOT[1] / (ys[1] - ys[0]))
    shown: list[tuple[float, float]] = [(0.0, 0.0)]
    labelled = set()
    for point in places.points:
        place = (point.x * scale, point.y * scale)
        if all(math.dist(place, other) >= GAP for other in shown):
            labelled.add(point.index)
            shown.append(place)
    data: list[dict[str, Any]] = [
        _arrow(p, has_head=math.hypot(p.x, p.y) * scale >= GAP) for p in places.points if p.x or p.y
    ]
    data.append(
        {
            "type": "scatter",
            "mode": "markers+text",
            "name": escape(shorten(origin_name(places), 35)),
            "x": [0.0],
            "y": [0.0],
            "text": [origin_label(places) if _has_room_below(shown) else ""],
            "textposition": "bottom center",
            "marker": {"color": BASE_MARK, "symbol": "circle", "size": 11, "line": {"width": 0}},
            "hovertext": [escape(origin_name(places))],
            "hoverinfo": "text",
        }
    )
    # What has no room for its number is drawn below what has.
    data += [_mark(p, p.index in labelled) for p in sorted(places.points, key=lambda p: p.index in labelled)]
    across, upwards = axis_titles(places)
    layout = {
        "height": 460,
        "hovermode": "closest",
        "xaxis": {
            "title": {"text": escape(across), "standoff": 6},
            "range": list(xs),
            "nticks": 8,
            "zeroline": True,
        },
        "yaxis": {
            "title": {"text": escape(upwards), "standoff": 8},
            "range": list(ys),
            "nticks": 8,
            "zeroline": True,
            "scaleanchor": "x",
            "scaleratio": 1,
        },
    }
    narrow = {"height": 340, "xaxis": {"nticks": 5}, "yaxis": {"nticks": 5}}
    return {"data": data, "layout": layout, "narrow": narrow, "table": _table(places)}


def _has_room_below(shown: Sequence[tuple[float, float]]) -> bool:
    return all(abs(x) > 32 or not -36 < y < 0 for x, y in shown[1:])


def _arrow(point: MapPoint, *, has_head: bool) -> dict[str, Any]:
    ground, _ = series(point.index)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "legendgroup": f"model-{point.index}",
        "name": f"{point.index + 1} {escape(shorten(point.name, 30))}",
        "x": [0.0, point.x],
        "y": [0.0, point.y],
        "line": {"color": ground, "width": 2, "dash": "dash" if point.outside else "solid"},
        "marker": {
            "color": ground,
            "symbol": "arrow",
            "angleref": "previous",
            "size": [0, 11 if has_head else 0],
            "standoff": [0, MARK / 2],
            "opacity": 1,
            "line": {"width": 0},
        },
        "hoverinfo": "skip",
    }


def _mark(point: MapPoint, has_label: bool) -> dict[str, Any]:
    ground, _ = series(point.index)
    is_merged = point.role == "merged"
    words = [
        f"{point.index + 1} {point.name}{' (merged)' if is_merged else ''}",
        f"{number(point.length)} from the origin",
        *([f"{number(point.outside)} off the plane"] if point.outside else []),
    ]
    return {
        "type": "scatter",
        "mode": "markers+text",
        "legendgroup": f"model-{point.index}",
        "name": f"{point.index + 1} {escape(shorten(point.name, 30))}",
        "x": [point.x],
        "y": [point.y],
        "text": [str(point.index + 1) if has_label else ""],
        "textposition": "middle center",
        "textfont": {"color": ink_on(ground), "size": 11},
        "marker": {
            "color": ground,
            "symbol": "square" if is_merged else "circle",
            "size": MARK if has_label else 11,
            "line": {"width": 0},
            "opacity": 1,
        },
        "hovertext": ["<br>".join(escape(w) for w in words)],
        "hoverinfo": "text",
    }


def _table(places: ModelMap) -> dict[str, Any]:
    origin = origin_label(places)
    rows: list[list[Any]] = [[f"{origin} {places.origin}", 0.0, 0.0, 0.0, 0.0]]
    rows += [[f"{p.index + 1} {p.name}", p.x, p.y, p.outside, p.length] for p in places.points]
    return {"columns": ["", "x", "y", "off the plane", f"distance from {origin}"], "rows": rows}
