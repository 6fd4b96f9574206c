"""Builds curve.html, a self-contained page with the curve, its best recipe and all points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alnico._version import __version__
from alnico.analysis.page import (
    CIVIDIS,
    Figure,
    PageSection,
    cell,
    copyable,
    escape,
    figure_html,
    format_count,
    number,
    page,
    scatter_view,
    series,
    shorten,
    table,
)
from alnico.analysis.scores import Estimate
from alnico.numerics.sizes import count_of
from alnico.tune.curve.result import Curve, CurvePoint
from alnico.tune.curve.scales import scale_text
from alnico.tune.curve.words import (
    axis_words,
    barrier_words,
    best_words,
    corners_of,
    ends_of,
    estimate_text,
    of_line,
)
from alnico.tune.search.objective import MEAN, is_better

GREY = "#7F7F7F"

ALL = "all tasks"

MOST_ROWS = 1_000
"""Largest number of points in the page's table; curve.csv has all of them."""


def curve_page(curve: Curve) -> str:
    """Return the page as HTML. Errors: AlnicoError without plotly."""
    sections = [_drawing(curve)]
    if curve.barriers:
        sections.append(_barriers(curve))
    sections += [_best(curve), _points(curve)]
    examples = [f"{task.name} {task.examples}" for task in curve.tasks if task.examples]
    facts = [
        ("Method", curve.method),
        ("Models", str(len(curve.models))),
        ("Points", format_count(len(curve.points))),
        ("Examples", ", ".join(examples) or "unknown"),
        ("Bootstrap", f"{curve.draws} draws, seed {curve.seed}"),
    ]
    return page(
        axis_words(curve)[1],
        "alnico curve",
        facts,
        sections,
        f"Made by alnico {__version__}. The numbers are in curve.csv and curve.json next to this page.",
    )


def _drawing(curve: Curve) -> PageSection:
    views: dict[str, Mapping[str, Any]] = {}
    names = list(curve.views)
    together = [MEAN, *curve.averaged] if curve.averaged and curve.kind != "surface" else []
    shown = [*([ALL] if together else []), *names]
    for index, name in enumerate(shown):
        if curve.kind == "surface":
            view = _surface(curve, name)
        else:
            view = _lines(curve, together if name == ALL and together and index == 0 else [name])
        views[str(index) if len(shown) > 1 else ""] = view
    label = {
        "line": "Lines: scores against the scale, with intervals as bands",
        "surface": "Contours: scores over the two scales",
        "path": "Lines: scores along the path, with intervals as bands",
    }[curve.kind]
    figure = Figure("curve-drawing", label, views, [("Show", shown)] if len(shown) > 1 else [])
    words = [best_words(curve), _means(curve)]
    return PageSection("curve", "The curve", words, figure_html(figure), [figure])


def _means(curve: Curve) -> str:
    what = (
        "Intervals in the tables are 95 % intervals"
        if curve.kind == "surface"
        else "Bands are 95 % intervals"
    )
    words = f"{what}: the range to expect on other examples of the same tasks."
    if all(e.low is None for e in curve.points[0].scores.values()):
        words = "The tasks report no contributions of examples, so there are no intervals."
    if curve.kind == "path":
        words += " A path without a barrier stays on the better side of the straight line between its ends, which is dashed."
    elif curve.kind == "line":
        words += " Horizontal lines are the base and the models" + (
            "; next to all tasks, their means." if curve.averaged else "."
        )
    less = [task.name for task in curve.tasks if task.goal == "min"]
    if less:
        words += (
            f" Lower is better on {', '.join(less)}; higher on the others."
            if len(less) < len(curve.tasks)
            else " Lower is better."
        )
    return words


def _hover(curve: Curve, name: str, point: CurvePoint) -> str:
    return f"{escape(name)}<br>{escape(curve.place(point.scales))}: {estimate_text(point.on(name))}"


def _lines(curve: Curve, names: Sequence[str]) -> dict[str, Any]:
    """Return a view of one task, or of the mean and its tasks."""
    x = list(curve.axes[0])
    traces: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        ground, mark = series(index)
        is_first = index == 0 and len(names) > 1
        estimates = [point.on(name) for point in curve.points]
        label = escape(shorten(name, 30))
        traces.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": label, "legendgroup": f"line {index}",
                "x": x, "y": [e.value for e in estimates],
                "line": {"color": ground, "width": 4 if is_first else 2},
                "marker": {"color": ground, "symbol": mark, "size": 7},
                "hovertext": [_hover(curve, name, p) for p in curve.points], "hoverinfo": "text",
            }
        )  # fmt: skip
        if (band := _band(x, estimates, ground)) is not None:
            traces.append({**band, "name": label, "legendgroup": f"line {index}"})
    first = names[0]
    traces += _horizontals(curve, first, is_alone=len(names) == 1)
    if curve.kind == "path":
        traces += _chord(curve, first)
    best = curve.best_on(first)
    traces.append(
        {
            "type": "scatter", "mode": "markers", "name": escape(f"best: {curve.place(best.scales)}"),
            "x": [best.scales[0]], "y": [best.on(first).value],
            "marker": {"color": series(0)[0], "symbol": "star", "size": 16},
            "hovertext": [_hover(curve, first, best)], "hoverinfo": "text",
        }
    )  # fmt: skip
    word, _ = axis_words(curve)
    columns = ["t" if curve.kind == "path" else "scale", *names]
    rows: list[list[Any]] = [
        [scale_text(p.scales[0]), *(estimate_text(p.on(name)) for name in names)] for p in curve.points
    ]
    for place, line in enumerate(curve.lines):
        rows.append([line.name, *(estimate_text(of_line(curve, name, place)) for name in names)])
    return scatter_view(traces, word, curve.metric_of(first), {"columns": columns, "rows": rows})


