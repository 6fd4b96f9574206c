"""Scores models on tasks with uncertainty: intervals, paired differences, and how much merges kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import xxhash

from alnico.analysis.charts import inline_picture
from alnico.analysis.common_tensors import short_names
from alnico.analysis.results import AnalysedModel
from alnico.analysis.scores import Accuracy, Estimate, accuracies
from alnico.errors import EvaluationError
from alnico.evaluation.placement import ON_THE_PROCESSOR, ModulePlacement
from alnico.evaluation.tasks import EvaluatedModel, Goal, Score, Task, counted_of, metric_of
from alnico.events import Scored, Watcher
from alnico.notebook import (
    ResultTable,
    figure_text,
    name_text,
    names_text,
    never_fails,
    result_html,
    result_line,
)
from alnico.numerics.sizes import count_of

LEVEL = 0.95
"""The confidence level of all intervals."""

DRAWS = 2000

MOST_DRAWN = 4_000_000
"""The most indices drawn at once."""

MOST_BARS = 60
"""The most bars of the picture that a notebook shows with a scorecard."""

Role = Literal["base", "model", "merged"]
TaskScores = Mapping[str, Score]
"""The scores of one model by task."""


@dataclass(frozen=True)
class TaskSummary:
    """A task of a scorecard; ``examples`` is 0 if it does not report the contribution of each example.

    ``metric`` names its scores, ``counted`` its examples.
    """

    name: str
    goal: Goal
    weight: float
    examples: int
    metric: str = "score"
    counted: str = "examples"


@dataclass(frozen=True)
class ModelScores:
    """A model's scores by task, and their mean over the tasks where higher is better; None if there are none."""

    name: str
    reference: str
    role: Role
    scores: Mapping[str, Estimate]
    mean: Estimate | None


@dataclass(frozen=True)
class ScoreDifference:
    """Scores of ``model`` minus those of ``other``, by task and for the mean, with intervals of the paired difference."""

    model: str
    other: str
    scores: Mapping[str, Estimate]
    mean: Estimate | None


