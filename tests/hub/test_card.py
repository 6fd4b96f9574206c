"""The model card is one that the hub can read, and says what is so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

import alnico
from hub.stub import Hub, serving
from made import family, save_file


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "home", monkeypatch) as running:
        yield running


def card(recipe: dict[str, object], **options: int) -> tuple[ModelCardData, str]:
    alnico.merge(recipe, "out", overwrite=True, **options)
    loaded = ModelCard.load("out/README.md")
    return loaded.data, loaded.text


def write(folder: Path, **front: str) -> None:
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n# A model\n")


def test_the_card_of_a_merge_of_hub_models_names_them_for_the_hub(hub: Hub) -> None:
    base, tuned = family(Path("sub"), 1)
    for folder in (base, *tuned):
        write(folder, license="apache-2.0")
    commits = [hub.add(name, folder) for name, folder in (("org/base", base), ("org/tuned", tuned[0]))]
    data, text = card(
        {
            "merge_method": "ties",
            "base_model": "org/base",
            "models": ["org/tuned@main"],
            "parameters": {"density": 0.5},
        },
        seed=7,
    )
    assert data.to_dict() == {
        "base_model": ["org/tuned", "org/base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "alnico"],
        "license": "apache-2.0",
    }
    assert (
        f"| [org/base](https://huggingface.co/org/base/tree/{commits[0]}) | `{commits[0][:12]}` | base; config, tokenizer |"
        in text
    )
    assert f"org/tuned@{commits[1]}" in text
    assert (
        "by `ties`: Trim each task vector, elect a sign for each parameter, average the entries that agree with it."
        in text
    )
    assert "https://arxiv.org/abs/2306.01708" in text
    assert "```sh\nalnico merge mergekit_config.yml OUT\n```\n" in text
    assert f"With alnico {alnico.__version__}, this gives the same weights, bit for bit:" in text
    assert "and names the commits of its models." in text


def test_a_local_path_is_no_base_model_and_is_not_in_the_card(hub: Hub, tmp_path: Path) -> None:
    base, tuned = family(Path("org"), 1)  # org/base and org/tuned-0 look like ids, and are paths
    secret = tmp_path / "secret"
    tuned[0].rename(secret)
    hub.add("org/other", family(Path("x"), 1, seed=3)[1][0])
    data, text = card({"merge_method": "linear", "models": ["org/base", str(secret), "org/other"]})
    assert data.to_dict()["base_model"] == ["org/other"]
    assert str(tmp_path) not in text
    assert "org/base" not in text
    assert "- base\n- secret\n- org/other@" in text
    assert "Its models base, secret were on the maker's disk" in text
    data, text = card({"merge_method": "linear", "models": ["org/base", str(secret)]})
    assert "base_model" not in data.to_dict()
    assert "base_model_relation" not in data.to_dict()
    assert str(base) not in text


def test_the_paths_of_a_reference_that_is_a_mapping_are_not_in_the_card(tmp_path: Path) -> None:
    base, _ = family(tmp_path / "secret", 1)
    adapter = tmp_path / "secret" / "adapter"
    names = [n for n in alnico.open_model(base).tensors if n.endswith("q_proj.weight")][:1]
    width = alnico.open_model(base).tensors[names[0]].shape[1]
    key = "base_model.model." + names[0].removesuffix(".weight")
    factors = {
        f"{key}.lora_A.weight": ("F32", np.ones((1, width), np.float32)),
        f"{key}.lora_B.weight": ("F32", np.ones((width, 1), np.float32)),
    }
    save_file(adapter / "adapter_model.safetensors", factors)
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]})
    )
    reference = {"model": {"path": str(base)}, "lora": {"path": str(adapter)}}
    text = card({"merge_method": "linear", "models": [{"model": reference}]})[1]
    assert str(tmp_path) not in text
    assert "path: adapter" in text


def test_local_models_of_one_name_are_told_apart() -> None:
    family(Path("a"), 1), family(Path("b"), 1, seed=1)
    _, text = card({"merge_method": "linear", "models": ["a/tuned-0", "b/tuned-0"]})
    assert "# A merge of tuned-0, tuned-0 (2)" in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["models"] == ["tuned-0", "tuned-0 (2)"]


@pytest.mark.parametrize(
    ("fronts", "expected", "shown"),
    [
        (({"license": "mit"}, {"license": "mit"}), {"license": "mit"}, "mit"),
        (({"license": "mit"}, {"license": "apache-2.0"}), {}, "mit"),
        (({"license": "mit"}, {}), {}, "not stated in its card"),
        (
            ({"license": "other", "license_name": "llama3"}, {"license": "other", "license_name": "llama3"}),
            {"license": "other", "license_name": "llama3"},
            "llama3",
        ),
        (
            ({"license": "other", "license_name": "llama3"}, {"license": "other", "license_name": "gemma"}),
            {},
            "gemma",
        ),
        (({"license": "a | b\n"}, {"license": "a | b\n"}), {}, "not stated in its card"),
    ],
)
def test_a_licence_is_stated_when_all_parents_state_it(
    fronts: tuple[dict[str, str], ...], expected: dict[str, str], shown: str
) -> None:
    _, tuned = family(Path("m"), 2)
    for folder, front in zip(tuned, fronts, strict=True):
        write(folder, **front)
    data, text = card({"merge_method": "linear", "models": [str(t) for t in tuned]})
    assert {k: v for k, v in data.to_dict().items() if k.startswith("license")} == expected
    assert f"| {shown} |" in text
    assert ("The parents do not all state one licence" in text) == (not expected)


def test_a_library_is_named_where_the_files_say_so() -> None:
    _, tuned = family(Path("m"), 2)
    recipe: dict[str, object] = {"merge_method": "linear", "models": [str(t) for t in tuned]}
    assert card(recipe)[0].library_name == "transformers"
    (tuned[0] / "modules.json").write_text(json.dumps([]))
    assert card(recipe)[0].library_name == "sentence-transformers"
    (tuned[0] / "modules.json").unlink()
    (tuned[0] / "config.json").write_text("{}")
    assert card(recipe)[0].library_name is None


@pytest.mark.parametrize("name", ["yes", "a: b", "#x", "a, b", "[x", "1e5", "é", "- a"])
def test_any_name_of_a_local_model_stands_in_the_cards_recipe(name: str) -> None:
    _, tuned = family(Path("m"), 1)
    tuned[0].rename(Path("m") / name)
    Path("r.yml").write_text(
        f"merge_method: passthrough\nmodels: [{json.dumps('m/' + name, ensure_ascii=False)}]\n"
    )
    alnico.merge("r.yml", "out")
    text = ModelCard.load("out/README.md").text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["models"] == [name]


def test_the_card_names_the_public_address_that_this_version_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = family(tmp_path, 1)
    record = {"url": "https://example.com/alnico.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}
    monkeypatch.setattr("alnico.installation._direct_url", lambda: record)
    line = "pip install 'alnico @ git+https://example.com/alnico.git@c0ffee'\nalnico merge mergekit_config.yml OUT\n"
    assert line in card({"merge_method": "linear", "models": [str(base)]})[1]
    record["url"] = (tmp_path / "secret").as_uri()
    text = card({"merge_method": "linear", "models": [str(base)]})[1]
    assert "secret" not in text
    assert "```sh\nalnico merge mergekit_config.yml OUT\n" in text
