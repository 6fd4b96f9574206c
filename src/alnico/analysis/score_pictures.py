"""Draws scores of models on tasks with matplotlib: bars with intervals, and a radar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from alnico.analysis.charts import (
    BarSeries,
    bars_size,
    chosen_positions,
    draw_bars,
    drawn_by,
    line_style,
    open_canvas,
    plain,
)
from alnico.analysis.page import short_labels, shorten
from alnico.analysis.scores import Estimates
from alnico.errors import AlnicoError

LEAST_ON_A_RADAR = 3
"""The smallest number of tasks for a radar: two axes have no area."""


def plot_scores(
    scores: Estimates,
    models: Sequence[str],
    name: str,
    *,
    chosen: Any = None,
    of: str,
    metric: str = "score",
    **canvas: Any,
) -> Any:
    """Draw scores (by task, then by model) as ``bars`` or as a ``radar``. Errors: AlnicoError."""
    draw = drawn_by(name, {"bars": _bars, "radar": _radar}, of)
    return draw(scores, models, chosen_positions(chosen, models), metric, canvas)


def _bars(
    scores: Estimates, models: Sequence[str], chosen: Sequence[int], metric: str, options: dict[str, Any]
) -> Any:
    canvas = open_canvas(default=bars_size(len(scores), len(chosen)), **options)
    axes = canvas.axes[0]
    drawn = []
    for m in chosen:
        found = [of_task.get(models[m]) for of_task in scores.values()]
        drawn.append(
            BarSeries(
                f"{m + 1} {shorten(models[m], 30)}",
                m,
                [None if e is None else e.value for e in found],
                [None if e is None else e.low for e in found],
                [None if e is None else e.high for e in found],
            )
        )
    draw_bars(canvas, axes, short_labels(list(scores), 24), drawn)
    is_known = any(v is not None for one in drawn for v in one.low)
    canvas.frame(axes, title=f"Scores{' with 95 % intervals' if is_known else ''}", x=metric, grid="x")
    canvas.legend(axes)
    return canvas.figure


def _radar(
    scores: Estimates, models: Sequence[str], chosen: Sequence[int], metric: str, options: dict[str, Any]
) -> Any:
    if len(scores) < LEAST_ON_A_RADAR:
        raise AlnicoError(
            f"plot: 'radar' has one axis per task, and there are {len(scores)}; expected {LEAST_ON_A_RADAR} or more where higher is "
            "better. Draw 'bars'."
        )
    canvas = open_canvas(default=(7.0, 5.0), polar=True, **options)
    axes = canvas.axes[0]
    if not hasattr(axes, "set_theta_offset"):
        raise AlnicoError(
            "ax: has axes with x and y; a radar needs polar axes. Make them with `figure.add_subplot(projection='polar')`."
        )
    angles = [2 * math.pi * i / len(scores) for i in range(len(scores))]
    for m in chosen:
        found = [of_task.get(models[m]) for of_task in scores.values()]
        lengths = [math.nan if e is None else e.value for e in found]
        axes.plot(
            [*angles, angles[0]],
            [*lengths, lengths[0]],
            label=plain(f"{m + 1} {models[m]}", 32),
            **line_style(m),
        )
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_xticks(angles, [plain(label, 14) for label in short_labels(list(scores), 14)])
    values = [e.value for of_task in scores.values() for e in of_task.values()]
    axes.set_rlim(bottom=min(0.0, *values))
    canvas.frame(axes, title=f"All tasks at once ({metric})", grid="both", is_boxed=True)
    canvas.legend(axes)
    return canvas.figure
