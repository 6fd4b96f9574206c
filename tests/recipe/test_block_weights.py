"""Values by block of an image model, and filters by block: names of the original code and of diffusers, lists, presets, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import alnico
from alnico.checkpoint.image_blocks import LISTS, PRESETS, block_of, preset_weights
from alnico.errors import RecipeError
from alnico.recipe.load import parse_recipe

UNET = "model.diffusion_model."
OUTSIDE = (
    "first_stage_model.decoder.conv_in.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
)


def unet_names(levels: int, with_attention: set[int]) -> list[str]:
    """Names of a U-Net in the original code: SD has four levels, SDXL three; ``with_attention`` are levels."""
    last = 3 * levels - 1
    names = ["time_embed.0.weight", "input_blocks.0.0.weight"]
    for block in range(1, last + 1):
        if block % 3 == 0:
            names += [f"input_blocks.{block}.0.op.weight"]
            continue
        names += [f"input_blocks.{block}.0.in_layers.2.weight"]
        names += [f"input_blocks.{block}.1.proj_in.weight"] if block // 3 in with_attention else []
    names += [
        f"middle_block.{i}.{w}.weight" for i, w in ((0, "in_layers.2"), (1, "proj_in"), (2, "in_layers.2"))
    ]
    for block in range(last + 1):
        has_attention = levels - 1 - block // 3 in with_attention
        names += [f"output_blocks.{block}.0.in_layers.2.weight"]
        names += [f"output_blocks.{block}.1.proj_in.weight"] if has_attention else []
        names += (
            [f"output_blocks.{block}.{1 + has_attention}.conv.{kind}" for kind in ("weight", "bias")]
            if block % 3 == 2 and block < last
            else []
        )
    return [*names, "out.2.weight"]


SD = unet_names(4, {0, 1, 2})
SDXL = unet_names(3, {1, 2})


def model(path: Path, names: list[str], value: float) -> str:
    save_file({n: np.full((2, 2), value, np.float32) for n in names}, path)
    return str(path)


def by_block(tmp_path: Path, names: list[str], t: Any) -> dict[str, float]:
    """Merge a model of zeros and one of ones by slerp's ``t``; returns the numbers by tensor."""
    zero, one = (model(tmp_path / f"{v}.safetensors", names, v) for v in (0.0, 1.0))
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": zero, "parameters": {"weight": 0.0}},
            {"model": one, "parameters": {"weight": t}},
        ],
        "parameters": {"normalize": False},
        "unrelated": "allow",
    }
    alnico.merge(recipe, tmp_path / "out.safetensors")
    return {n: float(v[0, 0]) for n, v in load_file(tmp_path / "out.safetensors").items()}


@pytest.mark.slow  # importing diffusers takes seconds
@pytest.mark.parametrize(("names", "blocks"), [(SD, 4), (SDXL, 3)], ids=["SD", "SDXL"])
def test_names_of_diffusers_are_in_the_blocks_of_the_names_that_it_converts(
    names: list[str], blocks: int
) -> None:
    utilities = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = {"layers_per_block": 2, "down_block_types": ["x"] * blocks, "up_block_types": ["x"] * blocks}
    converted = utilities.convert_ldm_unet_checkpoint(
        {UNET + n: i for i, n in enumerate(names)},
        config,
    )
    found = {i: block_of(n) for n, i in converted.items() if i is not None}
    expected = {i: block_of(UNET + n) for i, n in enumerate(names)}
    assert {i: expected[i] for i in found} == found
    assert len(found) >= len(names) - 1


def test_a_list_gives_each_block_its_number(tmp_path: Path) -> None:
    numbers = [round(0.01 * i, 2) for i in range(1, 27)]
    found = by_block(tmp_path, [UNET + n for n in SD] + list(OUTSIDE), {"blocks": numbers})
    expected = dict(zip(LISTS[26], numbers, strict=True)) | {"FIRST": numbers[1], "LAST": numbers[-1]}
    assert found == {n: pytest.approx(expected[block_of(n)]) for n in found}
    assert found[OUTSIDE[0]] == pytest.approx(0.01)
    assert {block_of(n) for n in found} == {*LISTS[26], "FIRST", "LAST"}


def test_a_preset_serves_models_with_fewer_blocks_and_says_nothing_of_the_others(tmp_path: Path) -> None:
    names = [UNET + n for n in SDXL]
    recipe = {
        "merge_method": "linear",
        "models": [model(tmp_path / f"{i}.safetensors", names, i) for i in range(2)],
    }
    plan = alnico.plan(
        {**recipe, "parameters": {"weight": {"blocks": "GRAD_V"}, "normalize": False}, "unrelated": "allow"}
    )
    assert not [note for note in plan.notes if "block" in note]
    found = by_block(tmp_path, names, {"blocks": "GRAD_V"})
    assert found[f"{UNET}input_blocks.6.0.op.weight"] == pytest.approx(0.5)
    assert found[f"{UNET}middle_block.1.proj_in.weight"] == 0


