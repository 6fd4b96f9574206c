"""Makes the merge of a result (a soup, a search) from models that its caller has, when it is wanted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from alnico.errors import RecipeError
from alnico.models.open_models import fill, merge_open_models, open_models, path_of, plain_copy, template_of
from alnico.recipe.load import load_recipe
from alnico.recipe.reference import relative_reference
from alnico.recipe.schema import Recipe
from alnico.run_options import RunOptions


@dataclass(frozen=True)
class MemoryMerge:
    """A merge that is not made yet: a recipe, and the models by the labels that it names."""

    models: Mapping[str, Any]
    recipe: Mapping[str, Any] | Recipe
    base: Any = None
    """The base of task vectors among the models."""
    threads: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the merged tensors. Errors: those of merging."""
        opened = open_models(self.models, base=self.base)
        return merge_open_models(opened, self.recipe, RunOptions.of(threads=self.threads))

    def module(self) -> Any:
        """Return a copy of the first module with the merged tensors, as :func:`alnico.merge_models` does.

        Errors: RecipeError if no model is a module; those of merging.
        """
        template = template_of(self.models.values())
        if template is None:
            raise RecipeError(
                "models: holds no nn.Module; expected at least one. state_dict() returns the merge as a dict of "
                "tensors."
            )
        made = plain_copy(template)
        fill(made, self.state_dict(), partly=load_recipe(self.recipe).missing == "drop")
        return made

    def recipe_text(self, folder: str | os.PathLike[str] = ".") -> str:
        """Return the recipe as YAML, with paths relative to ``folder``. Errors: as for :meth:`path`."""
        assert isinstance(self.recipe, Mapping)  # a Recipe has its own text
        recipe = dict(self.recipe)
        if "base_model" in recipe:
            recipe["base_model"] = relative_reference(self.path(recipe["base_model"]), folder)
        recipe["models"] = [
            {**entry, "model": relative_reference(self.path(entry["model"]), folder)}
            for entry in recipe["models"]
        ]
        return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)

    def path(self, label: str) -> str:
        """Return the path of a model, for a recipe. Errors: RecipeError for a model in memory."""
        path = path_of(self.models[label])
        if path is None:
            raise RecipeError(
                f"{label} is in memory, and a recipe names models by their paths; expected models on disk. Save the "
                "models and pass their paths, or use module() or state_dict() of this result."
            )
        return path
