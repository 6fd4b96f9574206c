"""Fisher information: how much a model's predictions depend on each of its parameters, measured on examples without labels."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from alnico.checkpoint.output_path import replace_mode
from alnico.checkpoint.statistics import check_statistics_folder
from alnico.errors import EvaluationError
from alnico.evaluation.extras import import_extra
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.module_names import sum_of
from alnico.evaluation.task_file import TasksLike, as_tasks
from alnico.evaluation.tasks import EvaluatedModel, Task
from alnico.events import Counted, Watcher
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.tune.statistics.measure import (
    MeasuredStatistics,
    differentiable,
    existing_paths,
    kind_of,
    places,
    stored_in,
    with_gradients,
)

Expectation = Literal["exact", "sampled"]


@ieee_arithmetic()
def fisher_statistics(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tasks: TasksLike,
    examples: int = 256,
    expectation: Expectation = "exact",
    seed: int = 0,
    offline: bool = False,
    allow_code: bool = False,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    watch: Watcher | None = None,
) -> Path:
    """Measure the Fisher information of a model on tasks, as files for ``merge_method: fisher``.

    Labels are never read. Needs ``alnico[eval]``. ``watch`` receives the number of examples done
    (:class:`alnico.events.Counted`).

    Options:
        model: Model: a transformers checkpoint, or owner/name@revision on the hub.
        out: Directory to create.
        tasks: Tasks file whose inputs are measured on.
        examples: Largest number of inputs per task.
        expectation: exact weighs all classes of an input by their probability; sampled draws one class per
            input.
        seed: Seed of the classes that expectation sampled draws.
    Errors: EvaluationError, ModelError, OutputError, HubError.
    """
    may_replace = replace_mode(overwrite, overwrite_anything)
    check_statistics_folder(Path(out), may_replace, existing_paths((model, tasks)))
    subject = open_subject(model, offline=offline)
    read = as_tasks(tasks, allow_code=allow_code)
    statistics = measure_fisher(
        subject, read, examples=examples, expectation=expectation, seed=seed, watch=watch
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
    watch: Watcher | None = None,
) -> MeasuredStatistics:
    """Measure the diagonal of a model's Fisher information on ``examples`` of each task; labels are never read.

    ``F = mean over examples x of sum_c p(c|x) * (d log p(c|x) / d theta)^2``: gradients of single examples are squared, and the
    model's own probabilities weigh the classes. ``exact`` takes a backward pass for each class but one; ``sampled`` draws one class an
    example, by ``seed``: right in the mean, and faster by as much. Parameters that no task depends on are left out. ``watch``
    is told how many of how many examples are done. Errors: EvaluationError, ModelError.
    Source: Matena and Raffel 2022, https://arxiv.org/abs/2111.09832, section 3.2.
    """
    torch = import_extra("torch", "Fisher information", "eval")
    given = differentiable(tasks)
    kind = kind_of(tasks, "Fisher information")
    module = subject.module(kind)
    stored = stored_in(subject, module, kind)
    parameters = dict(module.named_parameters())
    sums: dict[str, Any] = {}
    draws = torch.Generator().manual_seed(seed)
    chosen = [(task, place) for task in given for place in places(task, examples)]
    with with_gradients(list(parameters.values())), torch.enable_grad():
        for done, (task, place) in enumerate(chosen):
            logits = task.logits(subject, [place])[0]
            chances = torch.softmax(logits.detach().double().cpu(), -1)
            if not bool(torch.isfinite(chances).all()):
                raise EvaluationError(
                    f"{task.name}: {subject.label} gives scores of classes that are not finite. Look for NaN in the model: "
                    "`alnico inspect`."
                )
            ways = _ways(chances) if expectation == "exact" else [_drawn(chances, draws)]
            for left, (weight, way) in zip(range(len(ways) - 1, -1, -1), ways, strict=True):
                gradients = torch.autograd.grad(
                    logits,
                    list(parameters.values()),
                    way.to(logits.device, logits.dtype),
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
            f"{subject.label}: no prediction depends on its parameters; expected some that do. Look at the tasks: {given[0].name} first."
        )
    tensors: dict[str, Any] = {}
    entries: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    squares = []
    of_own = {id(parameters[name]): total for name, total in sums.items()}
    for name, held in stored.placement.of.items():
        shape = stored.shapes[name]
        values = sum_of(held, math.prod(shape), lambda own: of_own.get(id(own)))
        if values is None:
            is_parameter = any(one.own is p for one in held for p in parameters.values())
            left_out[name] = (
                f"not in the module of the tasks ({kind})"
                if not held
                else "no prediction depends on it"
                if is_parameter
                else "a buffer, no parameter"
            )
            continue
        first = stored.original(name)
        if first not in tensors:
            tensors[first] = values.reshape(shape).cpu().numpy()
            squares.append(float((tensors[first].astype("f8") ** 2).sum()))
        entries[name] = {"stored": first, "mean": float(tensors[first].astype("f8").mean())}
    told = {
        "l2_norm": math.sqrt(math.fsum(squares)),
        "examples": len(chosen),
        "tasks": {task.name: min(task.size, examples) for task in given},
        "settings": {"expectation": expectation, **({"seed": seed} if expectation == "sampled" else {})},
    }
    return MeasuredStatistics("fisher", tensors, entries, told, left_out)


def _ways(chances: Any) -> list[tuple[float, Any]]:
    """Directions v of the scores and their weights w, for which ``sum_c p_c (d log p_c)^2`` is ``sum w (v . d scores)^2``.

    With J the derivative of the scores, the former is the diagonal of ``J^T (diag(p) - p p^T) J``: the eigenvectors of what is in the
    middle are one less than the classes, as it is 0 along the ones.
    """
    import torch

    values, vectors = torch.linalg.eigh(torch.diag(chances) - torch.outer(chances, chances))
    least = 1e-12 * float(values.sum())
    return [(float(value), vectors[:, i]) for i, value in enumerate(values) if float(value) > least]


def _drawn(chances: Any, draws: Any) -> tuple[float, Any]:
    """The derivative of the logarithm of one class's probability by the scores; the class is drawn by these probabilities."""
    import torch

    way = -chances
    way[int(torch.multinomial(chances, 1, generator=draws))] += 1.0
    return 1.0, way