def test_blocks_with_values_and_the_value_of_the_others(tmp_path: Path) -> None:
    names = [UNET + n for n in SD] + list(OUTSIDE)
    found = by_block(
        tmp_path, names, {"blocks": {"IN00-IN05": 0.25, "MID,OUT": 1, "BASE": 0.5}, "value": 0.75}
    )
    for name, number in found.items():
        block = block_of(name)
        is_early = block.startswith("IN") and int(block[2:]) <= 5
        later = 1 if block == "MID" or block.startswith("OUT") else 0.5 if block == "BASE" else 0.75
        assert number == (0.25 if is_early else later), name


def test_a_rule_chooses_tensors_by_block(tmp_path: Path) -> None:
    names = [UNET + n for n in SD]
    models = [model(tmp_path / f"{i}.safetensors", names, i) for i in range(2)]
    rule = {"filter": "block:OUT", "merge_method": "passthrough", "model": models[1]}
    recipe = {"merge_method": "passthrough", "models": models[:1], "methods": [rule], "unrelated": "allow"}
    alnico.merge(recipe, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert {block_of(n) for n, v in found.items() if v[0, 0] == 1} == {f"OUT{i:02d}" for i in range(12)}


@pytest.mark.parametrize(
    ("preset", "numbers"),
    [  # IN00, IN01, IN05, IN08, MID, OUT03, OUT07, OUT11, as the presets' tables have them
        ("GRAD_V", [1, 0.9166666667, 0.5833333333, 0.3333333333, 0, 0.3333333333, 0.6666666667, 1]),
        ("GRAD_A", [0, 0.0833333333, 0.4166666667, 0.6666666667, 1, 0.6666666667, 0.3333333333, 0]),
        ("WRAP12", [1, 1, 1, 0, 0, 0, 1, 1]),
        ("RING08_SOFT", [0, 0, 0.5, 1, 0, 1, 0, 0]),
        ("RING10_3", [0, 0, 0, 1, 0, 1, 0, 0]),
        ("OUT12_5", [0, 0, 0, 0, 0.5, 1, 1, 1]),
        ("SMOOTHSTEP", [0, 0.00506365740740741, 0.112123842592593, 0.259259259259259, 0.5, 0.740740740740741, 0.925925925925926, 1]),
        ("SMOOTHSTEP*3", [0, 0.0151909722222222, 0.336371527777778, 0.777777777777778, 0.5, 0.222222222222222, 0.777777777777778, 1]),
        ("R_SMOOTHSTEP/3", [1, 0.95703125, 0.31640625, 0, 0.5, 1, 0.5, 0]),
        ("COSINE", [1, 0.995722430686905, 0.896676670145617, 0.75, 0.5, 0.25, 0.0669872981077805, 0]),
        ("TRUE_CUBIC_HERMITE", [0, 0.199031876929012, 0.549991560570988, 0.598765432098765, 0.520833333333333, 0.442901234567901, 0.543209876543211, 1]),
        ("FAKE_REVERSE_CUBIC_HERMITE", [1, 0.842423804012346, 0.487003279320988, 0.432098765432099, 0.5, 0.567901234567901, 0.459876543209876, 0]),
        ("ALL_B", [1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)  # fmt: skip
def test_presets_are_those_that_merge_tools_share(preset: str, numbers: list[float]) -> None:
    weights = preset_weights(preset)
    blocks = ("IN00", "IN01", "IN05", "IN08", "MID", "OUT03", "OUT07", "OUT11")
    assert [weights[block] for block in blocks] == pytest.approx(numbers, abs=1e-9)


def test_every_preset_gives_every_block_a_share() -> None:
    for preset in PRESETS:
        weights = preset_weights(preset)
        assert weights.keys() >= {block for blocks in LISTS.values() for block in blocks}
        assert all(0 <= value <= 1 for value in weights.values()), preset


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{blocks: GRAD}", r"is 'GRAD', which is no preset. Did you mean GRAD_[VA]\?"),
        ("{blocks: [1, 2, 3]}", "is a list of 3; expected 26 or 25 numbers for SD"),
        ("{blocks: {IN1x: 1}}", "has 'IN1x', which is no block; expected IN00 to IN11"),
        ("{blocks: {IN00: x}}", "is 'x'; expected a number"),
        ("{blocks: 3}", "is 3; expected the name of a preset, a list of numbers, or blocks with values"),
        ("{blocks: GRAD_V, values: 1}", "'values'"),
        ("[{filter: 'block:IN1x', value: 1}]", "is 'block:IN1x'; expected blocks of an image model"),
    ],
)
def test_mistakes_are_told(value: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(f"merge_method: linear\nmodels: [a, b]\nparameters:\n  weight: {value}\n", "r.yml")
