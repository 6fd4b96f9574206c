"""Scores a trial: merges its recipe in memory and evaluates it on growing parts of the examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from alnico.checkpoint.source import Source
from alnico.errors import AlnicoError, EvaluationError
from alnico.evaluation.splits import split, steps
from alnico.evaluation.tasks import EvaluatedModel, Score, Task
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.recipe.schema import Recipe
from alnico.tune.search.space import PointValues, SearchSpace


class CandidateFactory(Protocol):
    """Makes models from recipes; see :class:`alnico.evaluation.candidates.Candidates`."""

    def make(self, recipe: Recipe, *, label: str | None = None) -> EvaluatedModel: ...

    def source(self, reference: str) -> Source: ...

    def add(self, reference: str, open_source: Callable[[], Source]) -> None: ...

    def close(self) -> None: ...


class TrialEvaluator:
    """Makes the model of a point and scores it, rung by rung. There is one per process; it keeps the last model."""

    def __init__(
        self,
        space: SearchSpace,
        tasks: Sequence[Task],
        shares: Sequence[float],
        held_out: float | None,
        open_factory: Callable[[], CandidateFactory],
    ) -> None:
        """``shares`` are the growing parts of the examples; the last is 1.

        Errors: EvaluationError for tasks that cannot be scored on a part of their examples.
        """
        self._space = space
        self._tasks = tuple(tasks)
        self._shares = tuple(shares)
        self._parts: dict[str, list[list[int]]] = {}
        for task in tasks:
            if not task.size and (len(shares) > 1 or held_out is not None):
                raise EvaluationError(
                    f"{task.name}: cannot be scored on a part of its examples, which halving and held_out "
                    "need. Remove halving and held_out, and give a report file."
                )
            searched, _ = split(task, held_out) if task.size else ([], [])
            self._parts[task.name] = [
                [searched[i] for i in places] for places in steps(len(searched), shares)
            ]
        self._open_factory = open_factory
        self._factory: CandidateFactory | None = None
        self._number: int | None = None
        self._model: EvaluatedModel | None = None
        self._scores: dict[str, list[Score]] = {}

    @property
    def factory(self) -> CandidateFactory:
        """Makes the models; opened on first use."""
        if self._factory is None:
            self._factory = self._open_factory()
        return self._factory

    @ieee_arithmetic()  # each worker of a search is a separate process
    def scores(self, number: int, point: PointValues, rung: int) -> dict[str, float]:
        """Score a trial's point on all examples up to a rung; call it for each rung in order. Errors: AlnicoError."""
        try:
            if rung == 0 or self._number != number or self._model is None:
                self._number, self._scores = number, {task.name: [] for task in self._tasks}
                self._model = self.factory.make(self._space.instantiate(point), label=f"trial {number}")
            for task in self._tasks:
                self._scores[task.name] += self._of_part(task, self._model, rung)
            return {task.name: _checked(task, self._scores[task.name]) for task in self._tasks}
        except AlnicoError:
            raise
        except Exception as error:
            message = (str(error).strip() or "no message").splitlines()[0][:300]
            raise EvaluationError(f"trial {number}: {type(error).__name__}: {message}") from error

    def _of_part(self, task: Task, model: EvaluatedModel, rung: int) -> list[Score]:
        if not task.size or (len(self._shares) == 1 and len(self._parts[task.name][0]) == task.size):
            return [task.evaluate(model)]
        part = self._parts[task.name][rung]
        return [task.evaluate(model, part)] if part else []

    def close(self) -> None:
        if self._factory is not None:
            self._factory.close()


def _checked(task: Task, scores: Sequence[Score]) -> float:
    """Return a task's score over all parts so far. Errors: EvaluationError unless it is a finite number."""
    for score in scores:
        value: Any = score.value if isinstance(score, Score) else score
        if (
            not isinstance(score, Score)
            or isinstance(value, bool)
            or not isinstance(value, (int, float))
            or value - value != 0
        ):
            raise EvaluationError(
                f"{task.name}: returned {value!r}; expected a finite number. Correct the task."
            )
    return float(scores[0].value if len(scores) == 1 else task.pooled(scores).value)