def _band(x: Sequence[float], estimates: Sequence[Estimate], ground: str) -> dict[str, Any] | None:
    known = [(t, e.low, e.high) for t, e in zip(x, estimates, strict=True) if e.low is not None]
    if not known:
        return None
    red, green, blue = (int(ground[i : i + 2], 16) for i in (1, 3, 5))
    return {
        "type": "scatter", "mode": "lines", "fill": "toself", "hoverinfo": "skip", "line": {"width": 0},
        "x": [t for t, _, _ in known] + [t for t, _, _ in reversed(known)],
        "y": [high for _, _, high in known] + [low for _, low, _ in reversed(known)],
        "fillcolor": f"rgba({red},{green},{blue},0.15)",
    }  # fmt: skip


def _horizontals(curve: Curve, name: str, *, is_alone: bool) -> list[dict[str, Any]]:
    """Return the lines of the base and the models: grey next to the lines of several tasks, otherwise in their colours."""
    ends = [curve.axes[0][0], curve.axes[0][-1]]
    traces = []
    for place, line in enumerate(curve.lines):
        estimate = of_line(curve, name, place)
        if estimate is None:
            continue
        is_base = line.role == "base"
        ground, mark = (
            series(place) if is_alone and not is_base else (GREY, "line-ew" if is_base else "line-ew-open")
        )
        shown = line.name if is_base or is_alone else "models"
        text = f"{escape(line.name)}{'' if is_alone else ', mean'}: {estimate_text(estimate)}"
        traces.append(
            {
                "type": "scatter", "mode": "lines", "name": escape(shorten(shown, 30)),
                "legendgroup": f"model {place if is_base or is_alone else ''}", "x": ends, "y": [estimate.value] * 2,
                "line": {"color": ground, "width": 1.5, "dash": "dash" if is_base else "dot"},
                "marker": {"color": ground, "symbol": mark}, "hovertext": [text] * 2, "hoverinfo": "text",
            }
        )  # fmt: skip
    return traces


def _chord(curve: Curve, name: str) -> list[dict[str, Any]]:
    """Return the straight line between the ends of a path, and the barrier as a vertical line."""
    values = {p.scales[0]: p.on(name).value for p in curve.points}
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "name": "straight line", "x": [0.0, 1.0],
            "y": [values[0.0], values[1.0]], "line": {"color": GREY, "width": 1.5, "dash": "dash"},
            "marker": {"color": GREY, "symbol": "line-ew-open"}, "hoverinfo": "skip",
        }
    ]  # fmt: skip
    barrier = curve.barriers[name]
    if barrier.at is not None:
        top = (1 - barrier.at) * values[0.0] + barrier.at * values[1.0]
        ground, _ = series(1)
        traces.append(
            {
                "type": "scatter", "mode": "lines", "name": "barrier", "x": [barrier.at] * 2,
                "y": [top, values[barrier.at]], "line": {"color": ground, "width": 4},
                "marker": {"color": ground, "symbol": "line-ns"},
                "hovertext": [f"barrier {barrier_words(barrier)}"] * 2, "hoverinfo": "text",
            }
        )  # fmt: skip
    return traces


