"""A recipe: YAML of one document or several."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import yaml

from alnico.methods import registry
from alnico.output.recipe_file import format_recipe
from alnico.recipe.keys import TOP
from alnico.recipe.load import decode_recipes
from fuzz.harness import Target
from recipe.good_recipes import GOOD


def read(data: bytes, _: Path) -> None:
    for recipe in decode_recipes(data, "r"):
        recipe.canonical()
        format_recipe(dataclasses.replace(recipe, seed=7))


def seeds() -> list[bytes]:
    """Recipes as they are written, and the same as JSON, which is YAML too."""
    texts = [text.encode() for text in GOOD.values()]
    for text in GOOD.values():
        try:
            texts.append(json.dumps(next(iter(yaml.safe_load_all(text)))).encode())
        except (TypeError, ValueError):  # dates and such
            continue
    return texts


WORDS = (
    *TOP,
    *registry(),
    "model",
    "filter",
    "value",
    "from",
    "l2_norm",
    "layer_range",
    "sources",
    "tokens",
    "source",
    "kind",
    "force",
    "preset",
    "paper",
)
TARGET = Target(read, seeds, WORDS)
