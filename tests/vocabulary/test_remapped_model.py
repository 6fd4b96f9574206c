"""A mapped model gives the output's rows, in any piece, reading the bytes it needs and no others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.source import Model, Source
from alnico.errors import MismatchError
from alnico.vocabulary.remapped_model import remap_rows
from alnico.vocabulary.row_map import MEAN, PADDING, ZEROS, RowMap, RowRequest, make_row_maps
from made import save_model
from made_tokenizers import EMBED, HEAD, matrix

WIDTH = 3


class Counting:
    """A source that counts the bytes read, and how often."""

    def __init__(self, source: Model) -> None:
        self.source = source
        self.reads: list[tuple[str, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.reads.append((name, offset, len(buffer)))
        self.source.read_into(name, offset, buffer)


def made(
    root: Path, dtypes: tuple[str, ...] = ("F32", "F32"), rows: int = 6, width: int = WIDTH
) -> list[Source]:
    """Models whose values tell model, row and column, exact in bf16: (model + 1) * 8 + row + column / 8."""
    found: list[Source] = []
    for model, dtype in enumerate(dtypes):
        values = (model + 1) * 8 + np.arange(rows)[:, None] + np.arange(width) / 8
        tensors = {
            EMBED: (dtype, values),
            HEAD: (dtype, -values),
            "bias": (dtype, values[:, 0]),
            "norm": (dtype, values[0]),
        }
        found.append(Counting(open_model(save_model(root / f"m{model}", tensors))))  # type: ignore[arg-type]
    return found


def value(model: int, row: float) -> np.ndarray:
    return (model + 1) * 8 + row + np.arange(WIDTH) / 8


def row_map(rows: list[tuple[int, int]], means: list[list[int]] | None = None, own: int = 0) -> RowMap:
    origin, row = np.array(rows, np.int64).T
    return RowMap(own, origin.astype(np.int32), row, np.array(means or np.empty((0, 2)), np.int64))


ROWS = [(0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (ZEROS, 0), (0, 0), (1, 5)]
COMPUTED = [*ROWS, (MEAN, 0), (PADDING, 0), (PADDING, 0), (MEAN, 1), (MEAN, 2)]
MEANS = [[0, 5], [3, -1], [1, 1]]


def expected(rows: list[tuple[int, int]]) -> np.ndarray:
    """The matrix by hand, a row at a time."""
    made = []
    for origin, row in rows:
        if origin >= 0:
            made.append(value(origin, row))
        elif origin == MEAN:
            each = [value(m, r) for m, r in enumerate(MEANS[row]) if r >= 0]
            made.append(sum(each) / len(each))
        else:
            made.append(np.zeros(WIDTH))
    real = [m for m, (origin, _) in zip(made, rows, strict=True) if origin != PADDING]
    return np.array(
        [np.mean(real, axis=0) if o == PADDING else m for m, (o, _) in zip(made, rows, strict=True)]
    )


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "U8"])
def test_rows_of_one_dtype_are_moved_as_they_are(tmp_path: Path, dtype: str) -> None:
    sources = made(tmp_path, (dtype, dtype)) if dtype != "U8" else made(tmp_path, (dtype, dtype), width=1)
    model = remap_rows(sources[0], sources, (EMBED, HEAD), row_map(ROWS))
    tensor = model.tensors[EMBED]
    assert (tensor.dtype, tensor.nominal, tensor.shape[0]) == (dtype, dtype, len(ROWS))
    width = tensor.shape[1]
    assert (tensor.elements, tensor.byte_size) == (
        len(ROWS) * width,
        len(ROWS) * width * {"F64": 8, "F32": 4, "U8": 1}.get(dtype, 2),
    )
    np.testing.assert_array_equal(matrix(model, EMBED), expected(ROWS)[:, :width])
    assert model.tensors["norm"] is sources[0].tensors["norm"]
    np.testing.assert_array_equal(matrix(model, "norm"), value(0, 0)[:width])


@pytest.mark.parametrize(
    ("dtypes", "dtype"),
    [(("BF16", "BF16"), "F32"), (("F32", "F32"), "F32"), (("BF16", "F16"), "F32"), (("F32", "F64"), "F64")],
)
def test_computed_rows_are_exact_in_a_wider_dtype(
    tmp_path: Path, dtypes: tuple[str, str], dtype: str
) -> None:
    sources = made(tmp_path, dtypes)
    model = remap_rows(sources[0], sources, (EMBED,), row_map(COMPUTED, MEANS))
    assert (model.tensors[EMBED].dtype, model.tensors[EMBED].nominal) == (dtype, dtypes[0])
    np.testing.assert_array_equal(matrix(model, EMBED), expected(COMPUTED).astype(matrix(model, EMBED).dtype))


def test_rows_of_another_dtype_are_decoded(tmp_path: Path) -> None:
    sources = made(tmp_path, ("BF16", "F16"))
    model = remap_rows(sources[0], sources, (EMBED,), row_map(ROWS))
    assert (model.tensors[EMBED].dtype, model.tensors[EMBED].nominal) == ("F32", "BF16")
    np.testing.assert_array_equal(matrix(model, EMBED), expected(ROWS))


def test_a_bias_of_one_dimension_has_rows_too(tmp_path: Path) -> None:
    sources = made(tmp_path)
    model = remap_rows(sources[0], sources, ("bias",), row_map(COMPUTED, MEANS))
    assert model.tensors["bias"].shape == (len(COMPUTED),)
    np.testing.assert_array_equal(matrix(model, "bias"), expected(COMPUTED)[:, 0].astype(np.float32))


@pytest.mark.parametrize(
    ("rows", "dtypes"), [(ROWS, ("BF16", "BF16")), (COMPUTED, ("BF16", "F32"))], ids=["moved", "computed"]
)
def test_any_piece_has_the_bytes_of_the_whole(
    tmp_path: Path, rows: list[tuple[int, int]], dtypes: tuple[str, str]
) -> None:
    sources = made(tmp_path, dtypes)
    model = remap_rows(sources[0], sources, (EMBED,), row_map(rows, MEANS))
    size = model.tensors[EMBED].byte_size
    whole = bytearray(size)
    model.read_into(EMBED, 0, memoryview(whole))
    for begin in range(0, size, 3):
        for end in range(begin, size + 1, 7):
            piece = bytearray(end - begin)
            model.read_into(EMBED, begin, memoryview(piece))
            assert piece == whole[begin:end]


def test_consecutive_rows_are_read_at_once_and_no_others(tmp_path: Path) -> None:
    sources = made(tmp_path)
    model = remap_rows(sources[0], sources, (EMBED,), row_map(ROWS))
    row = 4 * WIDTH
    buffer = bytearray(3 * row)
    model.read_into(EMBED, row, memoryview(buffer))
    assert [s.reads for s in sources] == [[(EMBED, 3 * row, 2 * row)], [(EMBED, 0, row)]]  # type: ignore[attr-defined]


def test_the_padding_is_made_once_for_all_threads(tmp_path: Path) -> None:
    sources = made(tmp_path)
    model = remap_rows(sources[0], sources, (EMBED,), row_map([(0, 0), (0, 1), (PADDING, 0)]))
    found = []

    def read() -> None:
        buffer = bytearray(4 * WIDTH)
        model.read_into(EMBED, 2 * 4 * WIDTH, memoryview(buffer))
        found.append(bytes(buffer))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {*found} == {value(0, 0.5).astype(np.float32).tobytes()}
    assert len(sources[0].reads) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("pieces", [4, 1 << 16])
def test_the_size_of_pieces_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    random = np.random.default_rng(0)
    tensors = {EMBED: ("F32", random.standard_normal((40, 5))), "bias": ("F32", random.standard_normal(40))}
    source = open_model(save_model(tmp_path / "a", tensors))
    rows = [(0, r) for r in range(40)] + [(PADDING, 0)]
    monkeypatch.setattr("alnico.vocabulary.remapped_model.PIECE_ELEMENTS", pieces)
    model = remap_rows(source, [source], (EMBED, "bias"), row_map(rows))
    for name in (EMBED, "bias"):
        total = np.zeros(tensors[name][1].shape[1:])
        for each in tensors[name][1].astype(np.float32):
            total = total + each
        np.testing.assert_array_equal(matrix(model, name)[-1], (total / 40).astype(np.float32))


def test_a_model_whose_rows_stay_is_left_as_it_is(tmp_path: Path) -> None:
    sources = made(tmp_path)
    assert remap_rows(sources[0], sources, (EMBED,), row_map([(0, r) for r in range(6)])) is sources[0]
    fewer = remap_rows(sources[0], sources, (EMBED,), row_map([(0, r) for r in range(5)]))
    np.testing.assert_array_equal(matrix(fewer, EMBED), matrix(sources[0], EMBED)[:5])


def test_what_it_holds_and_takes_is_said(tmp_path: Path) -> None:
    sources = made(tmp_path)
    moved = remap_rows(sources[0], sources, (EMBED,), row_map(ROWS))
    computed = remap_rows(sources[0], sources, (EMBED,), row_map(COMPUTED, MEANS))
    assert moved.reading_bytes == 0
    assert moved.held_bytes >= len(ROWS) * 12
    assert computed.held_bytes >= len(COMPUTED) * 12 + 8 * WIDTH
    assert computed.reading_bytes >= (1 << 16) * 16
    sources[1].reading_bytes = 1000  # type: ignore[misc]
    assert moved.reading_bytes == 1000  # what it is read from may take memory, too


def test_another_map_is_another_identity(tmp_path: Path) -> None:
    sources = made(tmp_path)
    own = sources[0].identity()
    one, other = (remap_rows(sources[0], sources, (EMBED,), row_map(r)).identity() for r in (ROWS, ROWS[1:]))
    assert one[: len(own)] == other[: len(own)] == own
    assert one[-1] != other[-1]
    assert one == remap_rows(sources[0], sources, (EMBED,), row_map(ROWS)).identity()


def test_it_is_the_model_in_all_else(tmp_path: Path) -> None:
    sources = made(tmp_path)
    model = remap_rows(sources[0], sources, (EMBED,), row_map(ROWS))
    assert (model.label, model.config, model.directory) == (
        sources[0].label,
        sources[0].config,
        sources[0].directory,
    )
    assert (model.origin, model.paths(), list(model.tensors)) == (
        None,
        sources[0].paths(),
        list(sources[0].tensors),
    )
    model.close()


class Remote(Counting):
    """A model on the hub whose only file is not here yet."""

    def __init__(self, source: Model, label: str) -> None:
        super().__init__(source)
        self.label = label
        self.fetched: list[str] = []

    def absent(self, tensors: Any, side_files: bool) -> dict[str, int]:
        return {"model.safetensors": 10, **({"vocab.txt": 1} if side_files else {})} if list(tensors) else {}

    def fetch(self, files: Any, report: Callable[[int], None] | None = None) -> None:
        self.fetched += files


def test_what_rows_are_taken_from_is_fetched(tmp_path: Path) -> None:
    sources: list[Source] = [
        Remote(s.source, label)  # type: ignore[attr-defined]
        for s, label in zip(made(tmp_path, ("F32", "F32", "F32")), ("x/a", "x/b", "x/c"), strict=True)
    ]
    model = remap_rows(sources[0], sources, (EMBED,), row_map(ROWS))
    assert model.absent(["norm"], True) == {"model.safetensors": 10, "vocab.txt": 1}
    files = model.absent([EMBED, "norm"], False)
    assert files == {"model.safetensors": 10, "x/b::model.safetensors": 10}
    model.fetch(files)
    assert [s.fetched for s in sources] == [["model.safetensors"], ["model.safetensors"], []]  # type: ignore[attr-defined]


def test_a_tied_head_is_taken_from_the_embedding(tmp_path: Path) -> None:
    sources = made(tmp_path)
    tied = open_model(save_model(tmp_path / "tied", {EMBED: ("F32", 100 + np.arange(18).reshape(6, 3))}))
    model = remap_rows(
        sources[0], [sources[0], tied], (EMBED, HEAD), row_map([(0, 0), (1, 2)]), {HEAD: EMBED}
    )
    np.testing.assert_array_equal(matrix(model, HEAD), [-value(0, 0), [106, 107, 108]])


def test_rows_from_a_model_without_the_tensor_are_refused(tmp_path: Path) -> None:
    sources = made(tmp_path)
    bare = open_model(save_model(tmp_path / "bare", {"norm": ("F32", np.zeros(3))}))
    with pytest.raises(MismatchError) as caught:
        remap_rows(sources[0], [sources[0], bare], (EMBED,), row_map(ROWS))
    assert str(caught.value) == (
        f"{EMBED}: 3 of its rows come from {bare.label}, which lacks this tensor; expected it there. "
        "Name another model for these tokens in the recipe, or use models that all have it."
    )


def test_rows_of_another_width_are_refused(tmp_path: Path) -> None:
    sources = made(tmp_path)
    wide = open_model(save_model(tmp_path / "wide", {EMBED: ("F32", np.zeros((6, 4)))}))
    with pytest.raises(MismatchError) as caught:
        remap_rows(sources[0], [sources[0], wide], (EMBED,), row_map(ROWS))
    assert str(caught.value) == (
        f"{EMBED}: {sources[0].label} is (6, 3), {wide.label} is (6, 4); expected rows of one width. "
        "Use models of one architecture and size."
    )


def test_integers_cannot_be_averaged(tmp_path: Path) -> None:
    sources = made(tmp_path, ("U8", "U8"))
    with pytest.raises(
        MismatchError,
        match=r"its rows have dtypes that cannot be computed with \(U8\); expected F64, F32, F16, BF16",
    ):
        remap_rows(sources[0], sources, (EMBED,), row_map(COMPUTED, MEANS))


def test_the_rule_puts_own_rows_first_then_the_bases_then_the_mean_then_zeros() -> None:
    held = np.array([[0, 1, -1, -1, 3, -2], [1, -1, 2, -1, -1, -2], [2, 0, 1, -1, -1, -2]])
    one, two, three = make_row_maps(held, 8, [0, 1, 2], 2, {})
    assert one.origin.tolist() == [0, 0, 2, ZEROS, 0, PADDING, PADDING, PADDING]
    assert two.origin.tolist() == [1, 2, 1, ZEROS, 0, PADDING, PADDING, PADDING]
    assert three.origin.tolist() == [2, 2, 2, ZEROS, 0, PADDING, PADDING, PADDING]
    assert (one.row.tolist()[:3], two.row.tolist()[:3], three.row.tolist()[4]) == ([0, 1, 1], [1, 0, 2], 3)
    one, two, three = make_row_maps(held, 6, [0, 1, 2], None, {})
    assert (one.origin[2], two.origin[1], three.origin[4]) == (MEAN, MEAN, 0)
    assert (one.means.tolist(), two.means.tolist(), three.means.tolist()) == ([[-1, 2, 1]], [[1, -1, 0]], [])


def test_what_the_recipe_asks_goes_before_the_rule_and_by_force_before_own_rows() -> None:
    held = np.array([[0, 1, 2, -1], [0, -1, -1, -1]])
    asked = {
        0: RowRequest((1, 5), True),
        1: RowRequest((ZEROS, 0), False),
        2: RowRequest(None, True),
        3: RowRequest((0, 1), False),
    }
    one, two = make_row_maps(held, 4, [0, 1], 0, asked)
    assert (one.origin.tolist(), one.row.tolist()) == ([1, 0, 0, 0], [5, 1, 2, 1])
    assert (two.origin.tolist(), two.row.tolist()) == ([1, ZEROS, 0, 0], [5, 0, 2, 1])
