"""The section of a page with scores of models on tasks: bars with intervals, and a radar chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alnico.analysis.common_tensors import short_names
from alnico.analysis.page import (
    Figure,
    PageSection,
    bar_marker,
    cell,
    escape,
    figure_html,
    number,
    percent,
    series,
    short_labels,
    shorten,
)
from alnico.analysis.scores import NO_GAIN, NO_GAIN_MEANS, Accuracy, Estimate, Estimates

LEAST_ON_A_RADAR = 3
"""The smallest number of tasks for a radar: two axes have no area."""


def score_section(scores: Estimates, metric: str = "score") -> PageSection:
    """Build the section: bars by model and task, with known intervals, and a radar from three tasks on.

    ``metric`` names the scores. Errors: none; scores must not be empty.
    """
    references = list(dict.fromkeys(model for models in scores.values() for model in models))
    models = dict(zip(references, short_names(references), strict=True))
    figures = [_bars(scores, models, metric)]
    if len(scores) >= LEAST_ON_A_RADAR:
        figures.append(_radar(scores, models))
    words = [
        "Higher is better. Lines at the ends of bars are 95 % intervals, if the scores have them: the range "
        "to expect on other examples of the same task."
    ]
    body = f'<div class="maps" style="--least:420px">\n{"".join(map(figure_html, figures))}</div>\n'
    return PageSection("scores", "Scores", words, body, figures)


def _bars(scores: Estimates, models: Mapping[str, str], metric: str) -> Figure:
    data = []
    for index, (reference, name) in enumerate(models.items()):
        estimates = [of_task.get(reference) for of_task in scores.values()]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": f"{index + 1} {escape(shorten(name, 30))}",
                "y": list(range(len(scores))),
                "x": [None if e is None else e.value for e in estimates],
                "error_x": _whiskers(estimates),
                "marker": bar_marker(index),
                "hovertext": [
                    f"{escape(name)}, {escape(task)}<br>{_text(e)}"
                    for task, e in zip(scores, estimates, strict=True)
                ],
                "hoverinfo": "text",
            }
        )
    layout = {
        "height": max(len(scores) * (13 * len(models) + 14), 48) + 60,
        "bargap": 0.22,
        "xaxis": {"title": {"text": escape(metric), "standoff": 8}, "rangemode": "tozero", "nticks": 8},
        "yaxis": {
            "tickvals": list(range(len(scores))),
            "ticktext": [escape(label) for label in short_labels(list(scores), 24)],
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
        },
    }
    narrow = {"yaxis": {"ticktext": [escape(label) for label in short_labels(list(scores), 12)]}}
    behind = {
        "columns": ["task", *(f"{i + 1} {name}" for i, name in enumerate(models.values()))],
        "rows": [[task, *(_text(of_task.get(r)) for r in models)] for task, of_task in scores.items()],
    }
    view = {"data": data, "layout": layout, "narrow": narrow, "table": behind}
    return Figure("score-bars", "Bars: score of every model on every task", {"": view}, heading="By task")


def _whiskers(estimates: Sequence[Estimate | None]) -> dict[str, Any]:
    """Return both arms of every bar's interval; None where it is unknown."""
    high = [None if e is None or e.high is None else e.high - e.value for e in estimates]
    low = [None if e is None or e.low is None else e.value - e.low for e in estimates]
    is_known = any(arm is not None for arm in (*high, *low))
    return {
        "type": "data", "symmetric": False, "array": high, "arrayminus": low, "visible": is_known, "thickness": 1.5, "width": 3
    }  # fmt: skip


def _radar(scores: Estimates, models: Mapping[str, str]) -> Figure:
    views = {"0": _shape(scores, models, relative=False), "1": _shape(scores, models, relative=True)}
    label = "Radar: the scores of every model, one axis per task"
    return Figure(
        "score-radar", label, views, [("Show", ["score", "share of the best"])], "All tasks at once"
    )


def _shape(scores: Estimates, models: Mapping[str, str], *, relative: bool) -> dict[str, Any]:
    angles = [360 * i / len(scores) for i in range(len(scores))]
    unit = [
        max((abs(e.value) for e in of_task.values()), default=0.0) or 1.0 if relative else 1.0
        for of_task in scores.values()
    ]
    data, rows = [], []
    for index, (reference, name) in enumerate(models.items()):
        estimates = [of_task.get(reference) for of_task in scores.values()]
        lengths = [None if e is None else e.value / u for e, u in zip(estimates, unit, strict=True)]
        ground, mark = series(index)
        data.append(
            {
                "type": "scatterpolar",
                "mode": "lines+markers",
                "name": f"{index + 1} {escape(shorten(name, 30))}",
                "r": [*lengths, lengths[0]],
                "theta": [*angles, angles[0]],
                "line": {"color": ground, "width": 2},
                "marker": {"color": ground, "symbol": mark, "size": 7},
                "hovertext": [f"{escape(name)}, {escape(task)}<br>{number(length)}" for task, length in zip([*scores, next(iter(scores))], [*lengths, lengths[0]], strict=True)],
                "hoverinfo": "text",
            }
        )  # fmt: skip
        rows.append([f"{index + 1} {name}", *lengths])
    layout: dict[str, Any] = {
        "height": 440,
        "margin": {"l": 104, "r": 104, "t": 36, "b": 36},
        "polar": {
            "bgcolor": "rgba(0,0,0,0)",
            "radialaxis": {"rangemode": "tozero", "nticks": 5, "angle": 90, "tickangle": 90},
            "angularaxis": {
                "tickvals": angles,
                "ticktext": [escape(label) for label in short_labels(list(scores), 14)],
                "rotation": 90,
                "direction": "clockwise",
            },
        },
    }
    narrow = {
        "height": 300,
        "margin": {"l": 72, "r": 72, "t": 28, "b": 28},
        "polar": {
            **layout["polar"],
            "angularaxis": {
                **layout["polar"]["angularaxis"],
                "ticktext": [escape(label) for label in short_labels(list(scores), 10)],
            },
        },
    }
    behind = {"columns": ["model", *scores], "rows": rows}
    return {"data": data, "layout": layout, "narrow": narrow, "table": behind}


def _text(estimate: Estimate | None) -> str:
    """Return a score with its interval as text."""
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return number(estimate.value)
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def gain_cell(score: Accuracy) -> str:
    """Return the cell of the share of the best parent's gain that a merge kept, or of none."""
    return cell(NO_GAIN if score.has_no_gain else percent(score.gain_kept), score.gain_kept)


def kept_words(scores: Sequence[Accuracy]) -> list[str]:
    """Return what the columns of what a merge kept mean."""
    words = [
        "Kept: the merge's score over that of the best parent on the task. Of its gain: the same after subtracting the base's score from both."
    ]
    return words + [NO_GAIN_MEANS.capitalize()] * any(score.has_no_gain for score in scores)
