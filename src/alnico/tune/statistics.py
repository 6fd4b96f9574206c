"""What measurements of statistics share: the examples they take, and what a checkpoint calls a module's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.model import open_model
from alnico.checkpoint.statistics import StatisticsKind, write_statistics
from alnico.errors import EvaluationError, ModelError
from alnico.tune.tasks import Differentiable, Kind, Subject, Task


@dataclass(frozen=True)
class Measured:
    """The statistics of one model, under the names of its checkpoint.

    ``tensors`` are what is stored, ``entries`` say of each tensor of the model under which name (``stored``) and numbers about it,
    ``told`` is what goes for all. ``left_out`` are parameters that the checkpoint does not have under a name that is known.
    """

    kind: StatisticsKind
    tensors: Mapping[str, np.ndarray] = field(repr=False)
    entries: Mapping[str, Mapping[str, Any]] = field(repr=False)
    told: Mapping[str, Any]
    left_out: tuple[str, ...] = ()

    def write(self, out: Path, subject: Subject, *, overwrite: bool = False) -> None:
        """Write them into a directory, as ``merge_method: fisher`` and ``regmean`` read them. Errors: OutputError, RunError."""
        with open_model(subject.directory) as model:
            write_statistics(
                out, self.kind, model, self.tensors, self.entries, self.told, reference=subject.label, overwrite=overwrite
            )


def places(task: Task, examples: int) -> list[int]:
    """Which examples of a task are taken: at most ``examples``, evenly spread.

    >>> from types import SimpleNamespace
    >>> places(SimpleNamespace(size=10), 4)
    [0, 2, 5, 7]
    """
    count = min(task.size, examples)
    return [i * task.size // count for i in range(count)]


def kind_of(tasks: Sequence[Task], what: str) -> Kind:
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


def checkpoint_names(subject: Subject, module: Any) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """What the checkpoint calls each parameter of a module (several names for one that is tied), and the parameters that it lacks.

    Errors: ModelError where it has none of them.
    """
    prefix = getattr(module, "base_model_prefix", "")
    every: dict[int, list[str]] = {}
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    with open_model(subject.directory) as model:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            every.setdefault(id(parameter), [])
            first.setdefault(id(parameter), name)
            for own in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
                if own in model.tensors and model.tensors[own].shape == tuple(parameter.shape) and own not in every[id(parameter)]:
                    every[id(parameter)].append(own)
        for key, name in first.items():
            found[name] = every[key]
    lacking = tuple(name for name, names in found.items() if not names)
    if len(lacking) == len(found):
        raise ModelError(
            f"{subject.label}: its files have no tensor that is called as its module's parameters are ({lacking[0]}); expected a checkpoint "
            "with the names of transformers. Save it anew with transformers."
        )
    return found, lacking


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
