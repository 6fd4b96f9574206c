"""Makes the rows of tokens that a model does not know: as combinations of its own rows.

Each way says only which rows of the model are added with which weights. The model's own rows are read by
:class:`~alnico.vocabulary.remapped_model.RemappedModel`, so that a way sees no other table than the one it needs.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import xxhash

from alnico.checkpoint.source import Source
from alnico.errors import MismatchError, NonFiniteError
from alnico.numerics.dtypes import DTYPES, decode
from alnico.numerics.matching_pursuit import BLOCK_ATOMS, pursue, pursuit_bytes
from alnico.vocabulary.token_pieces import TokenPieces

ROOM_PARTS = 3
"""The share of the memory budget, as one in so many, that the targets of all threads take."""
RESIDENT_PARTS = 4
"""The share of the budget that the shared rows may take, to be read once and not in every step."""
LEAST_TARGETS, MOST_TARGETS = 8, 512
"""Targets that are made at a time."""

Combination = tuple[np.ndarray, np.ndarray]
"""Rows of the model, (ids, k) int64, and their weights, (ids, k) float64. Without any weight a row is the mean of all rows."""


class MadeRows(Protocol):
    """A way to make the rows of one table of a model."""

    @property
    def reads(self) -> tuple[Source, str] | None:
        """The table of another model that is read for it."""
        ...

    @property
    def held_bytes(self) -> int: ...

    @property
    def working_bytes(self) -> int:
        """Memory that one thread needs while it makes rows."""
        ...

    def of(self, ids: np.ndarray) -> Combination:
        """Return how the rows of output ids are made. Thread-safe."""
        ...

    def without_themselves(self, ids: np.ndarray) -> Combination:
        """Return how the rows of ids that the model knows would have been made, had it not known them."""
        ...


class MeanRows:
    """Every row is the mean of the model's rows."""

    reads: tuple[Source, str] | None = None
    held_bytes = working_bytes = 0

    def of(self, ids: np.ndarray) -> Combination:
        return np.zeros((len(ids), 1), np.int64), np.zeros((len(ids), 1))

    without_themselves = of


class SubwordRows:
    """A row is the mean of the rows of the tokens into which the model's own tokenizer divides the text. Source: the initialisation that
    is usual where tokens are added (Hewitt 2021 compares it), mergekit-tokensurgeon's ``subword``."""

    reads: tuple[Source, str] | None = None
    working_bytes = 1 << 20

    def __init__(self, pieces: TokenPieces, texts: Mapping[int, bytes], rows: int) -> None:
        """``texts`` are those of all output ids; rows from ``rows`` on are none of the table."""
        self._pieces, self._texts, self._rows = pieces, texts, rows
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        return 600 * len(self._texts)

    def of(self, ids: np.ndarray) -> Combination:
        with self._lock:  # which also makes the tables of merges once
            divided = [self._pieces.divide(self._texts.get(i, b"")) for i in ids.tolist()]
        return self._means(divided)

    def without_themselves(self, ids: np.ndarray) -> Combination:
        with self._lock:
            texts = [self._texts.get(i, b"") for i in ids.tolist()]
            return self._means([self._pieces.divide(text, without=text) for text in texts])

    def _means(self, divided: Sequence[Sequence[int]]) -> Combination:
        kept = [[row for row in rows if row < self._rows] for rows in divided]
        width = max(map(len, kept), default=0) or 1
        numbers, weights = np.zeros((len(kept), width), np.int64), np.zeros((len(kept), width))
        for i, rows in enumerate(kept):
            numbers[i, : len(rows)] = rows
            weights[i, : len(rows)] = 1 / max(len(rows), 1)
        return numbers, weights


