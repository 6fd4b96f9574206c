"""Reads the folder of a tokenizer without weights as a model without tensors."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from alnico.checkpoint.files import MAX_ENTRIES
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.source import Origin, Source, Tensor
from alnico.checkpoint.weight_files import gguf_files, holds_weights
from alnico.errors import AlnicoError
from alnico.recipe.schema import Recipe
from alnico.vocabulary.tokenizer import FILES, read_tokenizer_file


class TokenizerFolder:
    """A :class:`Source` with a tokenizer and no tensors."""

    origin: Origin | None = None
    held_bytes = reading_bytes = 0
    tensors: Mapping[str, Tensor] = {}

    def __init__(self, label: str, directory: Path) -> None:
        self.label = label
        self.directory: Path | None = directory
        self.location = directory

    @cached_property
    def config(self) -> Mapping[str, Any]:
        path = self.location / "config.json"
        return read_json(path) if path.exists() else {}

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        pass

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        raise AlnicoError(f"{self.label}: has no tensor {name}: it is the folder of a tokenizer.")

    def identity(self) -> list[dict[str, Any]]:
        return [
            {
                "file": path.name,
                "size": path.stat().st_size,
                "digest": xxhash.xxh3_128_hexdigest(read_tokenizer_file(path)),
            }
            for path in self.paths()
        ]

    def paths(self) -> list[Path]:
        return [self.location / name for name in FILES if (self.location / name).exists()]

    def close(self) -> None:
        pass


def tokenizer_alone(recipe: Recipe, reference: str, place: str) -> Source | None:
    """Return the folder at ``place`` as a source, if a recipe needs nothing of ``reference`` but its tokens, and it has no weights."""
    setting = recipe.tokenizer
    if setting is None or not setting.approximate or reference != setting.source:
        return None
    if reference in (recipe.base_model, recipe.complete_from) or any(
        entry.reference == reference for entry in recipe.entries
    ):
        return None
    folder = Path(os.path.expanduser(place))
    if not folder.is_dir():
        return None
    with os.scandir(folder) as entries:
        names = [entry.name for entry in itertools.islice(entries, MAX_ENTRIES) if not entry.is_dir()]
    if holds_weights(names) or gguf_files(names) or not any(name in FILES for name in names):
        return None
    return TokenizerFolder(reference, folder)
