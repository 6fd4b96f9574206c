"""Searches the open values of a recipe and returns the best recipe with its report."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alnico.engine.relatedness import IN_A_RECIPE, IN_PYTHON
from alnico.errors import EvaluationError, RecipeError
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.task_file import TasksLike, as_tasks
from alnico.evaluation.tasks import Task, shared_examples
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.models.recipe_of_objects import BASE, take_objects
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
    "these scores are on the examples searched on, so the best recipe's score is too high; set search.report "
    "or search.held_out to score it on examples that no trial has seen."
)
SAME_REPORT = (
    "the report is on the examples searched on, as requested (report: same), so the best recipe's score is "
    "too high."
)

Tasks = TasksLike
SearchLike = str | os.PathLike[str] | Mapping[str, Any]


@counts_compiling
@ieee_arithmetic()
def search(
    recipe: SearchLike,
    *,
    tasks: Tasks | None = None,
    report: Tasks | None = None,
    minimize: bool | Sequence[str] = False,
    out: str | os.PathLike[str] | None = None,
    trials: int | None = None,
    workers: int = 1,
    engine: Engine = "local",
    threads: int | None = None,
    memory: Size = DEFAULT_BUDGET_BYTES,
    offline: bool = False,
    allow_code: bool = False,
    factor_cache: str | os.PathLike[str] | None = None,
    watch: Watcher | None = None,
) -> SearchResult:
    """Search the values that a recipe leaves open for the best scores on tasks.

    Candidates are merged in memory, with the bits of ``alnico merge``, and scored. Trial 0 uses the default
    values. The same call on ``out`` resumes the search. With one worker the result depends only on the
    settings, however often the search was interrupted. ``watch`` receives each trial that ends
    (:class:`alnico.events.TrialDone`).

    In Python ``recipe`` may be a mapping with models in memory in the places of paths, called ``base`` and
    ``models[0]``, ``models[1]`` and so on, and ``tasks`` a function that scores a model, or a dict of functions, as
    for :func:`alnico.evaluate`. ``result.module()`` and ``result.state_dict()`` are then the best merge.

    Options:
        recipe: Recipe with {search: [least, greatest]} or {choice: [...]} in place of values, and settings
            under search.
        tasks: Tasks to search on; default: those of the recipe.
        report: Tasks to report on, which the search never scores; same reports on the tasks searched on.
        minimize: Scores of functions for which lower is better: True for all, or their names.
        out: Folder of the search, with its study, the best recipe, all trials and the page; default on
            the command line: the recipe's name with -search at its end.
        trials: Number of trials in all, including those of earlier runs; default: the recipe's.
        workers: Number of processes that score trials.
        engine: Where the workers run: local (this machine) or ray (a Ray cluster).
        threads: Threads of each worker; default: the processors divided by the workers.
    Errors: RecipeError, with a line for every mistake; EvaluationError for tasks that do not fit the search,
        for reported tasks that share examples with those searched on, and after too many failed trials;
        OutputError for a folder or a study of another search; ModelError, HubError, RunError.
    """
    workers = checked_count(workers, "workers")
    run = RunOptions.of(
        memory=memory,
        threads=threads,
        offline=offline,
        watch=watch,
        processes=workers,
        factor_cache=factor_cache,
    )
    taken = take_objects(recipe)
    space, settings = read_search(taken.recipe, allow_code=allow_code)
    if trials is not None:
        settings = replace(settings, trials=trials)
    if _is_same(report):
        settings = replace(settings, report=SAME, held_out=None)
    folder = None if out is None else search_folder(out)
    if folder is not None and settings.storage is None:
        settings = replace(settings, storage=f"sqlite:///{folder / STUDY}")
    source = _source(tasks if tasks is not None else settings.tasks, space, "tasks", minimize)
    objects = {label: model for label, model in taken.models.items() if label in space.references}
    every = objects | {reference: reference for reference in space.references if reference not in objects}
    open_candidates = functools.partial(
        Candidates,
        every if objects else space.references,
        donor=_donor(space),
        folder=space.folder,
        base=taken.models.get(BASE),
        run=replace(run, watch=None),
        caller=IN_PYTHON if objects else IN_A_RECIPE,
    )
    shares = settings.halving.shares() if settings.halving is not None else (1.0,)
    spec = WorkerSpec(space, source, shares, settings.held_out, open_candidates, allow_code)
    report_source = report if report is not None else settings.report
    if report_source is not None and not isinstance(report_source, (str, os.PathLike)):
        report_source = as_tasks(report_source, minimize=minimize, may_name_others=True, argument="report")
    models = models_data(space.references, space.folder, objects, offline=run.offline)
    return _search(spec, settings, models, report_source, folder, workers, engine, run, objects)


def _search(
    spec: WorkerSpec,
    settings: SearchSettings,
    models: Any,
    report: Tasks | None,
    folder: Path | None,
    workers: int,
    engine: Engine,
    run: RunOptions,
    objects: Mapping[str, Any],
) -> SearchResult:
    opened = spec.open_tasks()
    objectives = objectives_of(settings.objective, opened)
    goals = [o.goal for o in objectives]
    space = spec.space
    reported = _reported_tasks(report, opened, space, settings, spec.allow_code)
    check_sampler(settings.sampler, space.dimensions, goals)
    identity = Identity(space.data(), settings.data(), tasks_data(opened), models)
    with Study(settings.storage, settings.study, space.dimensions, goals, identity) as study:
        worker_spec = spec if workers > 1 or engine == "ray" else replace(spec, tasks=opened)
        with start_workers(worker_spec, workers, engine, run.threads) as staff:
            run_trials(space, settings, objectives, study, staff, run.watch)
        result = replace(_result(space, settings, objectives, study), objects=objects)
    result = _with_report(result, spec, reported, is_same=_is_same(report))
    if folder is not None:
        write_search(result, folder)
    return result


def _result(
    space: SearchSpace, settings: SearchSettings, objectives: tuple[Objective, ...], study: Study
) -> SearchResult:
    trials = tuple(t for t in study.trials() if t.state != "waiting")
    best = best_of(trials, [o.goal for o in objectives])
    if not best:
        reason = next((t.reason for t in reversed(trials) if t.reason), "the timeout passed before one ended")
        raise EvaluationError(
            f"none of {len(trials)} trials is complete ({reason}); expected at least one. Correct the cause, "
            "and search again."
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


def _is_same(report: Tasks | None) -> bool:
    return isinstance(report, str) and report == SAME


def _source(
    tasks: Tasks | None, space: SearchSpace, key: str, minimize: bool | Sequence[str] = False
) -> tuple[Task, ...] | str:
    """Return the tasks, or their file; a relative path may also start at the recipe's folder."""
    if tasks is None:
        raise RecipeError(
            f"{space.name}: search.{key} is missing; expected the tasks file to search on. Add it, or give "
            f"--{key}."
        )
    if not isinstance(tasks, (str, os.PathLike)):
        return as_tasks(tasks, minimize=minimize, argument=key)
    path = Path(tasks)
    in_folder = Path(space.folder) / path
    return os.fspath(in_folder if not path.exists() and in_folder.exists() else path)


