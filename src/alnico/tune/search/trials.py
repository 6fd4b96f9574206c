"""Runs the trials of a search: takes each from the study, merges it in memory and scores it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from alnico.errors import AlnicoError, EvaluationError, HubError, ModelError, RunError
from alnico.events import TrialDone, Watcher
from alnico.tune.search.objective import Objective, is_behind
from alnico.tune.search.samplers.grid import grid_size
from alnico.tune.search.samplers.registry import suggest
from alnico.tune.search.samplers.request import PointRequest
from alnico.tune.search.settings import SearchSettings
from alnico.tune.search.space import PointValues, SearchSpace
from alnico.tune.search.study import Study
from alnico.tune.search.workers import TrialScores, Worker, WorkerResult, result_of


@dataclass
class _Running:
    """A trial that a worker is scoring."""

    number: int
    point: PointValues
    rung: int
    worker: Worker


def run_trials(
    space: SearchSpace,
    settings: SearchSettings,
    objectives: Sequence[Objective],
    study: Study,
    workers: Sequence[Worker],
    watch: Watcher | None = None,
) -> None:
    """Run trials until the study has ``settings.trials`` of them, or the timeout has passed.

    With one worker the result depends only on the settings, however often the search was interrupted. Trials
    that another process on this machine left unfinished run again with the same numbers and points. After an
    error or Ctrl-C, the trials that were running wait to run again.
    Errors: EvaluationError when ``settings.failures`` trials in a row have failed; RunError when a worker is
    lost; ModelError, HubError.
    """
    _SearchRun(space, settings, tuple(objectives), study, watch).all(workers)


class _SearchRun:
    def __init__(
        self,
        space: SearchSpace,
        settings: SearchSettings,
        objectives: tuple[Objective, ...],
        study: Study,
        watch: Watcher | None,
    ) -> None:
        self._space = space
        self._settings = settings
        self._objectives = objectives
        self._study = study
        self._watch = watch
        self._rungs = len(settings.halving.shares()) if settings.halving is not None else 1
        self._deadline = None if settings.timeout is None else time.monotonic() + settings.timeout
        self._failed = 0
        self._trials = settings.trials
        if settings.sampler == "grid":
            self._trials = min(self._trials, grid_size(space.dimensions))

    def all(self, workers: Sequence[Worker]) -> None:
        idle = list(workers)
        running: dict[Future[TrialScores | WorkerResult], _Running] = {}
        taken: list[int] = []
        try:
            while True:
                while idle and (begun := self._begin(taken)) is not None:
                    trial = _Running(*begun, 0, idle.pop())
                    running[trial.worker.scores(trial.number, trial.point, 0)] = trial
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    trial = running.pop(future)
                    if self._continues(trial, future):
                        trial.rung += 1
                        running[trial.worker.scores(trial.number, trial.point, trial.rung)] = trial
                        continue
                    taken.remove(trial.number)
                    idle.append(trial.worker)
                    self._stop_if_failing()
        finally:
            for number in taken:
                self._study.wait(number)

    def _begin(self, taken: list[int]) -> tuple[int, PointValues] | None:
        """Take the next trial and return its number and point; None if no more trials should begin."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return None
        number = self._study.begin(self._trials)
        if number is None:
            return None
        taken.append(number)
        trials = self._study.trials()
        point: PointValues = next(t.point for t in trials if t.number == number)
        if not point:
            settings = self._settings
            request = PointRequest(
                self._space.dimensions,
                self._study.goals,
                settings.seed,
                number,
                [t for t in trials if t.number < number],
                settings.population,
                settings.concentration,
            )
            point = suggest(settings.sampler, request)
            self._study.set_point(number, point)
        return number, point

    def _continues(self, trial: _Running, future: Future[TrialScores | WorkerResult]) -> bool:
        """Record the result of a rung, and return whether the trial continues with the next one."""
        number = trial.number
        try:
            scores = result_of(future)
            values = [objective.value(scores) for objective in self._objectives]
        except (RunError, ModelError, HubError):  # the next trial would fail alike
            raise
        except AlnicoError as error:
            self._study.fail(number, " ".join(error.args))
            self._failed += 1
            self._report(number)
            return False
        self._failed = 0
        if trial.rung == self._rungs - 1:
            self._study.set_recipe(number, self._space.instantiate(trial.point).text)
            self._study.complete(number, values, scores)
            self._report(number)
            return False
        self._study.report(number, trial.rung, values[0])
        assert self._settings.halving is not None  # only halving has more than one rung
        before = [t for t in self._study.trials() if t.number < number]
        if is_behind(values[0], trial.rung, self._objectives[0].goal, self._settings.halving.keep, before):
            self._study.prune(number, scores)
            self._report(number)
            return False
        return True

    def _report(self, number: int) -> None:
        if self._watch is not None:
            self._watch(TrialDone(next(t for t in self._study.trials() if t.number == number)))

    def _stop_if_failing(self) -> None:
        if self._failed >= self._settings.failures:
            last = max((t for t in self._study.trials() if t.state == "failed"), key=lambda t: t.number)
            raise EvaluationError(
                f"{self._failed} trials in a row have failed; expected scores. The last, trial "
                f"{last.number}: {last.reason}",
                "Correct the cause and run the same command, which resumes; or allow more failures with "
                "search.failures.",
            )
