"""Task vectors of models on the hub: commits and hashes come from the hub, and weights come once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from alnico.store.create import create_vector
from alnico.store.target import Target
from hub.stub import Hub, serving
from made import family, save_file


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "home", monkeypatch) as running:
        yield running


def test_models_of_the_hub_are_identified_by_commit_and_the_hubs_hashes(hub: Hub) -> None:
    base, (tuned,) = family(Path("local"), 1, shards=2)
    (tuned / "README.md").write_text("---\nlicense: mit\n---\n")
    commits = {name: hub.add(name, folder) for name, folder in (("org/base", base), ("org/tuned", tuned))}
    made = create_vector("org/tuned", "org/base", Path("v"), name="x", target=Target(exact=True)).manifest
    local = create_vector(tuned, base, Path("w"), name="x", target=Target(exact=True)).manifest
    for own, other, folder in ((made.base, local.base, base), (made.finetuned, local.finetuned, tuned)):
        assert (own.id, own.revision) in commits.items()
        assert own.root == other.root
        assert own.files == other.files
        for name, file in own.files.items():
            assert file.sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert made.licence == "mit"
    assert made.tensors == local.tensors
    sent = hub.weight_bytes()
    create_vector("org/tuned", "org/base", Path("again"), name="x", target=Target(exact=True))
    assert hub.weight_bytes() == sent  # from the cache


def test_an_adapter_of_the_hub_is_taken_in_as_it_is(hub: Hub) -> None:
    base, _ = family(Path("local"), 1)
    name, shape = next((n, s) for n, s in shapes(base).items() if len(s) == 2 and n.endswith("q_proj.weight"))
    at = f"base_model.model.{name.removesuffix('.weight')}"
    factors = {
        f"{at}.lora_A.weight": ("F32", np.ones((2, shape[1]), np.float32)),
        f"{at}.lora_B.weight": ("F32", np.ones((shape[0], 2), np.float32)),
    }
    save_file(Path("adapter") / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    hub.add("org/base", base)
    commit = hub.add("org/adapter", Path("adapter"))
    manifest = create_vector("org/adapter", "org/base", Path("v"), name="x").manifest
    assert manifest.kind == "adapter"
    assert (manifest.finetuned.id, manifest.finetuned.revision) == ("org/adapter", commit)
    assert manifest.base.id == "org/base"
    assert list(manifest.tensors) == [name]
    assert manifest.tensors[name].norm == pytest.approx(2 * np.sqrt(shape[0] * shape[1]), rel=1e-6)
    assert (
        Path("v/adapter_model.safetensors").read_bytes()
        == Path("adapter/adapter_model.safetensors").read_bytes()
    )


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            found |= {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    return found
