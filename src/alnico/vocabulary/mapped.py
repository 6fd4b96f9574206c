"""A model whose vocabulary matrices have the output's rows: gathered while they are read."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.checkpoint.model import Source, Tensor
from alnico.errors import MismatchError
from alnico.numerics.dtypes import DTYPES, MERGEABLE, decode, promote
from alnico.vocabulary.rows import MEAN, PADDING, ZEROS, RowMap

if TYPE_CHECKING:
    from alnico.checkpoint.hub import Repository

PIECE_ELEMENTS = 1 << 16
"""Most elements that are decoded at a time."""

FOREIGN = "::"
"""Between a model's label and its file, where a file of another model must be fetched."""


@dataclass(frozen=True)
class MappedTensor:
    """What is said of a vocabulary tensor with the output's rows."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nominal: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def byte_size(self) -> int:
        return self.elements * DTYPES[self.dtype].bits // 8


@dataclass(frozen=True)
class _Gathered:
    """How one tensor is read: its name in each source that rows come from; ``raw`` if bytes are moved and never decoded."""

    tensor: MappedTensor
    columns: int
    names: Mapping[int, str]
    raw: bool


def mapped(
    source: Source, others: Sequence[Source], names: Iterable[str], row_map: RowMap, ties: Mapping[str, str] | None = None
) -> Source:
    """Give a model the output's vocabulary rows; returns ``source`` itself where nothing changes.

    ``others`` are all sources, in the order that ``row_map`` counts them, ``source`` among them; ``names`` are the tensors of
    ``source`` that have vocabulary rows. ``ties`` tells which tensor stands for one that another model does not store: the
    embedding for a tied head. A tensor keeps its dtype, and its bytes are moved, if all its rows come from models with
    this dtype; where rows are computed or come in another one it is float32 (float64 if one is), ``nominal`` stays.

    Errors: MismatchError for a tensor that a model lacks from which rows are taken, or that has another width there, or
    values that cannot be computed with.
    """
    found = {}
    for name in names:
        gathered = _gathered(source, others, name, row_map, ties or {})
        if gathered is not None:
            found[name] = gathered
    return MappedModel(source, others, found, row_map) if found else source


def _gathered(source: Source, others: Sequence[Source], name: str, row_map: RowMap, ties: Mapping[str, str]) -> _Gathered | None:
    own = source.tensors[name]
    if not own.shape or row_map.keeps(own.shape[0]):
        return None
    held = {}
    for i in row_map.read_from:
        alias = name if name in others[i].tensors else ties.get(name, name)
        if alias not in others[i].tensors:
            count = int((row_map.origin == i).sum()) + int((row_map.means[:, i : i + 1] >= 0).sum())
            raise MismatchError(
                f"{name}: {count} rows of it are taken from {others[i].label}, which lacks it; expected it there. "
                f"Name another model for these tokens in the recipe, or use models that all have it."
            )
        held[i] = alias
        shape = others[i].tensors[alias].shape
        if shape[1:] != own.shape[1:]:
            raise MismatchError(
                f"{name}: {source.label} is {own.shape}, {others[i].label} is {shape}; expected rows of one width. "
                "Use models of one architecture and size."
            )
    dtypes = {own.dtype, *(others[i].tensors[n].dtype for i, n in held.items())}
    raw = len(dtypes) == 1 and not row_map.is_computed
    if not raw and not dtypes <= set(MERGEABLE):
        raise MismatchError(
            f"{name}: the dtypes of its rows cannot be computed with ({', '.join(sorted(dtypes))}); "
            f"expected {', '.join(MERGEABLE)}. Convert the models."
        )
    dtype = own.dtype if raw else promote(["F32", *dtypes])
    tensor = MappedTensor(name, dtype, (row_map.size, *own.shape[1:]), own.nominal)
    return _Gathered(tensor, math.prod(own.shape[1:]), held, raw)


class MappedModel:
    """A source with the output's vocabulary rows. Made by :func:`mapped`; closing it closes the model alone, not the others."""

    def __init__(self, source: Source, others: Sequence[Source], gathered: Mapping[str, _Gathered], row_map: RowMap) -> None:
        self._source = source
        self._others = tuple(others)
        self._gathered = gathered
        self._map = row_map
        self._padding: dict[str, np.ndarray] = {}
        self._locks = {name: threading.Lock() for name in gathered}
        self.tensors: Mapping[str, Tensor] = {
            name: gathered[name].tensor if name in gathered else tensor for name, tensor in source.tensors.items()
        }

    @property
    def label(self) -> str:
        return self._source.label

    @property
    def config(self) -> Mapping[str, Any]:
        return self._source.config

    @property
    def directory(self) -> Path | None:
        return self._source.directory

    @property
    def location(self) -> Path | None:
        return getattr(self._source, "location", None)

    @property
    def origin(self) -> Repository | None:
        return self._source.origin

    @property
    def held_bytes(self) -> int:
        padding = sum(8 * g.columns for g in self._gathered.values() if not g.raw)
        return self._source.held_bytes + self._map.held_bytes + padding

    @property
    def reading_bytes(self) -> int:
        columns = max((g.columns for g in self._gathered.values() if not g.raw), default=0)
        if not columns:
            return self._source.reading_bytes
        piece = max(PIECE_ELEMENTS, columns)
        return self._source.reading_bytes + 24 * piece + 16 * columns  # raw, decoded, as float64; a sum and a term of it

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        """Files of other models that rows are taken from come as ``label::file``; they may be in these models' own lists too."""
        wanted = list(tensors)
        found = dict(self._source.absent(wanted, side_files))
        foreign: dict[int, list[str]] = {}
        for name in wanted:
            if name in self._gathered:
                for i, alias in self._gathered[name].names.items():
                    if i != self._map.own:
                        foreign.setdefault(i, []).append(alias)
        for i, names in foreign.items():
            other = self._others[i]
            found |= {f"{other.label}{FOREIGN}{file}": size for file, size in other.absent(names, False).items()}
        return found

    def fetch(self, files: Iterable[str], tell: Callable[[int], None] | None = None) -> None:
        own: list[str] = []
        foreign = {other.label: (other, list[str]()) for other in self._others}
        for file in files:
            label, mark, name = file.partition(FOREIGN)
            (foreign[label][1] if mark and label in foreign else own).append(name if mark else file)
        self._source.fetch(own, tell)
        for other, names in foreign.values():
            if names:
                other.fetch(names, tell)

    def identity(self) -> list[dict[str, Any]]:
        return [*self._source.identity(), {"rows": self._map.digest(), "tensors": sorted(self._gathered)}]

    def paths(self) -> list[Path]:
        return self._source.paths()

    def close(self) -> None:
        self._source.close()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        gathered = self._gathered.get(name)
        if gathered is None:
            self._source.read_into(name, offset, buffer)
            return
        width = DTYPES[gathered.tensor.dtype].bits
        for origin, row, first, count in self._stretches(
            offset * 8 // width // max(gathered.columns, 1), -(-(offset + len(buffer)) * 8 // width) // max(gathered.columns, 1) + 1
        ):
            begin = first * gathered.columns * width // 8
            low, high = max(offset, begin), min(offset + len(buffer), begin + count * gathered.columns * width // 8)
            if low < high:
                self._fill(gathered, origin, row, low - begin, buffer[low - offset : high - offset])

    def _stretches(self, low: int, high: int) -> Iterable[tuple[int, int, int, int]]:
        """The runs that touch output rows low to high: origin, its first row there, first output row, rows."""
        runs = self._map.runs
        begin = max(int(np.searchsorted(runs, low, "right")) - 1, 0)
        end = int(np.searchsorted(runs, high, "left"))
        edges = runs[begin : end + 1].tolist()
        for first, last in itertools.pairwise(edges):
            yield int(self._map.origin[first]), int(self._map.row[first]), first, last - first

    def _fill(self, gathered: _Gathered, origin: int, row: int, offset: int, buffer: memoryview) -> None:
        """Fill the bytes of one run from byte ``offset`` of it on."""
        if origin == ZEROS:
            np.frombuffer(buffer, np.uint8)[:] = 0
        elif gathered.raw:
            skipped = row * gathered.columns * DTYPES[gathered.tensor.dtype].bits // 8
            self._others[origin].read_into(gathered.names[origin], skipped + offset, buffer)
        else:
            self._compute(gathered, origin, row, offset, buffer)

    def _compute(self, gathered: _Gathered, origin: int, row: int, offset: int, buffer: memoryview) -> None:
        width = DTYPES[gathered.tensor.dtype].bytes
        out, columns = np.frombuffer(buffer, np.uint8), gathered.columns
        at, end = offset // width, -(-(offset + len(buffer)) // width)
        while at < end:
            in_row = at % columns
            # Means are made a row at a time; copied rows as they lie.
            count = min(PIECE_ELEMENTS, end - at, end - at if origin >= 0 else columns - in_row)
            if origin >= 0:
                values = self._decoded(gathered, origin, row * columns + at, count)
            elif origin == MEAN:
                values = self._mean(gathered, row + at // columns, in_row, count)
            else:
                values = self._padding_row(gathered)[in_row : in_row + count]
            data = values.astype(DTYPES[gathered.tensor.dtype].storage).view(np.uint8)
            low, high = max(at * width, offset), min((at + count) * width, offset + len(buffer))
            out[low - offset : high - offset] = data[low - at * width : high - at * width]
            at += count

    def _decoded(self, gathered: _Gathered, origin: int, element: int, count: int) -> np.ndarray:
        """Elements of a source's matrix as float32, or float64 where they are."""
        dtype = self._others[origin].tensors[gathered.names[origin]].dtype
        raw = np.empty(count * DTYPES[dtype].bytes, np.uint8)
        self._others[origin].read_into(gathered.names[origin], element * DTYPES[dtype].bytes, memoryview(raw))
        return decode(raw, dtype)

    def _mean(self, gathered: _Gathered, mean: int, in_row: int, count: int) -> np.ndarray:
        """The mean of several models' rows in float64, added in their order."""
        rows = self._map.means[mean]
        total = np.zeros(count, np.float64)
        for origin in np.flatnonzero(rows >= 0).tolist():
            total += self._decoded(gathered, origin, int(rows[origin]) * gathered.columns + in_row, count)
        return total / int((rows >= 0).sum())

    def _padding_row(self, gathered: _Gathered) -> np.ndarray:
        """The mean of all rows that are not padding, in float64 and in their order; made once, zeros if there are none."""
        name, columns = gathered.tensor.name, gathered.columns
        with self._locks[name]:
            if name not in self._padding:
                total = np.zeros(columns, np.float64)
                rows = 0
                for origin, row, _, count in self._stretches(0, self._map.size):
                    if origin == PADDING:
                        continue
                    rows += count
                    if origin != ZEROS:
                        self._add(gathered, origin, row, count, total)
                self._padding[name] = total / max(rows, 1)
            return self._padding[name]

    def _add(self, gathered: _Gathered, origin: int, row: int, count: int, total: np.ndarray) -> None:
        """Add the rows of a run to ``total``, one after the other: the order is part of the bits."""
        columns = gathered.columns
        step = max(PIECE_ELEMENTS // columns, 1) if origin >= 0 else 1
        for first in range(0, count, step):
            here = min(step, count - first)
            if origin == MEAN:
                block = self._mean(gathered, row + first, 0, columns)
            else:
                block = self._decoded(gathered, origin, (row + first) * columns, here * columns)
            for each in block.reshape(here, columns) if columns > 1 else [np.cumsum(block, dtype=np.float64)[-1:]]:
                total += each
