"""LoRA files of image models fold to what diffusers loads and fuses, on small pipelines that it makes."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

import alnico
from alnico.checkpoint.open_adapter import open_adapter
from lora import dialect_files as files
from lora.dialect_files import lora, near
from lora.small_pipelines import (
    IN_TEXT,
    IN_UNET,
    Module,
    agree,
    fused,
    kohya_name,
    layers,
    sd_pipeline,
    small_flux,
    small_unet,
    state,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, transformers and peft


def test_a_kohya_file_of_sd_folds_to_what_diffusers_fuses(tmp_path: Path) -> None:
    pipeline = sd_pipeline()
    modules = {
        kohya_name("lora_unet_", name): lora(
            shape, 2, i, alpha=1 if ".attn" in name else 1 + i % 3
        )  # diffusers 0.42 reads one alpha for all attention
        for i, (name, shape) in enumerate(layers(pipeline.unet, lambda n: n.endswith(IN_UNET)))
    }
    text = {
        kohya_name("lora_te_", name if name.startswith("text_model.") else f"text_model.{name}"): lora(
            shape, 2, 900 + i, alpha=2
        )
        for i, (name, shape) in enumerate(layers(pipeline.text_encoder, lambda n: n.endswith(IN_TEXT)))
    }
    adapter = files.file_of(tmp_path / "kohya.safetensors", modules | text)
    before = {part: state(getattr(pipeline, part)) for part in ("unet", "text_encoder")}
    pipeline.unet.save_pretrained(tmp_path / "unet")
    pipeline.text_encoder.save_pretrained(tmp_path / "text")
    expected = fused(pipeline, adapter, ["unet", "text_encoder"])
    of_unet = files.file_of(tmp_path / "of_unet.safetensors", modules)
    of_text = files.file_of(tmp_path / "of_text.safetensors", text)
    agree(alnico.lora.fold(tmp_path / "unet", of_unet), expected["unet"], before["unet"])
    # the text encoder left out by its block gives the same
    agree(alnico.lora.fold(tmp_path / "unet", adapter, blocks="BASE=0"), expected["unet"], before["unet"])
    found = alnico.lora.fold(tmp_path / "text", of_text)
    names = {n.removeprefix("text_model."): n for n in expected["text_encoder"]}
    matched = {names[n.removeprefix("text_model.")]: v for n, v in found.items()}
    agree(
        matched, {n: v for n, v in expected["text_encoder"].items() if n in matched}, before["text_encoder"]
    )


def test_a_kohya_file_of_sdxl_with_the_original_names_folds_to_what_diffusers_fuses(tmp_path: Path) -> None:
    unet = small_unet(is_xl=True)
    to_ldm = {
        "down_blocks.1.attentions.0": "input_blocks.4.1",
        "down_blocks.1.attentions.1": "input_blocks.5.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.0.attentions.2": "output_blocks.2.1",
        "up_blocks.1.attentions.0": "output_blocks.3.1",
    }
    modules = {}
    for i, (name, shape) in enumerate(
        layers(unet, lambda n: ".attn" in n or ".ff." in n or n.endswith(("proj_in", "proj_out")))
    ):
        start = next((s for s in to_ldm if name.startswith(s)), None)
        if start is not None:
            modules[kohya_name("lora_unet_", to_ldm[start] + name[len(start) :])] = lora(shape, 2, i, alpha=1)
    adapter = files.file_of(tmp_path / "kohya.safetensors", modules)
    unet.save_pretrained(tmp_path / "unet")
    before = state(unet)
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
    )
    expected = fused(pipeline, adapter, ["unet"])["unet"]
    agree(alnico.lora.fold(tmp_path / "unet", adapter), expected, before)


@pytest.mark.parametrize(
    "dialect",
    ["kohya", "diffusers", "stated in the header", "older diffusers", "diffusers without processors"],
)
def test_a_file_of_each_dialect_folds_to_what_diffusers_fuses(tmp_path: Path, dialect: str) -> None:
    pipeline = sd_pipeline()
    chosen = list(
        layers(
            pipeline.unet,
            lambda n: n.endswith(
                ("to_q", "to_out.0", "ff.net.2" if dialect != "older diffusers" else "to_v")
            ),
        )
    )
    pipeline.unet.save_pretrained(tmp_path / "unet")
    before = state(pipeline.unet)
    adapter = tmp_path / "pytorch_lora_weights.safetensors"
    if dialect == "stated in the header":
        from peft import LoraConfig

        config = LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["to_q", "to_out.0"],
            rank_pattern={"to_out.0": 2},
            alpha_pattern={"to_out.0": 7},
            init_lora_weights=False,
        )
        pipeline.unet.add_adapter(config)
        layers_of = diffusers.utils.convert_state_dict_to_diffusers(
            __import__("peft").get_peft_model_state_dict(pipeline.unet)
        )
        from diffusers.training_utils import _collate_lora_metadata

        pipeline.save_lora_weights(
            tmp_path, unet_lora_layers=layers_of, **_collate_lora_metadata({"unet": pipeline.unet})
        )
        pipeline.unet.delete_adapters("default")
    else:
        spell = {
            "kohya": ("kohya", lambda n: kohya_name("lora_unet_", n)),
            "diffusers": ("peft", lambda n: f"unet.{n}"),
            "diffusers without processors": ("plain", lambda n: f"unet.{n}"),
            "older diffusers": (
                "processor",
                lambda n: (
                    "unet."
                    + n.replace("attn1.", "attn1.processor.")
                    .replace("attn2.", "attn2.processor.")
                    .removesuffix(".0")
                ),
            ),
        }
        words, name_of = spell[dialect]
        files.file_of(
            adapter,
            {
                name_of(n): lora(s, 2, i, alpha=3 if words == "kohya" else None, words=words)
                for i, (n, s) in enumerate(chosen)
            },
        )
    expected = fused(pipeline, adapter, ["unet"])["unet"]
    agree(alnico.lora.fold(tmp_path / "unet", adapter), expected, before)


def test_a_checkpoint_with_the_original_names_folds_to_what_diffusers_converts(tmp_path: Path) -> None:
    unet = small_unet()
    original = ldm_names(unet)
    converted = single_file_utils.convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{n}": v for n, v in original.items()},
        config={**unet.config, "layers_per_block": 2},
    )
    assert {n: v.data_ptr() for n, v in converted.items()} == {
        n: v.data_ptr() for n, v in unet.state_dict().items()
    }
    save_file(
        {f"model.diffusion_model.{n}": v.contiguous() for n, v in original.items()},
        tmp_path / "sd.safetensors",
    )
    modules = {
        kohya_name("lora_unet_", name): lora(shape, 2, i, alpha=1)
        for i, (name, shape) in enumerate(
            layers(unet, lambda n: n.endswith((*IN_UNET, ".conv", "linear_1", "conv_in")))
        )
    }
    adapter = files.file_of(tmp_path / "kohya.safetensors", modules)
    unet.save_pretrained(tmp_path / "unet")
    expected = alnico.lora.fold(tmp_path / "unet", adapter)
    found = alnico.lora.fold(tmp_path / "sd.safetensors", adapter)
    found = single_file_utils.convert_ldm_unet_checkpoint(
        {n: torch.as_tensor(v) for n, v in found.items()}, config={**unet.config, "layers_per_block": 2}
    )
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert np.array_equal(np.asarray(found[name]), np.asarray(values)), name


def ldm_names(unet: Module) -> dict[str, torch.Tensor]:
    """The tensors of a U-Net of SD 1 under their names in the original checkpoints."""
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    whole = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
    }
    found = {}
    for name, value in unet.state_dict().items():
        module, _, parameter = name.rpartition(".")
        parts = name.split(".")
        if module in whole:
            renamed = f"{whole[module]}.{parameter}"
        elif parts[0] == "mid_block":
            place = "middle_block." + ({"0": "0", "1": "2"}[parts[2]] if parts[1] == "resnets" else "1")
            rest = [resnet[parts[3]], *parts[4:]] if parts[1] == "resnets" else parts[3:]
            renamed = ".".join([place, *rest])
        else:
            side, level, kind, i, *rest = parts
            first = 1 if side == "down_blocks" else 0
            blocks = "input_blocks" if side == "down_blocks" else "output_blocks"
            number = 3 * int(level) + first + int(i)
            if kind == "downsamplers":
                renamed = f"input_blocks.{3 * (int(level) + 1)}.0.op.{rest[1]}"
            elif kind == "upsamplers":
                has_attention = level != "0"
                renamed = f"output_blocks.{3 * int(level) + 2}.{2 if has_attention else 1}.conv.{rest[1]}"
            elif kind == "resnets":
                renamed = ".".join([blocks, str(number), "0", resnet[rest[0]], *rest[1:]])
            else:
                renamed = ".".join([blocks, str(number), "1", *rest])
        found[renamed] = value
    return found


def test_a_flux_file_of_diffusers_folds_to_what_diffusers_fuses(tmp_path: Path) -> None:
    transformer = small_flux()
    modules = {
        f"transformer.{name}": lora(shape, 2, i, words="peft")
        for i, (name, shape) in enumerate(
            layers(
                transformer,
                lambda n: n.endswith(
                    ("to_q", "to_k", "add_v_proj", "to_out.0", "proj_mlp", "ff.net.2", "x_embedder")
                ),
            )
        )
    }
    adapter = files.file_of(tmp_path / "flux.safetensors", modules)
    transformer.save_pretrained(tmp_path / "transformer")
    before = state(transformer)
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    expected = fused(pipeline, adapter, ["transformer"])["transformer"]
    agree(alnico.lora.fold(tmp_path / "transformer", adapter), expected, before)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_diffusers_loads_a_combination_as_the_sum_of_what_it_loads_of_each(
    tmp_path: Path, method: str
) -> None:
    pipeline = sd_pipeline()
    chosen = list(layers(pipeline.unet, lambda n: n.endswith(("to_q", "to_out.0", "conv1"))))
    before = state(pipeline.unet)
    adapters = [
        files.file_of(
            tmp_path / f"{seed}.safetensors",
            {
                kohya_name("lora_unet_", n): lora(s, 2 + seed, 50 * seed + i, alpha=2)
                for i, (n, s) in enumerate(chosen)
            },
        )
        for seed in (0, 1)
    ]
    deltas = []
    for adapter in adapters:
        one = sd_pipeline()
        deltas.append({n: v - before[n] for n, v in fused(one, adapter, ["unet"])["unet"].items()})
    alnico.lora.combine(
        adapters,
        tmp_path / "both.safetensors",
        weights=[0.7, -0.3],
        method=method,
        **({"rank": 5} if method == "svd" else {}),
    )
    with open_adapter(str(tmp_path / "both.safetensors")) as both:
        assert {u.module for u in both.updates.values()} == {kohya_name("lora_unet_", n) for n, _ in chosen}
    found = fused(pipeline, tmp_path / "both.safetensors", ["unet"])["unet"]
    for name, values in before.items():
        expected = values + 0.7 * deltas[0][name] - 0.3 * deltas[1][name]
        assert near(found[name], expected), name
