"""Names of Flux and Wan, the algebra of LyCORIS and whole pipelines: folds are what diffusers fuses, and PEFT merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.loaders import lora_conversion_utils, single_file_utils
from safetensors.torch import load_file, save_file

import alnico
from lora import dialect_files as files
from lora import made_adapters
from lora.dialect_files import Factors, lora, near
from lora.small_pipelines import (
    IN_TEXT,
    agree,
    flux_pipeline,
    fused,
    kohya_name,
    layers,
    sd_pipeline,
    small_flux,
    small_t5,
    small_text_encoder,
    small_unet,
    small_vae,
    small_wan,
    state,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, transformers and peft

PUBLISHED = {
    "double_blocks.0.img_attn.qkv": (96, 32),
    "double_blocks.0.txt_attn.qkv": (96, 32),
    "double_blocks.0.img_attn.proj": (32, 32),
    "double_blocks.0.txt_attn.proj": (32, 32),
    "double_blocks.0.img_mlp.0": (128, 32),
    "double_blocks.0.txt_mlp.2": (32, 128),
    "double_blocks.0.img_mod.lin": (192, 32),
    "double_blocks.0.txt_mod.lin": (192, 32),
    "single_blocks.0.linear2": (32, 160),
    "single_blocks.0.modulation.lin": (96, 32),
    "img_in": (32, 16),
    "txt_in": (32, 32),
    "time_in.in_layer": (32, 256),
    "vector_in.out_layer": (32, 32),
    "guidance_in.in_layer": (32, 256),
    "final_layer.linear": (16, 32),
    "final_layer.adaLN_modulation.1": (64, 32),
}
"""Modules of Flux as published, but for linear1 of single blocks: diffusers splits that into rows of the real model alone."""


@pytest.mark.parametrize("program", ["kohya", "ComfyUI"])
def test_a_file_with_the_published_names_of_flux_folds_to_what_diffusers_converts(
    tmp_path: Path, program: str
) -> None:
    transformer = small_flux()
    modules: dict[str, Factors] = {}
    for i, (name, shape) in enumerate(PUBLISHED.items()):
        spelled = kohya_name("lora_unet_", name) if program == "kohya" else f"diffusion_model.{name}"
        alpha = (
            None if name.startswith("final_layer") else 3
        )  # diffusers 0.42 leaves out the alphas of the last layer
        modules[spelled] = lora(shape, 2, i, alpha=alpha)
    adapter = files.file_of(tmp_path / "a.safetensors", modules)
    transformer.save_pretrained(tmp_path / "transformer")
    before = state(transformer)
    converted = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(load_file(adapter))
    # diffusers 0.42 converts the modules outside of the blocks, and forgets the prefix that it loads by
    prefixed = {"transformer." + n.removeprefix("transformer."): v for n, v in converted.items()}
    expected = fused(flux_pipeline(transformer), prefixed, ["transformer"])["transformer"]
    agree(alnico.lora.fold(tmp_path / "transformer", adapter), expected, before)


@pytest.mark.parametrize("is_published", [True, False], ids=["published names", "diffusers' names"])
def test_the_last_modulation_of_flux_is_what_diffusers_makes_of_it(
    tmp_path: Path, is_published: bool
) -> None:
    """A file of either form, on a checkpoint as published: the bytes of diffusers' form after its conversion."""
    published, of_diffusers = "final_layer.adaLN_modulation.1", "norm_out.linear"
    layer = small_flux().norm_out.linear
    values = {n: v.detach().clone() for n, v in layer.named_parameters()}
    name = f"diffusion_model.{published}" if is_published else f"transformer.{of_diffusers}"
    adapter = files.file_of(tmp_path / "a.safetensors", {name: lora((64, 32), 2, 1, words="peft")})
    swap = lora_conversion_utils.swap_scale_shift  # its own inverse
    save_file({f"{published}.{n}": swap(v) for n, v in values.items()}, tmp_path / "published.safetensors")
    save_file({f"{of_diffusers}.{n}": v for n, v in values.items()}, tmp_path / "diffusers.safetensors")
    one = alnico.lora.fold(tmp_path / "published.safetensors", adapter)
    other = alnico.lora.fold(tmp_path / "diffusers.safetensors", adapter)
    assert not np.array_equal(np.asarray(other[f"{of_diffusers}.weight"]), values["weight"].numpy())
    for parameter in values:
        found = torch.as_tensor(np.asarray(one[f"{published}.{parameter}"]))
        assert np.array_equal(swap(found).numpy(), np.asarray(other[f"{of_diffusers}.{parameter}"]))


