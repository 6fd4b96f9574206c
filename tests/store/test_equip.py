"""Equipping a base with stored vectors on disk, and taking them off again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import alnico
import made
import made_vectors
from alnico.devices import Device, made_gpus
from alnico.errors import (
    AlnicoError,
    MismatchError,
    ModelError,
    OutputError,
    RecipeError,
    UncheckedError,
    VerificationError,
)
from made_tokenizers import entry, letters, save_matrices, save_tokenizer, special

NAMES = ("sql", "japanese", "toxic")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    """A base, three fine-tunes, and a store with an exact vector of each."""
    base, tuned = made.family(tmp_path, 3)
    store = tmp_path / "store"
    monkeypatch.setenv("ALNICO_STORE", str(store))
    of_base = made.read_file(base / "model.safetensors")
    for name, folder in zip(NAMES, tuned, strict=True):
        put(store, name, of_base, made.read_file(folder / "model.safetensors"), "sparse")
    return {"base": base, "tuned": dict(zip(NAMES, tuned, strict=True)), "store": store, "of_base": of_base}


def put(store: Path, name: str, base: Any, tuned: Any, encoding: str, version: int = 1, **more: Any) -> Path:
    """Put a vector into a store, all tensors in one encoding."""
    folder = store / "vectors" / name / str(version)
    made_vectors.write_vector(folder, base, tuned, dict.fromkeys(tuned, encoding), name=name, **more)
    return folder


def model_file(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_exact_vectors_give_the_bits_of_merging_the_fine_tunes(world: Any, tmp_path: Path) -> None:
    weights = {"sql": 0.7, "japanese": 0.4, "toxic": -0.3}
    equipped = alnico.equip(world["base"], weights, tmp_path / "out")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(world["base"]),
        "models": [
            {"model": str(world["tuned"][n]), "parameters": {"weight": w}} for n, w in weights.items()
        ],
    }
    alnico.merge(recipe, tmp_path / "merged")
    assert model_file(tmp_path / "out") == model_file(tmp_path / "merged")
    start = made.read_model(world["base"])
    tuned = {name: made.read_model(folder) for name, folder in world["tuned"].items()}
    for name, found in made.read_model(tmp_path / "out").items():
        exact = start[name] + sum(
            w * (tuned[n][name].astype(np.float64) - start[name]) for n, w in weights.items()
        )
        assert np.abs(found - exact).max() <= np.abs(exact).max() / 256  # one rounding to bfloat16
    assert [(v.label, v.weight) for v in equipped.vectors] == [
        ("sql@1", 0.7),
        ("japanese@1", 0.4),
        ("toxic@1", -0.3),
    ]


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs"])
def test_other_methods_take_vectors_as_they_take_models(world: Any, tmp_path: Path, method: str) -> None:
    alnico.equip(
        world["base"], ["sql:0.7", "toxic:0.4"], tmp_path / "out", method=method, density=0.5, seed=3
    )
    recipe = alnico.make_recipe(
        [str(world["tuned"][n]) for n in ("sql", "toxic")],
        method,
        base=str(world["base"]),
        weights=[0.7, 0.4],
        density=0.5,
        seed=3,
    )
    alnico.merge(recipe, tmp_path / "merged")
    assert model_file(tmp_path / "out") == model_file(tmp_path / "merged")


def test_one_exact_vector_at_weight_1_is_the_fine_tune(world: Any, tmp_path: Path) -> None:
    alnico.equip(world["base"], ["sql:1"], tmp_path / "out")
    assert made.read_file(tmp_path / "out" / "model.safetensors").keys() == world["of_base"].keys()
    found, tuned = (
        made.read_file(p / "model.safetensors") for p in (tmp_path / "out", world["tuned"]["sql"])
    )
    assert all(found[n][0] == tuned[n][0] and (found[n][1] == tuned[n][1]).all() for n in tuned)


def test_the_recipe_is_an_ordinary_one_with_its_versions(world: Any, tmp_path: Path) -> None:
    alnico.equip(world["base"], ["sql:0.7", "store:japanese@1:0.4"], tmp_path / "out")
    written = yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text())
    assert written == {
        "merge_method": "task_arithmetic",
        "base_model": str(world["base"]),
        "models": [
            {"model": f"{world['base']}+store:sql@1", "parameters": {"weight": 0.7}},
            {"model": f"{world['base']}+store:japanese@1", "parameters": {"weight": 0.4}},
        ],
    }
    alnico.merge(tmp_path / "out" / "mergekit_config.yml", tmp_path / "again")
    assert model_file(tmp_path / "again") == model_file(tmp_path / "out")


def test_another_store_is_named_by_paths(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALNICO_STORE", str(tmp_path / "elsewhere"))
    with pytest.raises(ModelError, match="task vector 'sql': is not in the store"):
        alnico.equip(world["base"], ["sql"], tmp_path / "out")
    alnico.equip(world["base"], ["sql:0.5"], tmp_path / "out", store=world["store"])
    written = yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text())
    assert written["models"][0]["model"] == f"{world['base']}+{world['store']}/vectors/sql/1"
    alnico.unequip(tmp_path / "out", "sql")
    assert tensors_of(tmp_path / "out") == tensors_of(world["base"])


def tensors_of(folder: Path) -> dict[str, tuple[str, bytes]]:
    found = made.read_file(folder / "model.safetensors")
    return {name: (dtype, made.encoded(dtype, values)) for name, (dtype, values) in found.items()}


def test_taking_off_every_vector_gives_the_bytes_of_the_base(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    alnico.equip(world["base"], ["sql:0.7", "japanese:0.4", "toxic:-0.3"], out)
    alnico.unequip(out, ["toxic", "sql"])
    alone = tmp_path / "alone"
    alnico.equip(world["base"], ["japanese:0.4"], alone)
    assert tensors_of(out) == tensors_of(alone)
    left = alnico.unequip(out, "japanese@1")
    assert left.vectors == ()
    assert tensors_of(out) == tensors_of(world["base"])
    with pytest.raises(
        ModelError, match=r"has no task vector 'sql', as every one was taken off; expected an equipped"
    ):
        alnico.unequip(out, "sql")


def test_vectors_are_added_and_taken_off_on_the_device_that_is_named(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with made_gpus([Device("cuda:0", "Made", 8 << 30)]):
        alnico.equip(world["base"], ["sql:0.7", "japanese:0.4"], out, device="cuda")
        assert json.loads((out / "alnico.lock.json").read_text())["device"] == "cuda"
        alnico.unequip(out, "sql", device="cuda")
        assert json.loads((out / "alnico.lock.json").read_text())["device"] == "cuda"
        alnico.unequip(out, "japanese")
    assert json.loads((out / "alnico.lock.json").read_text())["device"] == "cpu"
    assert tensors_of(out) == tensors_of(world["base"])


def test_the_vector_that_is_taken_off_is_not_needed(world: Any, tmp_path: Path) -> None:

    alnico.equip(world["base"], ["sql:0.7", "japanese:0.4"], tmp_path / "out")
    shutil.rmtree(world["store"] / "vectors" / "sql")
    alnico.unequip(tmp_path / "out", "sql")
    alnico.equip(world["base"], ["japanese:0.4"], tmp_path / "alone")
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "alone")


def test_unequip_is_refused_with_the_names_of_what_is_missing(world: Any, tmp_path: Path) -> None:

    out = tmp_path / "out"
    alnico.equip(world["base"], ["sql:0.7", "japanese:0.4", "toxic:0.1"], out)
    before = made.model_bytes(out)
    shutil.rmtree(world["store"] / "vectors" / "japanese")
    world["base"].rename(tmp_path / "moved")
    with pytest.raises(UncheckedError) as caught:
        alnico.unequip(out, "sql")
    assert str(caught.value) == (
        f"{out}: cannot be made again: the base {world['base']} and the task vector japanese@1 are missing; expected the base "
        "and every task vector that stays. Pull or restore them, or say where it is with --input NAME=PATH."
    )
    assert made.model_bytes(out) == before


def test_a_base_that_moved_is_named_by_inputs(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    alnico.equip(world["base"], ["sql:0.7", "japanese:0.4"], out)
    moved = world["base"].rename(tmp_path / "moved")
    alnico.unequip(out, "sql", inputs={str(world["base"]): moved})
    alnico.unequip(out, "japanese")
    assert tensors_of(out) == tensors_of(moved)


def test_changes_of_the_model_or_the_base_are_not_lost(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    alnico.equip(world["base"], ["sql:0.7", "japanese:0.4"], out)
    whole = model_file(out)
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    (out / "model.safetensors").write_bytes(flipped)
    with pytest.raises(VerificationError, match="would be made again without that change"):
        alnico.unequip(out, "sql")
    assert model_file(out) == bytes(flipped)
    (out / "model.safetensors").write_bytes(whole)
    of_base = bytearray(model_file(world["base"]))
    of_base[-3] ^= 1
    (world["base"] / "model.safetensors").write_bytes(of_base)
    with pytest.raises(
        MismatchError, match="was changed since it was equipped; expected the tensors of that time"
    ):
        alnico.unequip(out, ["sql", "japanese"])
    assert model_file(out) == whole


def test_only_what_equip_wrote_is_unequipped(world: Any, tmp_path: Path) -> None:
    alnico.merge(
        {"merge_method": "linear", "models": [str(p) for p in world["tuned"].values()]}, tmp_path / "m"
    )
    with pytest.raises(OutputError, match=r"was not made by `alnico equip`"):
        alnico.unequip(tmp_path / "m", "sql")
    alnico.equip(world["base"], ["sql:0.7"], tmp_path / "one.safetensors")
    with pytest.raises(OutputError, match="is one file, which has no recipe beside it"):
        alnico.unequip(tmp_path / "one.safetensors", "sql")
    with pytest.raises(AlnicoError):
        alnico.unequip(world["base"], "sql")


def test_a_new_version_does_not_change_what_was_equipped(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    alnico.equip(world["base"], ["sql:0.7", "japanese:0.4"], out)
    tuned = made.read_file(world["tuned"]["toxic"] / "model.safetensors")
    put(world["store"], "sql", world["of_base"], tuned, "sparse", version=2)
    alnico.unequip(out, "japanese")
    alnico.equip(world["base"], ["sql@1:0.7"], tmp_path / "first")
    alnico.equip(world["base"], ["sql:0.7"], tmp_path / "latest")
    assert tensors_of(out) == tensors_of(tmp_path / "first") != tensors_of(tmp_path / "latest")
    assert alnico.equip(world["base"], ["sql"], dry_run=True).vectors[0].label == "sql@2"


@pytest.mark.parametrize(
    ("vectors", "error", "message"),
    [
        (["sql:0.7", "sql:0.2"], RecipeError, r"sql@1: is named twice, with the weights 0\.7 and 0\.2"),
        (["sql:0.7", "store:sql"], RecipeError, r"sql@1: is named twice"),
        ([""], RecipeError, r"vectors: a name is empty; expected the name of a task vector"),
        ([":0.3"], RecipeError, r"vectors: a name is empty"),
        (["sql:much"], RecipeError, r"sql: the weight is 'much'; expected a number\. Write it as sql:0\.7\."),
        (["sql:nan"], RecipeError, r"the weight of sql is nan; expected a finite number"),
        (["sqll:0.7"], ModelError, r"task vector 'sqll': is not in the store .* Did you mean sql\?"),
        (["sql@7"], ModelError, r"has no version 7 of it"),
        (["../sql"], ModelError, r"task vector '\.\./sql': is not in the store"),
        ([], RecipeError, r"vectors: there are none; expected at least one"),
        ([3], RecipeError, r"vectors has a value of type int"),
        (5, RecipeError, r"vectors is of type int"),
        ({"sql": "0.5x"}, RecipeError, r"sql: the weight is '0\.5x'"),
    ],
)
def test_each_mistake_in_the_vectors_has_its_sentence(
    world: Any, tmp_path: Path, vectors: Any, error: type[AlnicoError], message: str
) -> None:
    with pytest.raises(error, match=message):
        alnico.equip(world["base"], vectors, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_path_names_a_vector_and_a_folder_without_one_is_refused(world: Any, tmp_path: Path) -> None:
    folder = world["store"] / "vectors" / "sql" / "1"
    by_path = alnico.equip(world["base"], [f"{folder}:0.7"], tmp_path / "out")
    assert by_path.vectors[0].label == str(folder)
    alnico.equip(world["base"], ["sql:0.7"], tmp_path / "named")
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "named")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty: has no taskvector\.json and no adapter_config\.json"):
        alnico.equip(world["base"], [str(tmp_path / "empty")], tmp_path / "other")


def test_a_vector_is_known_by_its_path_and_in_a_copy(world: Any, tmp_path: Path) -> None:
    alnico.Store().create(world["tuned"]["sql"], world["base"], "made", exact=True)
    alnico.Store().update("made", description="The same files.")
    folder = world["store"] / "vectors" / "made" / "1"
    shutil.copytree(folder, tmp_path / "copy")
    for words in (
        ["made", f"{folder}:0.5"],
        ["made@2", f"{tmp_path}/copy:0.5"],
        [str(tmp_path / "copy"), "made:-0.5"],
    ):
        with pytest.raises(
            RecipeError, match=r"is the same task vector as .*; expected each once\. Leave one of them out"
        ):
            alnico.equip(world["base"], words, tmp_path / "out")
    alnico.equip(
        world["base"], ["made", "sql"], dry_run=True
    )  # of one fine-tune, in other files: the caller's choice


@pytest.mark.usefixtures("world")
def test_a_base_that_is_not_there_is_named_alone(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"{tmp_path}/none' is not there\. Check the path\.$"):
        alnico.equip(tmp_path / "none", ["sql"], tmp_path / "out")


def test_a_weight_as_an_option_of_the_method_is_refused(world: Any, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"weight is given as an option of the method; expected the weight of each"
    ):
        alnico.equip(world["base"], ["sql:0.7", "toxic"], tmp_path / "out", weight=0.5)


def test_a_weight_that_is_not_given_is_the_suggested_one(world: Any, tmp_path: Path) -> None:
    tuned = made.read_file(world["tuned"]["sql"] / "model.safetensors")
    scale = {"suggested": 0.6, "least": 0.2, "most": 0.9}
    put(world["store"], "mild", world["of_base"], tuned, "sparse", scale=scale)
    equipped = alnico.equip(world["base"], ["mild"], tmp_path / "out")
    assert (equipped.vectors[0].weight, equipped.vectors[0].is_suggested) == (0.6, True)
    alnico.equip(world["base"], {"mild": 0.6}, tmp_path / "given")
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "given")
    noted = alnico.equip(world["base"], ["mild:-0.3"], tmp_path / "far").notes
    assert noted[0] == (
        "mild@1: the weight -0.3 is outside of [0.2, 0.9], the range in which it was tried; its author suggests 0.6."
    )


def test_methods_that_take_no_weights_and_models_are_told_apart(world: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="method: linear merges models, not task vectors"):
        alnico.equip(world["base"], ["sql"], tmp_path / "out", method="linear")
    with pytest.raises(RecipeError, match=r"sql@1: has the weight 0\.5, and model_stock takes no weights"):
        alnico.equip(world["base"], ["sql:0.5", "toxic"], tmp_path / "out", method="model_stock")
    alnico.equip(world["base"], ["sql", "toxic"], tmp_path / "out", method="model_stock")
    alnico.merge(
        alnico.make_recipe(
            [str(world["tuned"][n]) for n in ("sql", "toxic")], "model_stock", base=str(world["base"])
        ),
        tmp_path / "merged",
    )
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "merged")


@pytest.mark.parametrize("encoding", ["sparse", "difference"])
def test_a_wrong_base_is_refused_and_nothing_is_written(world: Any, tmp_path: Path, encoding: str) -> None:
    tuned = made.read_file(world["tuned"]["sql"] / "model.safetensors")
    put(world["store"], "other", world["of_base"], tuned, encoding)
    with pytest.raises(MismatchError, match=r"is not the base of store:other@1: model\.\S+:"):
        alnico.equip(world["tuned"]["toxic"], ["other:1"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_base_may_be_allowed_for_differences_alone(world: Any, tmp_path: Path) -> None:
    tuned = made.read_file(world["tuned"]["sql"] / "model.safetensors")
    put(world["store"], "other", world["of_base"], tuned, "difference")
    equipped = alnico.equip(
        world["tuned"]["toxic"], ["other:0.5"], tmp_path / "out", allow_base_mismatch=True
    )
    assert any("base" in note and "other" in note for note in equipped.notes)
    wrong, right = made.read_model(world["tuned"]["toxic"]), made.read_model(world["tuned"]["sql"])
    start = made.read_model(world["base"])
    for name, found in made.read_model(tmp_path / "out").items():
        exact = wrong[name] + 0.5 * (right[name].astype(np.float64) - start[name])
        assert np.abs(found - exact).max() <= np.abs(exact).max() / 256
    with pytest.raises(MismatchError):
        alnico.equip(world["tuned"]["toxic"], ["sql:0.5"], tmp_path / "no", allow_base_mismatch=True)
    assert not (tmp_path / "no").exists()


def test_interference_without_sketches_is_that_of_the_fine_tunes(world: Any) -> None:
    equipped = alnico.equip(world["base"], ["sql", "toxic"], dry_run=True)
    (pair,) = equipped.interference
    start = made.read_model(world["base"])
    first, second = (
        np.concatenate(
            [(made.read_model(world["tuned"][n])[t].astype(np.float64) - start[t]).ravel() for t in start]
        )
        for n in ("sql", "toxic")
    )
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    signs = (
        np.sign(first) @ np.sign(second) / np.linalg.norm(np.sign(first)) / np.linalg.norm(np.sign(second))
    )
    assert (pair.a, pair.b, pair.cosine_error) == ("sql@1", "toxic@1", 0.0)
    assert pair.cosine == pytest.approx(cosine, abs=1e-9)
    assert pair.sign_conflict == pytest.approx((1 - signs) / 2, abs=1e-9)


def test_a_dry_run_writes_nothing_and_shows_the_plan(world: Any, tmp_path: Path, run: Any) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(
        "equip", str(world["base"]), "sql:0.7", "toxic:-0.3", "--dry-run", "-o", str(tmp_path / "out")
    )
    assert code == 0, err
    assert "method    task_arithmetic" in out
    assert f"model     {world['base']}+store:sql@1" in out
    assert "interference" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_commands_say_what_is_equipped_and_what_stays(world: Any, tmp_path: Path, run: Any) -> None:
    out = str(tmp_path / "out")
    code, shown, said = run("equip", str(world["base"]), "sql:0.7", "toxic:-0.3", "-o", out)
    assert code == 0, said
    assert shown.startswith(f"{out}: 20 tensors")
    lines = said.splitlines()
    assert lines[0].split() == ["vector", "weight", "description"]
    assert lines[1].split() == ["sql@1", "0.7"]
    assert lines[4].split()[:3] == ["interference", "and", "cosine"]
    assert lines[5].split()[:2] == ["sql@1", "toxic@1"]
    code, shown, said = run("unequip", out, "toxic")
    assert code == 0, said
    assert shown.splitlines()[1] == "with sql@1 x 0.7"
    code, shown, said = run("unequip", out, "sql", "--json")
    assert json.loads(shown)["vectors"] == []
    code, shown, said = run("equip", str(world["base"]), "sql:0.7")
    assert (code, "the output is missing" in said) == (2, True)
    code, _, said = run("unequip", out, "sql")
    assert code == 4


def test_an_adapter_is_equipped_beside_a_stored_vector(world: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    left, right = random.standard_normal((48, 2)), random.standard_normal((2, 16))
    module = "model.layers.0.mlp.up_proj"
    adapter = tmp_path / "adapter"
    made.save_file(
        adapter / "adapter_model.safetensors",
        {
            f"base_model.model.{module}.lora_B.weight": ("F32", left.astype(np.float32)),
            f"base_model.model.{module}.lora_A.weight": ("F32", right.astype(np.float32)),
        },
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1}))
    alnico.equip(world["base"], ["sql:0.7", f"{adapter}:0.1"], tmp_path / "out", dtype="float32")
    start, tuned = made.read_model(world["base"]), made.read_model(world["tuned"]["sql"])
    found = made.read_model(tmp_path / "out")[f"{module}.weight"]
    at = f"{module}.weight"
    exact = start[at] + 0.7 * (tuned[at].astype(np.float64) - start[at]) + 0.1 * 0.5 * left @ right
    assert np.abs(found - exact).max() < 1e-6
    alnico.unequip(tmp_path / "out", "adapter")
    alnico.equip(world["base"], ["sql:0.7"], tmp_path / "alone", dtype="float32")
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "alone")


def test_rows_of_added_tokens_are_left_out_on_request(world: Any, tmp_path: Path, run: Any) -> None:
    tokens, model = letters()
    base = save_tokenizer(save_matrices(tmp_path / "eight", 0, len(tokens)), tokens, special(), model)
    more = [*special(), entry("<new>", len(tokens))]
    tuned = save_tokenizer(save_matrices(tmp_path / "nine", 1, len(tokens) + 1), tokens, more, model)
    for seed, folder in enumerate((base, tuned)):
        rng = np.random.default_rng(seed)
        more_tensors = {
            f"model.layers.{i}.input_layernorm.weight": ("F32", rng.random(2, np.float32)) for i in range(4)
        }
        stored = made.read_file(folder / "model.safetensors")
        made.save_file(folder / "model.safetensors", {**stored, **more_tensors})
    alnico.Store(world["store"]).create(tuned, base, "grown", exact=True)
    words = ("equip", str(base), "grown:1", "-o", str(tmp_path / "out"))
    code, _, error = run(*words)
    assert code == 5
    assert "Write --tokenizer base" in error
    assert run(*words, "--tokenizer", "base")[0] == 0
    new = made.read_model(tuned)
    for name, values in made.read_model(tmp_path / "out").items():
        assert values.tobytes() == new[name][: len(values)].tobytes()
        assert len(values) in (len(tokens), 2)
    alnico.unequip(tmp_path / "out", "grown")
    assert tensors_of(tmp_path / "out") == tensors_of(base)


def test_errors_of_the_command_name_its_options(world: Any, tmp_path: Path, run: Any) -> None:
    tuned = made.read_file(world["tuned"]["sql"] / "model.safetensors")
    grown = {**tuned, "new.weight": ("F32", np.ones((2, 2), np.float32))}
    put(world["store"], "grown", world["of_base"], grown, "whole")
    code, _, error = run("equip", str(world["base"]), "grown:1", "-o", str(tmp_path / "out"))
    assert code == 5
    assert "set --missing copy or --missing drop" in error
    assert (
        run("equip", str(world["base"]), "grown:1", "-o", str(tmp_path / "out"), "--missing", "copy")[0] == 0
    )


def test_a_base_with_one_vector_is_not_called_unused(tmp_path: Path) -> None:
    base = made.save_model(tmp_path / "base", {"a.weight": ("F32", np.ones((4, 5), np.float32))})
    tuned = made.save_model(tmp_path / "tuned", {"a.weight": ("F32", np.full((4, 5), 2, np.float32))})
    store = alnico.Store(tmp_path / "store")
    store.create(tuned, base, "v", exact=True)
    done = alnico.equip(base, {"v": 1.0}, tmp_path / "out", store=store.folder)
    assert not [note for note in done.notes if "is not merged" in note]
