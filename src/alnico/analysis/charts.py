"""Draws the charts of an analysis as PNG files, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alnico.analysis.page import series, shorten
from alnico.analysis.results import GROUPS, Analysis
from alnico.installation import import_extra
from alnico.libraries import without_local_settings


def write_group_bars(analysis: Analysis, path: Path, models: Sequence[int] | None = None) -> None:
    """Write ``group_l2_bar.png``: the L2 norm of the task vectors by group, for all models or some positions.

    Errors: AlnicoError without the extra [report].
    """
    with without_local_settings():
        figure_of: Any = import_extra("matplotlib.figure", "group_l2_bar.png", "report").Figure
    chosen = range(len(analysis.models)) if models is None else models
    groups = [group for group in GROUPS if group in analysis.groups]
    figure = figure_of(
        figsize=(max(6.0, 1.2 * len(groups) + 0.25 * len(groups) * len(chosen)), 4.2),
        dpi=120,
        layout="constrained",
    )
    axes = figure.add_subplot()
    width = 0.8 / len(chosen)
    for place, index in enumerate(chosen):
        heights = [
            change.l2 if (change := analysis.groups[group].changes[index]) else 0.0 for group in groups
        ]
        lefts = [number - 0.4 + (place + 0.5) * width for number in range(len(groups))]
        label = shorten(analysis.models[index].name, 40).replace("$", r"\$")
        bars = axes.bar(lefts, heights, width * 0.92, color=series(index)[0], label=label)
        if len(chosen) > 1:
            name = shorten(analysis.models[index].name, 16).replace("$", r"\$")
            axes.bar_label(bars, [name] * len(groups), fontsize=7, padding=2, rotation=90)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("L2 norm of the task vector")
    axes.set_title(
        f"Change from {shorten(analysis.base.name, 40)}, by group".replace("$", r"\$"),
        loc="left",
        fontsize=11,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if len(chosen) > 1:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    else:
        axes.legend(loc="best", fontsize=8, frameon=False)
    figure.savefig(path)
