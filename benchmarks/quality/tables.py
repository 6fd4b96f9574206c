"""The tables of docs/quality.md, out of ``results.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from quality.results import Results, scores_of

DRAWS = 2000
AGAINST = "task arithmetic"
"""The row that all others are compared with, example by example: the simplest way that is tuned."""


def write_tables(results: Results, path: Path) -> None:
    """Write each table anew between ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a document."""
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
    return tables(results)["results"]


def tables(results: Results) -> dict[str, str]:
    """Return every table as Markdown, by the name of its place."""
    return {
        "tasks": tasks_table(results),
        "results": results_table(results["rows"]),
        "by-task": by_task_table(results["rows"]),
        "made-with": made_with(results["environment"]),
    }


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of means: each with its interval, and its paired difference from the row all are compared with."""
    draws = {row["name"]: resampled(scores_of(row)) for row in rows}
    means = {row["name"]: mean_of(row) for row in rows}
    lines = []
    for row in rows:
        name = row["name"]
        cells = [name, row["setting"], "" if row["validation"] is None else points(row["validation"])]
        cells.append(f"{points(means[name])} [{interval(draws[name])}]")
        if AGAINST in means:
            difference = means[name] - means[AGAINST]
            cells.append("" if name == AGAINST else f"{signed(difference)} [{interval(draws[name] - draws[AGAINST], signed)}]")
        if {"base", "specialists"} <= set(means):
            gained = (means[name] - means["base"]) / (means["specialists"] - means["base"])
            cells.append(f"{100 * gained:.0f} %")
        cells += [str(row["evaluations"] or ""), duration(row["seconds"])]
        lines.append(cells)
    header = ["way", "chosen", "validation", "test [95 %]"]
    header += [f"less {AGAINST} [95 %]"] if AGAINST in means else []
    header += ["gain kept"] if {"base", "specialists"} <= set(means) else []
    return markdown([*header, "tried", "time"], lines)


def by_task_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the accuracies of each task on the test part, with half the width of their intervals."""
    tasks = list(rows[0]["right"])
    lines = []
    for row in rows:
        cells = [row["name"]]
        for task, right in scores_of(row).items():
            low, high = np.quantile(resampled({task: right}), (0.025, 0.975))
            cells.append(f"{points(float(right.mean()))} ± {points(float(high - low) / 2)}")
        lines.append(cells)
    return markdown(["way", *tasks], lines)


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
    return (
        f"alnico {environment['alnico']}, Python {environment['python']}, torch {environment['torch']}, transformers "
        f"{environment['transformers']}, {environment['threads']} threads, {environment['precision']}; specialists of seed "
        f"{training['seed']}, {training['epochs']} epoch, batches of {training['batch_size']}, learning rate {training['learning_rate']:g}, "
        f"trained in {duration(environment['seconds_of_training'])}.\n"
    )


def mean_of(row: Mapping[str, Any]) -> float:
    """Return the mean over tasks of the share of examples that are right."""
    return float(np.mean([right.mean() for right in scores_of(row).values()]))


def resampled(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return (DRAWS,) means over tasks, of examples drawn anew within each task: for all rows the same draws, so that they pair."""
    return np.mean([_counts(place, len(right)) @ right / len(right) for place, right in enumerate(scores.values())], axis=0)


@lru_cache
def _counts(place: int, size: int) -> np.ndarray:
    """How often each example is in each draw of a task: (DRAWS, size) float64."""
    return np.random.default_rng(place).multinomial(size, np.full(size, 1 / size), DRAWS).astype(np.float64)


def points(share: float) -> str:
    """Write a share in percent."""
    return f"{100 * share:.1f}"


def signed(share: float) -> str:
    """Write a difference of shares in points."""
    return f"{100 * share:+.1f}"


def interval(draws: np.ndarray, write: Any = points) -> str:
    """Write the middle 95 % of draws."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{write(float(low))}, {write(float(high))}"


def duration(seconds: float) -> str:
    """Write a time: seconds below two minutes, else minutes."""
    return "" if not seconds else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
