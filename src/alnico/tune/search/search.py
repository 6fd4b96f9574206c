"""Searching the coefficients of a recipe: from the file to the best recipe and its report."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alnico.errors import EvaluationError, RecipeError
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.task_file import as_tasks
from alnico.evaluation.tasks import Task, shared_examples
from alnico.events import Watcher
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size, checked_count
from alnico.tune.search.files import STUDY, search_folder, write_search
from alnico.tune.search.fingerprint import Identity, models_data, tasks_data
from alnico.tune.search.objective import Objective, best_of, objectives_of
from alnico.tune.search.report import HeldOut, held_out
from alnico.tune.search.report import report as report_on
from alnico.tune.search.result import SearchResult
from alnico.tune.search.samplers.registry import check_sampler
from alnico.tune.search.settings import SAME, SearchSettings, read_search
from alnico.tune.search.space import SearchSpace
from alnico.tune.search.study import Study
from alnico.tune.search.trials import run_trials
from alnico.tune.search.workers import Engine, WorkerSpec, start_workers

NO_REPORT = (
    "these scores are of the examples searched on, and flatter the best recipe; search.report or search.held_out gives it "
    "examples that no trial has seen."
)
FLATTERING = (
    "the report is of the examples searched on, as asked (report: same), and flatters the best recipe."
)

Tasks = str | os.PathLike[str] | Sequence[Task]
SearchLike = str | os.PathLike[str] | Mapping[str, Any]


@ieee_arithmetic()
def search(
    recipe: SearchLike,
    *,
    tasks: Tasks | None = None,
    report: Tasks | None = None,
    out: str | os.PathLike[str] | None = None,
    trials: int | None = None,
    workers: int = 1,
    engine: Engine = "local",
    threads: int | None = None,
    memory: Size = DEFAULT_BUDGET_BYTES,
    offline: bool = False,
    allow_code: bool = False,
    watch: Watcher | None = None,
) -> SearchResult:
    """Search the values that a recipe leaves open for the best scores on tasks.

    Candidates are merged in memory, with the bits of ``alnico merge``, and scored. Trial 0 uses the default
    values. The same call on ``out`` resumes the search. With one worker the result depends only on the
    settings, however often the search was interrupted. ``watch`` receives each trial that ends
    (:class:`alnico.events.TrialDone`).

    Options:
        recipe: Recipe with {search: [least, greatest]} or {choice: [...]} in place of values, and settings
            under search.
        tasks: Tasks to search on; default: those of the recipe.
        report: Tasks to report on, which the search never scores; same reports on the tasks searched on.
        out: Folder of the search, with its study, the best recipe, all trials and the page.
        trials: Number of trials in all, including those of earlier runs; default: the recipe's.
        workers: Number of processes that score trials.
        engine: Where the workers run: local (this machine) or ray (a Ray cluster).
        threads: Threads of each worker; default: the processors divided by the workers.
    Errors: RecipeError, with a line for every mistake; EvaluationError for tasks that do not fit the search,
        for reported tasks that share examples with those searched on, and after too many failed trials;
        OutputError for a folder or a study of another search; ModelError, HubError, RunError.
    """
    workers = checked_count(workers, "workers")
    run = RunOptions.of(memory=memory, threads=threads, offline=offline, watch=watch, processes=workers)
    space, settings = read_search(recipe, allow_code=allow_code)
    if trials is not None:
        settings = replace(settings, trials=trials)
    if report == SAME:
        settings = replace(settings, report=SAME, held_out=None)
    folder = None if out is None else search_folder(out)
    if folder is not None and settings.storage is None:
        settings = replace(settings, storage=f"sqlite:///{folder / STUDY}")
    given = _source(tasks if tasks is not None else settings.tasks, space, "tasks")
    making = functools.partial(
        Candidates,
        space.references,
        donor=_donor(space),
        folder=space.folder,
        run=replace(run, watch=None),
    )
    shares = settings.halving.shares() if settings.halving is not None else (1.0,)
    order = WorkerSpec(space, given, shares, settings.held_out, making, allow_code)
    asked = report if report is not None else settings.report
    models = models_data(space.references, space.folder, offline=run.offline)
    return _found(order, settings, models, asked, folder, workers, engine, run)


def _found(
    order: WorkerSpec,
    settings: SearchSettings,
    models: Any,
    report: Tasks | None,
    folder: Path | None,
    workers: int,
    engine: Engine,
    run: RunOptions,
) -> SearchResult:
    opened = order.open_tasks()
    objectives = objectives_of(settings.objective, opened)
    goals = [o.goal for o in objectives]
    space = order.space
    kept = _kept(report, opened, space, settings, order.allow_code)
    check_sampler(settings.sampler, space.dimensions, goals)
    identity = Identity(space.data(), settings.data(), tasks_data(opened), models)
    with Study(settings.storage, settings.study, space.dimensions, goals, identity) as study:
        own = order if workers > 1 or engine == "ray" else replace(order, tasks=opened)
        with start_workers(own, workers, engine, run.threads) as staff:
            run_trials(space, settings, objectives, study, staff, run.watch)
        found = _result(space, settings, objectives, study)
    found = _with_report(found, order, kept, is_same=report == SAME)
    if folder is not None:
        write_search(found, folder)
    return found


def _result(
    space: SearchSpace, settings: SearchSettings, objectives: tuple[Objective, ...], study: Study
) -> SearchResult:
    trials = tuple(t for t in study.trials() if t.state != "waiting")
    best = best_of(trials, [o.goal for o in objectives])
    if not best:
        reasons = next((t.reason for t in reversed(trials) if t.reason), "the time was over before one ended")
        raise EvaluationError(
            f"no trial of {len(trials)} is complete ({reasons}); expected one at least. Mend it, and search again."
        )
    return SearchResult(
        name=Path(space.name).name,
        recipes=tuple(space.instantiate(t.point) for t in best),
        best=best,
        trials=trials,
        objectives=objectives,
        dimensions=tuple(d.name for d in space.dimensions),
        settings=settings,
        importances=study.importances(),
    )


def _donor(space: SearchSpace) -> str | None:
    recipe = space.instantiate(space.default)
    return recipe.base_model or next(iter(recipe.references), None)


def _source(given: Tasks | None, space: SearchSpace, key: str) -> tuple[Task, ...] | str:
    """The tasks, or their file as a path from here: of the settings, relative to the recipe's folder."""
    if given is None:
        raise RecipeError(
            f"{space.name}: search.{key} is missing; expected the file of the tasks to search on. Add it, or give --{key}."
        )
    if not isinstance(given, (str, os.PathLike)):
        return tuple(given)
    path = Path(given)
    beside = Path(space.folder) / path
    return os.fspath(beside if not path.exists() and beside.exists() else path)