@dataclass(frozen=True)
class Scorecard:
    """Scores of models on tasks.

    Intervals (95 %) are bootstrap percentiles: examples are resampled with replacement within each task, with the same
    draws for all models, so differences are paired. Tasks are not resampled: intervals describe other examples of these
    tasks, not other tasks. ``mean`` is the weighted mean over the tasks where higher is better. ``differences`` compare
    each merged model with all others or, without merged models, each model with the base. ``kept`` is, for each merged
    model, the share of the best parent's score, and of that parent's gain over the base. ``device`` and ``dtype`` say
    where checkpoints were scored, and in which dtype: ``own`` if each was in its own.
    """

    tasks: tuple[TaskSummary, ...]
    models: tuple[ModelScores, ...]
    differences: tuple[ScoreDifference, ...]
    kept: Mapping[str, tuple[Accuracy, ...]]
    draws: int
    seed: int
    device: str = "cpu"
    dtype: str = "float32"
    compile_seconds: float = field(default=0.0, compare=False)

    def plot(
        self,
        name: str = "bars",
        *,
        models: Any = None,
        figsize: tuple[float, float] | None = None,
        ax: Any = None,
        dark: bool = False,
    ) -> Any:
        """Draw the scores and return them as a matplotlib figure, which a notebook shows; it is none of pyplot's.

        ``name`` is ``bars``, with intervals, or ``radar``, with one axis per task; both have the tasks where higher is
        better. ``models`` chooses models by name or position. ``figsize`` is in inches; ``ax`` are axes to draw in, polar
        ones for a radar; ``dark`` takes the colours of the dark page. Needs the extra ``[report]``. Errors:
        AlnicoError, also for an unknown name.
        """
        return self._plot(name, models, figsize=figsize, ax=ax, dark=dark)

    def _plot(self, name: str, models: Any = None, **canvas: Any) -> Any:
        from alnico.analysis.score_pictures import plot_scores

        shown = [task for task in self.tasks if task.goal == "max"] or list(self.tasks)
        metrics = {task.metric for task in shown}
        return plot_scores(
            {task.name: {m.name: m.scores[task.name] for m in self.models} for task in shown},
            [m.name for m in self.models],
            name,
            chosen=models,
            of="a scorecard",
            metric=metrics.pop() if len(metrics) == 1 else "score",
            **canvas,
        )

    def __repr__(self) -> str:
        means = (
            f"{name_text(m.name)} {figure_text(next(iter(m.scores.values())).value if m.mean is None else m.mean.value)}"
            for m in self.models
        )
        tasks = names_text(task.name for task in self.tasks)
        return result_line(
            f"scores of {count_of(len(self.models), 'model')} on {tasks}", f"mean {names_text(means, 8)}"
        )

    @never_fails
    def _repr_html_(self) -> str:
        def shown(estimate: Estimate | None) -> str:
            if estimate is None or estimate.low is None or estimate.high is None:
                return figure_text(None if estimate is None else estimate.value)
            return f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"

        rows = [
            [i + 1, m.name, m.role, shown(m.mean), *(shown(m.scores.get(t.name)) for t in self.tasks)]
            for i, m in enumerate(self.models)
        ]
        heads = [f"{t.name}{' (lower is better)' if t.goal == 'min' else ''}" for t in self.tasks]

        return result_html(
            "Scores",
            ResultTable(("", "model", "role", "mean", *heads), rows),
            facts=[("tasks", len(self.tasks)), ("intervals", f"95 %, {self.draws:,} draws")],
            picture=inline_picture(
                lambda theme: self._plot("bars", dark=theme), "Bars: score of every model on every task"
            )
            if len(self.models) * len(self.tasks) <= MOST_BARS
            else None,
        )

    def data(self) -> dict[str, Any]:
        """Return plain data for JSON; ``alnico compare --scores`` reads it."""
        return {
            "tasks": [asdict(task) for task in self.tasks],
            "models": [
                {"name": m.name, "reference": m.reference, "role": m.role, **_estimates(m.scores, m.mean)}
                for m in self.models
            ],
            "differences": [
                {"model": d.model, "other": d.other, **_estimates(d.scores, d.mean)} for d in self.differences
            ],
            "kept": {
                model: [asdict(accuracy) for accuracy in of_tasks] for model, of_tasks in self.kept.items()
            },
            "bootstrap": {"level": LEVEL, "draws": self.draws, "seed": self.seed},
            "device": self.device,
            "dtype": self.dtype,
        }


def score_models(
    subjects: Iterable[EvaluatedModel],
    tasks: Sequence[Task],
    *,
    base: str | None = None,
    merged: Collection[str] = (),
    draws: int = DRAWS,
    seed: int = 0,
    watch: Watcher | None = None,
    placement: ModulePlacement = ON_THE_PROCESSOR,
) -> Scorecard:
    """Score models on all examples of tasks. ``base`` and ``merged`` are labels of subjects; all others are parents.

    Each subject is released before the next is loaded. ``watch`` receives each score. ``placement`` is where the subjects'
    modules are, as the scorecard says it.
    Errors: EvaluationError, ModelError.
    """
    results: dict[str, dict[str, Score]] = {}
    for subject in subjects:
        check_once([*results, subject.label])
        scores = results[subject.label] = {}
        for task in tasks:
            scores[task.name] = task.evaluate(subject)
            if watch is not None:
                watch(Scored(subject.label, task.name, scores[task.name], metric_of(task)))
    card = scorecard(results, tasks, base=base, merged=merged, draws=draws, seed=seed)
    return replace(card, device=placement.where, dtype=placement.own_or_dtype)


def check_once(labels: Sequence[str]) -> None:
    """Refuse a model that is listed twice. Errors: EvaluationError."""
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise EvaluationError(f"{twice}: is given twice; expected different models. Remove one.")


