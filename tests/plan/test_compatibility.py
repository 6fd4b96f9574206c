"""Models of another size or kind are refused with one message that says why and what can be done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alnico.errors import MismatchError
from alnico.plan.build import build_plan
from alnico.recipe.load import load_recipe
from alnico.run_options import RunOptions
from made import family, llama_config, save_model

ONE_THREAD = RunOptions(threads=1)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model(name: str, config: Mapping[str, Any] | None = None, **shape: Any) -> str:
    base, _ = family(Path(f"{name}-family"), 0, **shape)
    base.rename(name)
    if config is not None:
        import json

        (Path(name) / "config.json").write_text(json.dumps(config))
    return name


def told(*models: str, **keys: Any) -> str:
    with pytest.raises(MismatchError) as caught:
        build_plan(load_recipe({"merge_method": "linear", "models": list(models), **keys}), run=ONE_THREAD)
    return str(caught.value)


def notes(*models: str) -> list[str]:
    return list(
        build_plan(load_recipe({"merge_method": "linear", "models": list(models)}), run=ONE_THREAD).notes
    )


def test_a_small_model_with_a_large_one_gets_one_error_with_the_widths_in_words() -> None:
    model("7b", hidden=16, layers=2), model("13b", hidden=32, layers=3)
    assert told("7b", "13b") == (
        "7b and 13b are models of different sizes: hidden size 16 and 32, intermediate size 48 and 96, layers 2 and 3; "
        "expected one architecture and size.\n"
        "  20 of 29 tensors have different shapes, such as\n"
        "    model.embed_tokens.weight: 7b (32, 16), 13b (32, 32)\n"
        "    model.layers.0.input_layernorm.weight: 7b (16,), 13b (32,)\n"
        "    model.layers.0.mlp.down_proj.weight: 7b (16, 48), 13b (32, 96)\n"
        "  7b lacks 9 tensors, such as model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight and "
        "model.layers.2.mlp.gate_proj.weight.\n"
        "Use models of one architecture and size, or stack whole layers of one of them (slices, merge_method: passthrough). Only training "
        "(distillation) transfers knowledge between them."
    )


def test_models_of_one_width_and_another_depth_are_told_to_share_layers() -> None:
    model("shallow", layers=2), model("deep", layers=4)
    said = told("shallow", "deep")
    assert said.startswith(
        "shallow and deep are models of different sizes: layers 2 and 4; expected one architecture and size.\n"
    )
    assert "\n  shallow lacks 18 tensors, such as model.layers.2." in said
    assert said.endswith(
        "\nUse models with the same number of layers, merge the layers that all have (slices with a layer_range), or set missing: copy or missing: drop."
    )


def test_three_models_are_all_named() -> None:
    model("a"), model("b"), model("c", hidden=32)
    assert told("a", "b", "c").startswith(
        "a, b and c are models of different sizes: hidden size 16, 16 and 32, intermediate size 48, "
    )


def test_another_kind_of_model_is_named_where_tensors_do_not_fit() -> None:
    model("a"), model("b", {**llama_config(), "model_type": "mistral"}, layers=3)
    assert told("a", "b").startswith(
        "a and b are models of different architectures: model_type llama and mistral; "
    )


def test_models_without_a_config_are_told_apart_by_their_widths() -> None:
    for name, width in (("a", 16), ("b", 24)):
        save_model(Path(name), {f"w{i}": ("F32", np.zeros((width, 8))) for i in range(6)})
    said = told("a", "b")
    assert said.startswith(
        "a and b are models of different sizes: widths 16 and 24; expected one architecture and size.\n  6 of 6 tensors "
    )


def test_a_shape_is_not_explained_by_another_depth() -> None:
    model("a", {**llama_config(), "num_hidden_layers": 3}), model("b", vocabulary=48)
    assert told("a", "b").startswith(
        "model.embed_tokens.weight: a has 32 rows, b has 48; the models have different vocabularies"
    )


def test_a_tensor_that_differs_alone_keeps_its_own_message() -> None:
    for name, width in (("a", 16), ("b", 24)):
        save_model(
            Path(name),
            {**{f"w{i}": ("F32", np.zeros((4, 8))) for i in range(6)}, "v": ("F32", np.zeros(width))},
        )
    assert told("a", "b").startswith("v: a is (16,), b is (24,); ")


def test_another_kind_with_equal_shapes_is_a_note() -> None:
    (
        model("a"),
        model("b", {**llama_config(), "model_type": "mistral", "rope_theta": 1e6, "num_attention_heads": 8}),
    )
    assert notes("a", "b") == [
        "the configs of a and b differ in model_type (llama and mistral), attention heads (4 and 8), rope_theta (10000.0 and 1000000.0); "
        "the output has those of a, and weights trained with another config may not work with it."
    ]
    model("c")
    assert notes("a", "c") == []


def test_layers_of_a_model_that_computes_otherwise_are_noted_in_a_stack() -> None:
    model("a", {**llama_config(), "sliding_window": 8}), model("b", {**llama_config(), "sliding_window": 16})
    slices = [{"sources": [{"model": name, "layer_range": [0, 1]}]} for name in ("a", "b")]
    plan = build_plan(load_recipe({"merge_method": "passthrough", "slices": slices}), run=ONE_THREAD)
    assert [note for note in plan.notes if "configs" in note] == [
        "the configs of a and b differ in sliding_window (8 and 16); "
        "the output has those of a, and weights trained with another config may not work with it."
    ]


@pytest.mark.parametrize("written", ["rope_theta", "rope_parameters"])
def test_positions_are_compared_as_transformers_4_and_5_write_them(written: str) -> None:
    plain = {k: v for k, v in llama_config().items() if not k.startswith("rope_")}
    one, other = (
        {**plain, "rope_parameters": {"rope_type": "default", "rope_theta": base}} for base in (1e4, 1e6)
    )
    model("a", one)
    model("b", other if written == "rope_parameters" else {**plain, "rope_theta": 1e6, "rope_scaling": None})
    model("c", one if written == "rope_parameters" else {**plain, "rope_theta": 1e4, "rope_scaling": None})
    assert notes("a", "b") == [
        "the configs of a and b differ in rope_theta (10000.0 and 1000000.0); "
        "the output has those of a, and weights trained with another config may not work with it."
    ]
    assert notes("a", "c") == []
