"""What is told while statistics are measured, and the recipe that takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alnico.cli.printing import say
from alnico.methods.shared.documentation import recipe_text

TOLD = 10
"""Lines of progress, about."""

METHODS = {"fisher": "fisher", "gram": "regmean"}


def watch(done: int, total: int) -> None:
    """Print some of the steps to stderr, evenly spread, and the last."""
    if done % max(1, total // TOLD) == 0 or done == total:
        say(f"measured {done}/{total}")


def recipe_hint(
    kind: str, models: Sequence[str], written: Sequence[Path], settings: Mapping[str, Any]
) -> str:
    """The part of a recipe that names the statistics."""
    entries = [
        {"model": model, "parameters": {kind: str(path)}} for model, path in zip(models, written, strict=True)
    ]
    recipe = {
        "merge_method": METHODS[kind],
        "models": entries,
        **({"parameters": dict(settings)} if settings else {}),
    }
    return recipe_text(recipe).rstrip()
