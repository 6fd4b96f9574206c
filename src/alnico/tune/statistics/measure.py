"""What measurements of statistics share: the examples they take, and what a checkpoint calls a module's parameters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.output_path import Replace
from alnico.checkpoint.source import read_tensor
from alnico.checkpoint.statistics import StatisticsKind, write_statistics
from alnico.errors import EvaluationError
from alnico.evaluation.module_names import Placement, place
from alnico.evaluation.tasks import Differentiable, EvaluatedModel, ModelKind, Task


@dataclass(frozen=True)
class MeasuredStatistics:
    """The statistics of one model, under the names of its checkpoint.

    ``tensors`` are what is stored, ``entries`` say of each tensor of the model under which name (``stored``) and numbers about it,
    ``told`` is what goes for all. ``left_out`` are the tensors of the checkpoint that have no statistics, and why.
    """

    kind: StatisticsKind
    tensors: Mapping[str, np.ndarray] = field(repr=False)
    entries: Mapping[str, Mapping[str, Any]] = field(repr=False)
    told: Mapping[str, Any]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def write(self, out: Path, subject: EvaluatedModel, *, overwrite: Replace = False) -> None:
        """Write them into a directory, as ``merge_method: fisher`` and ``regmean`` read them. Errors: OutputError, RunError."""
        with open_model(subject.directory) as model:
            write_statistics(
                out,
                self.kind,
                model,
                self.tensors,
                self.entries,
                {**self.told, "left_out": dict(self.left_out)},
                reference=subject.label,
                overwrite=overwrite,
            )


def places(task: Task, examples: int) -> list[int]:
    """Which examples of a task are taken: at most ``examples``, evenly spread.

    >>> from types import SimpleNamespace
    >>> places(SimpleNamespace(size=10), 4)
    [0, 2, 5, 7]
    """
    count = min(task.size, examples)
    return [i * task.size // count for i in range(count)]


def kind_of(tasks: Sequence[Task], what: str) -> ModelKind:
    """The one kind of module that tasks need. Errors: EvaluationError where there is none, or several."""
    kinds: dict[Any, str] = {}
    for task in tasks:
        if task.size == 0 or not (kind := getattr(task, "kind", None)):
            raise EvaluationError(
                f"{task.name}: cannot be taken in part, or does not say its module; expected a task of examples for {what}. "
                "Take a classification, or a perplexity with a limit."
            )
        kinds.setdefault(kind, task.name)
    if len(kinds) != 1:
        found = " and ".join(f"{name} takes the {kind}" for kind, name in kinds.items()) or "there are none"
        raise EvaluationError(
            f"tasks: {found}; expected tasks of one kind of module for {what}. Measure those together that share it."
        )
    return next(iter(kinds))


def differentiable(tasks: Sequence[Task]) -> list[Differentiable]:
    """The tasks, each of which can be asked for scores of classes. Errors: EvaluationError."""
    found = [task for task in tasks if isinstance(task, Differentiable)]
    if len(found) < len(tasks):
        stranger = next(task for task in tasks if not isinstance(task, Differentiable))
        raise EvaluationError(
            f"{stranger.name}: has no scores of classes, of which Fisher information is made. Give classification tasks."
        )
    return found


@dataclass(frozen=True, eq=False)
class Stored:
    """The tensors of a checkpoint, by name, and where they stand in a module that was loaded from it."""

    shapes: Mapping[str, tuple[int, ...]]
    placement: Placement

    def original(self, name: str) -> str:
        """The name under which a tensor's statistics are stored: a tied tensor may have several."""
        whole = (one for one in self.placement.of[name] if one.is_whole)
        return next((self.placement.files_of[id(one.own)][0] for one in whole), name)


def stored_in(subject: EvaluatedModel, module: Any, kind: ModelKind) -> Stored:
    """Find where a checkpoint's tensors stand in its module. Errors: MismatchError for a parameter that is in no file; ModelError."""
    with open_model(subject.directory) as model:
        shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
        return Stored(
            shapes, place(module, shapes, lambda name: read_tensor(model, name), subject.label, kind)
        )


@contextmanager
def with_gradients(parameters: Sequence[Any]) -> Iterator[None]:
    """Have a graph recorded for all parameters, as long as the block lasts."""
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, wanted in zip(parameters, before, strict=True):
            p.requires_grad_(wanted)


def existing_paths(values: Iterable[Any]) -> list[Path]:
    """Return the paths among some arguments that exist."""
    return [Path(one) for one in values if isinstance(one, (str, os.PathLike)) and os.path.lexists(one)]
