"""Hashes the files of weights with SHA-256 while their tensors are read, and the root over them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.files import open_binary
from alnico.checkpoint.source import Origin, Shard, SourceWrapper, Tensor
from alnico.checkpoint.task_vectors.manifest import StoredFile
from alnico.errors import ModelError

READ_BYTES = 1 << 20


class HashingModel(SourceWrapper):
    """A model in files that hashes them as they pass: where tensors are read in the order of a file, it is read once.

    :meth:`files` reads what did not pass in order. The hub's own hashes are taken where it states them.
    """

    def __init__(self, model: FileModel) -> None:
        """Errors: ModelError for a model at a URL, whose files are not read in order."""
        if model.remote is not None:
            raise ModelError(
                f"{model.label}: is at a URL, and a stored task vector states the SHA-256 of whole files; expected a model on this "
                "machine or on the hub. Download the model, and give its path."
            )
        self.wrapped = model
        self.tensors: Mapping[str, Tensor] = model.tensors
        self.notes = model.notes
        self._states: dict[str, tuple[Any, int]] = {}
        self._shard_of = {t.name: shard for shard in model.shards for t in shard.header.tensors}
        self._shards = model.shards
        self._stated = _stated_hashes(model.shards, model.origin)

    @property
    def shards(self) -> Any:
        return getattr(self.wrapped, "shards", ())

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return self.wrapped.absent(tensors, side_files)

    def identity(self) -> list[dict[str, Any]]:
        return self.wrapped.identity()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.wrapped.read_into(name, offset, buffer)
        shard = self._shard_of[name]
        if shard.name in self._stated:
            return
        assert isinstance(self.wrapped, FileModel)
        place = self.wrapped.place_of(name)
        if place is None:
            return
        state, position = self._states.get(shard.name) or self._begun(shard)
        first = place[1] + offset
        if first <= position < first + len(buffer):
            state.update(buffer[position - first :])
            position = first + len(buffer)
        self._states[shard.name] = state, position

    @staticmethod
    def _begun(shard: Shard) -> tuple[Any, int]:
        """Hash what comes before the first tensor: the header."""
        state, size, data_begin = hashlib.sha256(), 0, shard.header.data_begin
        with open_binary(shard.path) as file:
            while size < data_begin and (data := file.read(min(READ_BYTES, data_begin - size))):
                state.update(data)
                size += len(data)
        return state, size

    def files(self) -> dict[str, StoredFile]:
        """Return all files of weights with their hashes. Errors: ModelError."""
        return {
            s.name: StoredFile(s.size, self._stated.get(s.name) or _sha256(s, *self._states.get(s.name, ())))
            for s in self._shards
        }


def hashed_files(shards: Sequence[Shard], origin: Origin | None) -> dict[str, StoredFile]:
    """Return files of weights with the hashes that the hub states, or those of their bytes. Errors: ModelError."""
    stated = _stated_hashes(shards, origin)
    return {s.name: StoredFile(s.size, stated.get(s.name) or _sha256(s)) for s in shards}


def _stated_hashes(shards: Sequence[Shard], origin: Origin | None) -> dict[str, str]:
    hashes: Mapping[str, str] = getattr(origin, "hashes", {})
    return {shard.name: hashes[shard.name] for shard in shards if shard.name in hashes}


def _sha256(shard: Shard, state: Any = None, position: int = 0) -> str:
    """Return the hash of a file, of which ``position`` bytes are in ``state``. Errors: ModelError."""
    state = hashlib.sha256() if state is None else state
    try:
        if position < shard.size:
            with open_binary(shard.path) as file:
                file.seek(position)
                while data := file.read(READ_BYTES):
                    state.update(data)
                    position += len(data)
    except OSError as error:
        raise ModelError(
            f"{shard.path}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from None
    if position != shard.size:
        raise ModelError(
            f"{shard.path}: changed while it was read (it had {shard.size} bytes, now {position}); expected an unchanged file. Run "
            "the command again when nothing writes to the file."
        )
    return str(state.hexdigest())


def root_of(files: Mapping[str, StoredFile]) -> str | None:
    """Return the SHA-256 over the sorted lines ``SHA256  SIZE  NAME`` of files; None where a hash is not known.

    >>> root_of({"model.safetensors": StoredFile(8, "ab" * 32)})[:8]
    '4650e2b3'
    """
    if not files or any(file.sha256 is None for file in files.values()):
        return None
    lines = sorted(f"{file.sha256}  {file.size}  {name}\n" for name, file in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