def scorecard(
    scores: Mapping[str, TaskScores],
    tasks: Sequence[Task],
    *,
    base: str | None = None,
    merged: Collection[str] = (),
    draws: int = DRAWS,
    seed: int = 0,
) -> Scorecard:
    """Build a scorecard from scores by label and task. Arguments as for :func:`score_models`."""
    if not tasks or not scores:
        raise EvaluationError(
            f"there are no {'models' if tasks else 'tasks'} to score; expected at least one. Give some."
        )
    labels = list(scores)
    for label in (*merged, *([base] if base is not None else [])):
        if label not in scores:
            raise EvaluationError(
                f"{label}: has no scores; expected one of {', '.join(labels)}. Score it too."
            )
    if base in merged:
        raise EvaluationError(
            f"{base}: is given as the base and as a merge; expected one of them. Remove it from one."
        )
    names = dict(zip(labels, short_names(labels), strict=True))
    drawn = ResampledScores(scores, tasks, draws=draws, seed=seed)
    roles: dict[str, Role] = {
        label: "base" if label == base else "merged" if label in merged else "model" for label in labels
    }
    models = tuple(ModelScores(names[label], label, roles[label], *drawn.scores(label)) for label in labels)
    if merged:
        pairs = [
            (one, other) for one in labels if one in merged for other in labels if roles[other] != "merged"
        ]
    else:
        pairs = [(label, base) for label in labels if base not in (None, label)]
    differences = tuple(
        ScoreDifference(names[one], names[other], *drawn.combined({one: 1.0, other: -1.0}))
        for one, other in pairs
        if other
    )
    kept = {names[one]: _kept(one, scores, names, roles, tasks, base) for one in labels if one in merged}
    measured = tuple(
        TaskSummary(t.name, t.goal, t.weight, drawn.examples(t.name), metric_of(t), counted_of(t))
        for t in tasks
    )
    return Scorecard(
        measured, models, differences, {name: shares for name, shares in kept.items() if shares}, draws, seed
    )


