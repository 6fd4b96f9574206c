"""Equipping bases, adapters and task vectors of the hub, and taking them off at the commits of that time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import alnico
import made
import made_vectors
from hub.stub import Hub, serving

MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "home", monkeypatch) as running:
        yield running


def save_adapter(folder: Path, seed: int) -> Path:
    random = np.random.default_rng(seed)
    factors = {
        f"base_model.model.{MODULE}.lora_A.weight": random.standard_normal((2, 16)),
        f"base_model.model.{MODULE}.lora_B.weight": random.standard_normal((48, 2)),
    }
    made.save_file(folder / "adapter_model.safetensors", {n: ("F32", v) for n, v in factors.items()})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1}))
    return folder


def tensors_of(folder: Path) -> dict[str, bytes]:
    found = made.read_file(folder / "model.safetensors")
    return {name: made.encoded(dtype, values) for name, (dtype, values) in found.items()}


def test_what_is_on_the_hub_is_equipped_as_what_is_here_and_taken_off_at_its_commit(hub: Hub) -> None:
    base, (tuned,) = made.family(Path("local"), 1)
    adapter = save_adapter(Path("adapter"), 0)
    start, after = (made.read_file(p / "model.safetensors") for p in (base, tuned))
    made_vectors.write_vector(Path("vector"), start, after, dict.fromkeys(after, "sparse"), name="sql")
    commits = {
        name: hub.add(name, folder)
        for name, folder in (("org/base", base), ("org/lora", adapter), ("org/sql", Path("vector")))
    }
    alnico.equip("org/base", ["org/lora:0.1", "org/sql:0.5"], "out")
    alnico.equip(base, ["./adapter:0.1", "./vector:0.5"], "here")
    assert tensors_of(Path("out")) == tensors_of(Path("here"))
    written = Path("out/mergekit_config.yml").read_text()
    assert all(f"{name}@{commit}" in written for name, commit in commits.items())

    hub.add("org/lora", save_adapter(Path("other"), 1))
    hub.add("org/base", tuned)
    alnico.unequip("out", "org/sql")
    alnico.equip(base, ["./adapter:0.1"], "alone")
    assert tensors_of(Path("out")) == tensors_of(Path("alone"))
    alnico.unequip("out", "org/lora")
    assert tensors_of(Path("out")) == {n: made.encoded(d, v) for n, (d, v) in start.items()}
