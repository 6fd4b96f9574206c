"""Recognises pipelines of diffusers, whose ``model_index.json`` lists parts with folders of their own."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from alnico.checkpoint.json_files import read_json
from alnico.errors import ModelError

PIPELINE = "model_index.json"
"""File in which diffusers lists the parts of a pipeline."""

PART_KEYS = frozenset(("_class_name", "architectures"))
"""Keys in the config of a part that has weights."""


def is_pipeline(directory: Path) -> bool:
    """Is a folder a pipeline of diffusers, whose weights are in the folders of its parts?"""
    return bool(parts_of(directory)) and not (directory / "config.json").exists()


def check_parts(directory: Path, files: Collection[str], weights: Collection[str]) -> None:
    """Refuse a pipeline without one of its parts, or without the weights of one. Errors: ModelError."""
    folders = {file.split("/")[0] for file in files}
    for part in parts_of(directory):
        if part not in folders:
            raise ModelError(
                f"{directory}: {PIPELINE} lists the part {part!r}, which has no folder; expected all parts of the pipeline. "
                "Complete the download."
            )
        config = f"{part}/config.json"
        if part not in weights and config in files and PART_KEYS & read_json(directory / config).keys():
            raise ModelError(
                f"{directory / part}: has config.json and no .safetensors or .bin file; expected the weights of this part of the "
                "pipeline. Complete the download."
            )


def parts_of(directory: Path) -> list[str]:
    """The parts that a pipeline lists: those that have a library and a class."""
    if not (directory / PIPELINE).exists():
        return []
    return [
        name
        for name, value in read_json(directory / PIPELINE).items()
        if not name.startswith("_") and isinstance(value, list) and value and isinstance(value[0], str)
    ]