def test_a_file_of_onetrainer_for_flux_folds_to_what_diffusers_fuses(tmp_path: Path) -> None:
    transformer = small_flux()
    wanted = (
        ".to_q",
        ".to_k",
        ".to_v",
        "to_out.0",
        "_q_proj",
        "_k_proj",
        "_v_proj",
        "to_add_out",
        "embedder",
        "linear_1",
    )
    modules = {
        kohya_name("lora_transformer_", name): lora(shape, 2, i, alpha=1 + i % 3)
        for i, (name, shape) in enumerate(
            layers(transformer, lambda n: n.endswith(wanted) or n in ("proj_out", "norm_out.linear"))
        )
    }
    adapter = files.file_of(tmp_path / "a.safetensors", modules)
    transformer.save_pretrained(tmp_path / "transformer")
    before = state(transformer)
    expected = fused(flux_pipeline(transformer), adapter, ["transformer"])["transformer"]
    agree(alnico.lora.fold(tmp_path / "transformer", adapter), expected, before)


def wan_name(name: str) -> str:
    """The name of a tensor of Wan as published."""
    embedder = "condition_embedder."
    for of_diffusers, published in (
        (f"{embedder}time_embedder.linear_1", "time_embedding.0"),
        (f"{embedder}time_embedder.linear_2", "time_embedding.2"),
        (f"{embedder}text_embedder.linear_1", "text_embedding.0"),
        (f"{embedder}text_embedder.linear_2", "text_embedding.2"),
        (f"{embedder}time_proj", "time_projection.1"),
        ("attn1.", "self_attn."),
        ("attn2.", "cross_attn."),
        (".to_out.0", ".o"),
        (".to_q", ".q"),
        (".to_k", ".k"),
        (".to_v", ".v"),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
        (".norm2.", ".norm3."),
        ("proj_out", "head.head"),
    ):
        name = name.replace(of_diffusers, published)
    if name == "scale_shift_table":
        return "head.modulation"
    return name.replace("scale_shift_table", "modulation")


@pytest.mark.parametrize("program", ["musubi-tuner", "ComfyUI", "ComfyUI, up and down"])
def test_a_file_for_wan_folds_to_what_diffusers_fuses(tmp_path: Path, program: str) -> None:
    """On diffusers' own folder, and on a base with the published names, which diffusers converts after the fold."""
    transformer = small_wan()
    before = state(transformer)
    published = {wan_name(n): torch.as_tensor(v) for n, v in before.items()}
    converted = single_file_utils.convert_wan_transformer_to_diffusers(dict(published))
    assert {n: v.numpy().tobytes() for n, v in converted.items()} == {
        n: v.tobytes() for n, v in before.items()
    }
    save_file({n: v.contiguous() for n, v in published.items()}, tmp_path / "wan.safetensors")
    transformer.save_pretrained(tmp_path / "transformer")
    words = "peft" if program == "ComfyUI" else "kohya"
    modules: dict[str, Factors] = {}
    wanted = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
    chosen = list(layers(transformer, lambda n: n.startswith("blocks") and n.endswith(wanted)))
    if words == "peft":  # the converters of diffusers take these without alphas
        chosen += layers(
            transformer, lambda n: n == "proj_out" or n.endswith(("time_proj", "linear_1", "linear_2"))
        )
    for i, (name, shape) in enumerate(chosen):
        own = wan_name(name)
        spelled = kohya_name("lora_unet_", own) if program == "musubi-tuner" else f"diffusion_model.{own}"
        modules[spelled] = lora(shape, 2, i, alpha=None if words == "peft" else 1 + i % 3, words=words)
    adapter = files.file_of(tmp_path / "a.safetensors", modules)
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=transformer
    )  # fmt: skip
    expected = fused(pipeline, adapter, ["transformer"])["transformer"]
    agree(alnico.lora.fold(tmp_path / "transformer", adapter), expected, before)
    folded = alnico.lora.fold(tmp_path / "wan.safetensors", adapter)
    found = single_file_utils.convert_wan_transformer_to_diffusers(
        {n: torch.as_tensor(np.asarray(v)) for n, v in folded.items()}
    )
    agree(found, expected, before)


