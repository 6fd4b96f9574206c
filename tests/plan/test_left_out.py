"""Rules that leave tensors out: named in plan and lock, absent from the output, and seen by the config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.errors import MismatchError, RecipeError
from made import llama_config, llama_shapes, read_model, save_model

MTP = {
    "mtp.fc.weight": (16, 32),
    "mtp.norm.weight": (16,),
    "mtp.layers.0.mlp.up_proj.weight": (48, 16),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model(name: str, seed: int, more: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    """Write a Llama-shaped model with more tensors, in float32."""
    random = np.random.default_rng(seed)
    shapes = {**llama_shapes(), **more}
    tensors = {n: ("F32", random.standard_normal(s).astype(np.float32)) for n, s in shapes.items()}
    save_model(Path(name), tensors, {**llama_config(dtype="float32"), **config})


def dropping(*filters: str, **more: Any) -> dict[str, Any]:
    rules = [{"filter": f, "merge_method": "drop"} for f in filters]
    return {"merge_method": "linear", "models": ["a", "b"], "methods": rules, **more}


def test_a_rule_drops_its_tensors_from_all_models_and_says_so_in_plan_and_lock() -> None:
    for seed, name in enumerate("ab"):
        model(name, seed, MTP, {"num_nextn_predict_layers": 1})
    result = alnico.merge(dropping("re:^mtp\\."), "out")
    assert read_model(Path("out")).keys() == llama_shapes().keys()
    assert {(d.model, d.name, d.why) for d in result.plan.dropped} == {
        (m, n, "methods[0] drops it") for m in (0, 1) for n in MTP
    }
    lock = json.loads(Path("out/alnico.lock.json").read_text())
    assert {(d["model"], d["tensor"]) for d in lock["dropped"]} == {(m, n) for m in "ab" for n in MTP}
    assert json.loads(Path("out/config.json").read_text())["num_nextn_predict_layers"] == 0
    assert result.plan.recipe.methods_used == ("linear",)
    (rule,) = result.plan.rules
    assert (rule.merge_method, rule.tensors) == ("drop", 3)
    notes = [note for note in result.plan.notes if "mtp" in note]
    assert notes == [
        "config.json: num_nextn_predict_layers is 0 in the output, since rules leave out all tensors for multi-token "
        "prediction (mtp.fc.weight, mtp.layers.0.mlp.up_proj.weight, mtp.norm.weight)."
    ]
    assert alnico.verify("out", against_inputs=True).unchecked == ()


def test_numbered_layers_for_further_tokens_are_known_as_such() -> None:
    further = {f"model.layers.2.{n}": s for n, s in (("eh_proj.weight", (16, 32)), ("enorm.weight", (16,)))}
    for seed, name in enumerate("ab"):
        model(name, seed, further, {"text_config": {"num_nextn_predict_layers": 1}})
    plan = alnico.plan(dropping("model.layers.2."))
    assert plan.config["text_config"] == {"num_nextn_predict_layers": 0}
    assert [n for n in plan.notes if n.startswith("config.json: text_config.num_nextn_predict_layers is 0")]


def test_some_layers_for_further_tokens_leave_the_config_and_a_note() -> None:
    for seed, name in enumerate("ab"):
        model(name, seed, MTP, {"num_nextn_predict_layers": 1})
    plan = alnico.plan(dropping("=mtp.norm.weight"))
    assert plan.config["num_nextn_predict_layers"] == 1
    assert [
        n for n in plan.notes if "is not changed for the tensors that rules leave out (mtp.norm.weight)" in n
    ]


def test_moving_averages_are_dropped_without_a_word_on_the_config() -> None:
    for seed, name in enumerate("ab"):
        model(name, seed, {"model_ema.layers0w": (4, 4), "model_ema.decay": ()}, {})
    plan = alnico.plan(dropping("model_ema."))
    assert {job.name for job in plan.jobs} == llama_shapes().keys()
    assert not [note for note in plan.notes if "config.json" in note]


def test_a_tower_that_is_dropped_is_noted_with_its_key() -> None:
    for seed, name in enumerate("ab"):
        model(name, seed, {"model.visual.blocks.0.norm.weight": (4,)}, {"vision_config": {"depth": 1}})
    (note,) = [n for n in alnico.plan(dropping("visual")).notes if "config.json" in n]
    assert note.startswith("config.json, which has vision_config, is not changed for the tensors")


def test_a_tensor_that_one_model_lacks_may_be_dropped() -> None:
    model("a", 0, MTP, {})
    model("b", 1, {}, {})
    plan = alnico.plan(dropping("mtp."))
    assert {job.name for job in plan.jobs} == llama_shapes().keys()
    assert {d.model for d in plan.dropped} == {0}


def test_the_first_rule_that_matches_decides() -> None:
    for seed, name in enumerate("ab"):
        model(name, seed, MTP, {})
    kept = {"filter": "mtp.fc", "merge_method": "passthrough", "model": "a"}
    dropped = {"filter": "mtp.", "merge_method": "drop"}
    plan = alnico.plan({"merge_method": "linear", "models": ["a", "b"], "methods": [kept, dropped]})
    assert [j.name for j in plan.jobs if j.name.startswith("mtp")] == ["mtp.fc.weight"]
    plan = alnico.plan({"merge_method": "linear", "models": ["a", "b"], "methods": [dropped, kept]})
    assert not [j.name for j in plan.jobs if j.name.startswith("mtp")]
    assert [n for n in plan.notes if n.startswith("methods[1] has no effect")]


def test_tensors_outside_of_the_modules_of_a_recipe_are_dropped_too() -> None:
    for seed, name in enumerate("ab"):
        model(name, seed, {"model.vision_tower.blocks.0.norm.weight": (4,)}, {})
    recipe = {
        "merge_method": "linear",
        "modules": {"text_decoder": {"models": ["a", "b"]}},
        "methods": [{"filter": "vision_tower", "merge_method": "drop"}],
    }
    plan = alnico.plan(recipe)
    assert {job.name for job in plan.jobs} == llama_shapes().keys()
    assert "model.vision_tower.blocks.0.norm.weight" in {d.name for d in plan.dropped}


def test_dropping_everything_is_refused() -> None:
    for seed, name in enumerate("ab"):
        model(name, seed, {}, {})
    with pytest.raises(MismatchError, match="the output would have no tensors"):
        alnico.plan(dropping("*"))


def test_a_layer_of_a_stack_cannot_be_dropped_in_part() -> None:
    for seed, name in enumerate("ab"):
        model(name, seed, {}, {})
    slices = [{"sources": [{"model": n, "layer_range": [0, 2]} for n in "ab"]}]
    with pytest.raises(MismatchError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        alnico.plan(
            {
                "merge_method": "linear",
                "slices": slices,
                "methods": [{"filter": "layers.1.mlp.up_proj", "merge_method": "drop"}],
            }
        )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"filter": "mtp.", "merge_method": "drop", "model": "a"},
            "methods[0] has model, but its merge_method is drop, which leaves the tensors out; expected a filter alone. "
            "Remove model, or name a merge method.",
        ),
        (
            {"filter": "mtp.", "merge_method": "drop", "parameters": {"weight": 1}},
            "methods[0] has parameters, but its merge_method is drop, which leaves the tensors out; expected a filter "
            "alone. Remove parameters, or name a merge method.",
        ),
        ({"merge_method": "drop"}, "methods[0].filter is missing; expected "),
    ],
)
def test_a_rule_that_drops_has_a_filter_alone(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        alnico.load_recipe({"merge_method": "linear", "models": ["a", "b"], "methods": [rule]})
    assert message in str(caught.value)


def test_drop_is_no_method_of_a_merge() -> None:
    with pytest.raises(RecipeError, match=r"merge_method is drop, which leaves tensors out of the output"):
        alnico.load_recipe({"merge_method": "drop", "models": ["a", "b"]})
