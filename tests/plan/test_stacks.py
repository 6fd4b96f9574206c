"""Configs of layers put together anew: what is written, what is refused, and layers that predict further tokens.

What a config means is taken from the classes of transformers 5; ``tests/test_layer_stacks.py`` compares forward passes with it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.errors import MismatchError
from made import read_model, save_model

SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(
    name: str, layers: Sequence[Sequence[str]], config: dict[str, Any], more: Sequence[str] = ()
) -> None:
    """A model whose layers have tensors of these names, each with a value that tells the layer."""
    tensors = {"model.embed_tokens.weight": np.ones((4, 2), np.float32)}
    for i, names in enumerate(layers):
        tensors |= {f"model.layers.{i}.{name}.weight": np.full((2, 2), i, np.float32) for name in names}
    tensors |= {name: np.full((2, 2), 100, np.float32) for name in more}
    tensors |= {"model.norm.weight": np.ones(2, np.float32), "lm_head.weight": np.ones((4, 2), np.float32)}
    save_model(Path(name), {n: ("F32", values) for n, values in tensors.items()}, config)


def stacked(*ranges: tuple[str, int, int], module: str = "") -> dict[str, Any]:
    """The config of slices put on top of one another."""
    slices = [{"sources": [{"model": name, "layer_range": [low, high]}]} for name, low, high in ranges]
    recipe: dict[str, Any] = {"merge_method": "passthrough"}
    recipe |= (
        {"modules": {module: {"slices": slices}}, "base_model": ranges[0][0]}
        if module
        else {"slices": slices}
    )
    alnico.merge(recipe, "out")
    return dict(json.loads(Path("out/config.json").read_text(encoding="utf-8")))


ALIKE = [["attn"]] * 4
DENSE_FIRST = [["mlp"], ["moe"], ["moe"], ["moe"]]
ALTERNATING = [["conv"], ["attn"]] * 2

WRITTEN: dict[str, tuple[list[list[str]], dict[str, Any], dict[str, Any]]] = {
    "a list that is repeated": (
        [["rnn"], ["rnn"], ["attn"], ["rnn"]],
        {"num_hidden_layers": 4, "block_types": ["recurrent", "recurrent", "attention"]},
        {
            "num_hidden_layers": 6,
            "block_types": ["recurrent", "recurrent", "attention", "recurrent", "attention", "recurrent"],
        },
    ),
    "a text with a letter for each layer": (
        [["mamba"], ["mlp"], ["mamba"], ["attn"]],
        {"num_hidden_layers": 4, "hybrid_override_pattern": "M-M*"},
        {"num_hidden_layers": 6, "hybrid_override_pattern": "M-M-M*"},
    ),
    "a list that is all that counts the layers": (
        ALTERNATING,
        {"layers_block_type": ["mamba", "attention"] * 2},
        {"layers_block_type": ["mamba", "attention", "mamba", "attention", "mamba", "attention"]},
    ),
    "sizes by layer": (
        ALIKE,
        {"num_hidden_layers": 4, "moe_topk": [1, 1, 2, 3], "intermediate_size": [8, 9, 10, 11]},
        {"num_hidden_layers": 6, "moe_topk": [1, 1, 2, 1, 2, 3], "intermediate_size": [8, 9, 10, 9, 10, 11]},
    ),
    "a mapping by the numbers of layers": (
        ALIKE,
        {"num_hidden_layers": 4, "per_layer_config": {"1": {"head_dim": 512}, "3": {"head_dim": 256}}},
        {"per_layer_config": {"1": {"head_dim": 512}, "3": {"head_dim": 512}, "5": {"head_dim": 256}}},
    ),
    "numbers of layers that count from one": (
        ALIKE,
        {
            "num_hidden_layers": 4,
            "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 4},
        },
        {"linear_attn_config": {"full_attn_layers": [6], "kda_layers": [1, 2, 3, 4, 5], "head_dim": 4}},
    ),
    "where sparse layers begin and end": (
        DENSE_FIRST,
        {
            "num_hidden_layers": 4,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
            "moe_layer_interval": 1,
        },
        {
            "num_hidden_layers": 6,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 5,
            "moe_layer_interval": 1,
        },
    ),
    "a number that is divided by the root of the count": (
        ALIKE,
        {"num_hidden_layers": 4, "scale_depth": 1.4},
        {"num_hidden_layers": 6, "scale_depth": pytest.approx(1.4 * 1.5**0.5)},
    ),
    "types that the family implies": (
        ALIKE,
        {"model_type": "gpt_oss", "num_hidden_layers": 4},
        {"layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL]},
    ),
    "dense layers that the family implies": (
        DENSE_FIRST,
        {"model_type": "glm4_moe_lite", "num_hidden_layers": 4},
        {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse", "sparse"]},
    ),
    "layers that use the keys and values of others": (
        [["attn"], ["attn"], ["attn"], ["mlp"]],
        {"num_hidden_layers": 4, "num_kv_shared_layers": 1, "layer_types": [FULL, FULL, FULL, FULL]},
        {"num_hidden_layers": 6, "num_kv_shared_layers": 1},
    ),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_the_config_says_of_every_layer_what_it_said_where_the_layer_is_from(what: str) -> None:
    layers, config, expected = WRITTEN[what]
    save("a", layers, config)
    assert stacked(("a", 0, 3), ("a", 1, 4)).items() >= expected.items()


def test_a_number_that_counts_the_first_layers_is_counted_anew() -> None:
    save("a", [["mlp"], ["mlp"], ["moe"], ["moe"]], {"num_hidden_layers": 4, "first_k_dense_replace": 2})
    assert stacked(("a", 0, 2), ("a", 1, 4)) == {"num_hidden_layers": 5, "first_k_dense_replace": 3}


def test_the_entries_of_a_layer_are_those_of_the_model_that_it_is_from() -> None:
    save("a", ALIKE, {"num_hidden_layers": 4, "moe_topk": [1, 2, 3, 4]})
    save("b", [["attn"]] * 5, {"num_hidden_layers": 5, "moe_topk": [5, 6, 7, 8, 9]})
    assert stacked(("a", 0, 2), ("b", 3, 5))["moe_topk"] == [1, 2, 8, 9]


def test_what_only_looks_like_a_list_by_layer_is_left_as_it_is() -> None:
    config = {
        "num_hidden_layers": 4,
        "eos_token_id": [1, 2, 3, 4],
        "mrope_section": [1, 1, 1, 1],
        "architectures": ["A", "B", "C", "D"],
    }
    save("a", ALIKE, config)
    assert stacked(("a", 0, 3), ("a", 1, 4)).items() >= (config | {"num_hidden_layers": 6}).items()


REFUSED: dict[str, tuple[list[list[str]], dict[str, Any], list[tuple[int, int]], str]] = {
    "a list that is not known": (ALIKE, {"num_hidden_layers": 4, "widths": [1, 2, 3, 4]}, [(0, 3), (1, 4)], r"widths has 4 entries"),
    "a number that is not known": (
        ALIKE, {"num_hidden_layers": 4, "attention_layer_offset_every": 2}, [(0, 3), (1, 4)], "attention_layer_offset_every is 2",
    ),
    "a count that no key has": (ALIKE, {"model_type": "own"}, [(0, 3)], "no key of a says that it has 4 layers"),
    "dense layers in the middle": (
        DENSE_FIRST, {"num_hidden_layers": 4, "first_k_dense_replace": 1}, [(0, 2), (0, 4)], "first_k_dense_replace is 1",
    ),
    "a first layer that is of its own kind": (
        [["attn"], *[["norm", "attn"]] * 3], {"num_hidden_layers": 4}, [(1, 4)], r"layers\.0\.norm\.weight: .*by layer number",
    ),
    "a last layer that is of its own kind": (
        [*[["attn"]] * 3, ["attn", "bias"]], {"num_hidden_layers": 4}, [(0, 3)], r"layers\.2\.bias\.weight: .*counted from the end",
    ),
    "layers whose constants follow from their numbers": (
        ALIKE, {"model_type": "diffllama", "num_hidden_layers": 4}, [(0, 3), (1, 4)], "model_type is diffllama",
    ),
    "a constant that the files do not have": (
        ALIKE, {"model_type": "minimax", "num_hidden_layers": 4, "layer_types": [FULL] * 4}, [(0, 3), (1, 4)], "compute slope_rate from",
    ),
    "residuals that are scaled by the number of layers": (
        ALIKE, {"model_type": "esmc", "num_hidden_layers": 4}, [(0, 3)], "model_type is esmc",
    ),
    "types that the code chooses": (
        ALIKE, {"model_type": "lfm3", "num_hidden_layers": 4}, [(0, 3), (1, 4)], "layer_types is missing",
    ),
    "sharing layers in the middle": (
        ALIKE, {"num_hidden_layers": 4, "num_kv_shared_layers": 1, "layer_types": [FULL] * 4}, [(0, 4), (2, 4)], "num_kv_shared_layers is 1",
    ),
    "sharing with another layer": (
        ALIKE, {"num_hidden_layers": 4, "num_kv_shared_layers": 1, "layer_types": [FULL] * 4}, [(0, 2), (3, 4)],
        "that would be layer 1 of a, and was layer 2 of a",
    ),
    "a first layer that uses what an earlier one chose": (
        ALIKE, {"num_hidden_layers": 4, "indexer_types": ["full", "shared"] * 2}, [(1, 4)], "indexer_types says that layer 1 of a uses",
    ),
    "a last layer without full attention": (
        ALIKE, {"model_type": "gemma4_text", "num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2}, [(0, 3)],
        "has sliding_attention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_config_cannot_say_is_refused_before_anything_is_read(what: str) -> None:
    layers, config, ranges, message = REFUSED[what]
    save("a", layers, config)
    with pytest.raises(MismatchError, match=message):
        stacked(*(("a", low, high) for low, high in ranges))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "name", ["model.embed_tokens_per_layer.weight", "esm.contact_head.regression.weight", "layer_weights"]
)
def test_tensors_with_a_part_for_each_layer_are_not_put_under_other_layers(name: str) -> None:
    save("a", ALIKE, {"num_hidden_layers": 4}, more=[name])
    assert stacked(("a", 0, 2), ("a", 2, 4))["num_hidden_layers"] == 4
    shutil.rmtree("out")
    with pytest.raises(MismatchError, match="a part for each of the 4 layers"):
        stacked(("a", 0, 3))


def test_a_layer_that_keeps_its_number_may_stand_beside_numbers_that_are_not_known() -> None:
    save("a", ALIKE, {"num_hidden_layers": 4, "attention_layer_interval": 2})
    assert stacked(("a", 0, 3)).items() >= {"num_hidden_layers": 3, "attention_layer_interval": 2}.items()


@pytest.mark.parametrize(
    ("module", "config", "expected"),
    [
        ("encoder", {"encoder_layers": 3, "decoder_layers": 3}, {"encoder_layers": 5, "decoder_layers": 3}),
        ("decoder", {"encoder_layers": 3, "decoder_layers": 3}, {"encoder_layers": 3, "decoder_layers": 5}),
        (
            "encoder",
            {"num_layers": 3, "is_encoder_decoder": True},
            {"num_layers": 5, "num_decoder_layers": 3},
        ),
        (
            "decoder",
            {"num_layers": 3, "is_encoder_decoder": True},
            {"num_layers": 3, "num_decoder_layers": 5},
        ),
        (
            "decoder",
            {"encoder": {"num_hidden_layers": 3}, "decoder": {"num_hidden_layers": 3}},
            {"encoder": {"num_hidden_layers": 3}, "decoder": {"num_hidden_layers": 5}},
        ),
    ],
)
def test_encoder_and_decoder_are_counted_each_by_itself(
    module: str, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    names = [f"{part}.layers.{i}.attn.weight" for part in ("encoder", "decoder") for i in range(3)]
    save("a", [], config, more=names)
    assert stacked(("a", 0, 3), ("a", 1, 3), module=module).items() >= expected.items()


def test_layers_of_a_module_that_no_slice_takes_are_not_written() -> None:
    names = [f"{part}.layers.{i}.attn.weight" for part in ("encoder", "decoder") for i in range(3)]
    save("a", [], {"encoder_layers": 3, "decoder_layers": 3}, more=names)
    stacked(("a", 0, 2), module="encoder")
    written = sorted(n for n in read_model(Path("out")) if ".layers." in n)
    assert written == sorted(n for n in names if n != "encoder.layers.2.attn.weight")


def test_lists_of_modules_that_one_number_counts_are_stacked_together() -> None:
    names = [f"transformer.{part}.{i}.lin.weight" for part in ("attentions", "ffns") for i in range(3)]
    save("a", [], {"n_layers": 3}, more=names)
    with pytest.raises(
        MismatchError, match=r"n_layers of a counts transformer\.attentions\.\* and transformer\.ffns\.\*"
    ):
        stacked(("a", 0, 2), module="transformer.attentions")


# --- Layers that predict further tokens

FURTHER = ["attn", "eh_proj", "enorm", "hnorm", "shared_head.norm", "embed_tokens"]


def deepseek(name: str, layers: int, *, further: bool, scale: float = 1.0) -> None:
    """A model of as many layers, and one that predicts further tokens under the next number, if it is asked for."""
    tensors = {"model.embed_tokens.weight": np.ones((4, 2), np.float32)}
    for i, names in enumerate([["attn"]] * layers + [FURTHER] * further):
        tensors |= {
            f"model.layers.{i}.{n}.weight": np.full((2, 2), scale * (i + 1), np.float32) for n in names
        }
    tensors["model.norm.weight"] = np.ones(2, np.float32)
    config = {"num_hidden_layers": layers, "num_nextn_predict_layers": int(further)}
    save_model(Path(name), {n: ("F32", values) for n, values in tensors.items()}, config)


def test_a_gradient_runs_over_the_layers_and_not_over_those_that_predict_further_tokens() -> None:
    outs = []
    for further in (False, True):
        deepseek(f"a{further}", 3, further=further)
        deepseek(f"b{further}", 3, further=further, scale=3.0)
        models = [{"model": f"a{further}"}, {"model": f"b{further}", "parameters": {"weight": [1.0, 3.0]}}]
        models[0]["parameters"] = {"weight": 1.0}
        alnico.merge({"merge_method": "linear", "models": models, "unrelated": "allow"}, f"out{further}")
        outs.append(read_model(Path(f"out{further}")))
    for name, values in outs[0].items():
        np.testing.assert_array_equal(outs[1][name], values, err_msg=name)
    # in no layer: the gradient's first value, as in mergekit for the last norm and head
    np.testing.assert_array_equal(
        outs[1]["model.layers.3.attn.weight"], np.full((2, 2), (4 + 12) / 2, np.float32)
    )


def test_modules_of_qwen_that_predict_further_tokens_are_no_stack_of_layers() -> None:
    save("a", ALIKE, {"num_hidden_layers": 4}, more=["mtp.layers.0.attn.weight", "mtp.fc.weight"])
    save("b", ALIKE, {"num_hidden_layers": 4}, more=["mtp.layers.0.attn.weight", "mtp.fc.weight"])
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": 1.0}},
            {"model": "b", "parameters": {"weight": [0.0, 1.0]}},
        ],
    }
    plan = alnico.plan(recipe)
    weights = {j.name: j.merge for j in plan.jobs}
    assert weights["mtp.layers.0.attn.weight"] == weights["mtp.fc.weight"]


def test_lines_takes_what_predicts_further_tokens_as_last() -> None:
    deepseek("base", 3, further=True)
    deepseek("a", 3, further=True, scale=2.0)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 1.0}}],
        "lines": {"alpha": 0.0, "beta": 1.0},
        "unrelated": "allow",
    }
    alnico.merge(recipe, "out")
    out = read_model(Path("out"))
    for i, share in enumerate((0.0, 0.5, 1.0, 1.0)):
        np.testing.assert_array_equal(
            out[f"model.layers.{i}.attn.weight"], np.full((2, 2), (i + 1) * (1 + share), np.float32)
        )
    np.testing.assert_array_equal(out["model.layers.3.embed_tokens.weight"], np.full((2, 2), 8, np.float32))


def test_a_stack_numbers_what_predicts_further_tokens_after_its_last_layer() -> None:
    deepseek("a", 3, further=True)
    config = stacked(("a", 0, 3), ("a", 1, 3))
    out = read_model(Path("out"))
    assert config.items() >= {"num_hidden_layers": 5, "num_nextn_predict_layers": 1}.items()
    assert [out[f"model.layers.{i}.attn.weight"][0, 0] for i in range(6)] == [1, 2, 3, 2, 3, 4]
    assert {n.removeprefix("model.layers.5.") for n in out if ".5." in n} == {f"{n}.weight" for n in FURTHER}
    assert not [n for n in out if ".6." in n]


def test_a_stack_whose_last_model_predicts_no_further_tokens_names_them_as_dropped() -> None:
    deepseek("a", 3, further=True)
    deepseek("b", 3, further=False)
    config = stacked(("a", 0, 3), ("b", 1, 3))
    assert config.items() >= {"num_hidden_layers": 5, "num_nextn_predict_layers": 0}.items()
    assert not [n for n in read_model(Path("out")) if "eh_proj" in n]


def test_a_slice_cannot_take_what_predicts_further_tokens() -> None:
    deepseek("a", 3, further=True)
    with pytest.raises(MismatchError, match="a has 3 layers; layer_range is"):
        stacked(("a", 0, 4))


def test_an_analysis_counts_the_layers_of_the_stack() -> None:
    deepseek("base", 3, further=True)
    deepseek("a", 3, further=True, scale=2.0)
    found = alnico.analyze(["a"], base="base")
    assert sorted(found.layers) == [0, 1, 2]


def test_slices_mean_the_text_decoder_also_where_a_tower_has_more_tensors() -> None:
    audio = [
        f"model.embed_tokens_extend.audio_embed.encoder.encoders.{i}.{n}.weight"
        for i in range(4)
        for n in "abcdef"
    ]
    save("a", ALIKE, {"num_hidden_layers": 4, "audio_config": {"num_blocks": 4}}, audio)
    config = stacked(("a", 0, 3), ("a", 1, 4))
    assert config["num_hidden_layers"] == 6
    assert config["audio_config"] == {"num_blocks": 4}
    found = read_model(Path("out"))
    assert [found[f"model.layers.{i}.attn.weight"][0, 0] for i in range(6)] == [0, 1, 2, 1, 2, 3]
    assert {n for n in found if "audio" in n} == set(audio)


def test_stages_are_no_layers() -> None:
    """As in Segformer, PVT and Swin, whose stages have other widths; equal ones here, so that no shape says so."""
    save("a", ALIKE, {"num_encoder_blocks": 4, "depths": [2, 2, 2, 2], "num_attention_heads": [1, 2, 4, 8]})
    with pytest.raises(
        MismatchError, match=r"depths is \[2, 2, 2, 2\]: model\.layers\.0 to model\.layers\.3 of a are stages"
    ):
        stacked(("a", 0, 3), ("a", 1, 4))
