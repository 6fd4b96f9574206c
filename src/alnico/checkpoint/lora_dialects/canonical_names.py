"""Gives one name to a module of an image model, whichever program wrote it.

The name is diffusers' (transformers' for text encoders) with underscores in the place of dots: files of kohya have no
dots, and where they were cannot be told without the base. The names of the original checkpoints of SD 1, SD 2, SDXL, Flux and Wan are
mapped to it by rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from alnico.checkpoint.image_blocks import BLOCKS_PER_LEVEL
from alnico.checkpoint.lora_dialects.factor_names import ANY, DENOISER, FIRST_TEXT, SECOND_TEXT, THIRD_TEXT

NUMBER = r"(\d{1,4})"
IN_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
"""Parts of a residual block in the original checkpoints, and in diffusers."""

OF_UNET = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed_timestep_embedder_linear_1",
    "time_in_out_layer": "time_text_embed_timestep_embedder_linear_2",
    "vector_in_in_layer": "time_text_embed_text_embedder_linear_1",
    "vector_in_out_layer": "time_text_embed_text_embedder_linear_2",
    "guidance_in_in_layer": "time_text_embed_guidance_embedder_linear_1",
    "guidance_in_out_layer": "time_text_embed_guidance_embedder_linear_2",
    "final_layer_linear": "proj_out",
    "time_embedding_0": "condition_embedder_time_embedder_linear_1",
    "time_embedding_2": "condition_embedder_time_embedder_linear_2",
    "text_embedding_0": "condition_embedder_text_embedder_linear_1",
    "text_embedding_2": "condition_embedder_text_embedder_linear_2",
    "time_projection_1": "condition_embedder_time_proj",
    "img_emb_proj_1": "condition_embedder_image_embedder_ff_net_0_proj",
    "img_emb_proj_3": "condition_embedder_image_embedder_ff_net_2",
    "head_head": "proj_out",
}
"""Modules outside of the blocks, in the original checkpoints of SD, Flux and Wan, and in diffusers."""

IN_FLUX_BLOCK = {
    "img_attn_proj": "attn_to_out_0",
    "txt_attn_proj": "attn_to_add_out",
    "img_mlp_0": "ff_net_0_proj",
    "img_mlp_2": "ff_net_2",
    "txt_mlp_0": "ff_context_net_0_proj",
    "txt_mlp_2": "ff_context_net_2",
    "img_mod_lin": "norm1_linear",
    "txt_mod_lin": "norm1_context_linear",
}
IN_SINGLE_BLOCK = {"linear2": "proj_out", "modulation_lin": "norm_linear"}
IN_WAN_BLOCK = {
    **{f"self_attn_{part}": f"attn1_to_{part}" for part in "qkv"},
    **{f"cross_attn_{part}": f"attn2_to_{part}" for part in "qkv"},
    "self_attn_o": "attn1_to_out_0",
    "cross_attn_o": "attn2_to_out_0",
    "cross_attn_k_img": "attn2_add_k_proj",
    "cross_attn_v_img": "attn2_add_v_proj",
    "ffn_0": "ffn_net_0_proj",
    "ffn_2": "ffn_net_2",
}

IN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn_out_proj": "self_attn_out_proj",
    "mlp_c_fc": "mlp_fc1",
    "mlp_c_proj": "mlp_fc2",
    "attn_in_proj": "self_attn_in_proj",
}
"""Parts of a layer of CLIP in OpenCLIP, and in transformers. The last is one matrix of q, k and v, and has no name there."""
OF_CLIP = {
    "token_embedding": "text_model_embeddings_token_embedding",
    "positional_embedding": "text_model_embeddings_position_embedding",
    "ln_final": "text_model_final_layer_norm",
}

FUSED: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(f"double_blocks_{NUMBER}_img_attn_qkv"), tuple(f"transformer_blocks_{{}}_attn_to_{p}" for p in "qkv")),
    (re.compile(f"double_blocks_{NUMBER}_txt_attn_qkv"), tuple(f"transformer_blocks_{{}}_attn_add_{p}_proj" for p in "qkv")),
    (
        re.compile(f"single_blocks_{NUMBER}_linear1"),
        (*(f"single_transformer_blocks_{{}}_attn_to_{p}" for p in "qkv"), "single_transformer_blocks_{}_proj_mlp"),
    ),
    (
        re.compile(f"text_model_encoder_layers_{NUMBER}_self_attn_in_proj"),
        tuple(f"text_model_encoder_layers_{{}}_self_attn_{p}_proj" for p in "qkv"),
    ),
)  # fmt: skip
"""Matrices that the original checkpoints store as one, and their parts in diffusers, in the order of their rows."""

SWAPPED = {
    "final_layer_adaLN_modulation_1": "norm_out_linear",
    "norm_out_linear": "final_layer_adaLN_modulation_1",
}
"""The modulation of the last layer of Flux: its rows are shift and scale in the original checkpoints, scale and shift in diffusers."""

STARTS: tuple[tuple[str, str], ...] = (
    ("model.diffusion_model.", DENOISER),
    ("diffusion_model.", DENOISER),
    *((f"{folder}/", DENOISER) for folder in ("unet", "transformer", "prior")),
    *((f"{text}/", text) for text in (FIRST_TEXT, SECOND_TEXT, THIRD_TEXT)),
    ("cond_stage_model.transformer.", FIRST_TEXT),
    ("cond_stage_model.model.", FIRST_TEXT),
    ("conditioner.embedders.0.transformer.", FIRST_TEXT),
    ("conditioner.embedders.0.model.", FIRST_TEXT),
    ("conditioner.embedders.1.model.", SECOND_TEXT),
    ("text_encoders.clip_l.transformer.", FIRST_TEXT),
    ("text_encoders.clip_g.transformer.", SECOND_TEXT),
    ("text_encoders.t5xxl.transformer.", THIRD_TEXT),
)
"""How the names of a part's tensors begin in a checkpoint or pipeline of several parts."""
NEVER = ("first_stage_model.", "vae/", "vae.", "model_ema.")
"""Parts that no LoRA file is for."""

