"""The table's rows as data: what every way reached on the test part, example by example."""

from __future__ import annotations

import json
import os
import platform
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
            | {"recipe": chosen.recipe, "evaluations": chosen.evaluations, "seconds": chosen.seconds}
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
    }


def scores_of(row: Mapping[str, Any]) -> dict[str, Score]:
    """Return a row's scores by task."""
    right = {task: np.array([float(digit) for digit in digits]) for task, digits in row["right"].items()}
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
