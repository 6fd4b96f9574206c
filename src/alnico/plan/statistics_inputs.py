"""Finds the statistics of each tensor for methods that need them, and binds the methods to them."""

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
from alnico.kernels.facts import Recorded, Side
from alnico.methods.base import MatrixMethod, Merge
from alnico.plan.families import OTHER_TABLES, is_lookup
from alnico.plan.job import Input
from alnico.plan.sections import ModelPart, TensorMethod
from alnico.vocabulary.tables import is_head


@dataclass(frozen=True)
class BoundMethod:
    """A method bound to the statistics of a tensor.

    ``merge`` has the numbers recorded in the statistics as arguments, ``sides`` are the statistics that it
    reads, ``digests`` the hashes that the models' tensors must have. ``why`` says why a fallback applies, if
    one does.
    """

    merge: Merge | MatrixMethod
    sides: tuple[Input, ...] = ()
    digests: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class LayerInputs:
    """The Gram matrix of the inputs of a matrix, the hash that the matrix must have, and whether it is (inputs, outputs)."""

    gram: Input
    digest: str
    is_transposed: bool


@dataclass(frozen=True)
class _SideTensor:
    """The statistics of one tensor: their position in the sources, and the tensor's name in the model."""

    place: int
    statistics: StatisticsSource
    name: str

    @property
    def entry(self) -> StatisticsEntry:
        return self.statistics.entries[self.name]


class StatisticsInputs:
    """The statistics of one plan, opened on first use and appended to its ``sources``."""

    def __init__(self, sources: list[Source], folder: str, new_rows: Sequence[Collection[str]] = ()) -> None:
        """``new_rows`` are the tensors of each model with the rows of another vocabulary."""
        self.sources = sources
        self.folder = folder
        self.new_rows = new_rows
        self._opened: dict[str, tuple[int, StatisticsSource]] = {}
        self._used: set[str] = set()

    def bind(
        self, name: str, chosen: TensorMethod, options: Mapping[str, Any], merge: Merge | MatrixMethod
    ) -> BoundMethod:
        """Bind ``merge`` to the statistics of the tensor ``name``.

        Errors: ModelError, MismatchError if they do not fit it.
        """
        shape = self.sources[chosen.parts[0].model].tensors[chosen.parts[0].names[name]].shape
        if isinstance(merge, MatrixMethod) and (why := why_no_matrix(name, shape, merge)):
            if merge.vectors is None or len(shape) != 1:
                return BoundMethod(merge.otherwise, why=why)
            merge = merge.vectors
            for kind in chosen.method.statistics:
                self._check_vectors(options[kind], kind)
        if not (kinds := chosen.method.statistics):
            return BoundMethod(merge)
        by_kind = {kind: [self._find(name, part, kind, path) for part, path in zip(chosen.parts, options[kind], strict=True)]
                 for kind in kinds}  # fmt: skip
        missing = [
            (kind, part)
            for kind in kinds
            for part, tensor in zip(chosen.parts, by_kind[kind], strict=True)
            if tensor is None
        ]
        if missing:
            return self._without(chosen, merge, missing)
        complete = {
            kind: [tensor for tensor in tensors if tensor is not None] for kind, tensors in by_kind.items()
        }
        read = (
            merge.sides
            if isinstance(merge, MatrixMethod)
            else [a.kind for a in merge.arguments if isinstance(a, Side)]
        )
        sides = tuple(self._input(name, shape, tensor) for kind in read for tensor in complete[kind])
        arguments = tuple(_recorded_numbers(a, complete) for a in merge.arguments)
        digests = tuple(tensor.entry.digest for tensor in complete[kinds[0]])
        return BoundMethod(dataclasses.replace(merge, arguments=arguments), sides, digests)

    def gram_of(self, name: str, part: ModelPart, path: str, shape: tuple[int, ...]) -> LayerInputs | None:
        """Return the Gram matrix of the inputs of a matrix; None for all other tensors, and if it has none.

        Errors: ModelError, MismatchError if the statistics do not fit the tensor.
        """
        found = self._find(name, part, "gram", path)
        if found is None or len(shape) != 2:
            return None
        side = self._input(name, shape, found)
        return LayerInputs(
            side, found.entry.digest, bool(found.statistics.number(found.name, "is_transposed"))
        )

    def check_used(self) -> None:
        """Refuse statistics that belong to none of the merged tensors. Errors: MismatchError."""
        for path, (_, statistics) in self._opened.items():
            if path not in self._used:
                example = next(iter(statistics.entries), "no tensor")
                raise MismatchError(
                    f"{statistics.label}: has statistics of {example} and others, but of no tensor that is "
                    "merged with them; expected those of the model that names them. Use that model's "
                    "statistics, or another method."
                )

    def _check_vectors(self, paths: Sequence[str], kind: str) -> None:
        """Refuse statistics of matrices only, for a method that was told to merge vectors by them. Errors: MismatchError."""
        for path in paths:
            _, statistics = self.opened(path, kind)
            if all(len(statistics.tensors[e.stored].shape) != 1 for e in statistics.entries.values()):
                raise MismatchError(
                    f"{statistics.label}: has {kind} statistics of matrices only; expected those of scales and biases too, "
                    f"because the recipe has vectors: inputs. Measure again with `alnico statistics {kind} --vectors`, or "
                    "remove vectors."
                )

    def _find(self, name: str, part: ModelPart, kind: str, path: str) -> _SideTensor | None:
        """Return the statistics of a tensor; None if it has none, or rows of another vocabulary."""
        place, statistics = self.opened(path, kind)
        own = self._own_name(part, name, kind)
        if (
            statistics.left_out is not None
            and own not in statistics.entries
            and own not in statistics.left_out
        ):
            near = closest_names(own, [*statistics.entries, *statistics.left_out])
            raise MismatchError(
                f"{own}: the {kind} statistics of {statistics.label} neither contain it nor say "
                f"why{f'; they name {near[0]}' if near else ''}. Expected every tensor of "
                f"{self.sources[part.model].label}: they were measured on a model with other names. Measure "
                "this model."
            )
        if own not in statistics.entries or (self.new_rows and part.names[name] in self.new_rows[part.model]):
            return None
        self._used.add(path)
        return _SideTensor(place, statistics, own)

    def _own_name(self, part: ModelPart, name: str, kind: str) -> str:
        """Return the stored name of a tensor, which the plan may read under the donor's name."""
        source, read_as = self.sources[part.model], part.names[name]
        if not isinstance(source, RenamedModel):
            return read_as
        stored = source.stored_names(read_as)
        if len(stored) > 1 or source.wrapped.tensors[stored[0]].shape != source.tensors[read_as].shape:
            raise MismatchError(
                f"{name}: {source.label} stores it as {'parts' if len(stored) > 1 else 'a part'} of "
                f"{stored[0]}, in another layout than the output's; expected one tensor for its {kind} "
                f"statistics. Save {source.label} in the output's layout and measure it again."
            )
        return stored[0]

    def opened(self, path: str, kind: str) -> tuple[int, StatisticsSource]:
        """Return statistics and their position in the sources, opened on first use. Errors: ModelError, MismatchError."""
        if path not in self._opened:
            in_folder = Path(self.folder) / path
            resolved = (
                path if Path(os.path.expanduser(path)).exists() or not in_folder.exists() else str(in_folder)
            )
            self._opened[path] = len(self.sources), open_statistics(resolved, path)
            self.sources.append(self._opened[path][1])
        place, statistics = self._opened[path]
        if statistics.kind != kind:
            raise MismatchError(
                f"{path}: contains {statistics.kind} statistics; expected {kind}. Measure them with `alnico "
                f"statistics {kind}`."
            )
        return place, statistics

    def _without(
        self, chosen: TensorMethod, merge: Merge | MatrixMethod, lacking: Sequence[tuple[str, ModelPart]]
    ) -> BoundMethod:
        kinds = " and ".join(dict.fromkeys(kind for kind, _ in lacking))
        labels = list(dict.fromkeys(self.sources[part.model].label for _, part in lacking))
        every = len(labels) == len({p.model for p in chosen.parts})
        why = f"no {kinds} statistics{'' if every else ' of it in ' + ' and '.join(labels)}"
        if merge.otherwise is None:
            raise MismatchError(
                f"{why}, which {chosen.method.name} needs; expected them for every model. Measure again."
            )
        return BoundMethod(merge.otherwise, why=why)

    def _input(self, name: str, shape: tuple[int, ...], side: _SideTensor) -> Input:
        stored = side.entry.stored
        tensor = side.statistics.tensors[stored]
        if tensor.shape != (expected := self._shape(shape, side)) or tensor.dtype != "F32":
            raise MismatchError(
                f"{name}: the {side.statistics.kind} statistics of {side.statistics.label} are "
                f"{tensor.dtype} {tensor.shape}; expected F32 {expected}, because the tensor is {shape}. Use "
                "the statistics of the model that names them."
            )
        return Input(side.place, stored, tensor.dtype, tensor.byte_size)

    def _shape(self, shape: tuple[int, ...], side: _SideTensor) -> tuple[int, ...]:
        """Return the shape that the statistics of a tensor must have."""
        if side.statistics.kind == "fisher" or len(shape) == 1:
            return shape
        inputs = shape[0] if side.statistics.number(side.name, "is_transposed") else shape[-1]
        return inputs, inputs


