"""Draws the pictures of an analysis, each by its name, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alnico.analysis.charts import bar_style, open_canvas, plain, write_png
from alnico.analysis.results import GROUPS, Analysis


def write_group_bars(analysis: Analysis, path: Path, models: Sequence[int] | None = None) -> None:
    """Write ``group_l2_bar.png``: the L2 norm of the task vectors by group, for all models or some positions.

    Errors: AlnicoError without the extra [report].
    """
    chosen = range(len(analysis.models)) if models is None else models
    groups = [group for group in GROUPS if group in analysis.groups]
    canvas = open_canvas(
        default=(max(6.0, 1.2 * len(groups) + 0.25 * len(groups) * len(chosen)), 4.2),
        purpose="group_l2_bar.png",
    )
    axes = canvas.axes[0]
    width = 0.8 / len(chosen)
    for place, index in enumerate(chosen):
        heights = [
            change.l2 if (change := analysis.groups[group].changes[index]) else 0.0 for group in groups
        ]
        lefts = [number - 0.4 + (place + 0.5) * width for number in range(len(groups))]
        bars = axes.bar(
            lefts,
            heights,
            width * 0.92,
            **bar_style(index, canvas.theme),
            label=plain(analysis.models[index].name),
        )
        if len(chosen) > 1:
            label = plain(analysis.models[index].name, 16)
            axes.bar_label(bars, [label] * len(groups), fontsize=7, padding=2, rotation=90)
    axes.set_xticks(range(len(groups)), groups)
    canvas.frame(
        axes,
        title=f"Change from {analysis.base.name}, by group",
        y="L2 norm of the task vector",
    )
    if len(chosen) > 1:
        canvas.legend()
    write_png(canvas.figure, path)
