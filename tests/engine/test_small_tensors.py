"""Small tensors are made in batches: the same bytes, fewer calls, and a NaN still has its tensor's name."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.files import read_side_by_side
from alnico.engine import batches
from alnico.errors import NonFiniteError, RunError
from alnico.events import Event, TensorDone
from made import encoded, model_bytes, read_model, save_model
from small_merges import tensors_in

Model = dict[str, tuple[str, np.ndarray]]


def made(count: int = 40, models: int = 3, dtype: str = "BF16") -> list[Model]:
    """Models of ``count`` small tensors, of which every fourth is float32 and one is larger than a block."""
    random = np.random.default_rng(1)
    shapes = {f"layers.{i}.w": (3, 5 + i) for i in range(count)} | {
        "layers.0.empty": (0, 4),
        "wide": (70_001, 4),
    }
    return [
        {
            name: ("F32" if i % 4 == 3 else dtype, random.standard_normal(shape).astype(np.float32))
            for i, (name, shape) in enumerate(shapes.items())
        }
        for _ in range(models)
    ]


def saved(folder: Path, models: Sequence[Model]) -> list[str]:
    return [str(save_model(folder / f"m{i}", model, shards=1 + i)) for i, model in enumerate(models)]


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "parameters": {"weight": 0.3}},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.4}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"density": 0.4}},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.3}},
    "rules": {"merge_method": "linear", "methods": [{"filter": "layers.2", "merge_method": "ties", "parameters": {"density": 0.5}}]},
}  # fmt: skip


def recipe_of(name: str, paths: Sequence[str]) -> dict[str, Any]:
    models = paths[1:2] if name == "slerp" else paths[1:]
    return {**RECIPES[name], "base_model": paths[0], "models": [{"model": path} for path in models]}


@pytest.mark.parametrize("name", RECIPES)
def test_batches_change_no_byte(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = saved(tmp_path, made())
    alnico.merge(recipe_of(name, paths), tmp_path / "batches")
    monkeypatch.setattr(batches, "MOST_TENSORS", 1)
    alnico.merge(recipe_of(name, paths), tmp_path / "single")
    assert model_bytes(tmp_path / "batches") == model_bytes(tmp_path / "single")


def test_the_tensors_of_a_batch_are_weighted_sums(tmp_path: Path) -> None:
    models = made()
    paths = saved(tmp_path, models)
    alnico.merge({"merge_method": "linear", "models": paths}, tmp_path / "out")
    merged = read_model(tmp_path / "out")
    for name in models[0]:
        stored = [read_model(Path(path))[name].astype(np.float64) for path in paths]
        mean = (sum(stored) / len(stored)).astype(np.float32)
        assert np.abs(merged[name] - mean).max(initial=0) <= 2**-8 * np.abs(mean).max(initial=0), name


def test_neighbours_are_read_and_written_by_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    names = [f"layers.{i:03d}.w" for i in range(320)]
    models = [
        {name: ("BF16", random.standard_normal((2, 7)).astype(np.float32)) for name in names}
        for _ in range(2)
    ]
    paths = [str(save_model(tmp_path / f"m{i}", model)) for i, model in enumerate(models)]
    reads, writes = [], []
    read, write = os.preadv, os.pwrite

    def noted_read(descriptor: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        reads.append(len(buffers))
        return read(descriptor, buffers, offset, flags)

    def noted_write(descriptor: int, data: Any, offset: int) -> int:
        writes.append(len(data))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "preadv", noted_read)
    monkeypatch.setattr(os, "pwrite", noted_write)
    alnico.merge(
        {"merge_method": "linear", "models": paths, "unrelated": "allow"}, tmp_path / "out", threads=1
    )
    assert sum(count for count in reads if count > 1) == 2 * len(names)
    assert sum(count > 1 for count in reads) == 2 * batches.LEAST_BATCHES
    assert sum(size == 28 * len(names) // batches.LEAST_BATCHES for size in writes) == batches.LEAST_BATCHES


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_nan_in_a_batch_is_named(method: str, tmp_path: Path) -> None:
    models = made()
    models[2]["layers.21.w"][1][1, 4] = np.nan
    with pytest.raises(NonFiniteError, match=r"layers\.21\.w\[1, 4\]: .*m2 has NaN"):
        alnico.merge(recipe_of(method, saved(tmp_path, models)), tmp_path / "out")


def test_a_batch_is_one_line_of_the_journal_and_is_taken_up(tmp_path: Path) -> None:
    paths = saved(tmp_path, made())
    done: list[str] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, TensorDone):
            done.append(event.tensor)
            if len(done) == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        alnico.merge(recipe_of("ties", paths), tmp_path / "out", watch=interrupt, threads=1)
    journal = tmp_path / ".out.alnico-part" / "journal.jsonl"
    finished, lines = tensors_in(journal), journal.read_text().splitlines()[1:]
    assert set(done) <= finished
    assert 1 < len(lines) < len(finished)
    assert any(len(json.loads(line).get("tensors", [])) == 3 for line in lines)
    result = alnico.merge(recipe_of("ties", paths), tmp_path / "out")
    assert result.resumed == len(finished)
    alnico.merge(recipe_of("ties", paths), tmp_path / "whole")
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "whole")


def test_a_read_that_ends_early_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may fill fewer buffers than were given, and a part of one."""
    data = encoded("F32", np.arange(100, dtype=np.float32))
    (tmp_path / "file").write_bytes(data)
    read = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset: read(fd, [memoryview(buffers[0])[:33]], offset)
    )
    parts = [bytearray(size) for size in (40, 0, 8, 300)]
    with open(tmp_path / "file", "rb") as file:
        read_side_by_side(file.fileno(), [memoryview(part) for part in parts], 4, "file")
        assert b"".join(parts) == data[4:352]
        with pytest.raises(RunError, match="the file ended at byte 400"):
            read_side_by_side(
                file.fileno(), [memoryview(bytearray(300)), memoryview(bytearray(200))], 0, "file"
            )
