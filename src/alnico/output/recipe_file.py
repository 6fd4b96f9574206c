"""Writes the recipe beside an output, as YAML that makes the same merge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from alnico.recipe.schema import Recipe

RECIPE = "mergekit_config.yml"


SEED = re.compile(r"^seed:.*$", re.MULTILINE)


def format_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML that makes the same merge: as it was written, with the seed that was used, or
    made from its values."""
    if recipe.text:
        text = recipe.text + ("" if recipe.text.endswith("\n") else "\n")
        if recipe.seed == recipe.written_seed:
            return text
        keys = yaml.safe_load(text)
        seeded = SEED.sub(f"seed: {recipe.seed}", text) if "seed" in keys else f"{text}seed: {recipe.seed}\n"
        if _reads_as(seeded, {**keys, "seed": recipe.seed}):
            return seeded
    return yaml.safe_dump(recipe.canonical(), sort_keys=False)


def _reads_as(text: str, expected: Mapping[str, Any]) -> bool:
    try:
        return bool(yaml.safe_load(text) == expected)
    except yaml.YAMLError:
        return False
