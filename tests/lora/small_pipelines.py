"""Small pipelines and models of diffusers, and what they are after diffusers loaded and fused a LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from lora.dialect_files import near

Module = torch.nn.Module


def small_unet(is_xl: bool = False) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    levels = 3 if is_xl else 4
    attention = ["CrossAttnDownBlock2D"] * (levels - 1)
    more = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 8 * 6 + 32,
            "use_linear_projection": True,
        }
        if is_xl
        else {}
    )
    return diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(16, 32, 32, 32)[:levels], cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
        down_block_types=("DownBlock2D", *attention) if is_xl else (*attention, "DownBlock2D"),
        up_block_types=(*[b.replace("Down", "Up") for b in attention], "UpBlock2D") if is_xl else ("UpBlock2D", *[b.replace("Down", "Up") for b in attention]),
        **more,
    )  # fmt: skip


def small_text_encoder() -> CLIPTextModel:
    torch.manual_seed(1)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
        )
    )


def small_flux() -> diffusers.FluxTransformer2DModel:
    torch.manual_seed(2)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip


def sd_pipeline() -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=small_text_encoder(), tokenizer=None, unet=small_unet(), scheduler=diffusers.DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def small_t5() -> T5EncoderModel:
    torch.manual_seed(3)
    return T5EncoderModel(
        T5Config(
            vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
        )
    )


def small_vae() -> diffusers.AutoencoderKL:
    torch.manual_seed(4)
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), norm_num_groups=4, layers_per_block=1,
        sample_size=8,
    )  # fmt: skip


def flux_pipeline(transformer: Module, **parts: Any) -> diffusers.FluxPipeline:
    others = {
        "vae": None,
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
    }
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=transformer, **{**others, **parts}
    )


def small_wan() -> diffusers.WanTransformer3DModel:
    torch.manual_seed(5)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip


def fused(
    pipeline: diffusers.DiffusionPipeline, adapter: Path | dict[str, Any], parts: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of parts of a pipeline after diffusers loaded and fused an adapter, or its tensors."""
    pipeline.load_lora_weights(adapter)
    pipeline.fuse_lora(components=parts)
    pipeline.unload_lora_weights()
    return {part: state(getattr(pipeline, part)) for part in parts}


def state(module: Module) -> dict[str, np.ndarray]:
    return {n.replace(".base_layer.", "."): v.detach().numpy().copy() for n, v in module.state_dict().items()}


def layers(module: Module, wanted: Callable[[str], bool]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The linear layers and convolutions of a module whose names are wanted, with the shapes of their weights."""
    for name, layer in module.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and wanted(name):
            yield name, tuple(layer.weight.shape)


def agree(found: dict, expected: dict[str, np.ndarray], before: dict[str, np.ndarray]) -> None:
    """Every tensor is that of diffusers to 1e-6 of its largest entry, and some are others than before."""
    assert set(found) == set(expected)
    changed = 0
    for name, values in expected.items():
        assert near(np.asarray(found[name], np.float64), values.astype(np.float64)), name
        changed += not np.array_equal(values, before[name])
    assert changed


IN_UNET = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
)
IN_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def kohya_name(prefix: str, name: str) -> str:
    return prefix + name.replace(".", "_")
