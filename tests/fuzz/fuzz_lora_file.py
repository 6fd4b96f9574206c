"""A LoRA file without a config on its base: the names, shapes and header of its tensors."""

from __future__ import annotations

import json
from pathlib import Path

from alnico.checkpoint.open_model import open_model
from fuzz.harness import Target, files_of, header_of, put, put_header

WEIGHTS = "a.safetensors"
WIDTHS = {"F32": 4, "BF16": 2}
BASE = {
    "model.diffusion_model.input_blocks.1.1.q.weight": ("F32", (4, 6)),
    "model.diffusion_model.input_blocks.1.1.q.bias": ("F32", (4,)),
    "model.diffusion_model.middle_block.0.in_layers.2.weight": ("F32", (4, 2, 3, 3)),
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": ("F32", (12, 4)),
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": ("F32", (12, 4)),
}
MOST_READ = 1 << 16


def prepare(folder: Path) -> None:
    (folder / "base").mkdir()
    put_header(folder / "base" / "model.safetensors", header_of(BASE, WIDTHS))


def read(data: bytes, folder: Path) -> None:
    put(folder, files_of(data), (WEIGHTS,))
    with open_model(f"{folder / 'base'}+{folder / WEIGHTS}") as opened:
        assert opened.held_bytes >= 0
        for name, tensor in opened.tensors.items():
            if tensor.byte_size <= MOST_READ:
                opened.read(name)


def seeds() -> list[bytes]:
    q, conv = "lora_unet_down_blocks_0_attentions_0_q", "lora_unet_mid_block_resnets_0_conv1"
    files = [
        {f"{q}.lora_down.weight": (2, 6), f"{q}.lora_up.weight": (4, 2), f"{q}.alpha": (), f"{q}.dora_scale": (4, 1), f"{q}.diff_b": (4,)},
        {f"{conv}.lora_down.weight": (2, 2, 1, 1), f"{conv}.lora_mid.weight": (2, 2, 3, 3), f"{conv}.lora_up.weight": (4, 2, 1, 1)},
        {f"{conv}.hada_t1": (1, 1, 3, 3), f"{conv}.hada_w1_a": (1, 4), f"{conv}.hada_w1_b": (1, 2), f"{conv}.hada_w2_a": (4, 2), f"{conv}.hada_w2_b": (2, 18)},
        {f"{q}.lokr_w1": (2, 3), f"{q}.lokr_w2_a": (2, 1), f"{q}.lokr_w2_b": (1, 2)},
        {"unet.transformer_blocks.0.attn.to_k.lora_A.weight": (1, 4), "unet.transformer_blocks.0.attn.to_k.lora_B.weight": (4, 1)},
        {"lora_te_text_model_encoder_layers_0_self_attn_v_proj.lora_down.weight": (1, 4), "lora_te_text_model_encoder_layers_0_self_attn_v_proj.lora_up.weight": (4, 1)},
    ]  # fmt: skip
    headers = [header_of({n: ("F32", s) for n, s in tensors.items()}, WIDTHS) for tensors in files]
    headers[4]["__metadata__"] = {"lora_adapter_metadata": json.dumps({"unet.r": 1, "unet.lora_alpha": 2})}
    return [json.dumps({WEIGHTS: header}).encode() for header in headers]


WORDS = (
    "dtype", "shape", "data_offsets", "F32", "BF16", "I64", "__metadata__", "lora_adapter_metadata", "unet.r", "unet.lora_alpha", "unet.rank_pattern",
    "lora_unet_", "lora_te_", "lora_te2_", "lycoris_", "diffusion_model.", "unet.", "transformer.", "text_encoder.", ".lora_up.weight", ".lora_down.weight", ".lora_mid.weight",
    ".lora_A.weight", ".lora_B.weight", ".alpha", ".dora_scale", ".diff", ".diff_b", ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_t1", ".lokr_w1", ".lokr_w2", ".lokr_w1_a",
    ".lokr_t2", "_lora.up.weight", ".processor.", WEIGHTS,
)  # fmt: skip
TARGET = Target(read, seeds, WORDS, prepare)
