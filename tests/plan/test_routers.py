"""Routers of mixtures of experts are recognised, named where a merge breaks them, kept, and fitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.source import TensorSpec
from alnico.errors import MismatchError, RecipeError
from alnico.plan.routers import find_routers
from made import Tensors, llama_config, read_model, save_model

E, H, F = 4, 16, 24
LAYER = "model.layers.0."


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def one_by_one(block: str, words: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The names of experts stored one by one."""
    return {f"{block}.experts.{i}.{word}.weight": (F, H) for i in range(E) for word in words}


GATED = ("gate_proj", "up_proj", "down_proj")
PACKED = {"experts.gate_up_proj": (E, 2 * F, H), "experts.down_proj": (E, H, F)}
FAMILIES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], set[str]]] = {
    "mixtral": ({"block_sparse_moe.gate.weight": (E, H), **one_by_one("block_sparse_moe", ("w1", "w2", "w3"))}, {}, {"block_sparse_moe.gate.weight"}),
    "qwen2_moe": (
        {
            "mlp.gate.weight": (E, H), "mlp.shared_expert_gate.weight": (1, H), "mlp.shared_expert.gate_proj.weight": (F, H),
            **one_by_one("mlp", GATED),
        }, {}, {"mlp.gate.weight"},
    ),
    "qwen3_moe, packed": ({"mlp.gate.weight": (E, H), **{f"mlp.{n}": s for n, s in PACKED.items()}}, {}, {"mlp.gate.weight"}),
    "deepseek_v3": (
        {
            "mlp.gate.weight": (E, H), "mlp.gate.e_score_correction_bias": (E,), "mlp.shared_experts.gate_proj.weight": (E, H),
            **one_by_one("mlp", GATED),
        }, {}, {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"},
    ),
    "gpt_oss": (
        {"mlp.router.weight": (E, H), "mlp.router.bias": (E,), "mlp.experts.gate_up_proj_bias": (E, 2 * F), **{f"mlp.{n}": s for n, s in PACKED.items()}},
        {}, {"mlp.router.weight", "mlp.router.bias"},
    ),
    "llama4": ({"feed_forward.router.weight": (E, H), "feed_forward.shared_expert.gate_proj.weight": (E, H), **{f"feed_forward.{n}": s for n, s in PACKED.items()}}, {}, {"feed_forward.router.weight"}),
    "granitemoe": (
        {"block_sparse_moe.router.layer.weight": (E, H), "block_sparse_moe.input_linear.weight": (E, 2 * F, H), "block_sparse_moe.output_linear.weight": (E, H, F)},
        {}, {"block_sparse_moe.router.layer.weight"},
    ),
    "lfm2_moe": ({"feed_forward.gate.weight": (E, H), "feed_forward.expert_bias": (E,), **one_by_one("feed_forward", ("w1", "w2", "w3"))}, {}, {"feed_forward.gate.weight", "feed_forward.expert_bias"}),
    "minimax_m2": ({"block_sparse_moe.gate.weight": (E, H), "block_sparse_moe.e_score_correction_bias": (E,), **one_by_one("block_sparse_moe", ("w1", "w2", "w3"))}, {}, {"block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias"}),
    "ernie4_5_moe": ({"mlp.gate.weight": (E, H), "mlp.moe_statics.e_score_correction_bias": (1, E), **one_by_one("mlp", GATED)}, {}, {"mlp.gate.weight", "mlp.moe_statics.e_score_correction_bias"}),
    "hunyuan_v1_moe": ({"mlp.gate.wg.weight": (E, H), **one_by_one("mlp", GATED)}, {}, {"mlp.gate.wg.weight"}),
    "switch_transformers": ({"mlp.router.classifier.weight": (E, H), **{f"mlp.experts.expert_{i}.wi.weight": (F, H) for i in range(E)}}, {"num_experts": E}, {"mlp.router.classifier.weight"}),
    "dbrx": ({"ffn.router.layer.weight": (E, H), "ffn.experts.mlp.w1": (E * F, H)}, {"ffn_config": {"moe_num_experts": E}}, {"ffn.router.layer.weight"}),
    "nemotron_h": ({"mixer.gate.weight": (E, H), "mixer.gate.e_score_correction_bias": (E,), **one_by_one("mixer", ("up_proj", "down_proj"))}, {}, {"mixer.gate.weight", "mixer.gate.e_score_correction_bias"}),
    "qwen3_5_moe, in a text_config": ({"mlp.gate.weight": (E, H)}, {"text_config": {"num_experts": E}}, {"mlp.gate.weight"}),
    "a gate of other rows": ({"mlp.gate.weight": (E + 1, H), **one_by_one("mlp", GATED)}, {}, set()),
    "dense": ({"mlp.gate_proj.weight": (F, H), "mlp.up_proj.weight": (F, H), "self_attn.gate.weight": (H, H)}, {}, set()),
    "a gate without experts": ({"self_attn.gate.weight": (E, H), "mlp.gate.weight": (E, H)}, {}, set()),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_are_recognised_by_name_and_shape(family: str) -> None:
    shapes, config, expected = FAMILIES[family]
    tensors = {f"{LAYER}{name}": TensorSpec("F32", shape, "F32") for name, shape in shapes.items()}
    found = find_routers(tensors, config)
    assert set(found.names) == {f"{LAYER}{name}" for name in expected}
    assert set(found.experts.values()) <= {E}


def mixture(seed: int, layers: int = 2, bias: bool = True) -> Tensors:
    """The tensors of a small mixture of experts."""
    random = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (32, H)}
    for i in range(layers):
        block = f"model.layers.{i}.mlp"
        shapes |= {f"{block}.gate.weight": (E, H), **one_by_one(block, ("up_proj",))}
        shapes |= {f"{block}.gate.e_score_correction_bias": (E,)} if bias else {}
    return {name: ("F32", random.standard_normal(s).astype(np.float32)) for name, s in shapes.items()}


CONFIG = {**llama_config(H, 2, 32), "model_type": "qwen3_moe", "num_experts": E}
GATES = [f"model.layers.{i}.mlp.gate.weight" for i in range(2)]
RECIPE: dict[str, Any] = {"merge_method": "linear", "models": ["a", "b"], "unrelated": "allow"}


@pytest.fixture
def _models() -> None:
    for i, name in enumerate(("base", "a", "b", "c")):
        save_model(Path(name), mixture(i), CONFIG)


@pytest.mark.usefixtures("_models")
def test_a_plan_says_that_routers_are_merged_and_the_line_to_add_keeps_them() -> None:
    said = [note for note in alnico.plan(RECIPE).notes if "router" in note]
    assert len(said) == 1
    assert said[0].startswith(
        "model.layers.0.mlp.gate.weight and 1 more routers of 4 experts are merged like other weights"
    )
    assert "Add `routers: a`" in said[0]
    with_base = alnico.plan({**RECIPE, "base_model": "base"})
    assert any("`routers: base`" in note for note in with_base.notes)
    for setting in ("merge", "a", "c"):
        assert not [n for n in alnico.plan({**RECIPE, "routers": setting}).notes if "are merged like" in n]
    own = {**RECIPE, "methods": [{"filter": "mlp.gate.", "merge_method": "passthrough", "model": "a"}]}
    assert not [note for note in alnico.plan(own).notes if "are merged like" in note]


@pytest.mark.usefixtures("_models")
@pytest.mark.parametrize("setting", ["base", "a", "c"])
def test_kept_routers_are_those_of_the_model_with_their_corrections(setting: str) -> None:
    alnico.merge({**RECIPE, "base_model": "base", "routers": setting}, "out")
    out, kept, a, b = (read_model(Path(name)) for name in ("out", setting, "a", "b"))
    for name, values in out.items():
        expected = kept[name] if ".mlp.gate." in name else (a[name] + b[name]) / np.float32(2)
        np.testing.assert_array_equal(values, expected, err_msg=name)
    alnico.verify("out", against_inputs=True)


@pytest.mark.usefixtures("_models")
def test_a_rule_of_the_recipe_comes_before_the_setting() -> None:
    rule = {"filter": GATES[0], "merge_method": "passthrough", "model": "b"}
    alnico.merge({**RECIPE, "methods": [rule], "routers": "a"}, "out")
    out, a, b = (read_model(Path(name)) for name in ("out", "a", "b"))
    np.testing.assert_array_equal(out[GATES[0]], b[GATES[0]])
    np.testing.assert_array_equal(out[GATES[1]], a[GATES[1]])


def test_the_setting_survives_writing_and_reading() -> None:
    for setting in ("merge", "a", "c", {"calibrate": "measured"}):
        recipe = alnico.load_recipe({**RECIPE, "routers": setting})
        assert recipe.canonical()["routers"] == setting
        assert alnico.load_recipe(recipe.canonical()).canonical() == recipe.canonical()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("base", "routers is base, and the recipe has no base_model"),
        ({}, "routers.calibrate is missing; expected a directory"),
        ({"callibrate": "x"}, "routers has the unknown key 'callibrate'. Did you mean calibrate?"),
        (3, "routers is 3; expected text"),
    ],
)
def test_wrong_settings_are_one_message(setting: Any, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        alnico.load_recipe({**RECIPE, "routers": setting})
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_recipe_of_slices_has_no_routers_key() -> None:
    slices = [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]
    with pytest.raises(RecipeError, match="routers is for models that are merged whole; found slices"):
        alnico.load_recipe({"merge_method": "passthrough", "slices": slices, "routers": "a"})


def test_a_dense_model_is_one_message() -> None:
    for i, name in enumerate(("a", "b")):
        random = np.random.default_rng(i)
        save_model(Path(name), {"w": ("F32", random.standard_normal((8, 8)).astype(np.float32))}, {})
    for setting in ("a", "merge", {"calibrate": "measured"}):
        with pytest.raises(MismatchError) as raised:
            alnico.plan({**RECIPE, "routers": setting})
        assert "routers is for mixtures of experts, and a has no router" in str(raised.value)
