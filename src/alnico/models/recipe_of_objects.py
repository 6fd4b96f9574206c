"""Takes models in memory out of a recipe: a mapping in which objects are in the places of models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alnico.checkpoint.memory_model import is_torch_module, is_torch_tensor
from alnico.checkpoint.open_model import is_opened_model
from alnico.models.open_models import is_lazy_model, is_task_vector, path_of

BASE = "base"
"""The label of the base of a recipe, if it is in memory."""


@dataclass
class RecipeObjects:
    """A recipe with labels in place of objects, and the objects by label, the base first."""

    recipe: Any
    models: dict[str, Any] = field(default_factory=dict)


def take_objects(recipe: Any) -> RecipeObjects:
    """Return a recipe without objects, and the objects that were in it; a recipe that is no mapping has none.

    The label of an object is its place: ``base``, ``models[0]``, or another path in the recipe. One object in
    several places has one label.

    >>> taken = take_objects({"base_model": {"w": np.ones(2)}, "models": [{"model": {"w": np.ones(2)}}, "path"]})
    >>> taken.recipe, list(taken.models)
    ({'base_model': 'base', 'models': [{'model': 'models[0]'}, 'path']}, ['base', 'models[0]'])
    """
    taken = RecipeObjects(recipe)
    if isinstance(recipe, Mapping):
        if is_object(recipe.get("base_model")):
            taken.models[BASE] = recipe["base_model"]
        taken.recipe = _without_objects(recipe, "", taken.models)
    return taken


def is_object(value: Any, where: str = "base_model") -> bool:
    """Is a value at a place of a recipe a model in memory? Dicts of tensors are models only in places of models."""
    if isinstance(value, Mapping):
        if not re.search(r"(^|\.)(base_)?model$|(^|\.)models\[\d+\]$", where):
            return False
        return bool(value) and all(isinstance(v, np.ndarray) or is_torch_tensor(v) for v in value.values())
    return is_torch_module(value) or is_lazy_model(value) or is_task_vector(value)


def _without_objects(value: Any, where: str, models: dict[str, Any]) -> Any:
    if is_opened_model(value):
        return path_of(value)
    if is_object(value, where):
        label = next((name for name, model in models.items() if model is value), where.removesuffix(".model"))
        models[label] = value
        return label
    if isinstance(value, Mapping):
        return {
            key: _without_objects(inner, f"{where}.{key}".removeprefix("."), models)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_without_objects(inner, f"{where}[{i}]", models) for i, inner in enumerate(value)]
    return value
