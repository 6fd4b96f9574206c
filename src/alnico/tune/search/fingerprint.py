"""What a search is of: its recipe, settings, tasks and models, told apart by digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from alnico.checkpoint.files import reading
from alnico.checkpoint.open_model import open_model
from alnico.evaluation.tasks import Task
from alnico.recipe.reference import resolve_reference

PIECES, PIECE_BYTES = 64, 1024
"""Of a file that are looked at: a model that was trained anew differs in some of them."""


@dataclass(frozen=True)
class Identity:
    """What a study is of: trials of one cannot stand beside those of another. Each part is plain data."""

    space: Any
    search: Any
    tasks: Any
    models: Any = ()

    def data(self) -> dict[str, str]:
        """A digest of each part."""
        return {name: _digest(value) for name, value in vars(self).items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tasks_data(tasks: Sequence[Task]) -> list[Any]:
    """What tasks score, as plain data."""
    return [[t.name, t.goal, t.size, t.weight, sorted(t.digests())] for t in tasks]


def models_data(references: Iterable[str], folder: str, *, offline: bool = False) -> list[Any]:
    """What models hold, as plain data: of files their size and some of their bytes, of the hub the commit.

    Errors: ModelError, HubError for models that cannot be opened.
    """
    found: list[Any] = []
    for reference in references:
        with closing(open_model(resolve_reference(reference, folder), offline=offline)) as model:
            is_of_hub = model.origin is not None
            found.append(
                [reference, model.identity() if is_of_hub else [_of_file(path) for path in model.paths()]]
            )
    return found


def _of_file(path: Path) -> list[Any]:
    size = path.stat().st_size
    digest = xxhash.xxh3_128()
    with reading(path) as file:
        for i in range(PIECES):
            file.seek(max(size - PIECE_BYTES, 0) * i // (PIECES - 1))
            digest.update(file.read(PIECE_BYTES))
    return [path.name, size, digest.hexdigest()]
