"""Outputs of one file carry the recipe, the models with hashes, and what image models state of themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

import alnico

SPEC = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.resolution": "1024x1024",
}


def checkpoint(path: Path, seed: int, metadata: dict[str, str] | None) -> str:
    path.parent.mkdir(exist_ok=True)
    values = np.random.default_rng(seed).standard_normal((8, 4)).astype(np.float32)
    save_file({"a.weight": values, "b.weight": values[:2]}, path, metadata)
    return str(path)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as opened:
        found: dict[str, str] = opened.metadata()
    return found


def model_hash(path: str) -> str:
    """The hash of a model, from the hashes that a merge of it alone into a folder records."""
    out = Path(path).with_suffix("")
    alnico.merge({"merge_method": "linear", "models": [path]}, out)
    lock = json.loads((out / "alnico.lock.json").read_text())
    tensors = lock["inputs"][0]["tensors"]
    return xxhash.xxh3_128_hexdigest("".join(f"{n} {d}\n" for n, d in sorted(tensors.items())).encode())


def test_the_recipe_and_the_models_are_in_the_metadata(tmp_path: Path) -> None:
    photo = {**SPEC, "modelspec.title": "Photo", "modelspec.hash_sha256": "0x1"}
    models = [
        checkpoint(tmp_path / "photo.safetensors", 0, photo),
        checkpoint(tmp_path / "anime.safetensors", 1, {**SPEC, "modelspec.title": "Anime", "other": "x"}),
    ]
    alnico.merge(
        {"merge_method": "linear", "models": models, "unrelated": "allow"}, tmp_path / "out.safetensors"
    )
    found = metadata_of(tmp_path / "out.safetensors")
    assert {k: v for k, v in found.items() if k.startswith("modelspec.")} == {
        **SPEC,
        "modelspec.merged_from": "photo.safetensors, anime.safetensors",
    }
    assert found["format"] == "pt"
    assert json.loads(found["alnico.inputs"]) == [
        {"model": Path(path).name, "hash": model_hash(path)} for path in models
    ]
    recipe = yaml.safe_load(found["alnico.recipe"])
    assert recipe["models"] == ["photo.safetensors", "anime.safetensors"]
    assert str(tmp_path) not in str(found)


def test_models_without_a_common_statement_state_nothing(tmp_path: Path) -> None:
    models = [
        checkpoint(tmp_path / "a.safetensors", 0, SPEC),
        checkpoint(tmp_path / "b.safetensors", 1, None),
    ]
    alnico.merge(
        {"merge_method": "linear", "models": models, "unrelated": "allow"}, tmp_path / "out.safetensors"
    )
    assert not [key for key in metadata_of(tmp_path / "out.safetensors") if key.startswith("modelspec.")]


def test_the_bytes_do_not_depend_on_where_the_models_are(tmp_path: Path) -> None:
    outputs = []
    for place in ("one", "two"):
        models = [checkpoint(tmp_path / place / f"{n}.safetensors", i, None) for i, n in enumerate("ab")]
        out = tmp_path / f"{place}.safetensors"
        alnico.merge({"merge_method": "linear", "models": models, "unrelated": "allow"}, out)
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    "tasks", [("text-to-image", "text-to-image"), ("text-to-image", "text-generation"), ("x\ny", "x\ny")]
)
def test_a_card_has_the_task_on_which_the_parents_agree(tmp_path: Path, tasks: tuple[str, str]) -> None:
    models = []
    for i, task in enumerate(tasks):
        folder = tmp_path / f"m{i}"
        checkpoint(folder / "model.safetensors", i, None)
        (folder / "README.md").write_text(f"---\npipeline_tag: {json.dumps(task)}\n---\n")
        models.append(str(folder))
    alnico.merge({"merge_method": "linear", "models": models, "unrelated": "allow"}, tmp_path / "out")
    is_there = "pipeline_tag: text-to-image\n" in (tmp_path / "out" / "README.md").read_text()
    assert is_there == (tasks == ("text-to-image", "text-to-image"))