TARGETS = ["to_q", "to_out.0", "ff.net.2", "conv1", "conv_shortcut"]
LYCORIS: dict[str, Any] = {
    "LoHa": peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
    "LoHa with cores": peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS, use_effective_conv2d=True),
    "LoKr": peft.LoKrConfig(r=1, alpha=3, target_modules=TARGETS),
    "LoKr of two low ranks": peft.LoKrConfig(r=1, alpha=3, target_modules=TARGETS, decompose_both=True),
    "LoKr with cores": peft.LoKrConfig(r=1, alpha=3, target_modules=TARGETS, use_effective_conv2d=True),
    "LoKr of whole matrices": peft.LoKrConfig(r=64, alpha=64, target_modules=TARGETS),  # the scale of these is 1
    "DoRA": peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, use_dora=True, init_lora_weights=False),
}  # fmt: skip
ENDINGS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
}
"""What PEFT calls the factors of LoRA, and kohya; the other factors have one name."""


@pytest.mark.parametrize("kind", LYCORIS)
def test_a_file_of_lycoris_folds_to_what_peft_merges(tmp_path: Path, kind: str) -> None:
    unet = small_unet()
    unet.save_pretrained(tmp_path / "unet")
    before = state(unet)
    shapes = dict(layers(unet, lambda _: True))
    model = peft.get_peft_model(unet, LYCORIS[kind])
    torch.manual_seed(7)
    tensors: dict[str, Any] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            value.data.uniform_(0.2, 1.5) if "magnitude" in name else value.data.normal_(0, 0.2)
    for name, value in peft.get_peft_model_state_dict(model).items():
        plain = name.removeprefix("base_model.model.")
        module, part = next(
            (plain.removesuffix(f".{of_peft}"), own)
            for of_peft, own in [*ENDINGS.items(), (plain.rpartition(".")[2],) * 2]
            if plain.endswith(f".{of_peft}")
        )
        if part == "dora_scale":  # a norm for each output, with the dimensions of the weight
            value = value.reshape(-1, *[1] * (len(shapes[module]) - 1))
        spelled = kohya_name("lora_unet_", module)
        tensors[f"{spelled}.{part}"] = value.contiguous()
        tensors[f"{spelled}.alpha"] = torch.tensor(float(getattr(LYCORIS[kind], "alpha", 3)))
    save_file(tensors, tmp_path / "a.safetensors")
    kinds = {u["kind"] for u in alnico.inspect(tmp_path / "a.safetensors").data()["updates"]}
    assert any(kind.startswith(found) for found in kinds), kinds
    expected = state(model.merge_and_unload())
    agree(alnico.lora.fold(tmp_path / "unet", tmp_path / "a.safetensors"), expected, before)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", ["SD", "Flux"])
