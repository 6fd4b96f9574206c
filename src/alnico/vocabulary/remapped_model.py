"""Reads a model's vocabulary matrices with the rows of the output's vocabulary."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.checkpoint.source import Source, SourceWrapper, Tensor, TensorSpec
from alnico.errors import MismatchError
from alnico.numerics.dtypes import DTYPES, MERGEABLE, decode, promote
from alnico.vocabulary.row_map import MADE, MEAN, OWN_MEAN, PADDING, ZEROS, RowMap

if TYPE_CHECKING:
    from alnico.vocabulary.made_rows import MadeRows

NO_MADE_ROWS: Mapping[str, MadeRows] = MappingProxyType({})

PIECE_ELEMENTS = 1 << 16
"""Most elements that are decoded at a time."""

COMBINED_ELEMENTS = 1 << 22
"""Most elements of rows that are combined at a time."""

LABEL_SEPARATOR = "::"
"""Separates a model's label from its file, for files of other models that must be downloaded."""


@dataclass(frozen=True)
class _RowGather:
    """How one tensor is read: its name in each source of rows; ``raw`` if bytes are moved without decoding.

    A tensor that ``is_turned`` has a column for each token; it is read by whole rows of ``columns`` elements.
    """

    name: str
    tensor: TensorSpec
    columns: int
    names: Mapping[int, str]
    raw: bool
    is_turned: bool = False


def remap_rows(
    source: Source,
    others: Sequence[Source],
    names: Iterable[str],
    row_map: RowMap,
    ties: Mapping[str, str] | None = None,
    turned: Collection[str] = (),
    made: Mapping[str, MadeRows] = NO_MADE_ROWS,
) -> Source:
    """Give a model the output's vocabulary rows; returns ``source`` itself if nothing changes.

    ``others`` are all sources including ``source``, in the order of ``row_map``'s indices; ``names`` are the
    tensors of ``source`` that have vocabulary rows. Those in ``turned`` have a column for each token.
    Dimensions of 1 before the rows stay: a bias may be (1, tokens). ``ties`` names the tensor that replaces
    one that another model does not store, such as the embedding for a tied head. ``made`` has by tensor what makes
    the rows that ``row_map`` calls MADE.

    If all rows come from models with the tensor's dtype, its bytes are moved and it keeps its dtype. If rows
    are computed or have another dtype, it becomes float32 (float64 if one of them is); ``nominal`` stays.

    Errors: MismatchError if a model that rows are taken from lacks the tensor, has another width there, or
    has a dtype that cannot be computed with.
    """
    gathers = {}
    for name in names:
        gather = _plan_gather(source, others, name, row_map, ties or {}, is_turned=name in turned)
        if gather is not None:
            gathers[name] = gather
    return RemappedModel(source, others, gathers, row_map, made) if gathers else source


def _plan_gather(
    source: Source,
    others: Sequence[Source],
    name: str,
    row_map: RowMap,
    ties: Mapping[str, str],
    *,
    is_turned: bool = False,
) -> _RowGather | None:
    own = source.tensors[name]
    if not own.shape:
        return None
    axis = 1 if is_turned else next((i for i, n in enumerate(own.shape) if n != 1), 0)
    if row_map.keeps(own.shape[axis]):
        return None
    names = {}
    for i in row_map.read_from:
        alias = name if name in others[i].tensors else ties.get(name, name)
        if alias not in others[i].tensors:
            count = int((row_map.origin == i).sum()) + int((row_map.means[:, i : i + 1] >= 0).sum())
            raise MismatchError(
                f"{name}: {count} of its rows come from {others[i].label}, which lacks this tensor; expected "
                "it there. Name another model for these tokens in the recipe, or use models that all have it."
            )
        names[i] = alias
        shape = others[i].tensors[alias].shape
        if _without_axis(shape, axis) != _without_axis(own.shape, axis):
            raise MismatchError(
                f"{name}: {source.label} is {own.shape}, {others[i].label} is {shape}; expected rows of one "
                "width. Use models of one architecture and size."
            )
    dtypes = {own.dtype, *(others[i].tensors[n].dtype for i, n in names.items())}
    raw = len(dtypes) == 1 and not row_map.is_computed
    if not raw and not dtypes <= set(MERGEABLE):
        raise MismatchError(
            f"{name}: its rows have dtypes that cannot be computed with ({', '.join(sorted(dtypes))}); "
            f"expected {', '.join(MERGEABLE)}. Convert the models."
        )
    dtype = own.dtype if raw else promote(["F32", *dtypes])
    tensor = TensorSpec(dtype, (*own.shape[:axis], row_map.size, *own.shape[axis + 1 :]), own.nominal)
    columns = row_map.size if is_turned else math.prod(own.shape[axis + 1 :])
    return _RowGather(name, tensor, columns, names, raw, is_turned)


