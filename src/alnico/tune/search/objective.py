"""What a search seeks: values made of the scores of tasks, and which trials are the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alnico.errors import EvaluationError
from alnico.evaluation.tasks import Goal, Task
from alnico.tune.search.samplers.request import Trial

MEAN = "mean"


@dataclass(frozen=True)
class Objective:
    """One number to be as large or as small as can be: the weighted mean of these tasks' scores."""

    name: str
    goal: Goal
    tasks: tuple[tuple[str, float], ...]
    """Names and weights."""

    def value(self, scores: Mapping[str, float]) -> float:
        """Errors: EvaluationError for anything but finite numbers."""
        total = math.fsum(weight * scores[name] for name, weight in self.tasks) / math.fsum(
            w for _, w in self.tasks
        )
        if not math.isfinite(total):
            raise EvaluationError(
                f"{self.name}: is {total}; expected a finite number. The trial counts as failed."
            )
        return total


def objectives_of(asked: Sequence[str], tasks: Sequence[Task]) -> tuple[Objective, ...]:
    """Make the objectives of a search. Errors: EvaluationError for names of no task, and for a mean of what cannot be added."""
    by_name = {task.name: task for task in tasks}
    found = []
    for name in asked:
        if name in by_name:
            found.append(Objective(name, by_name[name].goal, ((name, 1.0),)))
        elif name == MEAN:
            goals = {task.goal for task in tasks}
            if len(goals) > 1 or (goals == {"min"} and len(tasks) > 1):
                unfit = [task.name for task in tasks if task.goal == "min"]
                raise EvaluationError(
                    f"search.objective is mean, and less is better of {', '.join(unfit)}; expected scores that can be added. "
                    f"Name the tasks to seek: objective: [{', '.join(by_name)}]."
                )
            found.append(Objective(name, tasks[0].goal, tuple((task.name, task.weight) for task in tasks)))
        else:
            raise EvaluationError(
                f"search.objective names {name!r}, which is no task; expected mean or {', '.join(by_name)}."
            )
    return tuple(found)


def is_better(value: float, other: float, goal: Goal) -> bool:
    return value > other if goal == "max" else value < other


def best_of(trials: Sequence[Trial], goals: Sequence[Goal]) -> tuple[Trial, ...]:
    """The best complete trial, the first of equal ones; of several objectives, the Pareto front by its first objective.

    A trial is on the front if no other is at least as good in all objectives and better in one; of trials with equal values the
    first is taken.
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


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def is_behind(value: float, rung: int, goal: Goal, keep: float, before: Sequence[Trial]) -> bool:
    """Is a trial to be given up after a rung: is it not among the best ``keep`` of those that came there, itself counted?"""
    others = [t.rungs[rung] for t in before if len(t.rungs) > rung and t.state in ("complete", "pruned")]
    better = sum(is_better(other, value, goal) for other in others)
    return better >= math.ceil(keep * (len(others) + 1))
