"""Runs one method on made arrays through the whole engine, from files to files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import alnico
from alnico.methods import registry
from alnico.testing import small_models
from made import read_model, save_model
from methods.sides import with_statistics


def recipe_for(
    method: str, models: Sequence[Path], base: Path | None, options: Mapping[str, Any], **keys: Any
) -> dict[str, Any]:
    """Write a recipe; per-model options are lists in the order of ``models``."""
    return small_models.recipe_for(registry()[method], models, base, with_statistics(options, models), **keys)


def write_inputs(
    root: Path, base: Mapping[str, np.ndarray], models: Sequence[Mapping[str, np.ndarray]], dtype: str = "F32"
) -> tuple[Path, list[Path]]:
    paths = [save_model(root / f"m{i}", {n: (dtype, v) for n, v in m.items()}) for i, m in enumerate(models)]
    return save_model(root / "base", {n: (dtype, v) for n, v in base.items()}), paths


def merge_arrays(
    root: Path, method: str, base: Mapping[str, np.ndarray], models: Sequence[Mapping[str, np.ndarray]], options: Mapping[str, Any],
    dtype: str = "F32", keys: Mapping[str, Any] | None = None, **arguments: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Merge dicts of arrays; for slerp the first of ``models`` is the base; ``base`` may be empty."""
    base_path, paths = write_inputs(root, base, models, dtype)
    if registry()[method].base == "first":
        base_path = paths[0]
    alnico.merge(
        recipe_for(
            method,
            paths,
            base_path if base or registry()[method].base == "first" else None,
            options,
            **(keys or {}),
        ),
        root / "out",
        overwrite=True,
        **arguments,
    )
    return read_model(root / "out")