def test_a_pipeline_folds_to_what_diffusers_fuses(tmp_path: Path, family: str, dialect: str) -> None:
    """Of a folder with model_index.json: what is for the text encoder changes the text encoder, and the other parts stay."""
    pipeline = (
        sd_pipeline()
        if family == "SD"
        else flux_pipeline(small_flux(), text_encoder=small_text_encoder(), text_encoder_2=small_t5())
    )
    pipeline.register_modules(vae=small_vae())
    pipeline.save_pretrained(tmp_path / "pipeline")
    denoiser = "unet" if family == "SD" else "transformer"
    main = list(layers(getattr(pipeline, denoiser), lambda n: n.endswith(("to_q", "to_out.0"))))
    text = [
        (n if n.startswith("text_model.") else f"text_model.{n}", s)
        for n, s in layers(pipeline.text_encoder, lambda n: n.endswith(IN_TEXT))
    ]
    if dialect == "diffusers":
        modules = {f"{denoiser}.{n}": lora(s, 2, i, words="peft") for i, (n, s) in enumerate(main)}
        modules |= {f"text_encoder.{n}": lora(s, 2, 50 + i, words="peft") for i, (n, s) in enumerate(text)}
    else:
        if family == "Flux":
            main = [(n, s) for n, s in PUBLISHED.items() if n.startswith(("double_blocks", "single_blocks"))]
        modules = {kohya_name("lora_unet_", n): lora(s, 2, i, alpha=1) for i, (n, s) in enumerate(main)}
        modules |= {kohya_name("lora_te1_", n): lora(s, 2, 50 + i, alpha=1) for i, (n, s) in enumerate(text)}
    adapter = files.file_of(tmp_path / "a.safetensors", modules)
    parts = [
        p
        for p in (denoiser, "text_encoder", "text_encoder_2", "vae")
        if getattr(pipeline, p, None) is not None
    ]
    before = {part: state(getattr(pipeline, part)) for part in parts}
    expected = before | fused(pipeline, adapter, [denoiser, "text_encoder"])
    alnico.lora.fold(tmp_path / "pipeline", adapter, tmp_path / "out")
    others = {"tokenizer": None, **({"tokenizer_2": None} if family == "Flux" else {})}
    found = type(pipeline).from_pretrained(tmp_path / "out", **others)
    for part in parts:
        now = state(getattr(found, part))
        if part in (denoiser, "text_encoder"):
            agree(now, expected[part], before[part])
        else:
            assert all(np.array_equal(now[n], v) for n, v in before[part].items()), part
    without_text = alnico.lora.fold(tmp_path / "pipeline", adapter, blocks="BASE=0")
    with alnico.open_model(tmp_path / "pipeline") as base, alnico.open_model(tmp_path / "out") as out:
        for name, values in without_text.items():
            unchanged = name.startswith("text_encoder")
            assert np.array_equal(np.asarray(values), (base if unchanged else out).read(name)), name


def test_peft_and_kohya_are_combined_to_the_sum_of_what_diffusers_and_peft_make_of_them(
    tmp_path: Path,
) -> None:
    pipeline = sd_pipeline()
    before = state(pipeline.unet)
    chosen = list(layers(pipeline.unet, lambda n: n.endswith(("to_q", "conv1"))))
    kohya = files.file_of(
        tmp_path / "kohya.safetensors",
        {kohya_name("lora_unet_", n): lora(s, 2, i, alpha=1) for i, (n, s) in enumerate(chosen)},
    )
    tensors = {
        n + e: v for i, (n, s) in enumerate(chosen) for e, v in lora(s, 3, 50 + i, words="peft").items()
    }
    (tmp_path / "peft").mkdir()
    of_peft = made_adapters.save(
        tmp_path / "peft", tensors, r=3, lora_alpha=4, target_modules=[n for n, _ in chosen]
    )
    merged = state(peft.PeftModel.from_pretrained(small_unet(), of_peft).merge_and_unload())
    one = fused(pipeline, kohya, ["unet"])["unet"]
    sums = {n: v + 0.5 * (one[n] - v) + 2 * (merged[n] - v) for n, v in before.items()}
    alnico.lora.combine([kohya, of_peft], tmp_path / "a.safetensors", weights=[0.5, 2], method="cat")
    alnico.lora.combine([of_peft, kohya], tmp_path / "a", weights=[2, 0.5], method="cat")
    found = fused(sd_pipeline(), tmp_path / "a.safetensors", ["unet"])["unet"]
    again = state(peft.PeftModel.from_pretrained(small_unet(), tmp_path / "a").merge_and_unload())
    for name, values in sums.items():
        assert near(found[name], values), name
        assert near(again[name], values), name