OF_TEXT_ENCODER = ("text_model_", "encoder_block_")
"""How the canonical names of modules of a text encoder begin: CLIP's and T5's."""


def canonical_name(path: str, component: str) -> str:
    """Return the canonical name of a module of a part of an image model, from any program's.

    >>> [canonical_name(p, "unet") for p in ("input_blocks.4.1.proj_in", "output_blocks_2_1_conv", "double_blocks.0.img_mlp.2")]
    ['down_blocks_1_attentions_0_proj_in', 'up_blocks_0_upsamplers_0_conv', 'transformer_blocks_0_ff_net_2']
    >>> canonical_name("transformer.resblocks.3.mlp.c_fc", "text_encoder_2")
    'text_model_encoder_layers_3_mlp_fc1'
    """
    name = path.replace(".", "_")
    is_denoiser = component in (DENOISER, ANY)
    for pattern, rename in UNET_RULES if is_denoiser else TEXT_RULES:
        if (match := pattern.fullmatch(name)) is not None and (renamed := rename(match)) is not None:
            return renamed
    return (OF_UNET if is_denoiser else OF_CLIP).get(name, name)


NameRule = tuple[re.Pattern[str], Callable[[re.Match[str]], str | None]]


UNET_RULES: tuple[NameRule, ...] = (
    (re.compile(f"input_blocks_{NUMBER}_0_op"), lambda m: f"down_blocks_{int(m[1]) // BLOCKS_PER_LEVEL - 1}_downsamplers_0_conv"),
    (re.compile(f"input_blocks_{NUMBER}_([01])_(.+)"), lambda m: _block("down_blocks", int(m[1]) - 1, m[2], m[3])),
    (re.compile("middle_block_([012])_(.+)"), lambda m: _middle(int(m[1]), m[2])),
    (re.compile(f"output_blocks_{NUMBER}_[12]_conv"), lambda m: f"up_blocks_{int(m[1]) // BLOCKS_PER_LEVEL}_upsamplers_0_conv"),
    (re.compile(f"output_blocks_{NUMBER}_([01])_(.+)"), lambda m: _block("up_blocks", int(m[1]), m[2], m[3])),
    (re.compile(f"double_blocks_{NUMBER}_(.+)"), lambda m: _renamed(f"transformer_blocks_{m[1]}", m[2], IN_FLUX_BLOCK)),
    (re.compile(f"single_blocks_{NUMBER}_(.+)"), lambda m: _renamed(f"single_transformer_blocks_{m[1]}", m[2], IN_SINGLE_BLOCK)),
    (re.compile(f"blocks_{NUMBER}_(.+)"), lambda m: _renamed(f"blocks_{m[1]}", m[2], IN_WAN_BLOCK)),
)  # fmt: skip


