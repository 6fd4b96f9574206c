"""Identifies a search by digests of its recipe, settings, tasks and models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash

from alnico.checkpoint.files import open_binary
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.remote.remote_weights import remote_models
from alnico.checkpoint.source import Source
from alnico.evaluation.tasks import Task
from alnico.models.open_models import open_models
from alnico.models.recipe_of_objects import BASE
from alnico.recipe.reference import resolve_reference
from alnico.run_options import Access

PIECES, PIECE_BYTES = 64, 1024
"""Pieces of a file that are hashed: a model that was trained further differs in some of them."""


OBJECT_PIECE = 1 << 22
"""Bytes of a tensor in memory that are hashed at once."""


SCORED = "scored"
ON_PROCESSOR = "cpu in float32"
"""What :attr:`Identity.scored` is in a study that does not name it."""


@dataclass(frozen=True)
class Identity:
    """The identity of a study: trials of different identities cannot be mixed. Each part is plain data.

    ``scored`` is the kind of device and the dtype that trials are scored with, because scores differ in their last digits.
    """

    space: Any
    search: Any
    tasks: Any
    models: Any = ()
    scored: str = ON_PROCESSOR

    def data(self) -> dict[str, str]:
        """Return a digest of each part, and ``scored`` as it is: an error names it."""
        parts = {name: value for name, value in vars(self).items() if name != SCORED}
        return {name: digest_of(value) for name, value in parts.items()} | {SCORED: self.scored}


def digest_of(value: Any) -> str:
    """Return a digest of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tasks_data(tasks: Sequence[Task]) -> list[Any]:
    """Return what the tasks score, as plain data."""
    return [[t.name, t.goal, t.size, t.weight, sorted(t.digests())] for t in tasks]


def models_data(
    references: Iterable[str],
    folder: str,
    objects: Mapping[str, Any] = MappingProxyType({}),
    *,
    offline: bool = False,
) -> list[Any]:
    """Return the contents of models as plain data: size and some bytes of files, or the commit of a hub model.

    Of ``objects`` in memory, by their references, it is a digest of all tensors.

    Errors: ModelError, HubError for models that cannot be opened.
    """
    data: list[Any] = []
    opened = open_models(objects, base=objects.get(BASE)) if objects else None
    for reference in references:
        if reference in objects:
            assert opened is not None
            data.append([reference, source_data(opened.sources[reference])])
            continue
        with closing(open_model(resolve_reference(reference, folder), access=Access(offline))) as model:
            data.append([reference, source_data(model)])
    return data


def source_data(source: Source) -> Any:
    """Return the contents of an open model as plain data; of a model in memory, a digest of its tensors."""
    if source.origin is not None or remote_models([source]):
        return source.identity()
    if paths := source.paths():
        return [_of_file(path) for path in paths]
    return _of_tensors(source)


def _of_tensors(source: Source) -> str:
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(OBJECT_PIECE))
    for name, tensor in source.tensors.items():
        digest.update(f"{name}:{tensor.dtype}:{tensor.shape};".encode())
        for offset in range(0, tensor.byte_size, OBJECT_PIECE):
            piece = buffer[: min(OBJECT_PIECE, tensor.byte_size - offset)]
            source.read_into(name, offset, piece)
            digest.update(piece)
    return digest.hexdigest()


def _of_file(path: Path) -> list[Any]:
    size = path.stat().st_size
    digest = xxhash.xxh3_128()
    with open_binary(path) as file:
        for i in range(PIECES):
            file.seek(max(size - PIECE_BYTES, 0) * i // (PIECES - 1))
            digest.update(file.read(PIECE_BYTES))
    return [path.name, size, digest.hexdigest()]
