"""Models as operands of sums, and the numbers that multiply them."""

from __future__ import annotations

import itertools
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.memory_model import MemoryModel, is_torch_module, is_torch_tensor
from alnico.checkpoint.open_model import is_opened_model, open_model
from alnico.checkpoint.task_vector_file import is_task_vector_file
from alnico.checkpoint.task_vectors.manifest import MANIFEST, read_manifest
from alnico.errors import AlnicoError, ModelError, visible
from alnico.models.open_models import name_model, path_of


@dataclass(frozen=True, eq=False)
class Operand:
    """A model in a sum: equal paths lead to one ``place``, equal models in memory are one object.

    The id of an object is not stored for this: it is meaningless in a copy or in another process.
    """

    value: Any = field(repr=False)
    place: str | None
    """Where the path led when it was passed; None for a model in memory."""
    is_delta: bool = False
    """Is this a stored task vector, which is added as it is?"""
    is_artifact: bool = False
    """Is this the folder of a task vector with a manifest, which knows its base?"""

    @property
    def is_nothing(self) -> bool:
        """Is this the base of a stored task vector: zeros?"""
        return self.value is None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Operand):
            return NotImplemented
        return self.value is other.value if self.place is None else self.place == other.place

    def __hash__(self) -> int:
        return hash(id(self.value) if self.place is None else self.place)

    @property
    def name(self) -> str:
        """The name in ``repr``: the path, or the type of the object."""
        if self.is_delta and self.place is None:
            return "task vector"
        return visible(str(path_of(self.value)) if self.place is not None else type(self.value).__name__)

    def path(self) -> str | None:
        """Return the path as it was passed, if it still leads to the same place; otherwise the place.

        None for a model in memory.
        """
        if self.place is None:
            return None
        path = str(path_of(self.value))
        return path if is_opened_model(self.value) or _place(path) == self.place else self.place


NOTHING = Operand(None, None)
"""The base of a stored task vector."""

Term = tuple[float, Operand, Operand]
"""A coefficient, a model and its base."""


def _place(path: str) -> str:
    there = Path(os.path.expanduser(path))
    return os.path.realpath(there) if there.exists() else path


def is_model(value: object) -> bool:
    return isinstance(value, (str, os.PathLike, Mapping)) or is_opened_model(value) or is_torch_module(value)


def operand(value: Any, argument: str = "the model") -> Operand:
    """Return a model as an operand. Errors: ModelError for a value that is not a model."""
    if not is_model(value):
        only = f" Pass {argument}[0]." if isinstance(value, (list, tuple)) and len(value) == 1 else ""
        raise ModelError(
            f"{argument} is of type {type(value).__name__}; expected the path or hub id of a model, a dict of "
            f"tensors or an nn.Module.{only}"
        )
    name_model(value, argument)
    path = path_of(value)
    return Operand(value, None if path is None else _place(path))


def stored_operand(value: Any) -> Operand:
    """Return a stored task vector as an operand: a path, or a dict of tensors. Errors: ModelError.

    A path may lead to what ``TaskVector.save`` wrote, or to the folder of a task vector of a store.
    """
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if path is not None and (folder := Path(os.path.expanduser(path)) / MANIFEST).is_file():
        read_manifest(folder.parent)  # a damaged manifest is reported now
        return Operand(value, _place(path), is_delta=True, is_artifact=True)
    if path is not None:
        with closing(open_model(path, may_be_adapter=True)) as opened:
            if not is_task_vector_file(opened):
                raise ModelError(
                    f"{path}: does not say that it is a task vector; expected what TaskVector.save wrote. For a "
                    "model, write alnico.TaskVector(model, base); for a file of differences, pass its tensors as "
                    "a dict."
                )
        return Operand(value, _place(path), is_delta=True)
    if not isinstance(value, Mapping) or not value:
        what = "an empty dict" if isinstance(value, Mapping) else f"of type {type(value).__name__}"
        raise ModelError(
            f"the task vector is {what}; expected a path, or a dict of tensors by the names of a model. Make one "
            "of two models with alnico.TaskVector(finetuned, base)."
        )
    MemoryModel("the task vector", value)  # refuses values that are not tensors
    return Operand(value, None, is_delta=True)


def is_array(value: object) -> bool:
    return isinstance(value, (np.ndarray, np.generic)) or is_torch_tensor(value)


def as_float(number: Any) -> float:
    """Return a real number, or an array of one, as float; infinity for a whole number beyond float64.

    Errors: AlnicoError for an array of several numbers or of other values, and for a tensor that needs its
    gradient.
    """
    if is_array(number):
        kind = type(number).__name__
        if tuple(number.shape) != ():
            raise AlnicoError(
                f"a task vector is multiplied or divided by a value of type {kind} and shape {tuple(number.shape)}; "
                "expected one number. Multiply each task vector by its number, and add them up with sum()."
            )
        if getattr(number, "requires_grad", False):
            raise AlnicoError(
                f"a task vector is multiplied or divided by a {kind} that needs its gradient, which does not pass "
                "through a merge; expected a number. Pass its .item(), or learn coefficients with "
                "alnico.adamerge."
            )
        number = number.item()
        if not isinstance(number, numbers.Real):
            raise AlnicoError(
                f"a task vector is multiplied or divided by {number!r} of type {type(number).__name__}; expected a real "
                "number."
            )
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def name_models(operands: Sequence[Operand]) -> tuple[dict[Operand, str], dict[str, Any]]:
    """Return the references for a recipe, and the models by reference.

    Paths are their own reference; each model in memory gets a generated one.
    """
    distinct = list(dict.fromkeys(operands))
    names = {model: path for model in distinct if (path := model.path()) is not None}
    used, numbers = set(names.values()), itertools.count(1)
    for model in distinct:
        if model not in names:
            # A path may have this name, too.
            names[model] = next(
                name for name in (f"{model.name} {number}" for number in numbers) if name not in used
            )
    names = {model: names[model] for model in distinct}
    return names, {
        name: name if isinstance(model.value, (str, os.PathLike)) else model.value
        for model, name in names.items()
    }