def _kept(
    report: Tasks | None,
    searched: Sequence[Task],
    space: SearchSpace,
    settings: SearchSettings,
    allow_code: bool,
) -> tuple[HeldOut, ...]:
    """The tasks to report on, with their examples. Errors: EvaluationError for examples that are searched on, too."""
    if settings.held_out is not None and report is None:
        return held_out(searched, settings.held_out)
    if report is None:
        return ()
    if report == SAME:
        return tuple(map(HeldOut, searched))
    source = _source(report, space, "report")
    tasks = as_tasks(source, allow_code=allow_code)
    _check_apart(searched, tasks)
    return tuple(map(HeldOut, tasks))


def _with_report(
    found: SearchResult, order: WorkerSpec, kept: Sequence[HeldOut], *, is_same: bool
) -> SearchResult:
    if not kept:
        return replace(found, notes=(*found.notes, NO_REPORT))
    card, notes = report_on(order.space, found.recipes, kept, order.open_factory)
    return replace(found, report=card, notes=(*found.notes, *notes, *([FLATTERING] if is_same else [])))


def _check_apart(searched: Sequence[Task], reported: Sequence[Task]) -> None:
    """Refuse to report on what was searched on. Errors: EvaluationError."""
    for task, other, count in shared_examples(reported, searched):
        raise EvaluationError(
            f"{task.name}: {count} of its examples are searched on, in {other.name}, and its score would flatter; expected "
            "examples that no trial is scored on. Leave them out, or say report: same."
        )
