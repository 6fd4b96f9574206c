"""Holds a curve: the scores of merges by scale, those of the base and the models, the best, the barrier."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import yaml

from alnico.analysis.scores import Estimate
from alnico.errors import EvaluationError
from alnico.evaluation.scorecard import LEVEL, ModelScores, TaskSummary
from alnico.evaluation.tasks import Goal
from alnico.notebook import names_text, never_fails, result_line
from alnico.numerics.sizes import count_of
from alnico.recipe.reference import relative_reference
from alnico.tune.curve.scales import Scales, scale_text
from alnico.tune.search.objective import MEAN, is_better

CurveKind = Literal["line", "surface", "path"]
"""One scale for all models; one scale for each of two; a path from one model to another."""


@dataclass(frozen=True)
class CurvePoint:
    """One merge: its scales (one; two on a surface; on a path the position t), and its scores."""

    scales: Scales
    scores: Mapping[str, Estimate]
    mean: Estimate | None
    """The weighted mean over the curve's ``averaged`` tasks; None if there are fewer than two."""

    def on(self, objective: str) -> Estimate:
        """Return the score on a task, or the mean."""
        if objective in self.scores or self.mean is None:
            return self.scores[objective]
        return self.mean


@dataclass(frozen=True)
class Barrier:
    """The largest drop of a path below the straight line between the scores of its ends; of a loss, the largest rise above it.

    ``height`` is 0 if the path never drops below the line; ``at`` is then None. The interval is that of the
    drop at ``at`` (of the largest inside the path, if the height is 0), with paired draws, and no end of it
    is below 0. ``drops`` has the drop at every position from 0 to 1, negative where the path is better than the line.
    """

    height: Estimate
    at: float | None
    drops: Mapping[float, Estimate]

    def data(self) -> dict[str, Any]:
        return {
            **self.height.data(),
            "at": self.at,
            "drops": [{"t": t, **drop.data()} for t, drop in self.drops.items()],
        }