def why_no_matrix(name: str, shape: tuple[int, ...], method: MatrixMethod) -> str:
    """Return why a method does not take a tensor as a matrix, or as matrices; "" if it does.

    >>> from alnico.methods import find
    >>> tsv = find("tsv").bind({}, 2)
    >>> shapes = {"a.weight": (4, 8), "lm_head.weight": (9, 4), "conv.weight": (8, 4, 3, 3), "experts.up_proj": (4, 64, 64), "b": (8, 1, 3)}
    >>> [why_no_matrix(name, shape, tsv) for name, shape in shapes.items()]
    ['', 'a table of tokens or positions', '', '', 'not a matrix']
    """
    if len(shape) < 2 or 0 in shape or (len(shape) > 2 and not method.takes_stacks):
        return "not a matrix"
    if method.takes_stacks and (shape[1] == 1 if len(shape) > 2 else min(shape) == 1):
        return "not a matrix"  # a depthwise kernel, or a vector
    if len(shape) > 2 and shape[0] == 1:
        return "not a matrix"  # such as the table of positions of a vision transformer
    in_a_layer = any(word.isdigit() for word in name.split(".")[:-2])  # where "proj_out" is no head
    if not method.takes_tables and (
        is_lookup(name) or name.endswith(OTHER_TABLES) or (is_head(name) and not in_a_layer)
    ):
        return "a table of tokens or positions"
    return ""


def _recorded_numbers(argument: Any, by_kind: Mapping[str, Sequence[_SideTensor]]) -> Any:
    """Replace an argument recorded in statistics by its numbers, one per model."""
    if not isinstance(argument, Recorded):
        return argument
    return tuple(side.statistics.number(side.name, argument.key) for side in by_kind[argument.kind])
