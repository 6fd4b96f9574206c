"""A model with tied tensors, read as one that stores each copy: beside models whose copies are not tied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alnico.checkpoint.source import Origin, Source, Tensor
from alnico.checkpoint.tied_weights import is_tied, tied_copies, untied_config


class UntiedModel:
    """A source that stores the ``copies`` (copy to stored tensor) of its tied tensors, and whose config says that they are not tied."""

    def __init__(self, source: Source, copies: Mapping[str, str]) -> None:
        self.unmapped = source
        self._copies = {copy: original for copy, original in copies.items() if copy not in source.tensors}
        self.tensors: Mapping[str, Tensor] = {
            **source.tensors,
            **{copy: source.tensors[original] for copy, original in self._copies.items()},
        }
        self.config: Mapping[str, Any] = untied_config(source.config)
        self.notes = [
            *getattr(source, "notes", ()),
            f"{source.label}: {_some(copies)} is tied in it, and not in another model; it is merged as a tensor of its own.",
        ]

    @property
    def label(self) -> str:
        return self.unmapped.label

    @property
    def directory(self) -> Path | None:
        return self.unmapped.directory

    @property
    def location(self) -> Path | None:
        return getattr(self.unmapped, "location", None)

    @property
    def origin(self) -> Origin | None:
        return self.unmapped.origin

    @property
    def held_bytes(self) -> int:
        return self.unmapped.held_bytes

    @property
    def reading_bytes(self) -> int:
        return self.unmapped.reading_bytes

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        names = list(dict.fromkeys(self._copies.get(name, name) for name in tensors))
        return self.unmapped.absent(names, side_files)

    def fetch(self, files: Iterable[str], tell: Callable[[int], None] | None = None) -> None:
        self.unmapped.fetch(files, tell)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.unmapped.read_into(self._copies.get(name, name), offset, buffer)

    def identity(self) -> list[dict[str, Any]]:
        return [*self.unmapped.identity(), {"untied": sorted(self._copies)}]

    def paths(self) -> list[Path]:
        return self.unmapped.paths()

    def close(self) -> None:
        self.unmapped.close()


def untied(sources: Sequence[Source], speaking: Sequence[Source]) -> list[Source]:
    """Read the tied models among ``sources`` with their copies stored, where one of ``speaking`` stores a copy and says it is not tied.

    An adapter of an embedding unties it from the head: then the base beside it has a head of its own, equal to its embedding.
    """
    stored = {name for source in speaking if is_tied(source.config) is False for name in source.tensors}
    found: list[Source] = []
    for source in sources:
        copies = tied_copies(source.config, source.tensors) if stored else {}
        found.append(UntiedModel(source, copies) if stored & copies.keys() else source)
    return found


def _some(names: Iterable[str]) -> str:
    return next(iter(names), "")
