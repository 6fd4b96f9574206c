"""Searches the open values of a recipe and returns the best recipe with its report."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from alnico.checkpoint.open_model import open_model
from alnico.devices import DEFAULT_DEVICE, Device, are_made, checked_device, devices_here
from alnico.engine.relatedness import IN_A_RECIPE, IN_PYTHON
from alnico.errors import EvaluationError, RecipeError
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.module_places import needed_bytes, own_dtype, stored_sizes
from alnico.evaluation.placement import ModulePlacement
from alnico.evaluation.task_file import TasksLike, as_tasks
from alnico.evaluation.tasks import Task, shared_examples
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.models.recipe_of_objects import BASE, take_objects
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.dtypes import CONFIG_NAMES
from alnico.recipe.reference import resolve_reference
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size, checked_count, checked_ray
from alnico.tune.gpu_room import check_room
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
from alnico.tune.search.workers import WorkerSpec, devices_of_worker, start_workers

NO_REPORT = (
    "these scores are on the examples searched on, so the best recipe's score is too high; set search.report "
    "or search.held_out to score it on examples that no trial has seen."
)
SAME_REPORT = (
    "the report is on the examples searched on, as requested (report: same), so the best recipe's score is "
    "too high."
)

REPORT_HERE = "the report was scored on the processor of this machine, which has no GPU; the trials were scored on GPUs."

CHECKPOINTS = "the checkpoint's dtype"

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
    control: bool = True,
    workers: int | None = None,
    threads: int | None = None,
    memory: Size = DEFAULT_BUDGET_BYTES,
    offline: bool = False,
    device: Any = DEFAULT_DEVICE,
    dtype: Any = "auto",
    allow_code: bool = False,
    factor_cache: str | os.PathLike[str] | None = None,
    ray: bool | str | None = None,
    watch: Watcher | None = None,
) -> SearchResult:
    """Search the values that a recipe leaves open for the best scores on tasks.

    Candidates are merged in memory and scored: on the processor with the bits of ``alnico merge``, on a GPU with its
    values up to the last bit. Trial 0 uses the default values. The same call on ``out`` resumes the search, on the same
    kind of device and in the same dtype, because scores differ in their last digits. With one worker the result depends only on the
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
        control: Also report the best recipe with a random vector of the same norm in the place of each task vector; what
            it gains is luck. It costs one evaluation.
        workers: Number of processes that score trials; default: 1, and with cuda:all one per GPU. They take the GPUs
            in turn. On a Ray cluster each one takes a GPU of it.
        threads: Threads of each worker; default: the processors divided by the workers.
    Errors: RecipeError, with a line for every mistake; EvaluationError for tasks that do not fit the search,
        for reported tasks that share examples with those searched on, and after too many failed trials;
        OutputError for a folder or a study of another search; ResourceError for a device that does not exist, or
        that is too small for its workers; ModelError, HubError, RunError.
    """
    address = checked_ray(ray)
    on_cluster = address is not None
    placement = _placement(device, dtype, on_cluster)
    if workers is None:
        workers = _default_workers(str(device), on_cluster, placement)
    workers = checked_count(workers, "workers")
    run = RunOptions.of(
        memory=memory,
        threads=threads,
        offline=offline,
        watch=watch,
        processes=workers,
        factor_cache=factor_cache,
        device=device,
        ray=ray,
    )
    taken = take_objects(recipe)
    space, settings = read_search(taken.recipe, allow_code=allow_code)
    if trials is not None:
        settings = replace(settings, trials=trials)
    if _is_same(report):
        settings = replace(settings, report=SAME, held_out=None)
    source = _source(tasks if tasks is not None else settings.tasks, space, "tasks", minimize)
    if (
        placement.is_chosen and placement.device.is_gpu
    ):  # only then is it asked whether functions are among them
        read = as_tasks(source, allow_code=allow_code) if isinstance(source, str) else source
        placement = placement.for_tasks(read)
    _check_gpus(space, taken.models, placement, workers, run)
    folder = None if out is None else search_folder(out)
    if folder is not None and settings.storage is None:
        settings = replace(settings, storage=f"sqlite:///{folder / STUDY}")
    objects = {label: model for label, model in taken.models.items() if label in space.references}
    every = objects | {reference: reference for reference in space.references if reference not in objects}
    open_candidates = functools.partial(
        _open_candidates,
        references=every if objects else space.references,
        donor=_donor(space),
        folder=space.folder,
        base=taken.models.get(BASE),
        run=replace(run, watch=None, ray=None),
        caller=IN_PYTHON if objects else IN_A_RECIPE,
    )
    shares = settings.halving.shares() if settings.halving is not None else (1.0,)
    spec = WorkerSpec(
        space,
        source,
        shares,
        settings.held_out,
        open_candidates,
        allow_code,
        placement,
        devices_here()[1:] if are_made() else (),
    )
    report_source = report if report is not None else settings.report
    if report_source is not None and not isinstance(report_source, (str, os.PathLike)):
        report_source = as_tasks(report_source, minimize=minimize, may_name_others=True, argument="report")
    models = models_data(space.references, space.folder, objects, offline=run.offline)
    return _search(spec, settings, models, report_source, folder, workers, run, objects, control)


ON_THE_CLUSTER = Device("cuda", "GPUs of the Ray cluster", torch_name="cuda")
"""Stands for the GPU that Ray gives a worker: this machine may have none."""


def _placement(device: Any, dtype: Any, on_cluster: bool) -> ModulePlacement:
    """Return where candidates are scored. Errors: AlnicoError, RecipeError, ResourceError."""
    text = checked_device(device)
    if not on_cluster or text in ("auto", "cpu"):
        return ModulePlacement.of(text, dtype)
    if text not in ("cuda", "cuda:all"):
        raise RecipeError(
            f"device is {text}, and on a Ray cluster (ray) Ray chooses the GPU of each worker; expected auto, cpu, cuda or "
            "cuda:all. Choose cuda."
        )
    return replace(ModulePlacement.of("cpu", dtype), devices=(ON_THE_CLUSTER,))


def _default_workers(device: str, on_cluster: bool, placement: ModulePlacement) -> int:
    """Return one worker, or one per GPU with ``cuda:all``. Errors: RecipeError with Ray, whose GPUs this machine does not list."""
    if device == "cuda:all" and on_cluster:
        raise RecipeError(
            "device is cuda:all on a Ray cluster (ray), and workers is not given; expected the number of GPUs to use. Give "
            "it as workers."
        )
    return len(placement.devices) if device == "cuda:all" else 1


def _check_gpus(
    space: SearchSpace,
    objects: Mapping[str, Any],
    placement: ModulePlacement,
    workers: int,
    run: RunOptions,
) -> None:
    """Refuse GPUs without room for a module of each worker, as large as the donor. Errors: ResourceError, ModelError, HubError."""
    recipe, donor = space.instantiate(space.default), _donor(space)
    all_devices = placement.devices
    if not placement.device.is_gpu or placement.device == ON_THE_CLUSTER or not recipe.models:
        return
    if donor is None or donor in objects:
        return
    with closing(open_model(resolve_reference(donor, space.folder), access=run.access)) as model:
        stored = stored_sizes(model)
    dtype = placement.torch_dtype or CONFIG_NAMES.get(recipe.dtype or "") or own_dtype(stored)
    for number in range(min(workers, len(all_devices))):
        sharing = len(range(number, workers, len(all_devices)))
        what = "the module of a candidate" if sharing == 1 else f"the modules of {sharing} workers"
        own = replace(placement, devices=devices_of_worker(all_devices, number, workers))
        check_room("search", {what: sharing * needed_bytes(stored, dtype)}, dtype, own, workers=workers)


def _open_candidates(placement: ModulePlacement, *, references: Any, **options: Any) -> Candidates:
    """Open the models of a worker; other processes find this function by its name."""
    return Candidates(references, placement=placement, **options)


def _search(
    spec: WorkerSpec,
    settings: SearchSettings,
    models: Any,
    report: Tasks | None,
    folder: Path | None,
    workers: int,
    run: RunOptions,
    objects: Mapping[str, Any],
    control: bool,
) -> SearchResult:
    opened = spec.open_tasks()
    objectives = objectives_of(settings.objective, opened)
    goals = [o.goal for o in objectives]
    space = spec.space
    reported = _reported_tasks(report, opened, space, settings, spec.allow_code)
    check_sampler(settings.sampler, space.dimensions, goals)
    place = spec.placement
    scored = f"{place.device.kind} in {place.torch_dtype or CHECKPOINTS}"
    identity = Identity(space.data(), settings.data(), tasks_data(opened), models, scored)
    with Study(settings.storage, settings.study, space.dimensions, goals, identity) as study:
        worker_spec = spec if workers > 1 or run.ray is not None else replace(spec, tasks=opened)
        with start_workers(worker_spec, workers, run.ray, run.threads) as staff:
            run_trials(space, settings, objectives, study, staff, run.watch)
        result = replace(
            _result(space, settings, objectives, study),
            objects=objects,
            device=place.where if place.device != ON_THE_CLUSTER else place.device.model,
            dtype=place.own_or_dtype,
        )
    result = _with_report(result, spec, reported, control, is_same=_is_same(report))
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
    result: SearchResult, spec: WorkerSpec, reported: Sequence[HeldOut], control: bool, *, is_same: bool
) -> SearchResult:
    if not reported:
        return replace(result, notes=(*result.notes, NO_REPORT))
    placement = spec.placement
    notes: tuple[str, ...] = ()
    if placement.device == ON_THE_CLUSTER:
        placement = ModulePlacement.of("auto", placement.dtype)
        if not placement.device.is_gpu:
            notes = (REPORT_HERE,)
    card, others = report_on(
        spec.space,
        result.recipes,
        reported,
        lambda: spec.open_factory(placement),
        control_seed=result.settings.seed if control else None,
    )
    card = replace(card, device=placement.where, dtype=placement.own_or_dtype)
    notes = (*notes, *others)
    return replace(result, report=card, notes=(*result.notes, *notes, *([SAME_REPORT] if is_same else [])))


def _check_apart(searched: Sequence[Task], reported: Sequence[Task]) -> None:
    """Refuse to report on examples that are searched on. Errors: EvaluationError."""
    for task, other, count in shared_examples(reported, searched):
        raise EvaluationError(
            f"{task.name}: {count} of its examples are also in {other.name}, which is searched on, so its "
            "score would be too high; expected examples that no trial is scored on. Remove them, or set "
            "report: same."
        )