def _reported_tasks(
    report: Tasks | None,
    searched: Sequence[Task],
    space: SearchSpace,
    settings: SearchSettings,
    allow_code: bool,
) -> tuple[HeldOut, ...]:
    """Return the tasks to report on. Errors: EvaluationError for examples that are also searched on."""
    if settings.held_out is not None and report is None:
        return held_out(searched, settings.held_out)
    if report is None:
        return ()
    if _is_same(report):
        return tuple(map(HeldOut, searched))
    source = _source(report, space, "report")
    tasks = as_tasks(source, allow_code=allow_code)
    _check_apart(searched, tasks)
    return tuple(map(HeldOut, tasks))


def _with_report(
    result: SearchResult, spec: WorkerSpec, reported: Sequence[HeldOut], *, is_same: bool
) -> SearchResult:
    if not reported:
        return replace(result, notes=(*result.notes, NO_REPORT))
    card, notes = report_on(spec.space, result.recipes, reported, spec.open_factory)
    return replace(result, report=card, notes=(*result.notes, *notes, *([SAME_REPORT] if is_same else [])))


def _check_apart(searched: Sequence[Task], reported: Sequence[Task]) -> None:
    """Refuse to report on examples that are searched on. Errors: EvaluationError."""
    for task, other, count in shared_examples(reported, searched):
        raise EvaluationError(
            f"{task.name}: {count} of its examples are also in {other.name}, which is searched on, so its "
            "score would be too high; expected examples that no trial is scored on. Remove them, or set "
            "report: same."
        )
