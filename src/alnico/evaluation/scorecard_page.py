"""Writes a scorecard as JSON and, with the extra [report], as a page with charts and tables."""

from __future__ import annotations

import json
import os
from pathlib import Path

from alnico._version import __version__
from alnico.analysis.page import (
    PageSection,
    breakable,
    cell,
    has_report,
    name,
    number,
    page,
    percent,
    table,
)
from alnico.analysis.score_section import gain_cell, kept_words, score_section
from alnico.analysis.scores import Estimate
from alnico.checkpoint.output_path import result_folder
from alnico.checkpoint.overwrite import is_evaluation
from alnico.errors import OutputError
from alnico.evaluation.scorecard import Scorecard
from alnico.folders import write_new
from alnico.numerics.sizes import count_of

DATA = "evaluation.json"
PAGE = "report.html"


def scorecard_folder(out: str | os.PathLike[str]) -> Path:
    """Create the folder of an evaluation. An older evaluation in it is replaced; other files are an error.

    Errors: OutputError.
    """
    return result_folder(out, "an evaluation", lambda folder: is_evaluation(folder / DATA))


def write_scorecard(card: Scorecard, folder: Path) -> None:
    """Write ``evaluation.json`` and, with the extra [report], ``report.html``. Errors: OutputError."""
    try:
        write_new(folder / DATA, json.dumps(card.data(), indent=1))
        if has_report():
            write_new(folder / PAGE, _page(card).encode("utf-8", "replace").decode("utf-8"))
    except OSError as error:
        raise OutputError(
            f"{error.filename or folder}: cannot be written ({error.strerror}). Make room or choose another folder."
        ) from None


def scorecard_sections(card: Scorecard) -> list[PageSection]:
    """Return the sections of a page: charts, all scores, differences, and what merges kept."""
    more = {task.name: task.metric for task in card.tasks if task.goal == "max"}
    metric = next(iter(more.values())) if len(set(more.values())) == 1 else "score"
    scores = {task: {m.name: m.scores[task] for m in card.models} for task in more}
    return [
        *([score_section(scores, metric)] if scores else []),
        _table(card),
        *([_differences(card)] if card.differences else []),
        *([_kept(card)] if card.kept else []),
    ]


def _page(card: Scorecard) -> str:
    examples = [f"{task.name} {task.examples}" for task in card.tasks if task.examples]
    facts = [
        ("Models", str(len(card.models))),
        ("Tasks", str(len(card.tasks))),
        ("Examples", ", ".join(examples) or "unknown"),
        ("Bootstrap", f"{card.draws} draws, seed {card.seed}"),
        (
            "Scored on",
            f"{card.device}, in {'the dtype of each model' if card.dtype == 'own' else card.dtype}",
        ),
    ]
    subject = card.models[0].name if len(card.models) == 1 else count_of(len(card.models), "model")
    title = f"{subject} on {count_of(len(card.tasks), 'task')}"
    return page(
        title,
        "alnico evaluation",
        facts,
        scorecard_sections(card),
        f"Made by alnico {__version__}. The same numbers are in {DATA} next to this page.",
    )


def _table(card: Scorecard) -> PageSection:
    rows = [
        f"<tr><td>{name(m.name)}</td><td>{m.role}</td>{_cell(m.mean)}{''.join(_cell(m.scores[t.name]) for t in card.tasks)}</tr>\n"
        for m in card.models
    ]
    columns = [
        ("model", "text"),
        ("role", "text"),
        ("mean", "number"),
        *((_heading(card, t.name), "number") for t in card.tasks),
    ]
    words = [
        _what_is_scored(card),
        "Scores with their 95 % intervals. The mean is weighted, over the tasks where higher is better.",
    ]
    return PageSection(
        "table",
        "All scores",
        words,
        table(columns, rows, label="All scores", anchor="scores-table", sortable=True),
    )


def _heading(card: Scorecard, task: str) -> str:
    """Return the head of a task's column: its name, its metric, and the direction if lower is better."""
    summary = next(t for t in card.tasks if t.name == task)
    direction = ", lower is better" if summary.goal == "min" else ""
    return f"{task} ({summary.metric}{direction})"


def _what_is_scored(card: Scorecard) -> str:
    """Return a sentence for each metric: its direction, its tasks, and on how many examples."""
    tasks_of: dict[tuple[str, str], list[str]] = {}
    for task in card.tasks:
        count = f"{task.examples} {task.counted}" if task.examples else "number of examples unknown"
        tasks_of.setdefault((task.metric, task.goal), []).append(f"{task.name} ({count})")
    better = {"max": "higher", "min": "lower"}
    return " ".join(
        f"{metric[:1].upper()}{metric[1:]}, {better[goal]} is better: {', '.join(names)}."
        for (metric, goal), names in tasks_of.items()
    )


def _differences(card: Scorecard) -> PageSection:
    rows = [
        f"<tr><td>{name(d.model)}</td><td>{name(d.other)}</td>{_cell(d.mean, signed=True)}"
        f"{''.join(_cell(d.scores[t.name], signed=True) for t in card.tasks)}</tr>\n"
        for d in card.differences
    ]
    columns = [
        ("model", "text"),
        ("compared with", "text"),
        ("mean", "number"),
        *((_heading(card, t.name), "number") for t in card.tasks),
    ]
    words = "Paired: both models on the same resampled examples. If the interval excludes 0, the sign is likely to hold on other examples."
    return PageSection(
        "differences",
        "Differences",
        [words],
        table(columns, rows, label="Differences", anchor="differences-table", sortable=True),
    )


def _kept(card: Scorecard) -> PageSection:
    rows = [
        f"<tr><td>{name(model)}</td><td>{breakable(k.task)}</td>{cell(number(k.merged), k.merged)}<td>{name(k.best)}</td>"
        f"{cell(number(k.of_best), k.of_best)}{cell(percent(k.kept), k.kept)}{gain_cell(k)}</tr>\n"
        for model, of_tasks in card.kept.items()
        for k in of_tasks
    ]
    columns = [
        ("merge", "text"), ("task", "text"), ("score", "number"), ("best parent", "text"), ("its score", "number"), ("kept", "number"),
        ("of its gain", "number"),
    ]  # fmt: skip
    words = kept_words([k for of_tasks in card.kept.values() for k in of_tasks])
    return PageSection(
        "kept",
        "What each merge kept",
        words,
        table(columns, rows, label="What each merge kept", anchor="kept-table", sortable=True),
    )


def _cell(estimate: Estimate | None, *, signed: bool = False) -> str:
    if estimate is None:
        return '<td class="none">–</td>'
    shown = [
        f"{'+' if signed and value > 0 else ''}{number(value)}"
        for value in (estimate.value, estimate.low, estimate.high)
        if value is not None
    ]
    return cell(shown[0] if len(shown) < 3 else f"{shown[0]} [{shown[1]}, {shown[2]}]", estimate.value)
