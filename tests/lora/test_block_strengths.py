"""Strengths by block: what the lists and labels mean, in folds and in combinations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.checkpoint.lora_dialects.block_strengths import labels_of, parse_blocks
from alnico.checkpoint.lora_dialects.dialect_adapter import module_key
from alnico.checkpoint.lora_dialects.factor_names import module_name
from alnico.checkpoint.open_adapter import open_adapter
from alnico.errors import ModelError, RecipeError
from lora import dialect_files as files
from lora import made_adapters
from lora.dialect_files import lora, near

IN = "down_blocks.0.attentions.0.proj_in"
MID = "mid_block.attentions.0.proj_in"
OUT = "up_blocks.1.attentions.2.proj_out"
BLOCKS = {
    "lora_unet_input_blocks_0_0": "IN00",
    "lora_unet_input_blocks_4_1_proj_in": "IN04",
    "lora_unet_input_blocks_3_0_op": "IN03",
    "lora_unet_down_blocks_2_downsamplers_0_conv": "IN09",
    "lora_unet_down_blocks_3_resnets_1_conv2": "IN11",
    "lora_unet_middle_block_1_proj_in": "MID",
    "lora_unet_mid_block_resnets_1_conv1": "MID",
    "lora_unet_output_blocks_11_1_proj_out": "OUT11",
    "lora_unet_up_blocks_0_upsamplers_0_conv": "OUT02",
    "unet.up_blocks.3.attentions.2.proj_out": "OUT11",
    "diffusion_model.double_blocks.7.img_attn.qkv": "D07",
    "transformer.single_transformer_blocks.12.proj_mlp": "S12",
    "transformer.x_embedder": "FIRST",
    "lora_unet_time_embed_0": "FIRST",
    "lora_unet_out_2": "LAST",
    "lora_te_text_model_encoder_layers_0_mlp_fc1": "CLIP",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": "CLIP",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "T5",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_module_is_in_its_block_in_any_dialect(name: str) -> None:
    component, _, canonical = module_key(module_name(name, ".alpha")).partition(":")
    assert labels_of(component, canonical)[0] == BLOCKS[name]


def test_the_usual_lists_name_the_blocks_that_the_programs_give_them() -> None:
    for count, labels in (
        (12, "IN04 OUT05"),
        (17, "IN01 OUT11"),
        (20, "IN00 OUT08"),
        (26, "IN00 OUT11"),
        (58, "D00 S37"),
        (61, "T5 LAST"),
    ):
        values = parse_blocks(",".join(str(i) for i in range(count))).values
        first, last = labels.split()
        assert (values[first], values[last]) == (1, count - 1)
        assert (values["FIRST"], values["LAST"]) == ((1, count - 1) if count < 61 else (2, 60))
    assert parse_blocks([0.5] * 17).of("unet", "down_blocks_0_resnets_0_conv1") == 0.5
    assert parse_blocks([0.5] * 17).of("unet", "conv_in") == 0  # a block that the list does not have
    assert parse_blocks([0.5] * 17).of("unet", "time_embedding_linear_1") == 0.5  # before the first block
    assert parse_blocks([0.5] * 17).of("unet", "blocks_0_self_attn_q") == 1  # in no block
    assert parse_blocks("OUT=0.5").of("unet", "up_blocks_1_attentions_2_proj_out") == 0.5


def kohya(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def adapter(folder: Path) -> tuple[Path, dict[str, files.Factors]]:
    modules = {m: lora((8, 8, 1, 1), 2, i, alpha=1) for i, m in enumerate((IN, MID, OUT))}
    return files.file_of(folder / "a.safetensors", {kohya(m): f for m, f in modules.items()}), modules


TEXTS = ("IN00-IN03=0.5,MID=0", "IN=0.5,M00=0.0", "in01=.5, mid00=0")


@pytest.mark.parametrize("text", TEXTS)
def test_a_fold_scales_what_is_added_by_block(tmp_path: Path, text: str) -> None:
    before = files.unet(tmp_path / "unet")
    path, modules = adapter(tmp_path)
    alnico.lora.fold(tmp_path / "unet", path, tmp_path / "out", weights=2, blocks=text)
    in_memory = alnico.lora.fold(before, path, weights=2, blocks=text)
    with alnico.open_model(tmp_path / "out") as out:
        for module, strength in ((IN, 0.5), (MID, 0), (OUT, 1)):
            name = f"{module}.weight"
            expected = before[name].reshape(8, 8).astype(np.float64) + 2 * strength * files.added(
                modules[module]
            )
            assert near(out.read(name).reshape(8, 8), expected)
            assert np.array_equal(np.asarray(in_memory[name]), out.read(name))
    assert alnico.verify(tmp_path / "out")
    assert "[IN0" in (tmp_path / "out" / "mergekit_config.yml").read_text()


def test_a_recipe_writes_strengths_before_the_adapter(tmp_path: Path) -> None:
    before = files.unet(tmp_path / "unet")
    path, modules = adapter(tmp_path)
    with alnico.open_model(f"{tmp_path / 'unet'}+0.5[OUT00-OUT11=0.2]*{path}") as model:
        expected = before[f"{OUT}.weight"].reshape(8, 8) + 0.1 * files.added(modules[OUT])
        assert near(model.read(f"{OUT}.weight").reshape(8, 8), expected)


def test_a_combination_has_strengths_for_each_adapter(tmp_path: Path) -> None:
    path, modules = adapter(tmp_path)
    alnico.lora.combine(
        [path, path], tmp_path / "out.safetensors", method="cat", blocks=["IN01=0.5,MID=0", {"MID": 0}]
    )
    with open_adapter(str(tmp_path / "out.safetensors")) as combined:
        found = {}
        for update in combined.updates.values():
            (left,), (right,) = combined.matrices(update, np.dtype(np.float64))
            found[update.module] = update.scale * left @ right
    assert set(found) == {kohya(IN), kohya(OUT)}
    assert near(found[kohya(IN)], 1.5 * files.added(modules[IN]))
    assert near(found[kohya(OUT)], 2 * files.added(modules[OUT]))


def test_an_adapter_of_peft_for_a_unet_has_blocks_too(tmp_path: Path) -> None:
    before = files.unet(tmp_path / "unet")
    (tmp_path / "peft").mkdir()
    factors = made_adapters.factors(MID, 8, 8, 2, 1)
    peft = made_adapters.save(
        tmp_path / "peft", {n: v.reshape(*v.shape, 1, 1) for n, v in factors.items()}, r=2, lora_alpha=2
    )
    found = alnico.lora.fold(tmp_path / "unet", peft, blocks="MID=0.25")
    product = factors[f"{MID}.lora_B.weight"].astype(np.float64) @ factors[f"{MID}.lora_A.weight"]
    assert near(
        np.asarray(found[f"{MID}.weight"]).reshape(8, 8),
        before[f"{MID}.weight"].reshape(8, 8) + 0.25 * product,
    )


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("IN12=1", "blocks: 'IN12' names no block; expected BASE, IN00 to IN11, MID, OUT00 to OUT11, D00 to D18, S00 to S37, FIRST, LAST, CLIP or T5, or a range as IN00-IN05."),
        ("OUT02-IN01=1", "blocks: 'OUT02-IN01' ends before it begins; expected a range in the order of the model. Exchange its ends."),
        ("1,0,1", "blocks: is 3 values; expected BLOCK=NUMBER, such as IN04-IN08=0.5,MID=0, or a list of 12, 17, 20, 26, 58, 61 numbers. Change it."),
        ("MID=x", "blocks: a strength is 'x'; expected a finite number."),
        ("MID=nan", "blocks: a strength is nan; expected a finite number."),
        (["MID=0", "MID=0"], "blocks: there are 2 for 1 adapters; expected one for all, or one for each. Change the number."),
        (3, "blocks: is of type int; expected BLOCK=NUMBER, such as IN04-IN08=0.5,MID=0, or a list of 12, 17, 20, 26, 58, 61 numbers. Change it."),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_with_strengths_has_one_message(tmp_path: Path, blocks: object, message: str) -> None:
    files.unet(tmp_path / "unet")
    path, _ = adapter(tmp_path)
    with pytest.raises(RecipeError) as caught:
        alnico.lora.fold(tmp_path / "unet", path, blocks=blocks)
    assert str(caught.value).partition(" Did you mean")[0] == message


def test_an_adapter_that_blocks_do_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    llm = made_adapters.linear(tmp_path / "llm")
    with pytest.raises(ModelError, match="none of its 2 modules is in a block of a U-Net or Flux"):
        alnico.lora.combine([llm], tmp_path / "out", blocks="MID=0")
    dora = files.file_of(
        tmp_path / "dora.safetensors",
        {kohya(MID): lora((8, 8), 2, 1) | {".dora_scale": np.ones((8, 1), np.float32)}},
    )
    with pytest.raises(ModelError, match=r"has DoRA's norms, and its block the strength 0\.5"):
        alnico.lora.fold(files.unet(tmp_path / "unet"), dora, blocks="MID=0.5")
    (tmp_path / "peft").mkdir()
    whole = made_adapters.save(
        tmp_path / "peft", {f"{MID}.weight": np.ones((8, 8, 1, 1), np.float32)}, modules_to_save=["proj_in"]
    )
    with pytest.raises(ModelError, match=r"replaces a tensor of a block with the strength 0\.5"):
        alnico.lora.fold(tmp_path / "unet", whole, blocks="MID=0.5")
