"""TIES with one threshold a model: what is kept is the share of the whole task vector, exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.checkpoint.file_model import FileModel
from alnico.events import Event, Measuring, TensorDone
from made import model_bytes, read_model, save_model
from methods.merging import merge_arrays, recipe_for, write_inputs
from references.ties import consensus
from small_merges import tensors_in

SIZES = {"large": ((300, 257), 1.0), "small": ((40, 30), 0.05), "bias": ((7,), 3.0), "tiny": ((1,), 0.01)}
DENSITY = [0.3, 0.02, 1.0]


def made(wide: tuple[str, ...] = ()) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Tensors whose task vectors differ in size, so that one threshold for all is none of theirs."""
    random = np.random.default_rng(11)
    base = {
        n: random.standard_normal(shape).astype(np.float64 if n in wide else np.float32)
        for n, (shape, _) in SIZES.items()
    }
    models = [
        {n: (v + SIZES[n][1] * random.standard_normal(v.shape)).astype(v.dtype) for n, v in base.items()}
        for _ in DENSITY
    ]
    return base, models


def expected(base: dict[str, np.ndarray], models: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The paper: one flat vector a model, its largest entries, then an election and a mean a parameter."""
    deltas = [{n: m[n].astype(np.float64) - base[n] for n in base} for m in models]
    limits = []
    for delta, density in zip(deltas, DENSITY, strict=True):
        flat = np.sort(np.abs(np.concatenate([d.ravel() for d in delta.values()])))[::-1]
        limits.append(flat[max(1, int(density * flat.size)) - 1])
    merged = {}
    for name in base:
        kept = [
            np.where(np.abs(d[name]) >= limit, d[name], 0.0) for d, limit in zip(deltas, limits, strict=True)
        ]
        merged[name] = base[name] + consensus(kept, [1.0] * len(kept), "mass", "count")
    return merged


PAPER = {"density": DENSITY, "elect": "mass", "divide": "count", "scope": "model"}


def test_the_whole_task_vector_is_trimmed_with_one_threshold(tmp_path: Path) -> None:
    base, models = made()
    merged = merge_arrays(tmp_path, "ties", base, models, PAPER)
    for name, value in expected(base, models).items():
        assert np.abs(merged[name] - value).max() <= 2e-6 * np.abs(value).max(), name
    each = merge_arrays(tmp_path / "each", "ties", base, models, PAPER | {"scope": "tensor"})
    assert any((merged[n] != each[n]).mean() > 0.1 for n in base)


def test_tensors_of_two_precisions_have_one_threshold(tmp_path: Path) -> None:
    base, models = made(wide=("small",))
    dtypes = {np.dtype(np.float64): "F64", np.dtype(np.float32): "F32"}
    paths = [
        save_model(tmp_path / f"{i}", {n: (dtypes[v.dtype], v) for n, v in m.items()})
        for i, m in enumerate([base, *models])
    ]
    alnico.merge(recipe_for("ties", paths[1:], paths[0], PAPER), tmp_path / "out")
    merged = read_model(tmp_path / "out")
    for name, value in expected(base, models).items():
        assert np.abs(merged[name] - value).max() <= 2e-6 * np.abs(value).max(), name


def test_tensors_that_are_not_merged_do_not_count(tmp_path: Path) -> None:
    """One that a model lacks is copied; its entries would move the threshold."""
    base, models = made()
    paths = [
        save_model(tmp_path / f"{i}", {n: ("F32", v) for n, v in m.items()})
        for i, m in enumerate([base, *models])
    ]
    more = {"extra": ("F32", np.full(5000, 100.0, np.float32))}
    paths[1] = save_model(tmp_path / "more", {**{n: ("F32", v) for n, v in models[0].items()}, **more})
    alnico.merge(recipe_for("ties", paths[1:], paths[0], PAPER, missing="copy"), tmp_path / "out")
    merged = read_model(tmp_path / "out")
    for name, value in expected(base, models).items():
        assert np.abs(merged[name] - value).max() <= 2e-6 * np.abs(value).max(), name


def test_a_merge_that_is_taken_up_measures_the_model_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = made()
    base_path, paths = write_inputs(tmp_path, base, models)
    recipe = recipe_for("ties", paths, base_path, PAPER)

    finished: list[Event] = []

    def interrupt(event: Event) -> None:
        if finished:
            raise KeyboardInterrupt  # before another tensor is finished
        if isinstance(event, TensorDone):
            finished.append(event)

    with pytest.raises(KeyboardInterrupt):
        alnico.merge(recipe, tmp_path / "out", threads=1, watch=interrupt)
    journal = tmp_path / ".out.alnico-part" / "journal.jsonl"
    assert sum('"fact": 0' in line for line in journal.read_text().splitlines()) == 1
    done = tensors_in(journal)
    assert done
    read: set[str] = set()
    reads = FileModel.read_into

    def noted(model: FileModel, name: str, *rest: object) -> None:
        read.add(name)
        reads(model, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(FileModel, "read_into", noted)
    events: list[Event] = []
    alnico.merge(recipe, tmp_path / "out", watch=events.append)
    assert read == set(base) - done
    assert not any(isinstance(event, Measuring) for event in events)
    alnico.merge(recipe, tmp_path / "anew", watch=events.append)
    assert sum(isinstance(event, Measuring) for event in events) == 1
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "anew")
