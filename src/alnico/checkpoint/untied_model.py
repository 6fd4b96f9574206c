"""A model with tied tensors, read as one that stores each copy: beside models whose copies are not tied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from alnico.checkpoint.source import Source, SourceWrapper, Tensor
from alnico.checkpoint.tied_weights import tie_setting, tied_copies, untied_config


class UntiedModel(SourceWrapper):
    """A source that stores the ``copies`` (copy to stored tensor) of its tied tensors, and whose config says that they are not tied."""

    def __init__(self, source: Source, copies: Mapping[str, str]) -> None:
        self.wrapped = source
        self._copies = {copy: original for copy, original in copies.items() if copy not in source.tensors}
        self.tensors: Mapping[str, Tensor] = {
            **source.tensors,
            **{copy: source.tensors[original] for copy, original in self._copies.items()},
        }
        self.notes = [
            *getattr(source, "notes", ()),
            f"{source.label}: {_some(copies)} is tied in it, and not in another model; it is merged as a tensor of its own.",
        ]

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return untied_config(self.wrapped.config)

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        names = list(dict.fromkeys(self._copies.get(name, name) for name in tensors))
        return self.wrapped.absent(names, side_files)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.wrapped.read_into(self._copies.get(name, name), offset, buffer)

    def identity(self) -> list[dict[str, Any]]:
        return [*self.wrapped.identity(), {"untied": sorted(self._copies)}]


def untie(sources: Sequence[Source], speaking: Sequence[Source]) -> list[Source]:
    """Read the tied models among ``sources`` with their copies stored, where one of ``speaking`` stores a copy and says it is not tied.

    An adapter of an embedding unties it from the head: then the base beside it has a head of its own, equal to its embedding.
    """
    stored = {name for source in speaking if tie_setting(source.config) is False for name in source.tensors}
    found: list[Source] = []
    for source in sources:
        copies = tied_copies(source.config, source.tensors) if stored else {}
        found.append(UntiedModel(source, copies) if stored & copies.keys() else source)
    return found


def _some(names: Iterable[str]) -> str:
    return next(iter(names), "")
