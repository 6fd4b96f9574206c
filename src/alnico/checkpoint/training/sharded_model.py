"""A model whose tensors are stored in pieces, in the files of many ranks; it is read from them by blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.sidecars import check_kinds, check_links, config_path
from alnico.checkpoint.source import Origin, Shard, read_tensor
from alnico.checkpoint.training.piece_table import READING_BYTES, PieceTable

BESIDE = ("huggingface",)
"""Folders in which trainers put the config and the tokenizer of a checkpoint."""


@contextmanager
def closed_on_failure(files: FileModel) -> Iterator[None]:
    """Close the files if the block fails. If it does not, they belong to the model that it made."""
    try:
        yield
    except BaseException:
        files.close()
        raise


class ShardedModel:
    """A model in pieces. ``files`` has the stored pieces as its tensors, and ``tensors`` says how they are put together.

    ``directory`` is the folder of the config and the tokenizer, where one is found.
    """

    origin: Origin | None = None

    def __init__(
        self,
        label: str,
        location: Path,
        files: FileModel,
        tensors: Mapping[str, PieceTable],
        notes: Sequence[str],
        index_digest: str = "",
    ) -> None:
        self.label = label
        self.location = location
        self.tensors = tensors
        self._files = files
        self._index_digest = index_digest
        self.directory: Path | None = side_folder(location)
        self.notes = [*files.notes, *notes, *_side_note(label, location, self.directory)]

    @cached_property
    def config(self) -> Mapping[str, Any]:
        path = None if self.directory is None else config_path(self.directory)
        return {} if path is None else read_json(path)

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Nothing is ever absent."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.tensors[name].read_into(self._files.read_into, offset, buffer)

    def read(self, name: str) -> np.ndarray:
        return read_tensor(self, name)

    @property
    def held_bytes(self) -> int:
        return self._files.held_bytes

    @property
    def reading_bytes(self) -> int:
        return self._files.reading_bytes + READING_BYTES

    @property
    def shards(self) -> Sequence[Shard]:
        return self._files.shards

    def identity(self) -> list[dict[str, Any]]:
        index = [{"index": self._index_digest}] if self._index_digest else []
        return [*self._files.identity(), *index]

    def paths(self) -> list[Path]:
        return self._files.paths()

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> ShardedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<model {self.label}: {len(self.tensors)} tensors in {len(self._files.tensors)} pieces, "
            f"{len(self.shards)} files>"
        )


def side_folder(location: Path) -> Path | None:
    """Return the folder of a checkpoint's config and tokenizer: its own, one that trainers put into it or next to it, or its
    parent's. None if there is none. Errors: ModelError for files in it that cannot be read."""
    folders = [location, *(place / name for place in (location, location.parent) for name in BESIDE)]
    for folder in (*folders, location.parent):
        if (folder / "config.json").is_file():
            check_kinds(folder)
            check_links(folder)
            return folder
    return None


def _side_note(label: str, location: Path, found: Path | None) -> list[str]:
    """Say where config and tokenizer are from, if not from the folder that was named."""
    if found is None:
        return [
            f"{label}: has no config.json next to its shards, in huggingface/ or in the folder above, so an output that is "
            "made from it alone has no config and no tokenizer. Copy them into its folder, or name a model that has them "
            "as base_model."
        ]
    is_named = found in (location, Path(os.path.expanduser(label)))
    return [] if is_named else [f"{label}: config and tokenizer are those of {found}."]