@dataclass(frozen=True, repr=False)
class Curve:
    """Scores of merges by scale. It draws itself at the end of a notebook's cell; ``plot()`` returns the picture.

    All scores are on the tasks that also choose the best point, so its score is too high.
    ``axes`` has the values of each scale. ``lines`` has the scores of the base and the models.
    ``barriers`` has the barrier of a path, for each task and the mean. ``device`` and ``dtype`` say where merges were
    scored, and in which dtype: ``own`` is the output dtype of the merges.
    """

    kind: CurveKind
    method: str
    base: str | None
    models: tuple[str, ...]
    tasks: tuple[TaskSummary, ...]
    averaged: tuple[str, ...]
    """The tasks in the mean."""
    objective: str
    axes: tuple[Scales, ...]
    points: tuple[CurvePoint, ...]
    lines: tuple[ModelScores, ...]
    best_recipe: Mapping[str, Any]
    draws: int
    seed: int
    barriers: Mapping[str, Barrier] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "float32"
    compile_seconds: float = field(default=0.0, compare=False)

    @property
    def best(self) -> CurvePoint:
        """The point with the best objective; of equal ones, the first."""
        return self.best_on(self.objective)

    def best_on(self, objective: str) -> CurvePoint:
        """Return the best point on a task, or on the mean."""
        best = self.points[0]
        for point in self.points[1:]:
            if is_better(point.on(objective).value, best.on(objective).value, self.goal_of(objective)):
                best = point
        return best

    @property
    def barrier(self) -> Barrier | None:
        """The barrier of a path on the objective; None for other curves."""
        return self.barriers.get(self.objective)

    @property
    def views(self) -> tuple[str, ...]:
        """What can be drawn: the mean, if there is one, and every task."""
        return (*([MEAN] if self.points[0].mean is not None else []), *(task.name for task in self.tasks))

    def goal_of(self, objective: str) -> Goal:
        """Return whether a higher or a lower score is better on a task, or on the mean."""
        name = objective if objective in self.points[0].scores else self.averaged[0]
        return next(task.goal for task in self.tasks if task.name == name)

    def metric_of(self, objective: str) -> str:
        """Return what the scores of a task, or of the mean, are called."""
        names = [objective] if objective in self.points[0].scores else self.averaged
        metrics = {task.metric for task in self.tasks if task.name in names}
        return metrics.pop() if len(metrics) == 1 else "score"

    def check_view(self, task: str) -> str:
        """Return the name of a task or the mean. Errors: EvaluationError for others."""
        if task not in self.views:
            raise EvaluationError(
                f"task is {task!r}, which the curve does not have; expected {' or '.join(self.views)}. Name one of them."
            )
        return task

    def recipe(self, folder: str | os.PathLike[str] = ".") -> str:
        """Return the recipe of the best point as YAML, with paths relative to ``folder``.

        Models in memory have their names.
        """
        recipe = {**self.best_recipe}
        recipe["models"] = [
            {**entry, "model": relative_reference(entry["model"], folder)} for entry in recipe["models"]
        ]
        if "base_model" in recipe:
            recipe["base_model"] = relative_reference(recipe["base_model"], folder)
        return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)

    def plot(
        self,
        task: str | None = None,
        *,
        ax: Any = None,
        figsize: tuple[float, float] | None = None,
        dark: bool = False,
    ) -> Any:
        """Draw the curve with matplotlib and return the figure.

        ``task`` is the name of a task, or ``mean``; default: all tasks in one picture, or the objective on a
        surface. ``ax`` are axes of your own to draw in, ``figsize`` is in inches, and ``dark`` draws light lines on
        a dark background. Errors: EvaluationError for another task; AlnicoError without the extra ``[report]``.
        """
        from alnico.tune.curve.picture import draw_curve

        return draw_curve(self, task, ax=ax, figsize=figsize, dark=dark)

    def __repr__(self) -> str:
        best, barrier = self.best, self.barrier
        facts = [f"best {self.objective} {best.on(self.objective).value:.4g} at {self.place(best.scales)}"]
        if barrier is not None:
            at = "" if barrier.at is None else f" at t {scale_text(barrier.at)}"
            facts.append(f"barrier {barrier.height.value:.4g}{at}")
        what = {"line": "curve", "surface": "surface", "path": "path"}[self.kind]
        return result_line(
            f"{what} of {names_text(self.models)}",
            f"{self.method}, {count_of(len(self.points), 'point')}",
            *facts,
        )

    @never_fails
    def _repr_html_(self) -> str:
        from alnico.tune.curve.picture import curve_html

        return curve_html(self)

    def data(self) -> dict[str, Any]:
        """Return the curve as plain data, for ``--json``."""
        return {
            "curve": self.kind,
            "method": self.method,
            "base": self.base,
            "models": list(self.models),
            "tasks": [asdict(task) for task in self.tasks],
            "averaged": list(self.averaged),
            "objective": self.objective,
            "goal": self.goal_of(self.objective),
            "axes": [list(axis) for axis in self.axes],
            "best": self._point(self.best),
            "recipe": dict(self.best_recipe),
            "barriers": {name: barrier.data() for name, barrier in self.barriers.items()},
            "lines": [
                {"name": m.name, "model": m.reference, "role": m.role, **_scores(m.scores, m.mean)}
                for m in self.lines
            ],
            "points": [self._point(point) for point in self.points],
            "bootstrap": {"level": LEVEL, "draws": self.draws, "seed": self.seed},
            "device": self.device,
            "dtype": self.dtype,
        }

    def _point(self, point: CurvePoint) -> dict[str, Any]:
        return {"scales": list(point.scales), **_scores(point.scores, point.mean)}

    def place(self, scales: Sequence[float]) -> str:
        """Return where a point is, in words: ``scale 0.3``, ``scales 0.3 and 0.5``, ``t 0.5``."""
        return place_text(self.kind, scales)


def place_text(kind: CurveKind, scales: Sequence[float]) -> str:
    """Return where a point is, in words.

    >>> place_text("surface", (0.3, 1.0)), place_text("path", (0.5,))
    ('scales 0.3 and 1', 't 0.5')
    """
    word = {"line": "scale", "surface": "scales", "path": "t"}[kind]
    return f"{word} {' and '.join(map(scale_text, scales))}"


def _scores(scores: Mapping[str, Estimate], mean: Estimate | None) -> dict[str, Any]:
    return {
        "scores": {task: estimate.data() for task, estimate in scores.items()},
        "mean": None if mean is None else mean.data(),
    }
