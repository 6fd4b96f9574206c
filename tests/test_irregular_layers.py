"""Models whose layers differ (Nemotron-NAS, ``block_configs``): merged, and laid out as the config says.

Loading them needs the code of their repository, so names and shapes are held against what the config says of each layer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import alnico
from alnico.errors import MismatchError
from made import Tensors, read_model, save_model

EXAMPLE = Path(__file__).parent.parent / "examples" / "irregular-layers.yml"
HIDDEN, HEADS, VOCABULARY = 48, 4, 32

ATTENTION = {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False}
WIDE = {"ffn_mult": 2.0, "no_op": False, "replace_with_linear": False}
NONE = {"no_op": True, "replace_with_linear": False}
LINEAR = {"no_op": False, "replace_with_linear": True}

BLOCKS: tuple[dict[str, Any], ...] = (
    {"attention": ATTENTION, "ffn": WIDE},
    {"attention": {**ATTENTION, **NONE}, "ffn": {**WIDE, "ffn_mult": 8.0}},
    {"attention": {**ATTENTION, "n_heads_in_group": 4}, "ffn": {**WIDE, **NONE}},
    {"attention": {**ATTENTION, **NONE}, "ffn": {**WIDE, **NONE}},
    {"attention": {**ATTENTION, **LINEAR}, "ffn": {**WIDE, **LINEAR}},
    {"attention": {**ATTENTION, "n_heads_in_group": 1}, "ffn": WIDE},
)


def config(blocks: tuple[dict[str, Any], ...] = BLOCKS) -> dict[str, Any]:
    return {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM"},
        "block_configs": list(blocks),
        "hidden_size": HIDDEN,
        "intermediate_size": None,
        "num_attention_heads": HEADS,
        "num_hidden_layers": len(blocks),
        "num_key_value_heads": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY,
    }


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What a config says of each layer: DeciLM's widths are two thirds of the multiple, rounded up to 256."""
    hidden = config["hidden_size"]
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i, block in enumerate(config["block_configs"]):
        at, attention, ffn = f"model.layers.{i}.", block["attention"], block["ffn"]
        if not attention["no_op"]:
            found[f"{at}input_layernorm.weight"] = (hidden,)
        if attention["replace_with_linear"]:
            found[f"{at}self_attn.linear_attn.weight"] = (hidden, hidden)
        elif not attention["no_op"]:
            rows = hidden // attention["n_heads_in_group"]
            widths = {"q": hidden, "k": rows, "v": rows}
            found |= {f"{at}self_attn.{p}_proj.weight": (width, hidden) for p, width in widths.items()}
            found[f"{at}self_attn.o_proj.weight"] = (hidden, hidden)
        if not ffn["no_op"]:
            found[f"{at}post_attention_layernorm.weight"] = (hidden,)
        if ffn["replace_with_linear"]:
            found[f"{at}mlp.linear_mlp.weight"] = (hidden, hidden)
        elif not ffn["no_op"]:
            width = -(-int(2 * ffn["ffn_mult"] * hidden / 3) // 256) * 256
            found |= {f"{at}mlp.{p}_proj.weight": (width, hidden) for p in ("gate", "up")}
            found[f"{at}mlp.down_proj.weight"] = (hidden, width)
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}


def written(name: str, seed: int, blocks: tuple[dict[str, Any], ...] = BLOCKS) -> Path:
    """Write a model near the base, which has seed 0."""
    random, change = np.random.default_rng(0), np.random.default_rng(seed)
    tensors: Tensors = {
        n: ("F32", (random.standard_normal(s) + 0.01 * seed * change.standard_normal(s)).astype(np.float32))
        for n, s in shapes(config(blocks)).items()
    }
    return save_model(Path(name), tensors, config(blocks))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "coder", "math")):
        written(f"models/{name}", seed)


def config_of(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
    return found


def test_an_average_has_every_tensor_that_the_config_names_and_no_other() -> None:
    result = alnico.merge({"merge_method": "linear", "models": ["models/coder", "models/math"]}, "out")
    merged, models = read_model(Path("out")), [read_model(Path(f"models/{n}")) for n in ("coder", "math")]
    assert {name: values.shape for name, values in merged.items()} == shapes(config_of("out"))
    assert config_of("out") == config()
    assert not result.plan.dropped
    for name, values in merged.items():
        mean = np.mean([m[name].astype(np.float64) for m in models], 0).astype(np.float32)
        np.testing.assert_array_equal(values, mean, err_msg=name)


def test_the_example_merges_them() -> None:
    shutil.copy(EXAMPLE, "recipe.yml")
    assert "block_configs" in Path("recipe.yml").read_text()
    assert yaml.safe_load(Path("recipe.yml").read_text())["merge_method"] == "ties"
    alnico.merge("recipe.yml", "out")
    merged, base = read_model(Path("out")), read_model(Path("models/base"))
    assert {name: values.shape for name, values in merged.items()} == shapes(config_of("out"))
    assert all((values != base[name]).any() for name, values in merged.items())


def test_a_stack_of_such_layers_has_their_configs() -> None:
    slices = [
        {"sources": [{"model": "models/coder", "layer_range": [0, 3]}]},
        {"sources": [{"model": "models/math", "layer_range": [1, 6]}]},
    ]
    alnico.merge({"merge_method": "passthrough", "slices": slices}, "out")
    made = config_of("out")
    assert made["block_configs"] == [*BLOCKS[:3], *BLOCKS[1:]]
    assert made["num_hidden_layers"] == 8
    merged, coder, math = (read_model(Path(n)) for n in ("out", "models/coder", "models/math"))
    assert {name: values.shape for name, values in merged.items()} == shapes(made)
    np.testing.assert_array_equal(
        merged["model.layers.2.self_attn.k_proj.weight"], coder["model.layers.2.self_attn.k_proj.weight"]
    )
    np.testing.assert_array_equal(
        merged["model.layers.3.mlp.up_proj.weight"], math["model.layers.1.mlp.up_proj.weight"]
    )
    np.testing.assert_array_equal(
        merged["model.layers.6.mlp.linear_mlp.weight"], math["model.layers.4.mlp.linear_mlp.weight"]
    )


def test_models_of_other_blocks_are_refused_with_the_first_tensor_that_differs() -> None:
    written("other", 3, (BLOCKS[1], *BLOCKS[1:]))
    with pytest.raises(MismatchError) as caught:
        alnico.plan({"merge_method": "linear", "models": ["models/coder", "other"]})
    assert "model.layers.0." in str(caught.value)


def test_layers_of_other_kinds_are_not_put_on_top_of_one_another() -> None:
    ranges = [("models/coder", [0, 2]), ("models/math", [1, 3])]
    slices = [{"sources": [{"model": n, "layer_range": r} for n, r in ranges]}]
    with pytest.raises(MismatchError, match=r"model\.layers\.0\."):
        alnico.merge({"merge_method": "linear", "slices": slices}, "out")
