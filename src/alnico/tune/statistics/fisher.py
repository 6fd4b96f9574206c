"""Measures the diagonal Fisher information of a model on unlabelled examples."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from alnico.checkpoint.output_path import replace_mode
from alnico.checkpoint.statistics import check_statistics_folder
from alnico.devices import DEFAULT_DEVICE
from alnico.errors import EvaluationError
from alnico.evaluation.input_batches import InputBatches
from alnico.evaluation.module_names import sum_of
from alnico.evaluation.module_places import needed_bytes, own_dtype, stored_sizes
from alnico.evaluation.placement import ON_THE_PROCESSOR, ModulePlacement
from alnico.evaluation.task_file import TasksLike
from alnico.evaluation.tasks import EvaluatedModel, Task
from alnico.events import Counted, Watcher
from alnico.installation import import_extra
from alnico.kernels.clock import counts_compiling
from alnico.models.open_models import AnyModel, name_model, path_of
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.tune.gpu_room import check_room
from alnico.tune.statistics.measure import (
    MeasuredStatistics,
    computed_by,
    differentiable,
    existing_paths,
    kind_of,
    named_memory,
    places,
    stored_in,
    subject_of,
    tasks_of,
    weights_of,
    with_gradients,
)

Expectation = Literal["exact", "sampled"]


@counts_compiling
@ieee_arithmetic()
def fisher_statistics(
    model: AnyModel,
    out: str | os.PathLike[str],
    *,
    tasks: TasksLike | None = None,
    inputs: Any = None,
    examples: int = 256,
    expectation: Expectation = "exact",
    seed: int = 0,
    offline: bool = False,
    device: Any = DEFAULT_DEVICE,
    dtype: Any = "auto",
    allow_code: bool = False,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    watch: Watcher | None = None,
) -> Path:
    """Measure the Fisher information of a model on tasks, as files for ``merge_method: fisher``.

    Labels are never read. Needs the extra ``[eval]``. ``watch`` receives the number of examples done
    (:class:`alnico.events.Counted`).

    In Python the model may also be an ``nn.Module``, and ``inputs`` are the unlabelled inputs: a tensor
    (n, ...) or a DataLoader, or a list or a dict with those of each task. The module returns logits (n,
    classes). ``alnico.merge_models(models, "fisher", fisher=[a, b])`` then takes the files.

    Options:
        model: Model: a transformers checkpoint, a URL, or owner/name@revision on the hub.
        out: Directory to create.
        tasks: Tasks file with the inputs to measure on.
        inputs: Inputs in memory to measure on.
        examples: Largest number of inputs per task.
        expectation: How classes are weighted: exact takes all classes of an input by their probability,
            sampled draws one class per input.
        seed: Seed of the classes drawn with sampled.
        dtype: Dtype in which the module computes: float32, bfloat16 or float16. auto is float32 on every device, because
            gradients need it; a module in memory keeps its own.
        overwrite: Replace older statistics in the directory.
        overwrite_anything: Also write into a directory with other files, which are kept.
    Errors: EvaluationError, ModelError, OutputError, HubError; ResourceError for a device that does not exist, or that
        is too small.
    """
    placement = ModulePlacement.of(device, dtype)
    if placement.dtype == "auto" and path_of(model) is not None:
        placement = replace(placement, dtype="float32")
    may_replace = replace_mode(overwrite, overwrite_anything)
    label = name_model(model, "model")
    check_statistics_folder(Path(out), may_replace, existing_paths((path_of(model), tasks)))
    read = tasks_of(tasks, inputs, allow_code=allow_code)
    subject = subject_of(model, label, offline=offline, placement=placement, watch=watch)
    statistics = measure_fisher(
        subject,
        read,
        examples=examples,
        expectation=expectation,
        seed=seed,
        placement=placement,
        watch=watch,
    )
    statistics.write(Path(out), subject, overwrite=may_replace)
    return Path(out)


def measure_fisher(
    subject: EvaluatedModel,
    tasks: Sequence[Task],
    *,
    examples: int = 256,
    expectation: Expectation = "exact",
    seed: int = 0,
    placement: ModulePlacement = ON_THE_PROCESSOR,
    watch: Watcher | None = None,
) -> MeasuredStatistics:
    """Measure the diagonal of a model's Fisher information on ``examples`` of each task; labels are never
    read.

    ``F = mean over examples x of sum_c p(c|x) * (d log p(c|x) / d theta)^2``: gradients of single examples
    are squared, and the model's own probabilities weigh the classes. ``exact`` needs one backward pass per
    class, minus one; ``sampled`` draws one class per example by ``seed``, which is unbiased and needs one
    pass. Parameters that no prediction depends on are left out. ``placement`` says where ``subject`` has its module;
    gradients and their float32 sums are there, too, one example at a time. ``watch`` receives the number of examples
    done.
    Errors: EvaluationError, ModelError; ResourceError for a GPU that is too small.
    Source: Matena and Raffel 2022, https://arxiv.org/abs/2111.09832, section 3.2.
    """
    torch = import_extra("torch", "Fisher information", "eval")
    class_tasks = differentiable(tasks)
    for task in class_tasks:
        if isinstance(task, InputBatches) and task.is_function:
            raise EvaluationError(
                f"{task.name} is a function; expected inputs, because Fisher information needs the gradient of "
                "each of them. Pass their tensor, or batches of them."
            )
    kind = kind_of(tasks, "Fisher information")
    _check_room(subject, placement)
    module = subject.module(kind)
    stored = stored_in(subject, module, kind)
    parameters = dict(module.named_parameters())
    sums: dict[str, Any] = {}
    draws = torch.Generator().manual_seed(seed)
    chosen = [(task, place) for task in class_tasks for place in places(task, examples)]
    memory = named_memory(
        f"{subject.label}: {placement.device}",
        "the gradients of one input",
        "the module, its gradients, their sums and what it computes. Give shorter inputs, or choose another device",
    )
    with memory, with_gradients(list(parameters.values())), torch.enable_grad():
        for done, (task, place) in enumerate(chosen):
            logits = task.logits(subject, [place])[0]
            probabilities = torch.softmax(logits.detach().double().cpu(), -1)
            if not bool(torch.isfinite(probabilities).all()):
                raise EvaluationError(
                    f"{task.name}: {subject.label} gives class scores that are not finite; expected finite "
                    "numbers. Look for NaN in the model with `alnico inspect`."
                )
            directions = (
                _directions(probabilities)
                if expectation == "exact"
                else [_drawn_direction(probabilities, draws)]
            )
            for left, (weight, direction) in zip(range(len(directions) - 1, -1, -1), directions, strict=True):
                gradients = torch.autograd.grad(
                    logits,
                    list(parameters.values()),
                    direction.to(logits.device, logits.dtype),
                    retain_graph=left > 0,
                    allow_unused=True,
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        wide = gradient.float() if gradient.dtype != torch.float64 else gradient
                        if name not in sums:
                            sums[name] = torch.zeros_like(wide)
                        sums[name].addcmul_(wide, wide, value=weight / len(chosen))
            if watch:
                watch(Counted("examples", done + 1, len(chosen)))
    if not sums:
        raise EvaluationError(
            f"{subject.label}: no prediction depends on its parameters; expected at least one that does. "
            f"Check the tasks, {class_tasks[0].name} first."
        )
    tensors: dict[str, Any] = {}
    entries: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    squares = []
    of_own = {id(parameters[name]): total for name, total in sums.items()}
    for name, parts in stored.placement.of.items():
        shape = stored.shapes[name]
        values = sum_of(parts, math.prod(shape), lambda own: of_own.get(id(own)))
        if values is None:
            is_parameter = any(part.own is p for part in parts for p in parameters.values())
            left_out[name] = (
                f"not in the module of the tasks ({kind})"
                if not parts
                else "no prediction depends on it"
                if is_parameter
                else "a buffer, not a parameter"
            )
            continue
        first = stored.original(name)
        if first not in tensors:
            tensors[first] = values.reshape(shape).cpu().numpy()
            squares.append(float((tensors[first].astype("f8") ** 2).sum()))
        entries[name] = {"stored": first, "mean": float(tensors[first].astype("f8").mean())}
    summary = {
        "l2_norm": math.sqrt(math.fsum(squares)),
        "examples": len(chosen),
        "tasks": {task.name: min(task.size, examples) for task in class_tasks},
        **computed_by(module, placement),
        "settings": {"expectation": expectation, **({"seed": seed} if expectation == "sampled" else {})},
    }
    return MeasuredStatistics("fisher", tensors, entries, summary, left_out)


def _check_room(subject: EvaluatedModel, placement: ModulePlacement) -> None:
    """Refuse GPUs without room for a module, its gradients and their sums. Errors: ResourceError."""
    if not placement.device.is_gpu:
        return
    with closing(weights_of(subject)) as model:
        stored = stored_sizes(model)
    dtype = placement.torch_dtype or own_dtype(stored)
    own = needed_bytes(stored, dtype)
    needs = {"the module": own, "its gradients": own, "their sums": needed_bytes(stored, "float32")}
    check_room(f"{subject.label}: Fisher information", needs, dtype, placement)


def _directions(probabilities: Any) -> list[tuple[float, Any]]:
    """Return weights w and directions v with ``sum_c p_c (d log p_c)^2 = sum w (v . d scores)^2``.

    With J the derivative of the scores, the left side is the diagonal of ``J^T (diag(p) - p p^T) J``. The
    matrix in the middle is 0 along the vector of ones, so it has one eigenvector less than there are classes.
    """
    import torch

    values, vectors = torch.linalg.eigh(torch.diag(probabilities) - torch.outer(probabilities, probabilities))
    least = 1e-12 * float(values.sum())
    return [(float(value), vectors[:, i]) for i, value in enumerate(values) if float(value) > least]


def _drawn_direction(probabilities: Any, draws: Any) -> tuple[float, Any]:
    """Draw a class by its probability; return the derivative of its log probability by the scores."""
    import torch

    direction = -probabilities
    direction[int(torch.multinomial(probabilities, 1, generator=draws))] += 1.0
    return 1.0, direction
