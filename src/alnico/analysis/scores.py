"""Reads scores of models on tasks, and computes how much of them a merged model kept."""

from __future__ import annotations

import csv
import difflib
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.analysis.results import AnalysedModel
from alnico.checkpoint.files import open_named
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.near_paths import suggestion
from alnico.errors import ModelError

ScoreTable = Mapping[str, Mapping[str, float]]
"""Scores by task, then by model; higher is better."""


@dataclass(frozen=True)
class Estimate:
    """A score or a difference of scores, with its interval if known."""

    value: float
    low: float | None = None
    high: float | None = None

    def data(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


Estimates = Mapping[str, Mapping[str, Estimate]]
"""Scores by task, then by model; higher is better."""

NO_GAIN = "no gain"
"""What is shown in place of the share of a gain that does not exist."""

NO_GAIN_MEANS = (
    "no gain: the best parent is not better than the base on the task, so there is no gain to keep."
)

COLUMNS = ["task", "model", "score"]
"""The header of a CSV file of scores."""

MERGED = "merged"
BASE = "base"
"""Names that always mean the merged model and the base."""


@dataclass(frozen=True)
class Accuracy:
    """How much the merged model kept on a task, compared with the ``best`` parent (a name) on it.

    ``kept`` is merged / best; None unless best is above 0. ``gain`` is best - base, None if the base has no
    score. ``gain_kept`` is (merged - base) / gain; None unless ``gain`` is above 0, as there is nothing to keep.
    """

    task: str
    merged: float
    best: str
    of_best: float
    of_base: float | None
    kept: float | None
    gain_kept: float | None
    gain: float | None = None

    @property
    def has_no_gain(self) -> bool:
        """Whether no parent is better than the base, so that there is no gain to keep."""
        return self.gain is not None and self.gain <= 0


def read_scores(sources: Iterable[str | os.PathLike[str]]) -> ScoreTable:
    """Read scores, without their intervals; see :func:`read_estimates`."""
    return values_of(read_estimates(sources))


def values_of(estimates: Estimates) -> ScoreTable:
    """Return the scores without their intervals."""
    return {
        task: {model: estimate.value for model, estimate in models.items()}
        for task, models in estimates.items()
    }


def read_estimates(sources: Iterable[str | os.PathLike[str]]) -> Estimates:
    """Read scores, with intervals where given, from files and from text written ``TASK:MODEL=SCORE``.

    A ``.json`` file contains ``{"task": {"model": 0.5}}``, or is written by ``alnico evaluate``: then tasks
    where lower is better are skipped. A ``.csv`` file has the header ``task,model,score``. Errors:
    ModelError.
    """
    estimates: dict[str, dict[str, Estimate]] = {}
    for item in sources:
        text = os.fspath(item)
        for task, model, score in _rows(text):
            if model in estimates.setdefault(task, {}):
                raise ModelError(
                    f"{text}: the score of {model} on {task} is given twice; expected one. Remove one."
                )
            estimates[task][model] = _estimate(score, f"{text}: {task}: {model}")
    return estimates


def accuracies(
    scores: ScoreTable, parents: Sequence[AnalysedModel], merged: AnalysedModel, base: AnalysedModel | None
) -> tuple[Accuracy, ...]:
    """Compute how much a merged model kept on each task.

    Models are named as in an analysis, by path or hub id, or ``merged`` and ``base``. Errors: ModelError for
    any other model, and for a task without a score of the merged model or of any parent.
    """
    model_of: dict[str, AnalysedModel] = {}
    for model, word in (
        (merged, MERGED),
        *([(base, BASE)] if base is not None else []),
        *((p, "") for p in parents),
    ):
        model_of |= {
            name: model for name in (word, model.name, model.reference) if name and name not in model_of
        }
    results: list[Accuracy] = []
    for task, by_model in scores.items():
        own: dict[AnalysedModel, float] = {}
        for name, score in by_model.items():
            if name not in model_of:
                near = difflib.get_close_matches(name, model_of, 1)
                raise ModelError(
                    f"scores: {task}: {name} is not one of the models; expected "
                    f"{', '.join(dict.fromkeys(m.name for m in model_of.values()))}."
                    + (f" Did you mean {near[0]}?" if near else " Give one of these names, or its path.")
                )
            if model_of[name] in own:
                raise ModelError(
                    f"scores: {task}: {model_of[name].name} has two scores, the second as {name}; expected "
                    "one. Remove one."
                )
            own[model_of[name]] = _number(score, f"scores: {task}: {name}")
        of_parents = [(own[p], p.name) for p in parents if p in own]
        if merged not in own or not of_parents:
            lacking = "the merged model" if merged not in own else "any parent"
            raise ModelError(
                f"scores: {task}: has no score of {lacking}; expected one of each. Add it, or remove the "
                "task."
            )
        best = max(of_parents, key=lambda entry: entry[0])
        of_base = own.get(base) if base is not None else None
        gain = None if of_base is None else best[0] - of_base
        gain_kept = (own[merged] - of_base) / gain if of_base is not None and gain and gain > 0 else None
        kept = own[merged] / best[0] if best[0] > 0 else None
        results.append(Accuracy(task, own[merged], best[1], best[0], of_base, kept, gain_kept, gain))
    return tuple(results)


def _rows(text: str) -> list[tuple[str, str, Any]]:
    path = Path(text)
    if path.suffix == ".json":
        data = read_json(path)
        if isinstance(data.get("models"), list):
            return _evaluation(text, data)
        if not all(isinstance(models, dict) for models in data.values()):
            raise ModelError(
                f'{text}: is not a file of scores; expected {{"task": {{"model": 0.5}}}}. Convert it to this form.'
            )
        return [(task, model, score) for task, models in data.items() for model, score in models.items()]
    if path.suffix == ".csv":
        return _table(path)
    name, equals, score = text.rpartition("=")
    task, colon, model = name.partition(":")
    if not (equals and colon and task and model):
        raise ModelError(
            f"{text!r}: is not a score; expected a .json file, a .csv file or TASK:MODEL=SCORE. Write for "
            "example `gsm8k:merged=0.52`."
        )
    return [(task, model, score)]


def _evaluation(text: str, data: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Return the rows of a file that ``alnico evaluate`` wrote."""
    try:
        higher_is_better = {task["name"] for task in data["tasks"] if task["goal"] == "max"}
        return [
            (task, model["reference"], score)
            for model in data["models"]
            for task, score in model["scores"].items()
            if task in higher_is_better
        ]
    except (KeyError, TypeError, AttributeError):
        raise ModelError(
            f"{text}: is not a file of scores; expected the output of `alnico evaluate --json`. Write it "
            "again."
        ) from None


def _estimate(score: Any, where: str) -> Estimate:
    if not isinstance(score, dict):
        return Estimate(_number(score, where))
    value, low, high = (score.get(key) for key in ("value", "low", "high"))
    if low is None or high is None:
        return Estimate(_number(value, where))
    return Estimate(*(_number(number, where) for number in (value, low, high)))


def _table(path: Path) -> list[tuple[str, str, Any]]:
    try:
        with io.TextIOWrapper(open_named(path), "utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}). "
            f"{suggestion(path, 'Check the path and its permissions.', accepts=Path.is_file)}"
        ) from None
    except (ValueError, csv.Error) as error:
        raise ModelError(
            f"{path}: is not a CSV file ({error}); expected lines of task,model,score. Check the file."
        ) from None
    header, lines = [word.strip() for word in rows[0]] if rows else [], rows[1:]
    wrong = next((i for i, row in enumerate(lines) if len(row) != len(COLUMNS)), None)
    if header != COLUMNS or wrong is not None:
        what = (
            f"begins with {','.join(header)!r}"
            if header != COLUMNS
            else f"has {len(lines[wrong or 0])} values in row {(wrong or 0) + 2}"
        )
        raise ModelError(
            f"{path}: {what}; expected the header task,model,score and three values in each row. Convert it "
            "to this form."
        )
    return [(task.strip(), model.strip(), score) for task, model, score in lines]


def _number(score: Any, where: str) -> float:
    try:
        value = math.nan if isinstance(score, bool) else float(score)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ModelError(f"{where}: the score is {score!r}; expected a number. Correct it, or remove it.")
    return value