def interval(score: Score, task: str = "", *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Return a score with its interval, if its examples are known. ``task`` and ``seed`` select the draws.

    >>> import numpy as np
    >>> estimate = interval(Score(0.5, np.arange(100) % 2.0))
    >>> round(estimate.low, 1), round(estimate.high, 1)
    (0.4, 0.6)
    """
    values = _resampled([score], task, draws, seed)
    return _estimate(score.value, None if values is None else values[0])


def paired(
    a: TaskScores, b: TaskScores, tasks: Sequence[Task], *, draws: int = DRAWS, seed: int = 0
) -> ScoreDifference:
    """Return the scores of model a minus those of model b, by task and for the mean, with paired draws."""
    drawn = ResampledScores({"a": a, "b": b}, tasks, draws=draws, seed=seed)
    return ScoreDifference("a", "b", *drawn.combined({"a": 1.0, "b": -1.0}))


class ResampledScores:
    """Scores of models with their bootstrap values: examples are resampled with the same draws for all models.

    ``averaged`` are the names of the tasks in the mean; default: those where higher is better.
    """

    def __init__(
        self,
        scores: Mapping[str, TaskScores],
        tasks: Sequence[Task],
        *,
        draws: int = DRAWS,
        seed: int = 0,
        averaged: Collection[str] | None = None,
    ) -> None:
        self._scores = scores
        self._tasks = tasks
        self._averaged = [t for t in tasks if (t.goal == "max" if averaged is None else t.name in averaged)]
        self._values: dict[str, dict[str, np.ndarray | None]] = {}  # by task and model, (draws,)
        for task in tasks:
            of_task = [of_model[task.name] for of_model in scores.values()]
            values = _resampled(of_task, task.name, draws, seed)
            self._values[task.name] = (
                dict.fromkeys(scores) if values is None else dict(zip(scores, values, strict=True))
            )

    def examples(self, task: str) -> int:
        """Return the number of a task's examples; 0 if they are not known."""
        examples = next(iter(self._scores.values()))[task].examples
        return 0 if examples is None else len(examples)

    def scores(self, label: str) -> tuple[Mapping[str, Estimate], Estimate | None]:
        """Return a model's scores by task, and their mean."""
        return self.combined({label: 1.0})

    def combined(self, factors: Mapping[str, float]) -> tuple[Mapping[str, Estimate], Estimate | None]:
        """Return the sum of models' scores, each times its factor, by task and for the mean; draws are paired."""
        estimates = {}
        for task in self._tasks:
            value = _total((f, self._scores[label][task.name].value) for label, f in factors.items())
            estimates[task.name] = _estimate(value, self._drawn(task.name, factors))
        if not self._averaged:
            return estimates, None
        weights = sum(task.weight for task in self._averaged)
        mean = _total((t.weight, estimates[t.name].value) for t in self._averaged) / weights
        drawn = [(t.weight, self._drawn(t.name, factors)) for t in self._averaged]
        known = [(weight, values) for weight, values in drawn if values is not None]
        return estimates, _estimate(mean, _total(known) / weights if len(known) == len(drawn) else None)

    def _drawn(self, task: str, factors: Mapping[str, float]) -> np.ndarray | None:
        values = self._values[task]
        known = [(f, drawn) for label, f in factors.items() if (drawn := values[label]) is not None]
        return _total(known) if len(known) == len(factors) else None


def _total(terms: Iterable[tuple[float, Any]]) -> Any:
    """Return the sum of values, each times its factor."""
    return sum(factor * value for factor, value in terms)


def _resampled(scores: Sequence[Score], task: str, draws: int, seed: int) -> np.ndarray | None:
    """Return scores of one task on resampled examples, (scores, draws), with the same draws for all."""
    example_sets = [score.examples for score in scores if score.examples is not None]
    if len(example_sets) < len(scores):
        return None
    if len({len(examples) for examples in example_sets}) > 1:
        raise EvaluationError(
            f"{task}: models have {' and '.join(str(len(e)) for e in example_sets[:2])} examples; expected the same examples for all. Score all on the same data."
        )
    examples = np.stack(example_sets).astype(np.float64)
    count = examples.shape[1]
    random = np.random.default_rng([seed, xxhash.xxh64_intdigest(task.encode())])
    means = np.empty((len(scores), draws))
    for begin in range(0, draws, step := max(1, MOST_DRAWN // count)):
        size = min(step, draws - begin)
        indices = random.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(indices.ravel(), minlength=size * count).reshape(size, count)
        means[:, begin : begin + size] = examples @ times.T.astype(np.float64) / count
    return np.exp(means) if scores[0].link == "exp" else means


def _estimate(value: float, drawn: np.ndarray | None) -> Estimate:
    if drawn is None:
        return Estimate(value)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def _kept(
    one: str,
    scores: Mapping[str, TaskScores],
    names: Mapping[str, str],
    roles: Mapping[str, Role],
    tasks: Sequence[Task],
    base: str | None,
) -> tuple[Accuracy, ...]:
    """Compute how much a merged model kept of the best parent, on tasks where higher is better."""
    model_of = {label: AnalysedModel(names[label], label) for label in scores}
    parents = [label for label in scores if roles[label] == "model"]
    compared = [one, *parents, *([base] if base is not None else [])]
    table = {
        t.name: {label: scores[label][t.name].value for label in compared} for t in tasks if t.goal == "max"
    }
    if not parents:
        return ()
    return accuracies(
        table, [model_of[p] for p in parents], model_of[one], None if base is None else model_of[base]
    )


def _estimates(scores: Mapping[str, Estimate], mean: Estimate | None) -> dict[str, Any]:
    return {
        "scores": {task: estimate.data() for task, estimate in scores.items()},
        "mean": None if mean is None else mean.data(),
    }
