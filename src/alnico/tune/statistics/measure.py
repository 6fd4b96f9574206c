"""Picks examples, finds checkpoint tensors in a module and writes measured statistics."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.output_path import Replace
from alnico.checkpoint.source import Source, read_tensor
from alnico.checkpoint.statistics import StatisticsKind, write_statistics
from alnico.errors import EvaluationError, ResourceError
from alnico.evaluation.batches import is_out_of_memory
from alnico.evaluation.input_batches import as_input_tasks
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.memory_subject import MemorySubject
from alnico.evaluation.module_names import Placement, place
from alnico.evaluation.placement import ON_THE_PROCESSOR, ModulePlacement
from alnico.evaluation.task_file import as_tasks
from alnico.evaluation.tasks import Differentiable, EvaluatedModel, ModelKind, Task
from alnico.evaluation.user_function import UserFunction
from alnico.events import Watcher
from alnico.models.open_models import path_of, template_of


@dataclass(frozen=True)
class MeasuredStatistics:
    """The statistics of one model, under the tensor names of its checkpoint.

    ``tensors`` are the stored arrays. ``entries`` gives, for each tensor of the model, the name of its array
    (``stored``) and figures about it. ``summary`` describes the whole measurement. ``left_out`` maps the
    tensors without statistics to the reason.
    """

    kind: StatisticsKind
    tensors: Mapping[str, np.ndarray] = field(repr=False)
    entries: Mapping[str, Mapping[str, Any]] = field(repr=False)
    summary: Mapping[str, Any]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def write(self, out: Path, subject: EvaluatedModel, *, overwrite: Replace = False) -> None:
        """Write them to a directory that ``fisher`` or ``regmean`` reads. Errors: OutputError, RunError."""
        with closing(weights_of(subject)) as model:
            write_statistics(
                out,
                self.kind,
                model,
                self.tensors,
                self.entries,
                {**self.summary, "left_out": dict(self.left_out)},
                reference=subject.label,
                overwrite=overwrite,
            )


def places(task: Task, examples: int) -> list[int]:
    """Return the indices of at most ``examples`` examples of a task, evenly spread.

    >>> from types import SimpleNamespace
    >>> places(SimpleNamespace(size=10), 4)
    [0, 2, 5, 7]
    """
    count = min(task.size, examples)
    return [i * task.size // count for i in range(count)]


def kind_of(tasks: Sequence[Task], what: str) -> ModelKind:
    """Return the kind of module that all tasks need. Errors: EvaluationError if there is none, or several."""
    kinds: dict[Any, str] = {}
    for task in tasks:
        if isinstance(task, UserFunction):
            raise EvaluationError(
                f"{task.name}: is a function that scores a model; expected a task of examples for {what}. Use a "
                "classification, or a perplexity with a limit."
            )
        if task.size == 0 or not (kind := getattr(task, "kind", None)):
            raise EvaluationError(
                f"{task.name}: cannot run on a subset of examples, or does not state its kind of module; "
                f"expected a task of examples for {what}. Use a classification, or a perplexity with a limit."
            )
        kinds.setdefault(kind, task.name)
    if len(kinds) != 1:
        needs = " and ".join(f"{name} uses the {kind}" for kind, name in kinds.items()) or "there are none"
        raise EvaluationError(
            f"tasks: {needs}; expected tasks for one kind of module for {what}. Measure each kind on its own."
        )
    return next(iter(kinds))


def differentiable(tasks: Sequence[Task]) -> list[Differentiable]:
    """Check that all tasks give class scores, and return them. Errors: EvaluationError."""
    class_tasks = [task for task in tasks if isinstance(task, Differentiable)]
    if len(class_tasks) < len(tasks):
        other = next(task for task in tasks if not isinstance(task, Differentiable))
        raise EvaluationError(
            f"{other.name}: gives no class scores; expected a classification, which Fisher information "
            "needs. Remove the task."
        )
    return class_tasks


def weights_of(subject: EvaluatedModel) -> Source:
    """Open the tensors of a model: those in memory, or its checkpoint."""
    return subject.source() if isinstance(subject, MemorySubject) else open_model(subject.directory)


def subject_of(
    model: Any,
    label: str,
    *,
    offline: bool = False,
    placement: ModulePlacement = ON_THE_PROCESSOR,
    watch: Watcher | None = None,
) -> EvaluatedModel:
    """Return a model as tasks see it: a checkpoint by its path, or an object. Errors: ModelError, HubError."""
    where: dict[str, Any] = {"offline": offline, "placement": placement, "watch": watch}
    path = path_of(model)
    if path is not None:
        return open_subject(path, **where)
    return MemorySubject(label, model, template=template_of([model]), **where)


@contextmanager
def named_memory(where: str, what: str, advice: str) -> Iterator[None]:
    """Say what does not fit where torch finds too little memory, in place of torch's error. Errors: ResourceError."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"{where} has too little memory for {what}; expected room for {advice}."
        ) from None


def computed_by(module: Any, placement: ModulePlacement) -> dict[str, str]:
    """Return the device and the dtype of a module for the files of statistics.

    >>> import torch
    >>> computed_by(torch.nn.Linear(2, 2), ON_THE_PROCESSOR)
    {'device': 'cpu', 'dtype': 'float32'}
    """
    dtypes = [str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()]
    gpus = {gpu.kind: f"{gpu.kind} ({gpu.model})" for gpu in placement.devices if gpu.is_gpu}
    return {
        "device": gpus.get(placement.device.kind, placement.device.kind),
        "dtype": max(dtypes, key=dtypes.count, default="float32"),
    }


def tasks_of(tasks: Any, inputs: Any, *, allow_code: bool = False) -> tuple[Task, ...]:
    """Return the tasks to measure on: those of a file, and inputs in memory. Errors: EvaluationError."""
    if tasks is None and inputs is None:
        raise EvaluationError(
            "tasks: there are none; expected inputs to measure on. Pass tasks=, a tasks file, or inputs=, the "
            "inputs in memory."
        )
    return (
        *(as_tasks(tasks, allow_code=allow_code) if tasks is not None else ()),
        *(as_input_tasks(inputs) if inputs is not None else ()),
    )


@dataclass(frozen=True, eq=False)
class Stored:
    """The tensors of a checkpoint by name, and their places in the module loaded from it."""

    shapes: Mapping[str, tuple[int, ...]]
    placement: Placement

    def original(self, name: str) -> str:
        """Return the name that stores a tensor's statistics; a tied tensor may have several names."""
        whole = (part for part in self.placement.of[name] if part.is_whole)
        return next((self.placement.files_of[id(part.own)][0] for part in whole), name)


def stored_in(subject: EvaluatedModel, module: Any, kind: ModelKind) -> Stored:
    """Find a checkpoint's tensors in its module. Errors: MismatchError, ModelError."""
    with closing(weights_of(subject)) as model:
        shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
        return Stored(
            shapes, place(module, shapes, lambda name: read_tensor(model, name), subject.label, kind)
        )


@contextmanager
def with_gradients(parameters: Sequence[Any]) -> Iterator[None]:
    """Record gradients of all parameters inside the block."""
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, requires_grad in zip(parameters, before, strict=True):
            p.requires_grad_(requires_grad)


def existing_paths(values: Iterable[Any]) -> list[Path]:
    """Return the existing paths among ``values``."""
    return [
        Path(value) for value in values if isinstance(value, (str, os.PathLike)) and os.path.lexists(value)
    ]
