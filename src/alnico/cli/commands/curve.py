"""``alnico curve``: scores of merges by scale, or along the path between two models."""

from __future__ import annotations

from pathlib import Path

import click

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, QUIET, SCORING_DTYPE, Flag, method_names
from alnico.cli.printing import Page, page, say
from alnico.cli.quick import further_options
from alnico.errors import visible
from alnico.evaluation.scorecard import LEVEL
from alnico.tune.curve.result import Curve
from alnico.tune.curve.words import best_words, point_rows, summary_rows


@command(
    "alnico.curve",
    resumes="curve",
    fills=("minimize", "names"),
    base=Flag(metavar="BASE"),
    tasks=Flag(also=("-t",), metavar="FILE", is_option=True),
    scale=Flag(metavar="LOW:HIGH:STEP"),
    method=Flag(metavar="NAME", complete=method_names),
    weights=Flag(metavar="NUMBERS"),
    density=Flag(metavar="NUMBERS"),
    out=Flag(also=("-o",), metavar="FOLDER"),
    set=Flag(
        "Another option of the method, such as elect=count; may be repeated. `alnico methods NAME` lists them.",
        type=list[str],
        metavar="NAME=VALUE",
    ),
    dtype=SCORING_DTYPE,
    json=JSON,
    quiet=QUIET,
    verbose=Flag("Print every point.", type=int, default=0, also=("-v",), is_count=True),
)
def run(call: CommandCall) -> None:
    out = call["out"]
    options = further_options(call["set"] or ())
    if taken := next((name for name in options if name in call.values), None):
        raise click.BadParameter(f"--set: {taken} is an option of the command. Give --{taken}.")
    curve = call.invoke(**options)
    call.show(curve.data, lambda: curve_text(curve, call.verbose), besides=out)
    if out is not None:
        _say_files(call, Path(out))


def _say_files(call: CommandCall, folder: Path) -> None:
    from alnico.analysis.page import has_report
    from alnico.installation import install_hint
    from alnico.tune.curve.files import PAGE

    line = f"written: {folder / PAGE}"
    if not has_report():
        line = f"written: {folder}, without the page and the picture. {install_hint('report')}"
    say(line, call.is_quiet or call.is_json)


def curve_text(curve: Curve, verbose: int) -> Page:
    """A table of the best points by task next to the base and the models, and the best; with ``verbose`` all points."""
    lines = _table(summary_rows(curve))
    less = [task.name for task in curve.tasks if task.goal == "min"]
    if less:
        lines.append(f"lower is better: {', '.join(less)}")
    if verbose:
        lines += ["", *_table(point_rows(curve))]
    lines += ["", best_words(curve)]
    if curve.kind == "path":
        lines.append(
            "barrier: the largest drop below the straight line between the ends; of a loss, the rise above it"
        )
    else:
        lines.append("These scores also chose the best, so its own is too high. Score it on other examples.")
    if any(e.low is not None for e in curve.best.scores.values()):
        lines.append(
            f"[low, high]: {100 * LEVEL:g} % interval for other examples of the same tasks, {curve.draws} bootstrap draws"
        )
    return page(lines)


def _table(rows: list[list[str]]) -> list[str]:
    """Return rows with columns as wide as their longest cell; the first is left-aligned."""
    shown = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))]
    return [
        "  ".join(
            f"{cell:{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in shown
    ]
