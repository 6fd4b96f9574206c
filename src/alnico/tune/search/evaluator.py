"""Trying one recipe: it is merged in memory and scored on growing parts of the examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from alnico.errors import AlnicoError, EvaluationError
from alnico.evaluation.splits import split, steps
from alnico.evaluation.tasks import EvaluatedModel, Score, Task
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.recipe.schema import Recipe
from alnico.tune.search.space import PointValues, SearchSpace


class CandidateFactory(Protocol):
    """What makes models of recipes: :class:`alnico.evaluation.candidates.Candidates`."""

    def make(self, recipe: Recipe) -> EvaluatedModel: ...

    def close(self) -> None: ...


class TrialEvaluator:
    """Makes the model of a point and scores it, rung by rung. One for each process; it keeps the last model and its scores."""

    def __init__(
        self,
        space: SearchSpace,
        tasks: Sequence[Task],
        shares: Sequence[float],
        held_out: float | None,
        open_maker: Callable[[], CandidateFactory],
    ) -> None:
        """``shares`` are the growing parts of the examples, the last 1. Errors: EvaluationError for tasks that have no parts."""
        self._space = space
        self._tasks = tuple(tasks)
        self._shares = tuple(shares)
        self._parts: dict[str, list[list[int]]] = {}
        for task in tasks:
            if not task.size and (len(shares) > 1 or held_out is not None):
                raise EvaluationError(
                    f"{task.name}: cannot be scored on a part of its examples, as halving and held_out do; expected tasks that can. "
                    "Leave halving and held_out out, and give a report file."
                )
            searched, _ = split(task, held_out) if task.size else ([], [])
            self._parts[task.name] = [
                [searched[i] for i in places] for places in steps(len(searched), shares)
            ]
        self._open_maker = open_maker
        self._maker: CandidateFactory | None = None
        self._number: int | None = None
        self._subject: EvaluatedModel | None = None
        self._found: dict[str, list[Score]] = {}

    @property
    def maker(self) -> CandidateFactory:
        """What makes the models: opened when first asked."""
        if self._maker is None:
            self._maker = self._open_maker()
        return self._maker

    @ieee_arithmetic()  # a worker of a search is a process of its own
    def scores(self, number: int, point: PointValues, rung: int) -> dict[str, float]:
        """Score a trial's point on all examples up to a rung; rungs are asked for in order. Errors: AlnicoError."""
        try:
            if rung == 0 or self._number != number or self._subject is None:
                self._number, self._found = number, {task.name: [] for task in self._tasks}
                self._subject = self.maker.make(self._space.instantiate(point))
            for task in self._tasks:
                self._found[task.name] += self._of_part(task, self._subject, rung)
            return {task.name: _checked(task, self._found[task.name]) for task in self._tasks}
        except AlnicoError:
            raise
        except Exception as error:
            said = (str(error).strip() or "without a word").splitlines()[0][:300]
            raise EvaluationError(f"trial {number}: {type(error).__name__}: {said}") from error

    def _of_part(self, task: Task, subject: EvaluatedModel, rung: int) -> list[Score]:
        if not task.size or (len(self._shares) == 1 and len(self._parts[task.name][0]) == task.size):
            return [task.evaluate(subject)]
        part = self._parts[task.name][rung]
        return [task.evaluate(subject, part)] if part else []

    def close(self) -> None:
        if self._maker is not None:
            self._maker.close()


def _checked(task: Task, scores: Sequence[Score]) -> float:
    """A task's score of all parts so far. Errors: EvaluationError for anything but a finite number."""
    for score in scores:
        value: Any = score.value if isinstance(score, Score) else score
        if (
            not isinstance(score, Score)
            or isinstance(value, bool)
            or not isinstance(value, (int, float))
            or value - value != 0
        ):
            raise EvaluationError(f"{task.name}: gave {value!r}; expected a finite number. Mend the task.")
    return float(scores[0].value if len(scores) == 1 else task.pooled(scores).value)
