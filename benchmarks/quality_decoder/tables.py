"""Makes the tables of docs/quality-decoder.md."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

import alnico
from alnico.evaluation.scorecard import Estimate, TaskSummary, paired, scorecard
from alnico.evaluation.tasks import Score
from quality.parse import CORPORA
from quality.specialists import precision
from quality.tables import duration, markdown, points, signed
from quality_decoder.bench import Bench, Models
from quality_decoder.questions import QUESTIONS
from quality_decoder.sets import name_of
from quality_decoder.specialists import TRAINING
from quality_decoder.ways import ARITHMETIC, TSV, Row

Rows = Mapping[str, Row]
"""The rows of one set, by name."""


def tables(
    bench: Bench, main: Rows, fewer: Mapping[Models, Rows], shapes: Mapping[Models, Rows]
) -> dict[str, str]:
    """Return every table as Markdown, by the name of its place."""
    return {
        "tasks": tasks_table(bench, main),
        "results": results_table(main),
        "by-task": by_task_table(main),
        "fewer": sets_table(fewer, "specialists of"),
        "shapes": sets_table(shapes, "specialists"),
        "made-with": made_with(bench),
    }


def tasks_table(bench: Bench, rows: Rows) -> str:
    """Return the questions, how many rows of each are used, and what base and specialists reach."""
    lines = []
    for name, question in QUESTIONS.items():
        base, own = (rows[row].measured for row in ("base", "specialists"))
        lines.append(
            [
                name,
                CORPORA[name].source,
                f"`{question.cue.strip()}`",
                str(len(question.answers)),
                *(str(count) for count in (TRAINING.examples, *bench.examples.values())),
                f"{points(base.right[name].mean())} → {points(own.right[name].mean())}",
                f"{base.losses[name].mean():.2f} → {own.losses[name].mean():.2f}",
            ]
        )
    return markdown(
        ["task", "texts", "cue", "classes", "trained on", "validation", "test", "accuracy", "loss"], lines
    )


def results_table(rows: Rows) -> str:
    """Return means over the tasks: accuracy and loss, each with its paired difference from tuned task arithmetic."""
    base, best = rows["base"].measured.mean, rows["specialists"].measured.mean
    lines = []
    for row in rows.values():
        accuracy = mean_of(row.measured.right)
        lines.append(
            [
                row.name,
                row.setting,
                f"{points(accuracy.value)} {percent(accuracy)}",
                against(row, rows, "right"),
                f"{100 * (accuracy.value - base) / (best - base):.0f} %",
                f"{row.measured.loss:.2f}",
                against(row, rows, "losses"),
                str(row.tried or ""),
            ]
        )
    return markdown(
        [
            "merge", "chosen", "accuracy", f"against {ARITHMETIC.name}", "gain kept", "loss",
            f"loss against {ARITHMETIC.name}", "tried",
        ],
        lines,
    )  # fmt: skip


def by_task_table(rows: Rows) -> str:
    """Return accuracy and loss of each task."""
    lines = [
        [
            row.name,
            *(
                f"{points(row.measured.right[task].mean())} · {row.measured.losses[task].mean():.2f}"
                for task in QUESTIONS
            ),
        ]
        for row in rows.values()
    ]
    return markdown(["merge", *QUESTIONS], lines)


def sets_table(sets: Mapping[Models, Rows], title: str) -> str:
    """Return a line for each set: task arithmetic and tsv, with the paired differences of accuracy and loss."""
    lines = []
    for models, rows in sets.items():
        arithmetic, merged = rows[ARITHMETIC.name], rows[TSV.name]
        lines.append(
            [
                name_of(models),
                points(rows["specialists"].measured.mean),
                f"{points(arithmetic.measured.mean)} ({arithmetic.setting.split()[-1]})",
                points(merged.measured.mean),
                against(merged, rows, "right"),
                f"{arithmetic.measured.loss:.2f}",
                f"{merged.measured.loss:.2f}",
                against(merged, rows, "losses"),
            ]
        )
    return markdown(
        [
            title, "on their own tasks", "task arithmetic (scale)", "tsv", "difference", "loss of task arithmetic",
            "of tsv", "difference",
        ],
        lines,
    )  # fmt: skip


def against(row: Row, rows: Rows, what: str) -> str:
    """Return a row's paired difference from tuned task arithmetic: ``right`` in points, ``losses`` in nats."""
    if row.name == ARITHMETIC.name:
        return ""
    mine, other = getattr(row.measured, what), getattr(rows[ARITHMETIC.name].measured, what)
    found = paired(scores(mine), scores(other), summaries(mine)).mean
    assert found is not None
    if what == "right":
        return f"{signed(found.value)} [{signed(found.low)}, {signed(found.high)}]"
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def mean_of(examples: Mapping[str, np.ndarray]) -> Estimate:
    """Return the mean over tasks with its interval."""
    found = scorecard({"it": scores(examples)}, summaries(examples)).models[0].mean
    assert found is not None
    return found


def percent(found: Estimate) -> str:
    """Write an interval of shares in percent."""
    return f"[{points(found.low)}, {points(found.high)}]"


def scores(examples: Mapping[str, np.ndarray]) -> dict[str, Score]:
    """Return the examples of each task as a score."""
    return {task: Score(float(values.mean()), values) for task, values in examples.items()}


def summaries(examples: Mapping[str, np.ndarray]) -> Sequence[TaskSummary]:
    """Return the tasks as a scorecard wants them; all count in the mean, losses too."""
    return [TaskSummary(task, "max", 1.0, len(values)) for task, values in examples.items()]


def made_with(bench: Bench) -> str:
    """Return one line: versions, threads, training."""
    return (
        f"alnico {alnico.__version__}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} threads, {precision()}; specialists of seed {TRAINING.seed}, "
        f"{TRAINING.epochs} epoch, batches of {TRAINING.batch_size}, learning rate {TRAINING.learning_rate:g}, trained in "
        f"{duration(bench.seconds_of_training())}.\n"
    )


def write_tables(found: Mapping[str, str], path: Path) -> None:
    """Replace each table between ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a document."""
    text = path.read_text(encoding="utf-8")
    for name, table in found.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        assert text.count(start) == text.count(end) == 1, f"{path} has no place for {name}"
        before, rest = text.split(start)
        text = before + start + table + end + rest.split(end)[1]
    path.write_text(text, encoding="utf-8")