TEXT_RULES: tuple[NameRule, ...] = (
    (re.compile(f"(?:transformer_)?resblocks_{NUMBER}_(.+)"), lambda m: _renamed(f"text_model_encoder_layers_{m[1]}", m[2], IN_CLIP_LAYER)),
    (re.compile(f"encoder_layers_{NUMBER}_(.+)"), lambda m: f"text_model_encoder_layers_{m[1]}_{m[2]}"),
)  # fmt: skip


def _renamed(stem: str, rest: str, names: dict[str, str]) -> str | None:
    return f"{stem}_{names[rest]}" if rest in names else None


def _block(level: str, position: int, kind: str, rest: str) -> str | None:
    """Return diffusers' name of a module in block ``position`` of a side of the U-Net, counted without the first convolution."""
    if position < 0:
        return None
    place = f"{level}_{position // BLOCKS_PER_LEVEL}"
    if kind == "1":
        return f"{place}_attentions_{position % BLOCKS_PER_LEVEL}_{rest}"
    return _renamed(f"{place}_resnets_{position % BLOCKS_PER_LEVEL}", rest, IN_RESNET)


def _middle(position: int, rest: str) -> str | None:
    if position == 1:
        return f"mid_block_attentions_0_{rest}"
    return _renamed(f"mid_block_resnets_{position // 2}", rest, IN_RESNET)


def parts_of(canonical: str) -> tuple[str, ...]:
    """Return the modules that a fused one consists of, in the order of its rows; none for other modules.

    >>> parts_of("double_blocks_2_img_attn_qkv")[0], parts_of("x_embedder")
    ('transformer_blocks_2_attn_to_q', ())
    """
    for pattern, parts in FUSED:
        if (match := pattern.fullmatch(canonical)) is not None:
            return tuple(part.format(match[1]) for part in parts)
    return ()


def fused_with(canonical: str) -> tuple[str, int] | None:
    """Return the fused module that a module is a part of, and its position in it; None for other modules.

    >>> fused_with("single_transformer_blocks_7_proj_mlp")
    ('single_blocks_7_linear1', 3)
    """
    number = next(iter(re.findall(r"\d{1,4}", canonical)), "")
    for pattern, parts in FUSED:
        for position, part in enumerate(parts):
            if part.format(number) == canonical:
                return pattern.pattern.replace(NUMBER, number), position
    return None


def component_of(name: str) -> tuple[str, str] | None:
    """Return the part of an image model that a tensor of the base belongs to, and its name there; None for parts without LoRA.

    >>> component_of("model.diffusion_model.out.2.weight"), component_of("first_stage_model.x"), component_of("conv_in.weight")
    (('unet', 'out.2.weight'), None, ('', 'conv_in.weight'))
    """
    if name.startswith(NEVER):
        return None
    start, component = next((entry for entry in STARTS if name.startswith(entry[0])), ("", ANY))
    return component, name[len(start) :]
