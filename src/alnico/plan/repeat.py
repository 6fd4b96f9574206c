"""Plans recipes that differ from an earlier one in numbers alone, without matching their tensors again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from alnico.errors import AlnicoError
from alnico.plan.job import Plan
from alnico.recipe.schema import Parameters, Recipe

MOST_PLANS = 8
"""Most plans that are kept; the oldest goes first."""

RecipeStructure = tuple[object, ...]


class RepeatedPlans:
    """Plans recipes over models that stay as they are. ``build`` makes the first plan of each structure."""

    def __init__(self, build: Callable[[Recipe], Plan]) -> None:
        self._build = build
        self._known: list[tuple[RecipeStructure, Plan]] = []

    def plan(self, recipe: Recipe) -> Plan:
        """Return the plan that ``build`` makes of a recipe. Errors: those of ``build``."""
        structure = structure_of(recipe)
        for known, plan in self._known:
            if structure == known and plan.again is not None:
                try:
                    again = plan.again(plan, recipe)
                except AlnicoError:  # raised again, with its place
                    again = None
                return again if again is not None else self._build(recipe)
        plan = self._build(recipe)
        if structure is not None and plan.again is not None:
            self._known = [*self._known, (structure, plan)][-MOST_PLANS:]
        return plan


def structure_of(recipe: Recipe) -> RecipeStructure | None:
    """Return what two recipes share that differ in numbers alone; None if the numbers of tensors differ from one another."""
    parts = (
        recipe.slices,
        recipe.modules,
        recipe.methods,
        recipe.lines,
        recipe.protect,
        recipe.tokenizer,
        recipe.chat_template,
    )
    scopes = (recipe.parameters, *(entry.parameters for entry in recipe.models))
    if any(parts) or not all(isinstance(v, (int, float, str)) for scope in scopes for v in scope.values()):
        return None
    models = tuple(dataclasses.replace(e, parameters=_without_numbers(e.parameters)) for e in recipe.models)
    same = dataclasses.replace(recipe, models=models, parameters=_without_numbers(recipe.parameters), seed=0)
    return same, tuple(entry.all_layers for entry in recipe.models)


def _without_numbers(parameters: Parameters) -> Parameters:
    return {key: value if isinstance(value, (bool, str)) else 0.0 for key, value in parameters.items()}
