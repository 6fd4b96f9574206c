"""Decompositions that are kept in files serve other merges, change no byte, and are believed only with their hash."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.header import build
from alnico.checkpoint.open_model import open_model
from alnico.engine import factor_cache as cache_module
from alnico.engine.factor_cache import FactorFiles
from alnico.engine.matrix_store import KeptArrays, MatrixNote
from alnico.engine.merge_session import Resident
from alnico.errors import OutputError
from alnico.recipe.load import load_recipe
from alnico.run_options import RunOptions
from engine.test_matrix_store import SHAPES, decomposed, models, recipe
from made import model_bytes, save_model

__all__ = ["decomposed"]

KEY = "0" * 64


def merge(of: dict[str, Any], out: Path, **options: Any) -> dict[str, bytes]:
    alnico.merge(of, out, threads=1, overwrite=True, **options)
    found = model_bytes(out)
    shutil.rmtree(out)
    return found


def weights_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def test_a_merge_with_a_cache_has_the_bytes_of_one_without_and_decomposes_once(
    tmp_path: Path, decomposed: list[tuple[int, int]]
) -> None:
    base, tuned = models(tmp_path)
    given, other = recipe(base, tuned), recipe(base, tuned, (0.5, 1.0, 2.0))
    out, cache = tmp_path / "out", tmp_path / "cache"
    expected = merge(given, out), merge(other, out)
    decomposed.clear()
    assert merge(given, out, factor_cache=cache) == expected[0]
    assert len(decomposed) == 9
    assert merge(given, out, factor_cache=str(cache)) == expected[0]
    assert merge(other, out, factor_cache=cache) == expected[1]
    assert len(decomposed) == 9
    assert oct(cache.stat().st_mode)[-3:] == "700"


def test_models_are_known_by_their_content_wherever_they_are(
    tmp_path: Path, decomposed: list[tuple[int, int]]
) -> None:
    base, tuned = models(tmp_path / "a")
    merge(recipe(base, tuned), tmp_path / "out", factor_cache=tmp_path / "cache")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = recipe(tmp_path / "b" / base.name, [tmp_path / "b" / t.name for t in tuned])
    decomposed.clear()
    merge(moved, tmp_path / "out", factor_cache=tmp_path / "cache")
    with Resident(open_model, run=RunOptions(threads=1, factor_cache=tmp_path / "cache")) as resident:
        resident.merge(resident.plan(load_recipe(recipe(base, tuned, calibrate="none"))))
    assert not decomposed
    changed = save_model(
        tmp_path / "changed", {"wide": ("F32", np.ones((40, 100), np.float32)), **_others(tuned[2])}
    )
    merge(
        {**recipe(base, [*tuned[:2], changed]), "unrelated": "allow"},
        tmp_path / "out",
        factor_cache=tmp_path / "cache",
    )
    assert decomposed == [(40, 100)]


def _others(model: Path) -> dict[str, tuple[str, np.ndarray]]:
    with alnico.open_model(model) as opened:
        return {n: ("F32", opened.read(n)) for n in opened.tensors if n != "wide"}


def kept() -> KeptArrays:
    arrays = (
        np.arange(6.0).reshape(2, 3),
        np.arange(6.0).reshape(3, 2).T,
        np.arange(4),
        np.float64(3.0).reshape(()),
    )
    return KeptArrays(arrays, (MatrixNote("{} differs ({:.2f})", (0, 0.5)),))


def opened(folder: Path, **depends_on: str) -> FactorFiles:
    return FactorFiles(folder, depends_on=depends_on)


def test_arrays_come_back_with_their_order_and_notes(tmp_path: Path) -> None:
    with opened(tmp_path / "cache") as cache:
        assert cache.get(KEY, 1000) is None
        cache.put(KEY, kept())
        found = cache.get(KEY, 1000)
    assert found is not None
    for array, expected in zip(found.arrays, kept().arrays, strict=True):
        assert array.dtype == expected.dtype
        assert array.flags.c_contiguous == expected.flags.c_contiguous
        assert np.array_equal(array, expected)
    assert found.notes == kept().notes


def test_a_key_depends_on_everything_that_decides_the_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [("F32", "ab"), ("F32", "cd")]

    def key(what: str = "vectors", of: Any = tensors, shape: Any = (2, 3), **depends_on: str) -> str:
        with opened(tmp_path / "cache", **depends_on) as cache:
            return cache.key(what, of, shape)

    keys = [
        key(),
        key("others"),
        key(of=tensors[::-1]),
        key(of=[("BF16", "ab"), tensors[1]]),
        key(shape=(3, 2)),
        key(own_method="1234"),
    ]
    monkeypatch.setattr(cache_module, "ARITHMETIC", "another")
    keys.append(key())
    monkeypatch.setattr(cache_module.platform, "machine", lambda: "another")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another_key(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(KEY.encode(), b"1" * 64))


def foreign(path: Path) -> None:
    start, _ = build([("w", "F64", (2,))], {"format": "pt"})
    path.write_bytes(start + bytes(16))


def with_a_huge_header(path: Path) -> None:
    path.write_bytes((90_000_000).to_bytes(8, "little") + b"{")


def with_holes(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 40)


def writable_by_others(path: Path) -> None:
    path.chmod(0o666)


def a_link(path: Path) -> None:
    target = path.with_suffix(".elsewhere")
    path.rename(target)
    path.symlink_to(target)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def nested(path: Path) -> None:
    path.write_bytes((200_000).to_bytes(8, "little") + b"{" + b'"a":[' * 40_000)


def other_notes(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"differs", b"DIFFERS"))


DAMAGES = (
    flipped, truncated, emptied, of_another_key, foreign, with_a_huge_header, with_holes, writable_by_others, a_link, a_pipe,
    a_folder, nested, other_notes,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_damaged_or_foreign_is_not_believed_and_is_replaced(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    with opened(tmp_path / "cache") as cache:
        cache.put(KEY, kept())
        (path,) = (tmp_path / "cache").iterdir()
        damage(path)
        assert cache.get(KEY, 1000) is None
        cache.put(KEY, kept())
        if damage is not a_folder:  # nothing of others is removed
            assert cache.get(KEY, 1000) is not None
            assert cache.fault is None
        else:
            assert "could not be written" in str(cache.fault)


@pytest.mark.parametrize("text", ["{0.__class__}", "{!r}", "{:>1000000000}", "{} {}", "{", "plain"])
def test_a_text_that_would_do_more_than_name_models_is_refused(text: str, tmp_path: Path) -> None:
    with opened(tmp_path / "cache") as cache:
        cache.put(KEY, KeptArrays(kept().arrays, (MatrixNote(text, (0,)),)))
        assert cache.get(KEY, 1000) is None


def test_arrays_larger_than_the_method_holds_are_not_read(tmp_path: Path) -> None:
    with opened(tmp_path / "cache") as cache:
        big = KeptArrays((np.zeros(1 << 18),))
        cache.put(KEY, big)
        assert cache.get(KEY, 1000) is None
        assert cache.get(KEY, big.byte_size) is not None


def test_a_full_disk_is_said_once_and_fails_no_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = models(tmp_path)
    expected = merge(recipe(base, tuned), tmp_path / "out")
    monkeypatch.setattr(cache_module, "SPARE_BYTES", 1 << 60)
    result = alnico.merge(recipe(base, tuned), tmp_path / "out", factor_cache=tmp_path / "cache")
    assert model_bytes(tmp_path / "out") == expected
    assert list((tmp_path / "cache").iterdir()) == []
    assert result.notes == (
        f"{tmp_path / 'cache'}: the factor cache could not be written (No space left on device), so the rest is not kept. "
        "Make room, or empty it: its files can be removed at any time.",
    )


def test_a_folder_of_others_or_a_link_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    (tmp_path / "target").mkdir()
    (tmp_path / "file").write_text("")
    for path, message in (
        (
            shared,
            r"shared: can be written by others \(its mode is 0777\); the factor cache must be a folder of your own",
        ),
        (link, r"link: cannot be opened as the factor cache"),
        (tmp_path / "file", r"file: cannot be opened as the factor cache"),
    ):
        with pytest.raises(OutputError, match=message):
            alnico.merge(recipe(base, tuned), tmp_path / "out", factor_cache=path)


def test_what_a_killed_process_has_left_is_removed_after_a_day(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with opened(folder):
        pass
    old, new, strange = folder / f"{'a' * 16}.tmp", folder / f"{'b' * 16}.tmp", folder / "notes.tmp"
    for path in (old, new, strange):
        path.write_text("")
    for path in (old, strange):
        os.utime(path, (0, 0))
    with opened(folder):
        pass
    assert sorted(folder.iterdir()) == sorted([new, strange])


def put_often(folder: Path, value: int) -> None:
    with opened(folder) as cache:
        for i in range(30):
            cache.put(KEY, KeptArrays((np.full(1000 + i % 3, float(value)),)))
            found = cache.get(KEY, 10_000)
            assert found is not None
            assert len(set(found.arrays[0])) == 1


def test_processes_that_write_the_same_key_disturb_nobody(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=put_often, args=(tmp_path / "cache", i)) for i in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0, 0, 0]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".factors"]


def test_a_file_that_changes_while_it_is_decomposed_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = models(tmp_path)
    real = cache_module.FactorFiles.get
    spoilt: list[str] = []

    def spoil(self: FactorFiles, key: str, most_bytes: int) -> KeptArrays | None:
        found = real(self, key, most_bytes)
        if found is None and not spoilt:
            spoilt.append(key)
            path = tuned[0] / "model.safetensors"
            raw = bytearray(path.read_bytes())
            for i in range(8, 4 * sum(math.prod(shape) for shape in SHAPES.values()), 16):  # in all tensors
                raw[-i] ^= 1
            with path.open("r+b") as file:
                file.write(raw)
        return found

    monkeypatch.setattr(cache_module.FactorFiles, "get", spoil)
    with pytest.raises(alnico.errors.AlnicoError):
        alnico.merge(recipe(base, tuned), tmp_path / "out", threads=1, factor_cache=tmp_path / "cache")
    assert spoilt[0] not in {path.stem for path in (tmp_path / "cache").iterdir()}


def test_the_metadata_is_plain_json(tmp_path: Path) -> None:
    with opened(tmp_path / "cache") as cache:
        cache.put(KEY, kept())
    (path,) = (tmp_path / "cache").iterdir()
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"]["format"] == "alnico factors 1"
