"""Computes the objectives of a search from the scores of tasks, and selects the best trials."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alnico.errors import EvaluationError
from alnico.evaluation.tasks import Goal, Task
from alnico.tune.search.samplers.request import Trial

MEAN = "mean"


@dataclass(frozen=True)
class Objective:
    """A number to maximise or minimise: the weighted mean of the scores of these tasks."""

    name: str
    goal: Goal
    tasks: tuple[tuple[str, float], ...]
    """Names and weights."""

    def value(self, scores: Mapping[str, float]) -> float:
        """Return the objective. Errors: EvaluationError unless it is finite."""
        total = math.fsum(weight * scores[name] for name, weight in self.tasks) / math.fsum(
            w for _, w in self.tasks
        )
        if not math.isfinite(total):
            raise EvaluationError(
                f"{self.name}: is {total}; expected a finite number. The trial counts as failed."
            )
        return total


def objectives_of(names: Sequence[str], tasks: Sequence[Task]) -> tuple[Objective, ...]:
    """Return the objectives of a search. Errors: EvaluationError for unknown tasks, and for a mean of unlike scores."""
    by_name = {task.name: task for task in tasks}
    objectives = []
    for name in names:
        if name in by_name:
            objectives.append(Objective(name, by_name[name].goal, ((name, 1.0),)))
        elif name == MEAN:
            goals = {task.goal for task in tasks}
            if len(goals) > 1 or (goals == {"min"} and len(tasks) > 1):
                unfit = [task.name for task in tasks if task.goal == "min"]
                raise EvaluationError(
                    f"search.objective is mean, but lower is better for {', '.join(unfit)}; expected scores "
                    f"that can be averaged. Name the tasks: objective: [{', '.join(by_name)}]."
                )
            objectives.append(
                Objective(name, tasks[0].goal, tuple((task.name, task.weight) for task in tasks))
            )
        else:
            raise EvaluationError(
                f"search.objective names {name!r}, which is not a task; expected mean or "
                f"{', '.join(by_name)}."
            )
    return tuple(objectives)


ObjectiveLike = str | Mapping[str, float]
"""What a soup or a search of weights improves: mean, the name of a score, or the weight of each score in a mean."""


def objective_of(tasks: Sequence[Task], objective: ObjectiveLike, *, may_be_min: bool = False) -> Objective:
    """Return one objective over tasks. ``may_be_min``: the mean of several scores where lower is better is wanted.

    Errors: EvaluationError for no tasks, unknown names, weights that are no numbers above 0, and a mean of unlike scores.
    """
    if not tasks:
        raise EvaluationError(
            "tasks: there are none; expected at least one to choose by. Add tasks to the tasks file, or pass a "
            "function."
        )
    by_name = {task.name: task for task in tasks}
    if isinstance(objective, str) and objective in by_name:
        return Objective(objective, by_name[objective].goal, ((objective, 1.0),))
    named = {task.name: task.weight for task in tasks} if objective == MEAN else objective
    if not isinstance(named, Mapping) or not named:
        raise EvaluationError(
            f"objective is {objective!r}, which is not a task; expected mean or {', '.join(by_name)}. Name "
            "one of them."
        )
    for name, weight in named.items():
        if name not in by_name:
            raise EvaluationError(
                f"objective names {name!r}, which is not a task; expected {', '.join(by_name)}. Name one of them."
            )
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not 0 < weight < math.inf:
            raise EvaluationError(
                f"objective[{name!r}] is {weight!r}; expected the weight of this score in the mean, above 0."
            )
    unfit = [name for name in named if by_name[name].goal == "min"]
    if unfit and len(named) > 1 and not (may_be_min and len(unfit) == len(named)):
        raise EvaluationError(
            f"objective is mean, but lower is better for {', '.join(unfit)}; expected tasks whose scores can "
            "be averaged. Name one task as the objective."
        )
    return Objective(MEAN, by_name[next(iter(named))].goal, tuple((n, float(w)) for n, w in named.items()))


def is_better(value: float, other: float, goal: Goal) -> bool:
    return value > other if goal == "max" else value < other


def best_of(trials: Sequence[Trial], goals: Sequence[Goal]) -> tuple[Trial, ...]:
    """Return the best complete trial (the first on a tie) or, for several objectives, the Pareto front.

    The front is sorted by the first objective. A trial is on it if no other is at least as good in all objectives and
    better in one; among trials with equal values, the first is kept.
    """
    complete = [t for t in trials if t.state == "complete"]
    signs = [1.0 if goal == "max" else -1.0 for goal in goals]
    rated = [(tuple(s * v for s, v in zip(signs, t.values, strict=True)), t) for t in complete]
    if len(goals) == 1:
        return tuple(t for _, t in sorted(rated, key=lambda r: (-r[0][0], r[1].number))[:1])
    front: dict[tuple[float, ...], Trial] = {}
    for values, trial in rated:
        if not any(_dominates(other, values) for other, _ in rated):
            front.setdefault(values, trial)
    return tuple(front[values] for values in sorted(front, reverse=True))


def _dominates(values: Sequence[float], other: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(values, other, strict=True)) and tuple(values) != tuple(other)


def is_behind(value: float, rung: int, goal: Goal, keep: float, before: Sequence[Trial]) -> bool:
    """Check whether to prune a trial after a rung: it is not among the best ``keep`` that reached it, itself included."""
    others = [t.rungs[rung] for t in before if len(t.rungs) > rung and t.state in ("complete", "pruned")]
    better = sum(is_better(other, value, goal) for other in others)
    return better >= math.ceil(keep * (len(others) + 1))
