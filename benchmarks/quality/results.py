"""The table's rows as data: what every way reached on the test part, example by example."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import transformers

import alnico
from alnico.evaluation.tasks import Score
from quality.bench import Bench, say
from quality.continual import Manner, arrive
from quality.parse import CORPORA
from quality.specialists import precision
from quality.ways import Way, alone

Results = Mapping[str, Any]


def measure(bench: Bench, ways: Sequence[Way], manners: Sequence[Manner] = ()) -> Results:
    """Make every row, write ``results.json`` after each; then let the specialists arrive one by one, in each of ``manners``."""
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    continual: list[dict[str, Any]] = []

    def results() -> Results:
        found = {
            "environment": environment(bench, time.perf_counter() - began),
            "rows": rows,
            "continual": continual,
        }
        (bench.work / "results.json").write_text(json.dumps(found, indent=1))
        return found

    say("specialists")
    own = {
        name: bench.score(alone(bench.specialist(name)), "test", name).scores[name] for name in bench.tasks
    }
    rows.append(row("specialists", "each on its own task", own))
    for way in ways:
        say(way.name)
        chosen = way.choose(bench)
        found = bench.score(chosen.recipe, "test")
        say(f"  {found.mean:.4f} on test{': ' if chosen.setting else ''}{chosen.setting}")
        validated = bench.score(chosen.recipe, "validation").mean
        rows.append(
            row(way.name, chosen.setting, found.scores, validated)
            | {
                "recipe": chosen.recipe,
                "evaluations": chosen.evaluations,
                "seconds": chosen.seconds,
                "merging": found.merging,
            }
        )
        results()
    continual += arrive(bench, manners)
    return results()


def row(
    name: str, setting: str, scores: Mapping[str, Score], validated: float | None = None
) -> dict[str, Any]:
    """Return a row: the mean over tasks on the validation part, and of each task which test examples are right."""
    right = {
        task: "".join(str(int(value)) for value in score.examples)
        for task, score in scores.items()
        if score.examples is not None
    }
    return {
        "name": name,
        "setting": setting,
        "validation": validated,
        "right": right,
        "recipe": None,
        "evaluations": 0,
        "seconds": 0.0,
        "merging": 0.0,
        "each": [],
    }


def over_seeds(found: Sequence[Results]) -> Results:
    """Return the rows as means over specialists of several seeds, which have the same test examples.

    ``right`` counts for each example the seeds that are right, ``each`` has the mean over tasks of each seed; settings that differ stand
    in the order of the seeds. Seconds are means.
    """
    if len(found) == 1:
        return found[0]
    rows = [_one_row(rows) for rows in zip(*(results["rows"] for results in found), strict=True)]
    seeds = [results["environment"]["training"]["seed"] for results in found]
    environment = {**found[0]["environment"], "seeds": seeds}
    return {"environment": environment, "rows": rows, "continual": []}


def _one_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    assert len({row["name"] for row in rows}) == 1, "all seeds have the same rows"
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    return {
        **rows[0],
        "setting": settings[0] if len(settings) == 1 else _joined([row["setting"] for row in rows]),
        "validation": None
        if rows[0]["validation"] is None
        else statistics.mean(row["validation"] for row in rows),
        "right": {
            task: "".join(
                str(sum(map(int, digits)))
                for digits in zip(*(row["right"][task] for row in rows), strict=True)
            )
            for task in rows[0]["right"]
        },
        "each": [statistics.mean(score.value for score in scores_of(row).values()) for row in rows],
        "evaluations": max(row["evaluations"] for row in rows),
        "seconds": statistics.mean(row["seconds"] for row in rows),
        "merging": statistics.mean(row["merging"] for row in rows),
    }


def _joined(settings: Sequence[str]) -> str:
    """Join ``scale 1.0``, ``scale 1.2`` as ``scale 1.0 / 1.2``, and settings of other shapes with all their words."""
    starts = {setting.rpartition(" ")[0] for setting in settings}
    if len(starts) == 1 and all(setting.count(" ") == 1 for setting in settings):
        return f"{starts.pop()} {' / '.join(setting.rpartition(' ')[2] for setting in settings)}"
    return " / ".join(settings)


def scores_of(row: Mapping[str, Any]) -> dict[str, Score]:
    """Return a row's scores by task; of several seeds an example counts as much as the share of them that is right."""
    seeds = max(len(row.get("each", ())), 1)
    right = {
        task: np.array([int(digit) / seeds for digit in digits]) for task, digits in row["right"].items()
    }
    return {task: Score(float(examples.mean()), examples) for task, examples in right.items()}


def environment(bench: Bench, seconds: float) -> dict[str, Any]:
    """Say what the tables were made with."""
    return {
        "alnico": alnico.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "precision": precision(),
        "training": asdict(bench.training),
        "tasks": {
            name: {
                "source": CORPORA[name].source,
                "classes": len(CORPORA[name].words),
                "rows": {part: bench.rows(name, part) for part in ("train", "validation", "test")},
            }
            for name in bench.tasks
        },
        "seconds": seconds,
        "seconds_of_training": sum(
            json.loads((bench.work / "specialists" / name / "training.json").read_text())["seconds"]
            for name in bench.tasks
        ),
    }
