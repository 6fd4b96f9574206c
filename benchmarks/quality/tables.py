"""Makes the tables of docs/quality.md from ``results.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from alnico.evaluation.scorecard import TaskSummary, paired, scorecard
from quality.results import Results, scores_of

AGAINST = "task arithmetic"
"""The row that all others are compared with, example by example: the simplest way that is tuned."""


def write_tables(results: Results, path: Path) -> None:
    """Replace each table between ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a document."""
    text = path.read_text(encoding="utf-8")
    for name, table in tables(results).items():
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda found, table=table: found[1] + table + found[2],
            text,
            flags=re.DOTALL,
        )
        assert count == 1, f"{path} has {count} places for {name}"
    path.write_text(text, encoding="utf-8")


def text_of(results: Results) -> str:
    """Return the main table as text."""
    return results_table(results["rows"])


def tables(results: Results) -> dict[str, str]:
    """Return every table as Markdown, by the name of its place: rows over several seeds and rows of one have places of their own."""
    of = "" if "seeds" in results["environment"] else "-of-one-seed"
    return {
        "tasks": tasks_table(results),
        f"results{of}": results_table(results["rows"]),
        f"by-task{of}": by_task_table(results["rows"]),
        f"made-with{of}": made_with(results["environment"]),
        **({"continual": continual_table(results)} if results["continual"] else {}),
    }


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of means: each with its interval, and its paired difference from the row all are compared with."""
    scores = {row["name"]: scores_of(row) for row in rows}
    tasks = measured(rows)
    means = {model.reference: model.mean for model in scorecard(scores, tasks).models}
    base, best = means.get("base"), means["specialists"]
    with_seeds = any(row["each"] for row in rows)
    lines = []
    for row in rows:
        name = row["name"]
        mean = means[name]
        difference = (
            paired(scores[name], scores[AGAINST], tasks).mean
            if AGAINST in scores and name != AGAINST
            else None
        )
        lines.append(
            [
                name,
                row["setting"],
                "" if row["validation"] is None else points(row["validation"]),
                f"{points(mean.value)} [{points(mean.low)}, {points(mean.high)}]",
                *([" / ".join(map(points, row["each"]))] if with_seeds else []),
                ""
                if difference is None
                else f"{signed(difference.value)} [{signed(difference.low)}, {signed(difference.high)}]",
                ""
                if base is None
                else f"{100 * (mean.value - base.value) / (best.value - base.value):.0f} %",
                str(row["evaluations"] or ""),
                duration(row["seconds"]),
                f"{row['merging']:.1f} s" if row["merging"] and not row["evaluations"] else "",
            ]
        )
    header = ["merge", "chosen", "validation", "test", *(["each seed"] if with_seeds else [])]
    return markdown([*header, f"against {AGAINST}", "gain kept", "tried", "time", "merging"], lines)


def by_task_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the accuracies of each task on the test part, with half the width of their intervals."""
    tasks = measured(rows)
    lines = [
        [
            model.reference,
            *(
                f"{points(found.value)} ± {points((found.high - found.low) / 2)}"
                for found in model.scores.values()
            ),
        ]
        for model in scorecard({row["name"]: scores_of(row) for row in rows}, tasks).models
    ]
    return markdown(["merge", *(task.name for task in tasks)], lines)


def continual_table(results: Results) -> str:
    """Return the mean over the tasks so far after each arrival, and what tasks lost, on the mean, from their arrival to the end."""
    own = {task: score.value for task, score in scores_of(results["rows"][0]).items()}
    names = [arrival["arrived"] for arrival in results["continual"][0]["arrivals"]]
    lines = [
        ["specialists", *(points(mean(own[task] for task in names[: k + 1])) for k in range(len(names))), ""]
    ]
    for manner in results["continual"]:
        reached = [
            {task: share(right) for task, right in arrival["right"].items()} for arrival in manner["arrivals"]
        ]
        lost = mean(reached[k][task] - reached[-1][task] for k, task in enumerate(names))
        last = (
            scorecard({"last": scores_of(manner["arrivals"][-1])}, measured([manner["arrivals"][-1]]))
            .models[0]
            .mean
        )
        cells = [points(mean(found.values())) for found in reached]
        lines.append(
            [
                manner["name"],
                *cells[:-1],
                f"{cells[-1]} [{points(last.low)}, {points(last.high)}]",
                points(lost),
            ]
        )
    return markdown(
        ["order", *(f"{k}: {name}" for k, name in enumerate(names, 1)), "lost since arrival"], lines
    )


def share(right: str) -> float:
    """Return the share of examples that are right."""
    return right.count("1") / len(right)


def measured(rows: Sequence[Mapping[str, Any]]) -> list[TaskSummary]:
    """Return the tasks that rows are scored on, as a scorecard has them."""
    return [TaskSummary(task, "max", 1.0, len(right)) for task, right in rows[0]["right"].items()]


def tasks_table(results: Results) -> str:
    """Return what the tasks are, and how many rows of each are used."""
    environment = results["environment"]
    lines = [
        [name, task["source"], str(task["classes"]), *(str(count) for count in task["rows"].values())]
        for name, task in environment["tasks"].items()
    ]
    return markdown(["task", "texts", "classes", "trained on", "validation", "test"], lines)


def made_with(environment: Mapping[str, Any]) -> str:
    """Return one line: versions, threads, seed, times."""
    training = environment["training"]
    seeds = (
        f"seeds {', '.join(map(str, environment['seeds']))}"
        if "seeds" in environment
        else f"seed {training['seed']}"
    )
    return (
        f"alnico {environment['alnico']}, Python {environment['python']}, torch {environment['torch']}, transformers "
        f"{environment['transformers']}, {environment['threads']} threads, {environment['precision']}; specialists of "
        f"{seeds}, {training['epochs']} epoch, batches of {training['batch_size']}, learning rate {training['learning_rate']:g}, "
        f"trained in {duration(environment['seconds_of_training'])}.\n"
    )


def points(share: float) -> str:
    """Write a share in percent."""
    return f"{100 * share:.1f}"


def signed(share: float) -> str:
    """Write a difference of shares in points."""
    return f"{100 * share:+.1f}"


def duration(seconds: float) -> str:
    """Write a time: seconds below two minutes, else minutes."""
    return "" if not seconds else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
