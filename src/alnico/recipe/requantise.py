"""Divides a recipe with a quantised output in two: the exact merge in float32, and its rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from alnico.checkpoint.reference import is_path, split_adapter
from alnico.errors import RecipeError
from alnico.recipe.schema import ModelEntry, Recipe

EXACT = "in float32"
"""The name of the stage that is rounded."""
METHOD = "passthrough"


def requantised(recipe: Recipe, requantise: str | None) -> Recipe:
    """Return a recipe with the option that a caller gave. Errors: RecipeError for another one than fp8, and for a dtype beside it."""
    if requantise is None:
        return recipe
    if requantise != "fp8":
        raise RecipeError(f"requantise is {requantise!r}; expected fp8.")
    if recipe.dtype is not None:
        raise RecipeError(
            f"{recipe.name}: requantise and dtype are both given; expected one of them: a requantised output has the dtypes of its "
            "base. Remove one."
        )
    return dataclasses.replace(recipe, requantise="fp8", text="")


def is_requantising(recipe: Recipe) -> bool:
    """Is a recipe nothing but the rounding of one model to the format of a base?"""
    return (
        recipe.requantise is not None
        and recipe.merge_method == METHOD
        and len(recipe.models) == 1
        and recipe.base_model is not None
        and not recipe.methods
    )


def with_requantising(recipes: Sequence[Recipe]) -> tuple[Recipe, ...]:
    """Put before each recipe with a quantised output the stage that makes it exactly, in float32."""
    divided: list[Recipe] = []
    for number, recipe in enumerate(recipes):
        if recipe.requantise is None or is_requantising(recipe):
            divided.append(recipe)
            continue
        name = f"{recipe.stage or number + 1} {EXACT}"
        divided.append(dataclasses.replace(recipe, requantise=None, dtype="F32", stage=name, text=""))
        divided.append(
            Recipe(
                METHOD,
                (ModelEntry(name),),
                _base_of(recipe),
                seed=recipe.seed,
                requantise=recipe.requantise,
                stage=recipe.stage,
                name=recipe.name,
                folder=recipe.folder,
            )
        )
    return tuple(divided)


def _base_of(recipe: Recipe) -> str:
    """The model whose format the output has: the base, or else the first model, without what is added to it."""
    reference = recipe.base_model or recipe.references[0]
    parts = split_adapter(reference, is_path)
    while parts is not None:
        reference = parts[0]
        parts = split_adapter(reference, is_path)
    return reference
