"""Statistics that a recipe names for its models: which of them belong to which tensor, and what a method makes of those without."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.checkpoint.layouts import closest_names
from alnico.checkpoint.renamed_model import RenamedModel
from alnico.checkpoint.source import Source
from alnico.checkpoint.statistics import StatisticsEntry, StatisticsSource, open_statistics
from alnico.errors import MismatchError
from alnico.kernels.facts import Argument, Recorded, Side
from alnico.methods.base import MatrixMethod, Merge
from alnico.plan.job import Input
from alnico.plan.sections import ModelPart, TensorMethod


@dataclass(frozen=True)
class BoundMethod:
    """What makes a tensor: ``merge`` with the numbers that statistics record in their places, the ``sides`` it reads, the hash that
    each model's tensor must have, and for people ``why`` it is made otherwise than the others."""

    merge: Merge | MatrixMethod
    sides: tuple[Input, ...] = ()
    digests: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class _SideTensor:
    """The statistics of one tensor: their place among the sources, and the name that the model has for it."""

    place: int
    statistics: StatisticsSource
    name: str

    @property
    def entry(self) -> StatisticsEntry:
        return self.statistics.entries[self.name]


class StatisticsInputs:
    """The statistics of one plan, opened when the first tensor asks for them, and added to its ``sources``."""

    def __init__(self, sources: list[Source], folder: str, new_rows: Sequence[Collection[str]] = ()) -> None:
        """``new_rows`` are the tensors of each model that have the rows of another vocabulary."""
        self.sources = sources
        self.folder = folder
        self.new_rows = new_rows
        self._opened: dict[str, tuple[int, StatisticsSource]] = {}
        self._used: set[str] = set()

    def applied(
        self, name: str, asked: TensorMethod, options: Mapping[str, Any], merge: Merge | MatrixMethod
    ) -> BoundMethod:
        """Say what makes the tensor ``name``. Errors: ModelError, MismatchError for statistics that do not fit it."""
        shape = self.sources[asked.values[0].model].tensors[asked.values[0].names[name]].shape
        if isinstance(merge, MatrixMethod) and (len(shape) != 2 or 0 in shape):
            return BoundMethod(merge.otherwise, why="no matrix")
        if not (kinds := asked.method.statistics):
            return BoundMethod(merge)
        found = {kind: [self._found(name, part, kind, path) for part, path in zip(asked.values, options[kind], strict=True)]
                 for kind in kinds}  # fmt: skip
        lacking = [
            (kind, part)
            for kind in kinds
            for part, one in zip(asked.values, found[kind], strict=True)
            if one is None
        ]
        if lacking:
            return self._without(asked, merge, lacking)
        held = {kind: [one for one in ones if one is not None] for kind, ones in found.items()}
        read = (
            merge.sides
            if isinstance(merge, MatrixMethod)
            else [a.kind for a in merge.arguments if isinstance(a, Side)]
        )
        sides = tuple(self._input(name, shape, one) for kind in read for one in held[kind])
        arguments = tuple(_settled(a, held) for a in merge.arguments)
        digests = tuple(one.entry.digest for one in held[kinds[0]])
        return BoundMethod(dataclasses.replace(merge, arguments=arguments), sides, digests)

    def check_used(self) -> None:
        """Refuse statistics of other tensors than those that are merged. Errors: MismatchError."""
        for path, (_, statistics) in self._opened.items():
            if path not in self._used:
                held = next(iter(statistics.entries), "no tensor")
                raise MismatchError(
                    f"{statistics.label}: has statistics of {held} and others, but of no tensor that is merged with them; expected those "
                    "of the model they stand under. Give that model's, or leave the method out."
                )

    def _found(self, name: str, part: ModelPart, kind: str, path: str) -> _SideTensor | None:
        """The statistics of a model's tensor; None where there are none, or its rows are those of another vocabulary."""
        place, statistics = self._open(path, kind)
        own = self._own_name(part, name, kind)
        if (
            statistics.left_out is not None
            and own not in statistics.entries
            and own not in statistics.left_out
        ):
            near = closest_names(own, [*statistics.entries, *statistics.left_out])
            raise MismatchError(
                f"{own}: the {kind} statistics of {statistics.label} neither have it nor say why not"
                f"{f'; they name {near[0]}' if near else ''}. Expected every tensor of {self.sources[part.model].label}: they were measured of "
                "a model with other names. Measure this one."
            )
        if own not in statistics.entries or (self.new_rows and part.names[name] in self.new_rows[part.model]):
            return None
        self._used.add(path)
        return _SideTensor(place, statistics, own)

    def _own_name(self, part: ModelPart, name: str, kind: str) -> str:
        """What the files of a model call a tensor, which the plan may read under another's names."""
        source, read_as = self.sources[part.model], part.names[name]
        if not isinstance(source, RenamedModel):
            return read_as
        stored = source.stored_names(read_as)
        if len(stored) > 1 or source.wrapped.tensors[stored[0]].shape != source.tensors[read_as].shape:
            raise MismatchError(
                f"{name}: {source.label} stores it as {'parts' if len(stored) > 1 else 'a part'} of {stored[0]}, in another layout than the "
                f"output's; expected one tensor for its {kind} statistics. Save {source.label} in the output's layout and measure it anew."
            )
        return stored[0]

    def _open(self, path: str, kind: str) -> tuple[int, StatisticsSource]:
        if path not in self._opened:
            beside = Path(self.folder) / path
            there = path if Path(os.path.expanduser(path)).exists() or not beside.exists() else str(beside)
            self._opened[path] = len(self.sources), open_statistics(there, path)
            self.sources.append(self._opened[path][1])
        place, statistics = self._opened[path]
        if statistics.kind != kind:
            raise MismatchError(
                f"{path}: holds statistics of the kind {statistics.kind}; expected {kind}. Measure them with `alnico statistics {kind}`."
            )
        return place, statistics

    def _without(
        self, asked: TensorMethod, merge: Merge | MatrixMethod, lacking: Sequence[tuple[str, ModelPart]]
    ) -> BoundMethod:
        kinds = " and ".join(dict.fromkeys(kind for kind, _ in lacking))
        labels = list(dict.fromkeys(self.sources[part.model].label for _, part in lacking))
        every = len(labels) == len({p.model for p in asked.values})
        why = f"no {kinds} statistics{'' if every else ' of it in ' + ' and '.join(labels)}"
        if merge.otherwise is None:
            raise MismatchError(
                f"{why}, without which {asked.method.name} makes nothing; expected them in every model. Measure anew."
            )
        return BoundMethod(merge.otherwise, why=why)

    def _input(self, name: str, shape: tuple[int, ...], one: _SideTensor) -> Input:
        stored = one.entry.stored
        tensor = one.statistics.tensors[stored]
        if tensor.shape != (expected := self._shape(shape, one)) or tensor.dtype != "F32":
            raise MismatchError(
                f"{name}: the {one.statistics.kind} statistics of {one.statistics.label} are {tensor.dtype} {tensor.shape}; expected F32 "
                f"{expected}, as the tensor is {shape}. Give the statistics of the model they stand under."
            )
        return Input(one.place, stored, tensor.dtype, tensor.byte_size)

    def _shape(self, shape: tuple[int, ...], one: _SideTensor) -> tuple[int, ...]:
        """What the statistics of a tensor are laid out as."""
        if one.statistics.kind == "fisher":
            return shape
        inputs = shape[0] if one.statistics.number(one.name, "is_transposed") else shape[-1]
        return inputs, inputs


def _settled(argument: Argument, held: Mapping[str, Sequence[_SideTensor]]) -> Argument:
    """The numbers that stand for an argument which statistics record."""
    if not isinstance(argument, Recorded):
        return argument
    return tuple(one.statistics.number(one.name, argument.key) for one in held[argument.kind])