class PursuitRows:
    """A row is the combination of up to ``count`` rows of tokens that both models know, which comes nearest to the token's row of the donor.

    Orthogonal matching pursuit finds the combination among the donor's rows; the same weights are applied to the model's, whose width
    may be another. Each step compares targets with all shared rows of the donor, which are kept in memory if the budget has room, and
    otherwise read by blocks. Threads make different targets, and a thread whose targets another one makes continues with the next. What
    a target's combination is depends on nothing else.
    Source: Goddard and Fernandes 2025, https://arxiv.org/abs/2506.06607. Differs from the source: shared rows are compared by their
    cosine; mergekit-tokensurgeon compares products, so that long rows are preferred.
    """

    def __init__(
        self,
        donor: Source,
        name: str,
        donor_rows: np.ndarray,
        own_rows: np.ndarray,
        count: int,
        budget_bytes: int,
        threads: int,
    ) -> None:
        """``donor_rows`` and ``own_rows`` are the rows of each output id in the donor's table ``name`` and in the model's; negative where
        there is none. Errors: MismatchError if no token has both."""
        self.reads: tuple[Source, str] | None = (donor, name)
        shared = np.flatnonzero((donor_rows >= 0) & (own_rows >= 0))
        if not len(shared):
            raise MismatchError(
                f"{donor.label}: shares no token with the model; expected tokens that both know, of which the rows of others are made. "
                "Choose another tokenizer, or approximate: mean."
            )
        self._donor_rows, self._own_rows = donor_rows, own_rows
        self._table = _DonorTable(donor, name, donor_rows[shared], budget_bytes // RESIDENT_PARTS)
        self._shared = shared
        self._made = np.flatnonzero((donor_rows >= 0) & (own_rows < 0))
        self._place = np.full(len(donor_rows), -1, np.int64)
        self._place[self._made] = np.arange(len(self._made))
        self._count = min(count, len(shared))
        each = pursuit_bytes(1, self._table.width, self._count) - pursuit_bytes(
            0, self._table.width, self._count
        )
        room = budget_bytes // ROOM_PARTS // max(threads, 1)
        self._targets = min(max(room // each, LEAST_TARGETS), MOST_TARGETS)
        self._state = np.zeros(len(self._made), np.uint8)
        self._changed = threading.Condition()

    @property
    def held_bytes(self) -> int:
        maps = self._donor_rows.nbytes + self._own_rows.nbytes + self._place.nbytes
        return maps + 12 * self._count * len(self._made) + self._table.held_bytes

    @property
    def working_bytes(self) -> int:
        return pursuit_bytes(self._targets, self._table.width, self._count) + self._table.working_bytes

    def of(self, ids: np.ndarray) -> Combination:
        places = self._place[ids]
        self._make(places[places >= 0])
        weights = np.where((places >= 0)[:, None], self._weights[places], 0.0)
        return self._rows_of(self._numbers[places]), weights

    def without_themselves(self, ids: np.ndarray) -> Combination:
        atoms = np.searchsorted(self._shared, ids)
        known = np.minimum(atoms, len(self._shared) - 1)
        excluded = np.where(self._shared[known] == ids, self._table.atom_of(known), -1)
        count = min(self._count, len(self._table.lengths) - 1)
        parts = [
            pursue(self._targets_of(ids[first:last]), self._table, count, excluded[first:last])
            for first, last in self._batches(len(ids))
        ]
        numbers, weights = (np.concatenate(each) for each in zip(*parts, strict=True))
        return self._rows_of(numbers), weights

    def _batches(self, ids: int) -> list[tuple[int, int]]:
        return [(first, min(first + self._targets, ids)) for first in range(0, ids, self._targets)]

    def _rows_of(self, atoms: np.ndarray) -> np.ndarray:
        rows: np.ndarray = self._own_rows[self._shared[self._table.kept[atoms]]]
        return rows

    @cached_property
    def _numbers(self) -> np.ndarray:
        return np.zeros((max(len(self._made), 1), self._count), np.int32)

    @cached_property
    def _weights(self) -> np.ndarray:
        return np.zeros((max(len(self._made), 1), self._count))

    def _targets_of(self, ids: np.ndarray) -> np.ndarray:
        return self._table.read(self._donor_rows[ids])

    def _make(self, places: np.ndarray) -> None:
        """Make targets that nobody has made, and wait for those that other threads make."""
        while True:
            with self._changed:
                waiting = places[self._state[places] < 2]
                if not len(waiting):
                    return
                begun = places[self._state[places] == 0][: self._targets]
                if len(begun) < self._targets:
                    later = np.flatnonzero(self._state[waiting[0] :] == 0)[: self._targets] + waiting[0]
                    begun = np.union1d(begun, later)[: self._targets]
                if not len(begun):
                    self._changed.wait(1)
                    continue
                self._state[begun] = 1
                numbers, weights = self._numbers, self._weights
            done = 0
            try:
                numbers[begun], weights[begun] = pursue(
                    self._targets_of(self._made[begun]), self._table, self._count
                )
                done = 2
            finally:
                with self._changed:
                    self._state[begun] = done
                    self._changed.notify_all()


class _DonorTable:
    """The shared rows of a donor's table as atoms, in the order of output ids. Equal rows count once: ``kept`` are the first of each."""

    def __init__(self, donor: Source, name: str, rows: np.ndarray, room_bytes: int) -> None:
        tensor = donor.tensors[name]
        self._donor, self._name, self._rows = donor, name, rows
        self._dtype = tensor.dtype
        self.width = tensor.elements // max(tensor.shape[0], 1)
        self._element_bytes = 8 if tensor.dtype == "F64" else 4
        self._is_resident = len(rows) * self.width * self._element_bytes <= room_bytes
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        return (self.width * self._element_bytes if self._is_resident else 0) * len(self._rows) + 72 * len(
            self._rows
        )

    @property
    def working_bytes(self) -> int:
        return self._donor.reading_bytes + 3 * 8 * self.width * BLOCK_ATOMS

    @property
    def lengths(self) -> np.ndarray:
        return self._known[0]

    @property
    def kept(self) -> np.ndarray:
        """The positions of the atoms among the shared rows."""
        return self._known[1]

    def atom_of(self, shared: np.ndarray) -> np.ndarray:
        """Return the atoms that stand for shared rows."""
        atoms: np.ndarray = self._known[2][shared]
        return atoms

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        kept = self.kept
        for first in range(0, len(kept), BLOCK_ATOMS):
            part = slice(first, first + BLOCK_ATOMS)
            resident = self._known[3]
            yield first, resident[part] if resident is not None else self._decoded(self._rows[kept[part]])

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        resident = self._known[3]
        if resident is not None:
            return np.asarray(resident[numbers], np.float64)
        return self.read(self._rows[self.kept[numbers]])

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return rows of the donor, (rows, width) float64. Errors: NonFiniteError."""
        return self._decoded(rows).astype(np.float64)

    @property
    def _known(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        with self._lock:
            return self._read_all

    @cached_property
    def _read_all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Read all shared rows once: lengths and positions of the different ones, the atom of each, and the rows, if there is room."""
        count = len(self._rows)
        lengths, atom = np.empty(count), np.empty(count, np.int64)
        first_with: dict[bytes, int] = {}
        kept: list[int] = []
        resident = (
            np.empty((count, self.width), np.float64 if self._element_bytes == 8 else np.float32)
            if self._is_resident
            else None
        )
        for first in range(0, count, BLOCK_ATOMS):
            values = self._decoded(self._rows[first : first + BLOCK_ATOMS])
            exact = values.astype(np.float64)
            lengths[first : first + len(values)] = np.sqrt(np.einsum("nd,nd->n", exact, exact))
            for i, row in enumerate(values):
                seen = first_with.setdefault(xxhash.xxh3_128_digest(row.data), len(kept))
                atom[first + i] = seen
                if seen == len(kept):
                    if resident is not None:
                        resident[seen] = row
                    kept.append(first + i)
        positions = np.array(kept, np.int64)
        return lengths[positions], positions, atom, None if resident is None else resident[: len(kept)]

    def _decoded(self, rows: np.ndarray) -> np.ndarray:
        """Return rows of the donor as float32 (float64 stays); consecutive rows are read at once."""
        size = self.width * DTYPES[self._dtype].bytes
        raw = np.empty(len(rows) * size, np.uint8)
        view = memoryview(raw)
        edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        for first, last in itertools.pairwise(edges):
            if last > first:
                self._donor.read_into(self._name, int(rows[first]) * size, view[first * size : last * size])
        values = decode(raw, self._dtype).reshape(len(rows), self.width)
        if not np.isfinite(values).all():
            row, column = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise NonFiniteError(
                f"{self._donor.label}: {self._name}[{int(rows[row])}, {column}] is not finite; expected finite numbers. Repair this model, "
                "or choose another tokenizer."
            )
        return values
