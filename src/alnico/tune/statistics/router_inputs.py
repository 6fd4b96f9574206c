"""Measures the inputs of routers, from which a merge fits them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from alnico.checkpoint.output_path import replace_mode
from alnico.devices import DEFAULT_DEVICE
from alnico.errors import EvaluationError, MismatchError
from alnico.evaluation.placement import ON_THE_PROCESSOR, ModulePlacement
from alnico.evaluation.task_file import TasksLike
from alnico.evaluation.tasks import EvaluatedModel, Task
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.models.open_models import AnyModels
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.plan.routers import find_routers
from alnico.tune.statistics.gram import collect_grams, layers_of, measured_grams, open_measured
from alnico.tune.statistics.measure import MeasuredStatistics, kind_of, stored_in, weights_of

WHAT = "the inputs of routers"


@counts_compiling
@ieee_arithmetic()
def router_statistics(
    models: AnyModels,
    out: str | os.PathLike[str],
    *,
    tasks: TasksLike | Sequence[TasksLike] | None = None,
    inputs: Any = None,
    examples: int = 64,
    offline: bool = False,
    device: Any = DEFAULT_DEVICE,
    dtype: Any = "auto",
    allow_code: bool = False,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    watch: Watcher | None = None,
) -> tuple[Path, ...]:
    """Measure what the routers of mixtures of experts see, as files for ``routers: {calibrate: OUT}``.

    Each model gets a directory in ``out``, named after it, with the Gram matrix ``X^T X`` of the inputs X (tokens,
    hidden) of each of its routers. The merge solves for each router W, in float64,
    ``min_W sum_i (|X_i W^T - X_i W_i^T|^2 / n_i + r_i |W - W_i|^2)``, where W_i is the router of model i, n_i the number of its
    tokens, and r_i 0.001 times the mean square of X_i: the merged router gives the inputs of each model the logits
    that this model's own router gives them. Labels are never read; tens of inputs are enough, because the ridge keeps the mean of the routers where there are
    none. Needs the extra ``[eval]``. ``watch`` receives the number of tasks done (:class:`alnico.events.Counted`).

    Options:
        models: Models: mixtures of experts as transformers checkpoints, URLs, or owner/name@revision on the hub.
        out: Directory to create, with one directory per model.
        tasks: Tasks file with the inputs to measure on; for several models one for all, or one per model.
        inputs: Inputs in memory to measure on; for several models those for all, or a list with those of each.
        examples: Largest number of inputs per task.
        overwrite: Replace older statistics in the directory.
        overwrite_anything: Also write into a directory with other files, which are kept.
    Errors: EvaluationError, ModelError, OutputError, HubError; MismatchError for a model without routers;
        ResourceError for a device that does not exist, or that is too small.
    """
    placement = ModulePlacement.of(device, dtype)
    may_replace = replace_mode(overwrite, overwrite_anything)
    evaluated, tasks_of_each, folders = open_measured(
        models,
        Path(out),
        tasks,
        inputs,
        placement,
        may_replace,
        in_one_folder=False,
        offline=offline,
        allow_code=allow_code,
        watch=watch,
    )
    for subject, own, folder in zip(evaluated, tasks_of_each, folders, strict=True):
        measured = measure_routers(subject, own, examples=examples, placement=placement, watch=watch)
        measured.write(folder, subject, overwrite=may_replace)
    return tuple(folders)


def measure_routers(
    subject: EvaluatedModel,
    tasks: Sequence[Task],
    *,
    examples: int = 64,
    placement: ModulePlacement = ON_THE_PROCESSOR,
    watch: Watcher | None = None,
) -> MeasuredStatistics:
    """Measure the Gram matrix of the inputs of each router of a model, on ``examples`` of each task.

    Errors: EvaluationError, ModelError; MismatchError for a model without routers.
    """
    with closing(weights_of(subject)) as model:
        routers = find_routers(model.tensors, model.config).experts
    if not routers:
        raise MismatchError(
            f"{subject.label}: has no router; expected a mixture of experts, with a matrix of one row for each expert, such as "
            "model.layers.0.mlp.gate.weight. Measure a dense model with `alnico statistics gram`."
        )
    kind = kind_of(tasks, WHAT)
    module = subject.module(kind)
    stored = stored_in(subject, module, kind)
    layers = {
        path: layer
        for path, layer in layers_of(module, stored).items()
        if not routers.keys().isdisjoint(stored.placement.files_of.get(id(layer.weight), ()))
    }
    grams = collect_grams(subject, module, tasks, examples, layers, watch)
    if not grams:
        raise EvaluationError(
            f"{subject.label}: the tasks call none of its routers as they are stored; expected at least one call. Give tasks for this "
            'model, or pass dtype="float32" (--dtype float32), if it computes routers in float32.'
        )
    measured = measured_grams(stored, module, kind, grams, tasks, examples, {"routers": True}, placement)
    left_out = {name: why if name in routers else "not a router" for name, why in measured.left_out.items()}
    return replace(measured, left_out=left_out)
