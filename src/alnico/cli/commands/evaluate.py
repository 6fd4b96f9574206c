"""``alnico evaluate``: scores of models on tasks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import click

from alnico.analysis.scores import Estimate
from alnico.cli.command import CommandCall, command
from alnico.cli.commands.analyze import say_report
from alnico.cli.commands.compare import gain_text, kept_legend
from alnico.cli.options import JSON, QUIET, REQUIRED, SCORING_DTYPE, VERBOSE, Flag
from alnico.cli.printing import Page, json_page, page
from alnico.errors import OutputError
from alnico.evaluation.scorecard import LEVEL, Scorecard

NAME = 24
"""Room for the name of a model."""

COLUMN = 10
"""Room for a score."""

WIDE = 23
"""Room for a score with its interval."""


@command(
    "alnico.evaluate",
    fills=("names", "minimize"),
    tasks=Flag(also=("-t",), metavar="FILE", is_option=True, default=REQUIRED),
    out=Flag(spelled=("--report",), metavar="FOLDER"),
    file=Flag("File for the JSON.", type=str, spelled=("--out",), also=("-o",)),
    dtype=SCORING_DTYPE,
    json=JSON,
    quiet=QUIET,
    verbose=replace(VERBOSE, help="Print every interval."),
)
def run(call: CommandCall) -> None:
    from alnico.checkpoint.durable import replace_file
    from alnico.checkpoint.output_path import check_new_file, is_stream
    from alnico.checkpoint.overwrite import is_evaluation

    if not (call["models"] or call["merged"] or call["base"]):
        raise click.BadParameter("evaluate needs at least one model. Name one.")
    file, folder = call["file"], call["out"]
    if file is not None and (os.path.isdir(file) or not os.path.isdir(Path(file).parent)):
        raise OutputError(
            f"{file}: cannot be written; expected a file in an existing folder. Choose another name."
        )
    is_streamed = file is not None and is_stream(Path(file))
    if file is not None and not is_streamed and not is_evaluation(Path(file)):
        check_new_file(Path(file))
    card = call.invoke()
    if file is not None:
        text = json_page(card.data()) + "\n"
        if is_streamed:
            Path(file).write_text(text, "utf-8")
        else:
            replace_file(Path(file), text)
    call.show(card.data, lambda: scorecard_text(card, call.verbose), besides=file or folder)
    say_report(call, folder)


def scorecard_text(card: Scorecard, verbose: int) -> Page:
    """Tables: the models by task and on the mean, paired differences, what merges kept; with ``verbose`` an interval for each score."""
    tasks = [task.name for task in card.tasks]
    width = WIDE if verbose else COLUMN
    heads = "  ".join(f"{_cut(task, width):>{width}}" for task in tasks)
    lines = [f"{'model':{NAME}}  {'mean':>{WIDE}}  {heads}", *_units(card, width)]
    for model in card.models:
        values = "  ".join(_shown(model.scores[task], width, verbose) for task in tasks)
        lines.append(f"{_cut(model.name):{NAME}}  {_shown(model.mean, WIDE, True)}  {values}")
    less = [task.name for task in card.tasks if task.goal == "min"]
    if less:
        lines.append(f"less is better, and not in the mean: {', '.join(less)}")
    if card.differences:
        room = 2 * NAME + 3
        lines += ["", f"{'difference':{room}}  {'mean':>{WIDE}}  {heads}"]
        for d in card.differences:
            values = "  ".join(_shown(d.scores[task], width, verbose, signed=True) for task in tasks)
            pair = f"{_cut(d.model)} - {_cut(d.other)}"
            lines.append(f"{pair:{room}}  {_shown(d.mean, WIDE, True, signed=True)}  {values}")
        lines.append(f"* the {100 * LEVEL:g} % interval of the paired difference leaves out 0")
    for merge, kept in card.kept.items():
        lines += [
            "",
            f"{_cut('kept by ' + merge, 31):31}  {'score':>8}  {'best parent':>11}  {'kept':>7}  {'of its gain':>11}  parent",
        ]
        lines += [
            f"{_cut(k.task, 31):31}  {k.merged:8.4g}  {k.of_best:11.4g}  {_percent(k.kept):>7}  {gain_text(k):>11}  {k.best}"
            for k in kept
        ]
    if card.kept:
        lines += kept_legend([k for kept in card.kept.values() for k in kept])
    return page([*lines, *(["", legend] if (legend := _interval_legend(card)) else [])])


def _units(card: Scorecard, width: int) -> list[str]:
    """Lines under the heads of tasks: what each score is, which direction is better, and on how many examples."""
    metrics = {task.metric for task in card.tasks if task.goal == "max"}
    of_mean = next(iter(metrics)) if len(metrics) == 1 else "score" if metrics else ""
    better = {"max": "higher", "min": "lower"}
    counts = [
        "unknown"
        if not task.examples
        else str(task.examples)
        if task.counted == "examples" or width < len(f"{task.examples} {task.counted}")
        else f"{task.examples} {task.counted}"
        for task in card.tasks
    ]
    rows = [
        ("metric", of_mean, [task.metric for task in card.tasks]),
        ("better", "higher" if of_mean else "", [better[task.goal] for task in card.tasks]),
        ("examples", "", counts),
    ]
    return [
        f"{name:{NAME}}  {mean:>{WIDE}}  {'  '.join(f'{_cut(cell, width):>{width}}' for cell in cells)}"
        for name, mean, cells in rows
    ]


def _interval_legend(card: Scorecard) -> str:
    estimates = [e for model in card.models for e in (model.mean, *model.scores.values()) if e is not None]
    if all(estimate.low is None for estimate in estimates):
        return ""
    words = f"{100 * LEVEL:g} % interval for other examples of the same tasks"
    return f"[low, high]: {words}, {card.draws} bootstrap draws"


def _shown(estimate: Estimate | None, width: int, interval: bool | int, *, signed: bool = False) -> str:
    """A score, with its interval or, of a difference, a star where that leaves out 0."""
    if estimate is None:
        return f"{'-':>{width}}"
    form = "+.4g" if signed else ".4g"
    if max(abs(estimate.value), 0.001) < 10:
        form = "+.3f" if signed else ".3f"
    text, low, high = format(estimate.value, form), estimate.low, estimate.high
    if low is None or high is None:
        return f"{text:>{width}}"
    mark = "*" if signed and (low > 0 or high < 0) else " " if signed else ""
    return f"{f'{text}{mark} [{low:{form}}, {high:{form}}]' if interval else text + mark:>{width}}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _cut(text: str, length: int = NAME) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
