"""Stored task vectors on the hub, and bases there: named with a plus, downloaded in part, pinned in the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.errors import MismatchError, ModelError
from alnico.run_options import OFFLINE
from hub.stub import Hub, serving
from made import encoded, read_model, save_model
from made_vectors import random_pair, write_vector

SHAPES = {"model.a.weight": (300, 301), "model.b.weight": (40, 41), "model.c.weight": (7, 37)}
ENCODINGS = {"model.a.weight": "sparse", "model.b.weight": "whole", "model.c.weight": "low_rank"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "home", monkeypatch) as running:
        yield running


def test_a_vector_of_the_hub_is_put_on_a_base_of_the_hub(hub: Hub) -> None:
    base, tuned = random_pair(np.random.default_rng(5), SHAPES, changed=0.1)
    save_model(Path("base"), base, {"model_type": "llama"})
    write_vector(Path("vector"), base, tuned, ENCODINGS)
    commits = {name: hub.add(name, Path(name.partition("/")[2])) for name in ("org/base", "org/vector")}
    recipe = {
        "merge_method": "linear",
        "models": [{"model": "org/base+org/vector", "parameters": {"weight": 1}}],
    }
    plan = alnico.plan(recipe)
    assert hub.weight_bytes() == 0
    pinned = f"org/base@{commits['org/base']}+org/vector@{commits['org/vector']}"
    assert pinned in plan.recipe.text
    alnico.merge(recipe, "out")
    found = read_model(Path("out"))
    for name in ("model.a.weight", "model.b.weight"):
        assert encoded("BF16", found[name]) == encoded(*tuned[name])
    lock = json.loads(Path("out/alnico.lock.json").read_text())
    assert {(p["repository"], p["commit"]) for p in lock["inputs"][0]["repositories"]} == set(commits.items())
    sent = hub.weight_bytes()
    assert alnico.verify("out", against_inputs=True) is not None
    assert hub.weight_bytes() == sent
    with open_model("org/base+0.5*org/vector", access=OFFLINE) as model:
        assert model.read("model.a.weight").shape == (300, 301)


def test_another_base_of_the_hub_and_an_incomplete_vector_are_refused(hub: Hub) -> None:
    base, tuned = random_pair(np.random.default_rng(5), SHAPES, changed=0.1)
    save_model(Path("base"), {n: (k, v + 1) for n, (k, v) in base.items()}, {"model_type": "llama"})
    write_vector(Path("vector"), base, tuned, ENCODINGS)
    hub.add("org/base", Path("base"))
    hub.add("org/vector", Path("vector"))
    with (
        open_model("org/base+org/vector") as model,
        pytest.raises(MismatchError, match="is not the base of org/vector"),
    ):
        model.read("model.a.weight")
    Path("vector/taskvector.safetensors").unlink()
    hub.add("org/vector", Path("vector"))
    with pytest.raises(ModelError, match=r"has no taskvector\.safetensors, which taskvector\.json names"):
        open_model("org/base+org/vector")
