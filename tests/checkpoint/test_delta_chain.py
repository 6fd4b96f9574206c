"""Steps of training runs, stored as an anchor and sparse deltas, as models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.errors import ModelError
from made import encoded, read_model, save_file

SHAPES = {"model.a.weight": (300, 301), "model.b.bias": (131,), "model.c.weight": (3, 4)}
Model = dict[str, tuple[str, np.ndarray]]


def write_run(
    run: Path,
    steps: tuple[int, ...] = (0, 1, 2, 3, 4),
    anchors: tuple[int, ...] = (0, 3),
    *,
    wide: bool = False,
    versions: bool = False,
) -> dict[int, Model]:
    """Write a run, in TRL's layout; returns the whole models of all steps."""
    rng = np.random.default_rng(4)
    model: Model = {n: ("BF16", rng.standard_normal(s).astype(np.float32)) for n, s in SHAPES.items()}
    models = {}
    for number, step in enumerate(steps):
        metadata = {"sparse": "true", **({"model_version": str(number + 1)} if versions else {})}
        if number:
            delta: dict[str, Any] = {}
            changed = dict(model)
            for name in list(SHAPES)[: 1 + step % 3]:
                values = model[name][1].copy()
                places = (
                    np.flatnonzero(rng.random(values.size) < 0.02)
                    if step % 2
                    else np.array([0, values.size - 1])
                )
                values.reshape(-1)[places] += 1
                changed[name] = ("BF16", values)
                delta[f"{name}.indices"] = (
                    "I64" if wide else "I32",
                    places.astype(np.int64 if wide else np.int32),
                )
                delta[f"{name}.values"] = ("BF16", values.reshape(-1)[places])
            model = changed
            save_file(run / f"deltas/step_{step}.safetensors", delta, metadata)
        if step in anchors:
            save_file(run / f"anchors/step_{step}.safetensors", model, metadata)
        models[step] = model
    (run / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return models


def all_bytes(reference: str) -> dict[str, bytes]:
    found = {}
    with open_model(reference) as model:
        for name, tensor in model.tensors.items():
            raw = bytearray(tensor.byte_size)
            cut = tensor.byte_size // 3 | 1
            for at in range(0, len(raw), cut):
                model.read_into(name, at, memoryview(raw)[at : at + cut])
            found[name] = bytes(raw)
        assert model.config == {"model_type": "llama"}
    return found


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("versions", [False, True])
def test_a_step_has_the_bits_of_its_model(tmp_path: Path, wide: bool, versions: bool) -> None:
    models = write_run(tmp_path / "run", wide=wide, versions=versions)
    for step, model in models.items():
        assert all_bytes(f"{tmp_path / 'run'}@{step}") == {n: encoded(*t) for n, t in model.items()}


def test_a_whole_tensor_in_a_delta_replaces_the_one_before(tmp_path: Path) -> None:
    models = write_run(tmp_path / "run", (0, 1), (0,))
    whole = ("BF16", np.ones((3, 4), np.float32))
    save_file(tmp_path / "run/deltas/step_2.safetensors", {"model.c.weight": whole})
    last = {
        "model.c.weight.indices": ("I32", np.array([5])),
        "model.c.weight.values": ("BF16", np.array([7.0])),
    }
    save_file(tmp_path / "run/deltas/step_3.safetensors", last)
    values = np.ones((3, 4), np.float32)
    values[1, 1] = 7
    expected = {**models[1], "model.c.weight": ("BF16", values)}
    assert all_bytes(f"{tmp_path / 'run'}@3") == {n: encoded(*t) for n, t in expected.items()}


def test_the_last_steps_of_a_run_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = write_run(Path("run"))
    Path("recipes").mkdir()
    Path("recipes/r.yml").write_text(
        "merge_method: linear\nmodels: [../run@2, ../run@3, ../run@4]\nparameters: {weight: 1}\ndtype: float32\n"
    )
    alnico.merge("recipes/r.yml", "out")
    for name, values in read_model(Path("out")).items():
        mean = np.mean([_float32(models[s][name]) for s in (2, 3, 4)], axis=0)
        np.testing.assert_allclose(values.reshape(-1), mean, rtol=1e-6, atol=1e-7)
    assert alnico.verify("out", against_inputs=True) is not None


def _float32(tensor: tuple[str, np.ndarray]) -> np.ndarray:
    return (np.frombuffer(encoded(*tensor), np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(("versions", "step"), [(False, 3), (True, 3)])
def test_a_gap_is_an_error(tmp_path: Path, versions: bool, step: int) -> None:
    write_run(tmp_path / "run", anchors=(0,), versions=versions)
    (tmp_path / "run/deltas/step_2.safetensors").unlink()
    all_bytes(f"{tmp_path / 'run'}@1")
    with pytest.raises(
        ModelError,
        match=r"a delta is missing between the steps 1 and 3: .* expected a distance of 1\. Complete",
    ):
        open_model(f"{tmp_path / 'run'}@{step}")


def test_steps_may_be_far_apart(tmp_path: Path) -> None:
    models = write_run(tmp_path / "run", (0, 10, 20, 30), (0,))
    assert all_bytes(f"{tmp_path / 'run'}@30") == {n: encoded(*t) for n, t in models[30].items()}
    (tmp_path / "run/deltas/step_20.safetensors").unlink()
    with pytest.raises(ModelError, match="missing between the steps 10 and 30"):
        open_model(f"{tmp_path / 'run'}@30")


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (7, "step 7 is not there; .* the nearest steps are 0, 1, 2, 3, 4"),
        (2, "step 2 has no anchor up to it"),
    ],
)
def test_a_step_that_is_not_there_is_an_error(tmp_path: Path, step: int, expected: str) -> None:
    write_run(tmp_path / "run")
    if step == 2:
        (tmp_path / "run/anchors/step_0.safetensors").unlink()
    with pytest.raises(ModelError, match=expected):
        open_model(f"{tmp_path / 'run'}@{step}")


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([3, 2], "not ascending and distinct"),
        ([2, 2], "not ascending"),
        ([-1, 2], "not ascending"),
        ([2, 12], "reach 12; expected 0 to 11"),
    ],
)
def test_wrong_indices_are_refused(tmp_path: Path, indices: list[int], expected: str) -> None:
    write_run(tmp_path / "run", (0,), (0,))
    tensors = {
        "model.c.weight.indices": ("I32", np.array(indices)),
        "model.c.weight.values": ("BF16", np.zeros(2)),
    }
    save_file(tmp_path / "run/deltas/step_1.safetensors", tensors)
    with pytest.raises(ModelError, match=expected):
        all_bytes(f"{tmp_path / 'run'}@1")


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"model.c.weight.indices": ("I32", np.zeros(1))}, "has indices alone"),
        ({"model.c.weight.values": ("BF16", np.zeros(1))}, "has values alone"),
        ({"model.c.weight.indices": ("I32", np.zeros(1)), "model.c.weight.values": ("F32", np.zeros(1))}, r"values F32 \[1\]"),
        ({"model.c.weight.indices": ("I32", np.zeros(2)), "model.c.weight.values": ("BF16", np.zeros(1))}, r"indices I32 \[2\]"),
        ({"model.c.weight.indices": ("F32", np.zeros(1)), "model.c.weight.values": ("BF16", np.zeros(1))}, r"indices F32 \[1\]"),
        ({"model.c.weight": ("F32", np.zeros((3, 4)))}, r"is F32 \[3, 4\]"),
        ({"model.d.weight": ("BF16", np.zeros((3, 4)))}, "which the anchor does not have"),
    ],
)  # fmt: skip
def test_a_delta_that_does_not_fit_is_refused(tmp_path: Path, tensors: Any, expected: str) -> None:
    write_run(tmp_path / "run", (0,), (0,))
    save_file(tmp_path / "run/deltas/step_1.safetensors", tensors)
    with pytest.raises(ModelError, match=expected):
        open_model(f"{tmp_path / 'run'}@1")
