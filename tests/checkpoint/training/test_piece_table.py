"""Tensors in pieces: any division is put together to the same elements, whatever part of them is read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from alnico.checkpoint.training import piece_table as tables
from alnico.checkpoint.training.piece_table import PieceTable, StoredPiece, boxes_of, flat_table, piece_table

WHOLE = np.arange(7 * 6 * 5, dtype=np.int32).reshape(7, 6, 5)


def divided(cuts: tuple[tuple[int, ...], ...]) -> tuple[list[StoredPiece], dict[str, np.ndarray]]:
    """The pieces of WHOLE when each dimension is cut at some indices, in a mixed order."""
    pieces, stored = [], {}
    for cell in itertools.product(*(itertools.pairwise(c) for c in cuts)):
        name = str(cell)
        stored[name] = np.ascontiguousarray(WHOLE[tuple(slice(a, b) for a, b in cell)])
        pieces.append(StoredPiece(tuple(a for a, _ in cell), tuple(b - a for a, b in cell), name))
    np.random.default_rng(0).shuffle(pieces)  # type: ignore[arg-type]
    return pieces, stored


def reader(stored: dict[str, np.ndarray]) -> Callable[[str, int, memoryview], None]:
    def read(name: str, offset: int, buffer: memoryview) -> None:
        data = stored[name].tobytes()
        assert 0 <= offset <= offset + len(buffer) <= len(data), "outside of the piece"
        buffer[:] = data[offset : offset + len(buffer)]

    return read


CUTS = {
    "whole": ((0, 7), (0, 6), (0, 5)),
    "rows": ((0, 2, 4, 6, 7), (0, 6), (0, 5)),
    "columns": ((0, 7), (0, 3, 6), (0, 5)),
    "last": ((0, 7), (0, 6), (0, 1, 2, 3, 4, 5)),
    "grid": ((0, 4, 7), (0, 5, 6), (0, 5)),
    "cells": ((0, 1, 7), (0, 2, 6), (0, 3, 5)),
}


@pytest.mark.parametrize("way", CUTS)
@pytest.mark.parametrize("chunk", [3, 11, 1000])
def test_every_range_of_bytes_is_that_of_the_whole(
    way: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alnico.checkpoint.virtual_read.CHUNK", chunk)
    pieces, stored = divided(CUTS[way])
    table = piece_table("I32", WHOLE.shape, pieces)
    assert table is not None
    data = WHOLE.tobytes()
    draw = np.random.default_rng(1)
    for first, last in [(0, len(data)), *(sorted(draw.integers(0, len(data) + 1, 2)) for _ in range(60))]:
        buffer = bytearray(int(last - first))
        table.read_into(reader(stored), int(first), memoryview(buffer))
        assert buffer == data[first:last]


def test_rows_are_read_as_runs_and_grids_as_boxes() -> None:
    assert piece_table("I32", WHOLE.shape, divided(CUTS["rows"])[0]).sizes == (WHOLE.size,)  # type: ignore[union-attr]
    assert piece_table("I32", WHOLE.shape, divided(CUTS["columns"])[0]).sizes == WHOLE.shape  # type: ignore[union-attr]


@pytest.mark.parametrize("way", ["rows", "columns", "grid", "cells"])
def test_a_missing_piece_and_an_overlap_are_no_table(way: str) -> None:
    pieces, _ = divided(CUTS[way])
    for i in range(len(pieces)):
        assert piece_table("I32", WHOLE.shape, pieces[:i] + pieces[i + 1 :]) is None
        wrong = StoredPiece(pieces[i].offsets, tuple(n + 1 for n in pieces[i].sizes), "x")
        assert piece_table("I32", WHOLE.shape, [*pieces[:i], wrong, *pieces[i + 1 :]]) is None
    assert piece_table("I32", WHOLE.shape, [*pieces, StoredPiece((0, 0, 0), (1, 1, 1), "x")]) is None
    assert piece_table("I32", (8, 6, 5), pieces) is None


def test_replicas_and_empty_pieces_are_left_out() -> None:
    pieces, stored = divided(CUTS["grid"])
    copies = [StoredPiece(p.offsets, p.sizes, "copy") for p in pieces]
    empty = [StoredPiece((7, 0, 0), (0, 6, 5), "empty")]
    table = piece_table("I32", WHOLE.shape, [*pieces, *copies, *empty])
    assert table is not None
    assert {name for name, _ in table.pieces} == set(stored)


def test_tensors_of_one_number_and_of_none() -> None:
    one = piece_table("F64", (), [StoredPiece((), (), "one")])
    assert one is not None
    buffer = bytearray(8)
    one.read_into(reader({"one": np.float64([3.5])}), 0, memoryview(buffer))
    assert np.frombuffer(bytes(buffer), np.float64)[0] == 3.5
    none = piece_table("F64", (0, 4), [StoredPiece((0, 0), (0, 4), "none")])
    assert none is not None
    none.read_into(reader({}), 0, memoryview(bytearray()))
    assert piece_table("F64", (), []) is None
    assert piece_table("F64", (2,), []) is None


def test_runs_of_several_stored_tensors_follow_on_each_other() -> None:
    stored = {"a": np.arange(10, dtype=np.int32), "b": np.arange(100, 110, dtype=np.int32)}
    table = flat_table("I32", (2, 3), [("a", 7, 3), ("b", 0, 0), ("b", 2, 3)])
    buffer = bytearray(24)
    table.read_into(reader(stored), 0, memoryview(buffer))
    assert np.frombuffer(bytes(buffer), np.int32).tolist() == [7, 8, 9, 102, 103, 104]


def test_boxes_cover_a_range_in_order() -> None:
    shape = (3, 4, 5)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for first, stop in itertools.combinations(range(math.prod(shape) + 1), 2):
        found: list[int] = []
        for starts, counts in boxes_of(shape, first, stop):
            found += (
                numbers[tuple(slice(s, s + n) for s, n in zip(starts, counts, strict=True))].ravel().tolist()
            )
        assert found == list(range(first, stop))


def test_a_table_says_what_a_header_says() -> None:
    table = piece_table("BF16", (2, 3), [StoredPiece((0, 0), (2, 3), "a")])
    assert isinstance(table, PieceTable)
    assert (table.elements, table.byte_size, table.nominal) == (6, 12, "BF16")
    assert tables.READING_BYTES >= 2 * 8 * tables.CHUNK
