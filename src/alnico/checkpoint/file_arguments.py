"""Refuses objects in memory where a function needs a model's files, and says how to write them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from alnico.errors import ModelError, RecipeError


def label_of_open(value: Any) -> str | None:
    """Return the path or hub id of an open :class:`alnico.Model`; None for anything else."""
    label = getattr(value, "label", None)
    return label if isinstance(label, str) and hasattr(value, "shards") else None


def model_path(value: Any, argument: str, *, in_memory: str = "") -> str:
    """Return the path or hub id of a model. Errors: ModelError for an object in memory.

    ``in_memory`` says what does the same with objects.

    >>> model_path("models/a", "base")
    'models/a'
    """
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if (label := label_of_open(value)) is not None:
        return label
    raise ModelError(
        f"{argument} is {_kind(value)}; expected the path or hub id of a model, as this function reads files. "
        f"{_how_to_write(value, argument)}{in_memory and ' '}{in_memory}"
    )


def model_paths(values: Any, argument: str, *, in_memory: str = "") -> list[str]:
    """Return paths or hub ids as a list, also for a single one. Errors: RecipeError, ModelError."""
    if isinstance(values, (str, os.PathLike)) or hasattr(values, "shards"):
        return [model_path(values, argument, in_memory=in_memory)]
    is_list = isinstance(values, Iterable) and not isinstance(values, (Mapping, bytes))
    if not is_list or hasattr(values, "named_parameters") or getattr(values, "shape", None) is not None:
        raise RecipeError(
            f"{argument} is {_kind(values)}; expected a list of paths or hub ids, as this function reads "
            f"files. {_how_to_write(values, argument)}{in_memory and ' '}{in_memory}"
        )
    return [model_path(value, f"{argument}[{i}]", in_memory=in_memory) for i, value in enumerate(values)]


def merge_path(value: Any, function: str, argument: str = "out") -> str:
    """Return the path of a finished merge. Errors: ModelError for an object in memory."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    found = f"{argument} is {_kind(value)}; expected the directory of a finished merge"
    if isinstance(getattr(value, "path", None), (str, os.PathLike)):
        raise ModelError(f"{found}. Pass {argument}={argument}.path.")
    raise ModelError(
        f"{found}, because {function} works on its files. alnico.merge(recipe, path) writes one, and so does "
        "tau.on(base).save(path)."
    )


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _how_to_write(value: Any, argument: str) -> str:
    """Say how to write the files of a value that a caller passed in place of a path."""
    if callable(getattr(value, "on", None)) and hasattr(value, "terms"):
        return f"Write the model that it gives on a base: {argument}.on(base).save(path)."
    if hasattr(value, "named_parameters"):
        if callable(getattr(value, "save_pretrained", None)):
            return f"Write it first: {argument}.save_pretrained(path)."
        return f"Write it first: safetensors.torch.save_model({argument}, path)."
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "save", None)):
        return f"Write it first: {argument}.save(path)."
    if isinstance(value, Mapping) and value:
        kinds = [hasattr(v, "shape") for v in value.values()]
        if not any(kinds):
            return "Pass the paths of its models."
        package = "torch" if any(hasattr(v, "requires_grad") for v in value.values()) else "numpy"
        return f"Write it first: safetensors.{package}.save_file({argument}, path)."
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return f"Pass {argument}[0]."
    return "Pass its path."
