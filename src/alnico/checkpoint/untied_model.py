"""Reads a model with tied tensors as one that stores each copy, for merges with untied models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from alnico.checkpoint.source import Source, SourceWrapper, Tensor
from alnico.checkpoint.tied_weights import tie_setting, tied_copies, untied_config


class UntiedModel(SourceWrapper):
    """A source with the ``copies`` (copy to stored tensor) of tied tensors as tensors of their own, and an
    untied config."""

    def __init__(self, source: Source, copies: Mapping[str, str]) -> None:
        self.wrapped = source
        self._copies = {copy: original for copy, original in copies.items() if copy not in source.tensors}
        self.tensors: Mapping[str, Tensor] = {
            **source.tensors,
            **{copy: source.tensors[original] for copy, original in self._copies.items()},
        }
        self.notes = [
            *getattr(source, "notes", ()),
            f"{source.label}: {_first(copies)} is tied here but not in another model; it is merged as a "
            "separate tensor.",
        ]

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return untied_config(self.wrapped.config)

    def stored_name(self, name: str) -> str:
        """The wrapped model's tensor that a tensor is."""
        return self._copies.get(name, name)

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        names = list(dict.fromkeys(self._copies.get(name, name) for name in tensors))
        return self.wrapped.absent(names, side_files)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.wrapped.read_into(self._copies.get(name, name), offset, buffer)

    def identity(self) -> list[dict[str, Any]]:
        return [*self.wrapped.identity(), {"untied": sorted(self._copies)}]


def untie(sources: Sequence[Source], deciding: Sequence[Source]) -> list[Source]:
    """Untie the tied models among ``sources`` where a model in ``deciding`` stores a copy and its config
    declares it untied.

    An adapter of an embedding unties it from the head; the base merged with it then gets its own head, equal
    to its embedding.
    """
    stored = {name for source in deciding if tie_setting(source.config) is False for name in source.tensors}
    result: list[Source] = []
    for source in sources:
        copies = tied_copies(source.config, source.tensors) if stored else {}
        result.append(UntiedModel(source, copies) if stored & copies.keys() else source)
    return result


def _first(names: Iterable[str]) -> str:
    return next(iter(names), "")
