"""Specialists that arrive one by one: each is merged into the running model and gone.

When the k-th arrives, there are the base, the running model and the arrival; the specialists before it are not at hand. The running model
lies in ``DIR/continual``, and the next one takes its place.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import alnico
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.tasks import Score
from quality.bench import Bench, say, write

Weights = tuple[float, float]
"""Of the running model, and of the arrival."""


@dataclass(frozen=True)
class Manner:
    """How an arrival is merged: by a method, with one of ``weights`` of its number, counted from 1.

    Of several, that which is best on the validation rows of the tasks that have arrived.
    """

    name: str
    method: str
    weights: Callable[[int], Sequence[Weights]]

    def recipe(self, base: str, running: str, arrival: str, count: int, weights: Weights) -> dict[str, Any]:
        """Return the recipe of the next running model; the first arrival is alone."""
        pairs = list(zip((running, arrival), weights, strict=True))[-1 if count == 1 else 0 :]
        models = [{"model": model, "parameters": {"weight": weight}} for model, weight in pairs]
        if self.method == "linear":
            return {"merge_method": "linear", "models": models}
        return {"merge_method": self.method, "base_model": base, "models": models}


MANNERS = (
    Manner("running average", "linear", lambda count: [(count - 1.0, 1.0)]),
    Manner("sum, each at 0.3", "task_arithmetic", lambda _: [(1.0, 0.3)]),
    Manner(
        "sum, all at 1/√k",
        "task_arithmetic",
        lambda count: [(math.sqrt((count - 1) / count), 1 / math.sqrt(count))],
    ),
    Manner(
        "sum, each at its best", "task_arithmetic", lambda _: [(1.0, share / 10) for share in range(2, 11, 2)]
    ),
    Manner("largest changes", "magmax", lambda _: [(1.0, 1.0)]),
)
"""The average of all so far; sums of task vectors; MagMax (Marczak et al. 2024, arXiv 2407.06322), which is made for this."""


PLAIN = str.maketrans(" /", "--", ",")
"""What names of folders do without."""


def arrive(bench: Bench, manners: Sequence[Manner] = MANNERS) -> list[dict[str, Any]]:
    """Return, for each manner and arrival, which test examples of the tasks so far are right. What was scored before is read."""
    return [{"name": manner.name, "arrivals": list(_arrivals(bench, manner))} for manner in manners]


def _arrivals(bench: Bench, manner: Manner) -> Iterator[Mapping[str, Any]]:
    folder = bench.work / "continual" / f"{manner.name.translate(PLAIN)}-{bench.fingerprint[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    for count, task in enumerate(bench.tasks, 1):
        kept, running = folder / f"{count}.json", folder / f"running-{count}"
        if not kept.exists():
            say(f"continual, {manner.name}: {task} arrives")
            found = _arrival(bench, manner, folder, count)
            write(kept, json.dumps(found))
        shutil.rmtree(folder / f"running-{count - 1}", ignore_errors=True)
        yield json.loads(kept.read_text())
    shutil.rmtree(running, ignore_errors=True)


def _arrival(bench: Bench, manner: Manner, folder: Path, count: int) -> dict[str, Any]:
    """Merge and score one arrival."""
    base, arrival = (str(bench.work / name) for name in ("base", bench.specialist(bench.tasks[count - 1])))
    began = time.perf_counter()
    tried = []
    choices = manner.weights(count)
    for weights in choices:
        out = folder / f"tried-{weights[1]:.3f}"
        recipe = manner.recipe(base, str(folder / f"running-{count - 1}"), arrival, count, weights)
        alnico.merge(recipe, out, overwrite=True)
        scores = _scores(bench, out, "validation", count) if len(choices) > 1 else {}
        tried.append((sum(score.value for score in scores.values()), weights, out))
    _, weights, best = max(tried, key=lambda entry: entry[0])
    shutil.rmtree(folder / f"running-{count}", ignore_errors=True)
    best.rename(folder / f"running-{count}")
    for _, _, out in tried:
        shutil.rmtree(out, ignore_errors=True)
    seconds = time.perf_counter() - began
    scores = _scores(bench, folder / f"running-{count}", "test", count)
    right = {
        name: "".join(str(int(value)) for value in score.examples)
        for name, score in scores.items()
        if score.examples is not None
    }
    return {"arrived": bench.tasks[count - 1], "weights": list(weights), "right": right, "seconds": seconds}


def _scores(bench: Bench, model: Path, part: str, count: int) -> dict[str, Score]:
    """Score a model on the tasks that have arrived."""
    subject = open_subject(model)
    return {task.name: task.evaluate(subject) for task in bench.read_tasks(part)[:count]}
