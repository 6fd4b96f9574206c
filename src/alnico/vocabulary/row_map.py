"""Decides where each row of an output's vocabulary matrices comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import xxhash

ZEROS, PADDING, MEAN, MADE, OWN_MEAN = -1, -2, -3, -4, -5
"""Values of :attr:`RowMap.origin` for rows that are not a copy of a row."""


@dataclass(frozen=True, eq=False)
class RowMap:
    """Where the rows of one model's vocabulary matrices come from.

    For output row r, ``origin[r]`` is a source and ``row[r]`` its row; or ZEROS; or PADDING, the mean of all
    rows that are not padding; or MEAN, and then ``means[row[r]]`` holds each source's row, -1 for sources
    left out; or MADE, a combination of the model's own rows that :mod:`~alnico.vocabulary.made_rows` makes, and then
    ``row[r]`` is r; or OWN_MEAN, the mean of all rows of the model's own matrix.

    Shapes: origin (rows,) int32, row (rows,) int64, means (means, sources) int64. ``own`` is the model's
    index among the sources.
    """

    own: int
    origin: np.ndarray
    row: np.ndarray
    means: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))

    @property
    def size(self) -> int:
        return len(self.origin)

    @cached_property
    def runs(self) -> np.ndarray:
        """First output rows of runs, and the end.

        The rows of a run have one origin and are consecutive there.
        """
        if not self.size:
            return np.zeros(1, np.int64)
        follows = (self.origin[1:] == self.origin[:-1]) & (
            (self.row[1:] == self.row[:-1] + 1) | (self.origin[1:] == PADDING)
        )
        follows |= (self.origin[1:] == ZEROS) & (self.origin[:-1] == ZEROS)
        return np.concatenate([[0], np.flatnonzero(~follows) + 1, [self.size]])

    @cached_property
    def read_from(self) -> tuple[int, ...]:
        """The sources that rows are read from, in order; the model itself may be one of them."""
        copied = np.unique(self.origin[self.origin >= 0]).tolist()
        averaged = (
            np.flatnonzero((self.means >= 0).any(axis=0)).tolist() if (self.origin == MEAN).any() else []
        )
        own = [self.own] if (self.origin <= MADE).any() else []
        return tuple(sorted({*copied, *averaged, *own}))

    @cached_property
    def is_computed(self) -> bool:
        """Are some rows computed: means, padding, or combinations?"""
        return bool((self.origin <= PADDING).any())

    def keeps(self, rows: int) -> bool:
        """Are these the model's own ``rows`` rows, unchanged and in order?"""
        is_own = self.size == rows and bool((self.origin == self.own).all())
        return is_own and bool((self.row == np.arange(rows)).all())

    @property
    def held_bytes(self) -> int:
        return int(self.origin.nbytes + self.row.nbytes + self.means.nbytes + self.runs.nbytes)

    def digest(self) -> str:
        """Return a hash of the map, which is part of what determines the output's bits."""
        state = xxhash.xxh3_128(np.array([self.own, self.size, *self.means.shape], np.int64))
        for part in (self.origin.astype(np.int32), self.row.astype(np.int64), self.means.astype(np.int64)):
            state.update(np.ascontiguousarray(part))
        return state.hexdigest()


@dataclass(frozen=True)
class RowRequest:
    """The recipe's setting for one output row: (source, row), or ZEROS; None applies the default rule."""

    origin: tuple[int, int] | None
    force: bool


def make_row_maps(
    token_rows: np.ndarray,
    size: int,
    voters: Sequence[int],
    base: int | None,
    requests: Mapping[int, RowRequest],
) -> tuple[RowMap, ...]:
    """Return for each source where the rows of its matrices come from.

    A model keeps its own row of a token that it has. Otherwise the first of these that applies is used: the
    row that the recipe requests; the row of the only voter that has the token; the base's row; the mean of
    the rows of all voters that have the token; zeros. ``force`` replaces the model's own row too. Rows
    without a token are padding.

    Shapes: token_rows (sources, tokens) int64: for each output id up to the highest, the row in each source;
    -1 where the source has none, -2 in all sources if the id has no token.

    >>> token_rows = np.array([[0, 1, -1], [1, -1, 0]])
    >>> [(m.origin.tolist(), m.row.tolist()) for m in make_row_maps(token_rows, 4, [0, 1], 0, {})]
    [([0, 0, 1, -2], [0, 1, 0, 0]), ([1, 0, 1, -2], [1, 1, 0, 0])]
    """
    sources, count = token_rows.shape
    origin, row = np.full(size, PADDING, np.int32), np.zeros(size, np.int64)
    voted = token_rows[list(voters)]
    has = voted >= 0
    number = has.sum(axis=0)
    first = np.asarray(voters, np.int64)[has.argmax(axis=0)]
    base_rows = token_rows[base] if base is not None else np.full(count, -1, np.int64)
    chosen = np.where((number > 1) & (base_rows >= 0), -1 if base is None else base, first)
    is_token = (token_rows > -2).all(axis=0)
    origin[:count] = np.where(is_token, np.where(number > 0, chosen, ZEROS), PADDING)
    row[:count] = np.where(number > 0, token_rows[chosen, np.arange(count)], 0)
    averaged = np.flatnonzero((number > 1) & (base_rows < 0))
    origin[averaged], row[averaged] = MEAN, np.arange(len(averaged))
    means = np.full((len(averaged), sources), -1, np.int64)
    means[:, list(voters)] = voted[:, averaged].T
    forced = np.zeros(size, bool)
    for token_id, request in requests.items():
        forced[token_id] = request.force
        if request.origin is not None:
            origin[token_id], row[token_id] = request.origin
    maps = []
    for source in range(sources):
        keeps = np.zeros(size, bool)
        keeps[:count] = (token_rows[source] >= 0) & ~forced[:count]
        own = np.zeros(size, np.int64)
        own[:count] = token_rows[source]
        maps.append(_compact(source, np.where(keeps, source, origin), np.where(keeps, own, row), means))
    return tuple(maps)


def _compact(own: int, origin: np.ndarray, row: np.ndarray, means: np.ndarray) -> RowMap:
    """Return a map with only the means that it uses."""
    used = origin == MEAN
    used_means = means[row[used]]
    row = row.copy()
    row[used] = np.arange(int(used.sum()))
    return RowMap(own, origin.astype(np.int32), row, used_means)


def make_approximated_maps(
    token_rows: np.ndarray, size: int, requests: Mapping[int, RowRequest]
) -> tuple[RowMap, ...]:
    """Return for each source where the rows of its matrices come from, if it makes the rows that it lacks of its own rows.

    A model keeps its own row of a token that it has, unless the recipe requests another by ``force``. Rows of other tokens are
    requested, or MADE; rows without a token are OWN_MEAN. Shapes: as for :func:`make_row_maps`.

    >>> [m.origin.tolist() for m in make_approximated_maps(np.array([[0, 1, -1], [1, -1, 0]]), 4, {})]
    [[0, 0, -4, -5], [1, -4, 1, -5]]
    """
    sources, count = token_rows.shape
    maps = []
    for source in range(sources):
        origin, row = np.full(size, OWN_MEAN, np.int32), np.arange(size, dtype=np.int64)
        has = token_rows[source] >= 0
        origin[:count] = np.where(has, source, np.where(token_rows[source] == -1, MADE, OWN_MEAN))
        row[:count][has] = token_rows[source][has]
        for token_id, request in requests.items():
            if request.origin is not None and (request.force or not has[token_id]):
                origin[token_id], row[token_id] = request.origin
        maps.append(RowMap(source, origin, row))
    return tuple(maps)
