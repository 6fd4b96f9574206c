"""Tries weights of models: merges in memory for each, their scores, and the best of all trials."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alnico.analysis.charts import draw_trials, inline_picture, mark_style, open_canvas, plain
from alnico.analysis.page import series
from alnico.engine.relatedness import IN_PYTHON
from alnico.errors import EvaluationError, RecipeError, visible
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.placement import ON_THE_PROCESSOR, ModulePlacement
from alnico.evaluation.tasks import Goal, Task
from alnico.events import ScaleTried, Watcher
from alnico.models.memory_merge import MemoryMerge
from alnico.notebook import ResultTable, name_text, names_text, never_fails, result_html, result_line
from alnico.numerics.sizes import count_of
from alnico.recipe.load import load_recipe
from alnico.run_options import RunOptions
from alnico.tune.search.objective import Objective

MOST_RANKED = 8
"""Trials in the table of a notebook: the best ones."""

MOST_FAILURES = 5
"""Number of failed evaluations that ends the search."""

Weights = tuple[float, ...]


@dataclass(frozen=True)
class WeightTrial:
    """One merge: the weight of each model, the value that the search improves, and every score by name.

    ``failure`` says why it has no score.
    """

    weights: Weights
    score: float | None
    failure: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def scales(self) -> Weights:
        """The weights, as scales of task vectors."""
        return self.weights


@dataclass(frozen=True)
class WeightSearch:
    """The best weights, one per model, their score, and all trials in the order in which they were tried.

    ``models`` are the names of the models. ``goal`` says whether a higher or a lower score is better.
    """

    weights: Weights
    score: float
    trials: tuple[WeightTrial, ...]
    models: tuple[str, ...] = ()
    goal: Goal = "max"
    objective: str = "mean"
    merge: MemoryMerge | None = field(default=None, repr=False, compare=False)
    compile_seconds: float = field(default=0.0, compare=False)

    @property
    def scales(self) -> Weights:
        """The best weights, as scales of task vectors."""
        return self.weights

    @property
    def scores(self) -> Mapping[str, float]:
        """Every score of the best trial, by name."""
        return self.ranked[0].scores

    @property
    def ranked(self) -> tuple[WeightTrial, ...]:
        """The trials with a score, the best first; of equal ones, the first that was tried."""
        return ranked(self.trials, self.goal)

    def module(self) -> Any:
        """Return the best merge as a module: a copy of the base or of the first module, in its training mode.

        Errors: RecipeError if no model is a module.
        """
        return self._merge().module()

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors of the best merge: torch tensors, or numpy arrays if all models are dicts of them."""
        return self._merge().state_dict()

    def recipe(self, folder: str | os.PathLike[str] = ".") -> str:
        """Return the recipe of the best merge as YAML, with paths relative to ``folder``.

        Errors: RecipeError for models in memory, which a recipe cannot name.
        """
        head = f"# The best of {len(self.trials)} trials: {visible(self.objective)} {self.score:.6g}.\n"
        return head + self._merge().recipe_text(folder)

    def plot(self, *, figsize: tuple[float, float] | None = None, ax: Any = None, dark: bool = False) -> Any:
        """Draw the trials and return them as a matplotlib figure, which a notebook shows; it is none of pyplot's.

        Left: the score of each trial, and the best so far. Right: the score against the weight of each model.
        ``figsize`` is in inches; ``ax`` are two axes to draw in; ``dark`` takes the colours of the dark page. Needs the
        extra ``[report]``. Errors: AlnicoError.
        """
        return self._plot(figsize=figsize, ax=ax, dark=dark)

    def _plot(self, **options: Any) -> Any:
        canvas = open_canvas(2, default=(9.2, 4.2), columns=2, **options)
        left, right = canvas.axes
        scored = [(i, t.weights, t.score) for i, t in enumerate(self.trials) if t.score is not None]
        scores = [score for _, _, score in scored]
        draw_trials(
            canvas,
            left,
            [i for i, _, _ in scored],
            scores,
            goal=self.goal,
            title="Trials, and the best so far",
            y=self.objective,
            has_legend=False,
        )
        for m in range(len(self.weights)):
            name = self.models[m] if m < len(self.models) else "model"
            style = {**mark_style(m), "linestyle": "none", "markersize": 4.5, "alpha": 0.8}
            right.plot([w[m] for _, w, _ in scored], scores, label=plain(f"{m + 1} {name}", 30), **style)
            right.axvline(self.weights[m], color=series(m)[0], linewidth=1.2, linestyle="--")
        canvas.frame(right, title="Score by weight; dashed: the best", x="weight", grid="both")
        canvas.legend(right, is_below=True)
        return canvas.figure

    def __repr__(self) -> str:
        names = self.models or tuple(map(str, range(len(self.weights))))
        weights = (f"{name_text(n)} {w:.4g}" for n, w in zip(names, self.weights, strict=False))
        failed = sum(t.score is None for t in self.trials)
        return result_line(
            f"search of weights with {count_of(len(self.trials), 'trial')}{f', {failed} failed' if failed else ''}",
            f"{self.objective} {self.score:.4g}",
            names_text(weights, 8),
        )

    @never_fails
    def _repr_html_(self) -> str:
        rows = [[self.trials.index(t), t.score, *t.weights] for t in self.ranked[:MOST_RANKED]]
        return result_html(
            "Search of weights",
            ResultTable(("trial", self.objective, *self.models), rows, "The best trials"),
            facts=[
                ("trials", len(self.trials)),
                ("failed", sum(t.score is None for t in self.trials)),
                ("best", self.score),
            ],
            picture=inline_picture(
                lambda theme: self._plot(dark=theme),
                "Points: the score of each trial, and against the weights",
            ),
        )

    def data(self) -> dict[str, Any]:
        """Return the search as plain data."""
        return {
            "models": list(self.models),
            "objective": self.objective,
            "goal": self.goal,
            "weights": list(self.weights),
            "score": self.score,
            "trials": [
                {"weights": list(t.weights), "score": t.score, "scores": dict(t.scores), "failure": t.failure}
                for t in self.trials
            ],
        }

    def _merge(self) -> MemoryMerge:
        assert self.merge is not None  # the searches set it
        return self.merge


