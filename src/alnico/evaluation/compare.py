"""Compares a merged model with its parents and its base, next to their scores on tasks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from alnico.analysis.compare import compare_models
from alnico.analysis.retention import Retention, recorded_base
from alnico.analysis.scores import BASE, MERGED, Estimate, Estimates, ScoreTable, read_estimates
from alnico.checkpoint.open_model import open_model
from alnico.devices import DEFAULT_DEVICE
from alnico.errors import EvaluationError, HubError, ModelError
from alnico.evaluation.memory_subject import subjects_of
from alnico.evaluation.placement import ModulePlacement
from alnico.evaluation.scorecard import score_models
from alnico.evaluation.task_file import TasksLike, as_tasks
from alnico.evaluation.tasks import Task
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.models.open_models import AnyModel, AnyModels, name_model, name_models, path_of, template_of
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size


@counts_compiling
@ieee_arithmetic()
def compare(
    parents: AnyModels,
    merged: AnyModel,
    *,
    base: AnyModel | None = None,
    names: Sequence[str] | None = None,
    scores: ScoreTable | Sequence[str | os.PathLike[str]] = (),
    tasks: TasksLike | None = None,
    out: str | os.PathLike[str] | None = None,
    top_share: float = 0.2,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    device: Any = DEFAULT_DEVICE,
    dtype: Any = "auto",
    allow_code: bool = False,
    watch: Watcher | None = None,
) -> Retention:
    """Measure what a merged model kept of its parents.

    It compares distances, task vectors, signs, largest parameters and scores, by group of tensors. The base
    is the one that the merged model's recipe names, unless ``base`` is given. Without a base it measures only
    distances, and ``retention.notes`` says so. With ``out`` the folder gets ``retention.json``, ``retention.csv`` and
    everything that :func:`analyze` writes about the parents and the merged model. ``scores`` may also be a
    mapping of tasks to models to scores. The models may also be in memory, of every kind that
    :func:`alnico.merge_models` takes; they are called ``parents[0]``, ``parents[1]``, ``merged`` and ``base``,
    also in ``scores``.

    With ``tasks`` the base, the parents and the merged model are scored: a function, a dict of functions, a tasks
    file, or tasks, as for :func:`alnico.evaluate`. ``retention.scores`` says what the merge kept of the best
    parent's score, and ``retention.by_model`` has every score. Tasks where lower is better are left out, with a
    note.

    Options:
        parents: The models that were merged: directories, files, URLs, or owner/name@revision on the hub.
        merged: The merged model.
        base: The model that the parents were tuned from; default: the base recorded in the merged model.
        names: Names of the parents in the results, one for each.
        scores: Scores to show next to the distances: a .json or .csv file, or TASK:MODEL=SCORE; may be
            repeated.
        tasks: YAML file of tasks to score the models on, next to the distances.
        out: Folder for the numbers, the tables and the page.
        allow_code: Allow the tasks file to run code: functions, and task folders of the harness. Use it only
            if you trust its author.
    Errors: ModelError, MismatchError, NonFiniteError, ResourceError, HubError, OutputError, EvaluationError.

    >>> import numpy as np
    >>> base, one, other = ({"w": np.float32(v)} for v in ([0, 0], [1, 0], [0, 1]))
    >>> merged = {"w": np.float32([0.5, 0.5])}
    >>> found = compare([one, other], merged, base=base, tasks={"first": lambda model: model["w"][0]})
    >>> found.by_model
    {'first': {'base': 0.0, 'parents[0]': 1.0, 'parents[1]': 0.0, 'merged': 0.5}}
    >>> found.scores[0].kept
    0.5
    """
    named = name_models(parents, "parents", names=names)
    merged_label = name_model(merged, MERGED, named)
    base_label = None if base is None else name_model(base, BASE, named)
    if isinstance(scores, Mapping):
        estimates: Estimates = {
            task: {model: Estimate(value) for model, value in of.items()} for task, of in scores.items()
        }
    else:
        estimates = read_estimates(scores)
    run = RunOptions.of(memory=memory, threads=threads, offline=offline, watch=watch, device=device)
    placement = ModulePlacement.of(device, dtype)
    read = as_tasks(() if tasks is None else tasks, allow_code=allow_code)
    placement = placement.for_tasks(read)
    used = [task for task in read if task.goal == "max"]
    if used:
        if twice := next((task.name for task in used if task.name in estimates), None):
            raise EvaluationError(
                f"{twice}: is in scores and in tasks; expected it in one of them. Remove it from one."
            )
        scored_base = (base_label, base) if base_label is not None else _recorded_base(merged, run)
        scored = _scores(named, (merged_label, merged), scored_base, used, run, placement)
        estimates = {**estimates, **scored}
    retention = compare_models(
        named,
        (merged_label, merged),
        None if base_label is None else (base_label, base),
        estimates=estimates,
        is_named=names is not None,
        out=out,
        top_share=top_share,
        run=run,
    )
    left_out = [task.name for task in read if task.goal != "max"]
    if not left_out:
        return retention
    note = f"{', '.join(left_out)}: lower is better, so there is no share to keep; not scored."
    return replace(retention, notes=(*retention.notes, note))


def _recorded_base(merged: Any, run: RunOptions) -> tuple[str, Any] | None:
    """Return the base that a merged model on disk records, if it can be opened."""
    path = path_of(merged)
    if path is None:
        return None
    with closing(open_model(path, access=run.access)) as source:
        reference, _ = recorded_base(source)
    if reference is None:
        return None
    try:
        open_model(reference, access=run.access).close()
    except (ModelError, HubError):
        return None
    return reference, reference


def _scores(
    parents: Mapping[str, Any],
    merged: tuple[str, Any],
    base: tuple[str, Any] | None,
    tasks: Sequence[Task],
    run: RunOptions,
    placement: ModulePlacement,
) -> Estimates:
    """Score the base, the parents and the merged model: estimates by task, then by label."""
    models = {**({} if base is None else {base[0]: base[1]}), **parents, merged[0]: merged[1]}
    waiting = subjects_of(
        models,
        template=template_of(models.values()),
        base=None if base is None else base[1],
        offline=run.offline,
        placement=placement,
        watch=run.watch,
    )
    card = score_models(
        (waiting.pop(0) for _ in range(len(waiting))), tasks, watch=run.watch, placement=placement
    )
    return {task.name: {model.reference: model.scores[task.name] for model in card.models} for task in tasks}