def _surface(curve: Curve, name: str) -> dict[str, Any]:
    x, y = curve.axes
    points = [[curve.points[i * len(y) + j] for i in range(len(x))] for j in range(len(y))]
    scale = [[i / (len(CIVIDIS) - 1), colour] for i, colour in enumerate(CIVIDIS)]
    traces: list[dict[str, Any]] = [
        {
            "type": "contour", "x": list(x), "y": list(y), "z": [[p.on(name).value for p in row] for row in points],
            "colorscale": scale, "ncontours": 16, "line": {"width": 0.6, "color": "rgba(255,255,255,0.7)"},
            "hovertext": [[_hover(curve, name, p) for p in row] for row in points], "hoverinfo": "text",
            "colorbar": {"thickness": 12, "outlinewidth": 0, "nticks": 6},
        }
    ]  # fmt: skip
    for place, (label, (a, b)) in enumerate(corners_of(curve).items()):
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": escape(shorten(label, 30)), "x": [a], "y": [b],
                "cliponaxis": False, "hovertext": [escape(label)], "hoverinfo": "text",
                "marker": {
                    "color": series(place + 2)[0], "symbol": series(place)[1], "size": 12,
                    "line": {"width": 2, "color": "#ffffff"},
                },
            }
        )  # fmt: skip
    best = curve.best_on(name)
    traces.append(
        {
            "type": "scatter", "mode": "markers", "name": escape(f"best: {curve.place(best.scales)}"),
            "x": [best.scales[0]], "y": [best.scales[1]], "cliponaxis": False,
            "marker": {"color": series(1)[0], "symbol": "star", "size": 18, "line": {"width": 1.5, "color": "#ffffff"}},
            "hovertext": [_hover(curve, name, best)], "hoverinfo": "text",
        }
    )  # fmt: skip
    first, second = ends_of(curve)
    columns = [f"{second} \\ {first}", *map(scale_text, x)]
    rows = [
        [scale_text(b), *(estimate_text(p.on(name)) for p in row)] for b, row in zip(y, points, strict=True)
    ]
    view = scatter_view(
        traces, f"scale of {first}", f"scale of {second}", {"columns": columns, "rows": rows}, height=560
    )
    for key, axis in (("xaxis", x), ("yaxis", y)):
        room = 0.04 * (axis[-1] - axis[0] or 1.0)
        view["layout"][key] |= {"range": [axis[0] - room, axis[-1] + room], "showgrid": False}
        if key in view["narrow"]:
            view["narrow"][key] |= {"range": [axis[0] - room, axis[-1] + room]}
    view["narrow"]["height"] = 400
    return view


def _barriers(curve: Curve) -> PageSection:
    first, second = ends_of(curve)
    at = {p.scales[0]: p for p in curve.points}
    rows = []
    for name, barrier in curve.barriers.items():
        height = estimate_text(barrier.height)
        place = number(None) if barrier.at is None else scale_text(barrier.at)
        cells = "".join(cell(estimate_text(at[t].on(name)), at[t].on(name).value) for t in (0.0, 1.0))
        rows.append(
            f"<tr><td>{escape(name)}</td>{cells}{cell(height, barrier.height.value)}{cell(place, barrier.at)}</tr>\n"
        )
    columns = [
        ("task", "text"),
        (first, "number"),
        (second, "number"),
        ("barrier", "number"),
        ("at t", "number"),
    ]
    words = [
        "The barrier is the largest drop of the path below the straight line between the scores of its ends; of a "
        "loss, the largest rise above it. It is 0 where the path is nowhere worse than that line.",
        "Its interval is of the drop at that position, with the same examples resampled at all three points; it "
        "has no value below 0.",
    ]
    return PageSection(
        "barrier",
        "The barrier",
        words,
        table(columns, rows, label="Barriers", anchor="barrier-table", sortable=True),
    )


def _best(curve: Curve) -> PageSection:
    words = [
        f"{best_words(curve)} It was chosen by these scores, so its score is too high: score the merge on examples that "
        "did not choose it.",
        "Paths of models are relative to the folder of the call.",
    ]
    return PageSection("best", "The best recipe", words, copyable(curve.recipe(), "The best recipe"))


def _points(curve: Curve) -> PageSection:
    word = "t" if curve.kind == "path" else "scale"
    heads = [f"scale of {n}" for n in ends_of(curve)] if curve.kind == "surface" else [word]
    columns = [
        ("merge or model", "text"),
        *((h, "number") for h in heads),
        *((n, "number") for n in curve.views),
    ]
    rows = [
        f"<tr><td>{escape(line.name)}</td>{cell(number(None)) * len(heads)}"
        + "".join(_cell(of_line(curve, name, place)) for name in curve.views)
        + "</tr>\n"
        for place, line in enumerate(curve.lines)
    ]
    shown = list(curve.points)
    words = []
    if len(shown) > MOST_ROWS:
        goal = curve.goal_of(curve.objective)
        shown.sort(key=lambda p: p.on(curve.objective).value, reverse=is_better(1.0, 0.0, goal))
        shown = shown[:MOST_ROWS]
        words = [
            f"The best {MOST_ROWS:,} of {count_of(len(curve.points), 'point')}; curve.csv has all of them."
        ]
    best = curve.best
    rows += [
        f"<tr><td>{'<b>best merge</b>' if point is best else 'merge'}</td>"
        + "".join(cell(scale_text(s), s) for s in point.scales)
        + "".join(_cell(point.on(name)) for name in curve.views)
        + "</tr>\n"
        for point in shown
    ]
    return PageSection(
        "points",
        "All points",
        words,
        table(columns, rows, label="All points", anchor="points-table", sortable=True),
    )


def _cell(estimate: Estimate | None) -> str:
    return (
        f'<td class="none">{number(None)}</td>'
        if estimate is None
        else cell(estimate_text(estimate), estimate.value)
    )