def ranked(trials: Iterable[WeightTrial], goal: Goal) -> tuple[WeightTrial, ...]:
    """Return the trials with a score, the best first."""
    sign = -1.0 if goal == "max" else 1.0
    scored = [(sign * trial.score, trial) for trial in trials if trial.score is not None]
    return tuple(trial for _, trial in sorted(scored, key=lambda pair: pair[0]))


def try_weights(
    models: Mapping[str, Any],
    points: Sequence[Weights],
    recipe_of_weights: Callable[[Weights], Mapping[str, Any]],
    tasks: Sequence[Task],
    seeks: Objective,
    *,
    listed: Sequence[str],
    base: Any = None,
    run: RunOptions,
    watch: Watcher | None = None,
    placement: ModulePlacement = ON_THE_PROCESSOR,
) -> WeightSearch:
    """Merge and score every point, and return the best. ``listed`` are the labels that have a weight.

    Merges are scored where ``placement`` says.
    A score that cannot be had is a failed trial. Errors: EvaluationError for too many of them; those of merging.
    """
    tried: list[WeightTrial] = []
    with Candidates(models, base=base, run=run, caller=IN_PYTHON, placement=placement) as candidates:
        for number, weights in enumerate(points):
            candidate = candidates.make(load_recipe(recipe_of_weights(weights)), label=f"trial {number}")
            try:
                scores = {task.name: task.evaluate(candidate).value for task in tasks}
                tried.append(WeightTrial(weights, seeks.value(scores), scores=scores))
            except EvaluationError as error:
                tried.append(WeightTrial(weights, None, " ".join(map(str, error.args))))
            if watch is not None:
                watch(ScaleTried(tried[-1], len(points)))
            _check_failures(tried)
    best = next(iter(ranked(tried, seeks.goal)), None)
    if best is None or best.score is None:
        raise EvaluationError(f"all {len(points)} trials failed; {tried[0].failure}")
    merge = MemoryMerge(models, recipe_of_weights(best.weights), base, run.threads)
    return WeightSearch(best.weights, best.score, tuple(tried), tuple(listed), seeks.goal, seeks.name, merge)


def _check_failures(trials: Sequence[WeightTrial]) -> None:
    failed = [trial for trial in trials if trial.score is None]
    if len(failed) >= MOST_FAILURES:
        raise EvaluationError(f"{len(failed)} of {len(trials)} trials failed; the last: {failed[-1].failure}")


def check_trials(trials: Any, seed: Any, low: float, high: float, what: str) -> None:
    """Check the options of a random search; ``what`` is drawn from ``low`` to ``high``. Errors: RecipeError."""
    if not isinstance(trials, numbers.Integral) or trials < 1:
        raise RecipeError(
            f"trials is {trials!r}; expected {'at least 1' if isinstance(trials, int) else 'a whole number'}."
        )
    if not isinstance(seed, numbers.Integral) or seed < 0:
        raise RecipeError(f"seed is {seed!r}; expected a whole number, at least 0.")
    if not isinstance(low, numbers.Real) or not isinstance(high, numbers.Real):
        raise RecipeError(f"{what} from {low!r} to {high!r}; expected two numbers, low below high.")
    try:
        is_range = math.isfinite(low) and math.isfinite(high) and low < high and math.isfinite(high - low)
    except OverflowError:  # for whole numbers of hundreds of digits
        raise RecipeError(f"{what} are beyond float64; expected two numbers, low below high.") from None
    if not is_range:
        raise RecipeError(f"{what} from {low:g} to {high:g}; expected two numbers, low below high.")
