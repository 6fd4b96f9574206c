"""The section of an analysis page about what a merged model kept of its parents."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from alnico.analysis.page import (
    CIVIDIS,
    Figure,
    PageSection,
    badge,
    breakable,
    cell,
    escape,
    figure_html,
    name,
    number,
    percent,
    series,
    shorten,
    table,
    tinted_cell,
)
from alnico.analysis.report import ReportSubject
from alnico.analysis.retention import ParentRetention, Retention, ScopeRetention
from alnico.analysis.score_section import gain_cell, kept_words

RetentionColumn = tuple[str, Callable[[ParentRetention], float | None], str]
"""A quantity drawn by layer: its name, its value, and the format of the axis."""

BY_LAYER: tuple[RetentionColumn, ...] = (
    ("Projection", lambda share: share.projection, ""),
    ("Weight", lambda share: share.weight, ""),
    ("Top kept", lambda share: share.top_kept, ".3~%"),
    ("Signs agree", lambda share: share.sign_agreement, ".3~%"),
    ("Distance", lambda share: share.relative_distance, ".3~%"),
)


def comparison(retention: Retention) -> ReportSubject:
    """Return what the report of a merged model is about."""
    parents = retention.parents
    title = f"{retention.merged.name} and {'its parent ' + parents[0].name if len(parents) == 1 else f'its {len(parents)} parents'}"
    words = [*(p.reference for p in parents), retention.merged.reference]
    words += ["--base", retention.base.reference] if retention.base is not None else []
    origin = "merged model" if retention.base is None else "base"
    return ReportSubject(
        title, "alnico comparison", f"alnico compare {shlex.join(words)}", origin, retention.map
    )


def retention_section(retention: Retention) -> PageSection:
    """Build the section: a table of the whole model and its groups, figures by layer, and the scores."""
    figures = [_by_layer(retention)] if len(retention.layers) > 1 else []
    scores = f"<h3>Scores</h3>\n{_scores(retention)}" if retention.scores else ""
    drawings = "".join(map(figure_html, figures))
    body = f"{_table(retention)}{drawings}{scores}"
    return PageSection("kept", "What the merge kept", [*_words(retention), *retention.notes], body, figures)


def _words(retention: Retention) -> list[str]:
    if retention.base is None:
        return [
            f"How far {retention.merged.name} is from each parent; relative: over its own norm. More needs "
            "the base of the parents."
        ]
    whole = retention.whole
    outside = (
        ""
        if whole.outside is None
        else f"; {percent(whole.outside)} of the length of its change is in no parent's direction"
    )
    return [
        f"{retention.merged.name} is {percent(whole.relative_distance)} away from the base{outside}.",
        "Projection: its task vector projected on a parent's; 1 if it contains all of it. Weight: the same, "
        "without what the other "
        "parents explain. Signs agree: among the entries that both changed. Top kept: the share of the "
        "parent's largest changes "
        "that are also among the largest changes of the merge.",
    ]


def _table(retention: Retention) -> str:
    with_base = retention.base is not None
    columns = [("over", "text"), ("parent", "text"), ("distance", "number"), ("relative", "number")]
    if with_base:
        columns += [
            ("projection", "number"),
            ("weight", "number"),
            ("signs agree", "number"),
            ("top kept", "number"),
        ]
    rows = [
        f"<tr><td>{escape('whole model' if kind == 'whole' else scope.name)}</td><td>{badge(i)} {name(retention.parents[i].name)}</td>"
        f"{_cells(share, with_base)}</tr>\n"
        for kind, scope in retention.scopes()
        if kind != "layer"
        for i, share in _shares(scope)
    ]
    return table(columns, rows, label="What the merge kept", anchor="kept-table", sortable=True)


def _shares(scope: ScopeRetention) -> list[tuple[int, ParentRetention]]:
    return [(i, share) for i, share in enumerate(scope.parents) if share is not None]


def _cells(share: ParentRetention, with_base: bool) -> str:
    cells = cell(number(share.distance), share.distance) + cell(
        percent(share.relative_distance), share.relative_distance
    )
    if not with_base:
        return cells
    for value in (share.projection, share.weight):
        cells += cell(number(value), value)
    return cells + "".join(
        tinted_cell(v, v or 0.0, percent(v), CIVIDIS) for v in (share.sign_agreement, share.top_kept)
    )


def _by_layer(retention: Retention) -> Figure:
    shown = [
        s
        for s in BY_LAYER
        if any(s[1](share) is not None for scope in retention.layers.values() for _, share in _shares(scope))
    ]
    views = {str(place): _lines(retention, measure) for place, measure in enumerate(shown)}
    label = "Lines: what the merged model kept of each parent, by layer"
    return Figure("kept-layers", label, views, [("Show", [title for title, _, _ in shown])], "By layer")


def _lines(retention: Retention, measure: RetentionColumn) -> dict[str, Any]:
    title, value, form = measure
    numbers = list(retention.layers)
    traces = [
        _trace(
            retention,
            i,
            [None if (p := s.parents[i]) is None else value(p) for s in retention.layers.values()],
        )
        for i in range(len(retention.parents))
    ]
    values = [v for trace in traces for v in trace["y"] if v is not None]
    least, most = min(0.0, *values, 0.0), max(*values, 0.0, 1e-12)
    room = 0.06 * (most - least)
    layers: dict[str, Any] = {
        "title": {"text": "layer", "standoff": 6},
        "tickformat": "d",
        "nticks": 16,
        "showgrid": False,
        "zeroline": False,
    }
    return {
        "data": traces,
        "layout": {
            "height": 360,
            "hovermode": "closest",
            "xaxis": layers | ({"tickvals": numbers} if len(numbers) <= 12 else {}),
            "yaxis": {
                "title": {"text": title.lower(), "standoff": 8},
                "range": [least - room if least < 0 else 0, most + room],
                "tickformat": form,
                "zeroline": True,
            },
        },
        "narrow": {"xaxis": {"nticks": 7}},
    }


def _trace(retention: Retention, parent: int, values: Sequence[float | None]) -> dict[str, Any]:
    ground, mark = series(parent)
    every = math.ceil(len(values) / 20)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": f"{parent + 1} {escape(shorten(retention.parents[parent].name, 30))}",
        "x": list(retention.layers),
        "y": list(values),
        "line": {"color": ground, "width": 2},
        "marker": {
            "color": ground,
            "symbol": mark,
            "size": [0 if i % every else 8 for i in range(len(values))],
            "opacity": 1,
            "line": {"width": 0},
        },
        "hovertemplate": "layer %{x}<br>%{fullData.name}: %{y:.3g}<extra></extra>",
    }


def _scores(retention: Retention) -> str:
    columns = [
        ("task", "text"), ("merged", "number"), ("best parent", "text"), ("its score", "number"), ("base", "number"), ("kept", "number"),
        ("of its gain", "number"),
    ]  # fmt: skip
    rows = [
        f"<tr><td>{breakable(s.task)}</td>{cell(number(s.merged), s.merged)}<td>{name(s.best)}</td>{cell(number(s.of_best), s.of_best)}"
        f"{cell(number(s.of_base), s.of_base)}{cell(percent(s.kept), s.kept)}{gain_cell(s)}</tr>\n"
        for s in retention.scores
    ]
    words = f"<p>{escape(' '.join(kept_words(retention.scores)))}</p>\n"
    return table(columns, rows, label="Scores", anchor="kept-scores", sortable=True) + words