def _without_axis(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


class RemappedModel(SourceWrapper):
    """A source with the output's vocabulary rows, made by :func:`remap_rows`.

    Closing it does not close the others.
    """

    def __init__(
        self,
        source: Source,
        others: Sequence[Source],
        gathered: Mapping[str, _RowGather],
        row_map: RowMap,
        made: Mapping[str, MadeRows] = NO_MADE_ROWS,
    ) -> None:
        self.wrapped = source
        self._others = tuple(others)
        self._gathered = gathered
        self._map = row_map
        self._made = {name: rows for name, rows in made.items() if name in gathered}
        self._padding: dict[str, np.ndarray] = {}
        self._own_means: dict[str, np.ndarray] = {}
        self._locks = {name: threading.Lock() for name in gathered}
        self.tensors: Mapping[str, Tensor] = {
            name: gathered[name].tensor if name in gathered else tensor
            for name, tensor in source.tensors.items()
        }

    @property
    def held_bytes(self) -> int:
        padding = sum(16 * g.columns for g in self._gathered.values() if not g.raw and not g.is_turned)
        made = sum({id(rows): rows.held_bytes for rows in self._made.values()}.values())
        return self.wrapped.held_bytes + self._map.held_bytes + padding + made

    @property
    def reading_bytes(self) -> int:
        columns = max(
            (self._widest(g) for g in self._gathered.values() if not g.raw or g.is_turned), default=0
        )
        inner = max(
            source.reading_bytes for source in (self.wrapped, *(self._others[i] for i in self._map.read_from))
        )
        if not columns:
            return inner
        piece = max(PIECE_ELEMENTS, columns)
        made = max((rows.working_bytes for rows in self._made.values()), default=0)
        # raw, decoded, the output's, a sum, a partial copy; the rows that are combined
        return inner + 40 * piece + made + (12 * COMBINED_ELEMENTS if made else 0)

    def _widest(self, gathered: _RowGather) -> int:
        """Return the largest number of elements of a row, in the output and in the sources."""
        if not gathered.is_turned:
            return gathered.columns
        return max(
            gathered.columns, *(self._others[i].tensors[n].shape[1] for i, n in gathered.names.items())
        )

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        """As ``Source.absent``; files of other models appear as ``label::file``."""
        tensors = list(tensors)
        files = dict(self.wrapped.absent(tensors, side_files))
        other_tensors: dict[int, list[str]] = {}
        for name in tensors:
            if name in self._gathered:
                for i, alias in self._gathered[name].names.items():
                    if i != self._map.own:
                        other_tensors.setdefault(i, []).append(alias)
        for rows in (self._made[name] for name in tensors if name in self._made):
            if rows.reads is not None:
                i = next(i for i, other in enumerate(self._others) if other is rows.reads[0])
                other_tensors.setdefault(i, []).append(rows.reads[1])
        for i, names in other_tensors.items():
            other = self._others[i]
            files |= {
                f"{other.label}{LABEL_SEPARATOR}{file}": size
                for file, size in other.absent(names, False).items()
            }
        return files

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        own: list[str] = []
        by_label = {other.label: (other, list[str]()) for other in self._others}
        for file in files:
            label, separator, name = file.partition(LABEL_SEPARATOR)
            (by_label[label][1] if separator and label in by_label else own).append(
                name if separator else file
            )
        self.wrapped.fetch(own, report)
        for other, names in by_label.values():
            if names:
                other.fetch(names, report)

    def identity(self) -> list[dict[str, Any]]:
        return [*self.wrapped.identity(), {"rows": self._map.digest(), "tensors": sorted(self._gathered)}]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        gathered = self._gathered.get(name)
        if gathered is None:
            self.wrapped.read_into(name, offset, buffer)
        elif len(buffer):
            row_bytes = gathered.columns * DTYPES[gathered.tensor.dtype].bits // 8
            low, high = offset // row_bytes, -(-(offset + len(buffer)) // row_bytes)
            if gathered.is_turned:
                self._read_turned(gathered, low, high, row_bytes, offset, buffer)
            elif gathered.raw:
                self._read_raw(gathered, low, high, row_bytes, offset, buffer)
            else:
                self._read_decoded(gathered, low, high, row_bytes, offset, buffer)

    def _read_raw(
        self, gathered: _RowGather, low: int, high: int, row_bytes: int, offset: int, buffer: memoryview
    ) -> None:
        """Fill a buffer with bytes of rows low to high, from byte ``offset``; one read per run."""
        runs = self._map.runs
        edges = runs[np.searchsorted(runs, low, "right") - 1 : np.searchsorted(runs, high, "left") + 1]
        origins, rows = self._map.origin[edges[:-1]].tolist(), self._map.row[edges[:-1]].tolist()
        begins = (edges * row_bytes).tolist()
        end = offset + len(buffer)
        for origin, row, (first, last) in zip(origins, rows, itertools.pairwise(begins), strict=True):
            start, stop = max(offset, first), min(end, last)
            piece = buffer[start - offset : stop - offset]
            if origin == ZEROS:
                np.frombuffer(piece, np.uint8)[:] = 0
            else:
                self._others[origin].read_into(gathered.names[origin], row * row_bytes + start - first, piece)

    def _read_decoded(
        self, gathered: _RowGather, low: int, high: int, row_bytes: int, offset: int, buffer: memoryview
    ) -> None:
        """Fill a buffer as :meth:`_read_raw` does, with decoded rows."""
        out, end = np.frombuffer(buffer, np.uint8), offset + len(buffer)
        padding = self._padding_row(gathered) if (self._map.origin[low:high] == PADDING).any() else None
        for first, last in self._pieces(gathered, low, high):
            values = self._values(gathered, first, last)
            if padding is not None:
                values[self._map.origin[first:last] == PADDING] = padding
            data = values.view(np.uint8).ravel()
            start, stop = max(offset, first * row_bytes), min(end, last * row_bytes)
            out[start - offset : stop - offset] = data[start - first * row_bytes : stop - first * row_bytes]

    def _read_turned(
        self, gathered: _RowGather, low: int, high: int, row_bytes: int, offset: int, buffer: memoryview
    ) -> None:
        """Fill a buffer as :meth:`_read_raw` does, one row at a time, where tokens have columns."""
        out, end = np.frombuffer(buffer, np.uint8), offset + len(buffer)
        for row in range(low, high):
            values = self._turned_row(gathered, row).view(np.uint8)
            start, stop = max(offset, row * row_bytes), min(end, (row + 1) * row_bytes)
            out[start - offset : stop - offset] = values[start - row * row_bytes : stop - row * row_bytes]

    def _turned_row(self, gathered: _RowGather, row: int) -> np.ndarray:
        """Return one row of a tensor with a column for each token, (columns,)."""
        origin, column = self._map.origin, self._map.row
        size = DTYPES[gathered.tensor.dtype].bytes
        kind = np.dtype(f"u{size}") if gathered.raw else np.dtype(DTYPES[gathered.tensor.dtype].storage)
        out = np.zeros(gathered.columns, kind)
        total = np.zeros(len(self._map.means), np.float64)
        averaged = np.flatnonzero(origin == MEAN)
        for source, name in gathered.names.items():
            tensor = self._others[source].tensors[name]
            width = tensor.shape[1] * DTYPES[tensor.dtype].bytes
            raw = np.empty(width, np.uint8)
            self._others[source].read_into(name, row * width, memoryview(raw))
            values = raw.view(kind) if gathered.raw else decode(raw, tensor.dtype)
            here = origin == source
            out[here] = values[column[here]]
            if len(averaged):
                table = self._map.means[:, source]
                total[table >= 0] += values[table[table >= 0]]
        if len(averaged):
            out[averaged] = (total / (self._map.means >= 0).sum(axis=1))[column[averaged]]
        combined = np.flatnonzero(origin <= MADE)
        if len(combined):
            out[combined] = self._turned_combinations(gathered, row, combined)
        padding = origin == PADDING
        if padding.any():
            out[padding] = out[~padding].astype(np.float64).sum() / max(int((~padding).sum()), 1)
        return out

    def _turned_combinations(self, gathered: _RowGather, row: int, ids: np.ndarray) -> np.ndarray:
        """Return the elements of one row at the columns of made tokens."""
        own = self._map.own
        tensor = self._others[own].tensors[gathered.names[own]]
        width = tensor.shape[1] * DTYPES[tensor.dtype].bytes
        raw = np.empty(width, np.uint8)
        self._others[own].read_into(gathered.names[own], row * width, memoryview(raw))
        values = decode(raw, tensor.dtype).astype(np.float64)
        result = np.full(len(ids), values.sum() / max(len(values), 1))
        made = np.flatnonzero(self._map.origin[ids] == MADE)
        if len(made):
            numbers, weights = self._made[gathered.name].of(ids[made])
            used = weights.any(axis=1)
            result[made[used]] = np.einsum("nk,nk->n", values[numbers[used]], weights[used])
        return result

    def _pieces(self, gathered: _RowGather, low: int, high: int) -> Iterable[tuple[int, int]]:
        step = max(PIECE_ELEMENTS // gathered.columns, 1)
        return ((first, min(first + step, high)) for first in range(low, high, step))

    def _values(self, gathered: _RowGather, low: int, high: int) -> np.ndarray:
        """Return output rows low to high in the output's dtype, (rows, columns); padding is zero."""
        origin, row = self._map.origin[low:high], self._map.row[low:high]
        out = np.zeros((high - low, gathered.columns), DTYPES[gathered.tensor.dtype].storage)
        for source in np.unique(origin[origin >= 0]).tolist():
            here = np.flatnonzero(origin == source)
            out[here] = self._rows_of(gathered, source, row[here])
        averaged = np.flatnonzero(origin == MEAN)
        if len(averaged):
            table = self._map.means[row[averaged]]
            total = np.zeros((len(averaged), gathered.columns), np.float64)
            for source in range(
                table.shape[1]
            ):  # always in the models' order: the bits of a sum depend on it
                has = np.flatnonzero(table[:, source] >= 0)
                if len(has):
                    total[has] += self._rows_of(gathered, source, table[has, source])
            out[averaged] = total / (table >= 0).sum(axis=1, keepdims=True)
        mean = origin == OWN_MEAN
        if mean.any():
            out[mean] = self._own_mean(gathered)
        made = np.flatnonzero(origin == MADE)
        if len(made):
            numbers, weights = self._made[gathered.name].of(row[made])
            out[made] = self._combined(gathered, numbers, weights)
        return out

    def rebuilt(self, name: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of a tensor that the model has for output ids that it knows, and those that would have been made for them.

        Shapes: (ids, columns) float64 both.
        """
        gathered = self._gathered[name]
        numbers, weights = self._made[name].without_themselves(ids)
        own = self._rows_of(gathered, self._map.own, self._map.row[ids])
        return own.astype(np.float64), self._combined(gathered, numbers, weights)

    def known(self, name: str) -> np.ndarray:
        """Return the output ids of which a tensor has the model's own rows; none if no row of it is made of others, or tokens are columns."""
        if name not in self._made or self._gathered[name].is_turned:
            return np.empty(0, np.int64)
        return np.flatnonzero(self._map.origin == self._map.own)

    @property
    def uses_blas(self) -> bool:
        """Are rows computed by products of matrices?"""
        own = any(rows.reads is not None for rows in self._made.values())
        return own or getattr(self.wrapped, "uses_blas", False)

    @property
    def made_tensors(self) -> Mapping[str, int]:
        """The tensors with rows that are combinations of others, and how many rows these are."""
        count = int((self._map.origin == MADE).sum())
        return dict.fromkeys(self._made, count) if count else {}

    def _combined(self, gathered: _RowGather, numbers: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return sums of the model's own rows, ``sum of weight * row`` in the order of ``numbers``, in float64; their mean without weights.

        Shapes: numbers and weights (n, k); returns (n, columns).
        """
        result = np.zeros((len(numbers), gathered.columns))
        step = max(COMBINED_ELEMENTS // (gathered.columns * max(numbers.shape[1], 1)), 1)
        for first in range(0, len(numbers), step):
            part = slice(first, first + step)
            needed, places = np.unique(numbers[part], return_inverse=True)
            rows = self._rows_of(gathered, self._map.own, needed)
            places = places.reshape(numbers[part].shape)
            for k in range(numbers.shape[1]):
                result[part] += weights[part, k, None] * rows[places[:, k]]
        empty = ~weights.any(axis=1)
        if empty.any():
            result[empty] = self._own_mean(gathered)
        return result

    def _own_mean(self, gathered: _RowGather) -> np.ndarray:
        """Return the mean of all rows of the model's own tensor, summed in float64 in order; computed once."""
        name, own = gathered.name, self._map.own
        with self._locks[name]:
            if name not in self._own_means:
                count = math.prod(self._others[own].tensors[gathered.names[own]].shape) // gathered.columns
                total = np.zeros(gathered.columns)
                for first, last in self._pieces(gathered, 0, count):
                    total += self._rows_of(gathered, own, np.arange(first, last)).sum(
                        axis=0, dtype=np.float64
                    )
                self._own_means[name] = total / max(count, 1)
            return self._own_means[name]

    def _rows_of(self, gathered: _RowGather, source: int, rows: np.ndarray) -> np.ndarray:
        """Return rows of a source's matrix as float32 (float64 stays); consecutive rows are read at once."""
        name = gathered.names[source]
        dtype = self._others[source].tensors[name].dtype
        size = gathered.columns * DTYPES[dtype].bytes
        raw = np.empty(len(rows) * size, np.uint8)
        view = memoryview(raw)
        edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        for (first, last), begin in zip(itertools.pairwise(edges), rows[edges[:-1]].tolist(), strict=True):
            self._others[source].read_into(name, begin * size, view[first * size : last * size])
        return decode(raw, dtype).reshape(len(rows), gathered.columns)

    def _padding_row(self, gathered: _RowGather) -> np.ndarray:
        """Return the mean of all rows that are not padding, summed in float64 in order; computed once."""
        name = gathered.name
        with self._locks[name]:
            if name not in self._padding:
                total = np.zeros(gathered.columns, np.float64)
                real = self._map.origin != PADDING
                for first, last in self._pieces(gathered, 0, self._map.size):
                    for row in self._values(gathered, first, last)[real[first:last]]:
                        total += row
                self._padding[name] = total / max(int(real.sum()), 1)
            return self._padding[name]
