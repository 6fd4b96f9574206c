"""Finds how one model's tensor names and shapes map to another's spelling of the same model.

The same weights have different names in different places: a wrapper adds a prefix, transformers 5 renamed
modules that files of transformers 4 still use, and experts are stored separately or packed into one tensor.
:data:`SPELLINGS` lists the renames; :func:`find_layout` finds the one under which the names and shapes of two
models agree.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from alnico.errors import MismatchError
from alnico.numerics.dtypes import Shape

Rename = Callable[[str], str]
Joined = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Spelling:
    """Renames from the names in files to those of transformers' modules, for some model types.

    ``renames`` are pairs of a regular expression and its replacement, applied in order; a module's name is
    left unchanged. ``joined`` are modules that one side stores fused, with the parts that the other stores
    separately, in the order of rows.
    """

    types: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] = ()
    joined: Joined = ()

    @functools.cached_property
    def _compiled(self) -> tuple[tuple[re.Pattern[str], str], ...]:
        return tuple((re.compile(pattern), replacement) for pattern, replacement in self.renames)

    def __call__(self, name: str) -> str:
        for pattern, replacement in self._compiled:
            name = pattern.sub(replacement, name)
        return name

    @property
    def title(self) -> str:
        return f"names of files and of modules of {self.types[0]}"


_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_up_proj", ("gate_proj", "up_proj"))
_CONVOLUTIONS = (("conv1d", ("q_conv1d", "k_conv1d", "v_conv1d")),)
_MIXTRAL = (
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),
    (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
    (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
)
_VIT = (
    (r"(^|\.)encoder\.layer\.", r"\1layers."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1."),
    (r"\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
_FORGET_GATE = (
    (r"\.self_attn\.(A_log|dt_bias|f_proj\.|f_a_proj\.|f_b_proj\.)", r".self_attn.forget_gate.\1"),
)

_LLAVA = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (
        r"^(language_model|vision_tower|vision_model|multi_modal_projector|image_newline|audio_tower|image_tower|video_tower)(?=\.|$)",
        r"model.\1",
    ),
)
_ARIA = (
    (r"\.mlp\.experts\.fc1\.weight$", ".mlp.experts.gate_up_proj"),
    (r"\.mlp\.experts\.fc2\.weight$", ".mlp.experts.down_proj"),
)

_HY_V4 = (
    (r"\.hc_pre\.hc_", ".hc_"),
    (r"\.learnable_sink_param$", ".sinks"),
    (r"\.linear_gate\.", ".gate_proj."),
    (r"\.hc_attn_layer\.hc_", ".attn_hc."),
    (r"\.hc_mlp_layer\.hc_", ".ffn_hc."),
    (r"\.hc_head_(fn|base|scale)$", r".hc_\1"),
)
_HUNYUAN_TOWER = (
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.fc2."),
    (r"(^|\.)vit\.layers\.(\d+)\.input_layernorm\.", r"\1vit.layers.\2.layer_norm1."),
    (r"(^|\.)vit\.layers\.(\d+)\.post_attention_layernorm\.", r"\1vit.layers.\2.layer_norm2."),
    (r"\.perceive\.norm\.", ".perceive.before_rms."),
    (r"\.perceive\.proj\.0\.", ".perceive.proj_conv."),
    (r"\.perceive\.proj\.2\.", ".perceive.proj_out."),
    (r"\.perceive\.", ".patch_merger."),
)

SPELLINGS: tuple[Spelling, ...] = (
    # Vision or audio with a text decoder: ``language_model.model.`` in files, ``model.language_model.`` in modules.
    Spelling(
        (
            "llava",
            "llava_next",
            "gemma3",
            "mistral3",
            "paligemma",
            "mllama",
            "internvl",
            "aya_vision",
            "vipllava",
            "got_ocr2",
            "qwen2_audio",
        ),
        _LLAVA,
    ),
    Spelling(("aria", "aria_text"), (*_LLAVA, *_ARIA)),
    Spelling(("shieldgemma2", "pi0"), ((r"(^|\.)language_model\.model\.", r"\1language_model."),)),
    Spelling(
        ("emu3",),
        (
            (r"^text_model\.lm_head\.", "lm_head."),
            (r"^text_model\.model\.", "model.text_model."),
            (r"^vqmodel\.", "model.vqmodel."),
        ),
    ),
    Spelling(
        ("paddleocr_vl",),
        (
            (r"^mlp_AR\.", "model.projector."),
            (r"^visual\.", "model.visual."),
            (r"^model\.(?!visual\.|projector\.|language_model\.)", "model.language_model."),
        ),
    ),
    Spelling(
        ("hunyuan_vl",),
        (
            (r"\.mlp\.dense_h_to_4h\.", ".mlp.fc1."),
            (r"\.mlp\.dense_4h_to_h\.", ".mlp.fc2."),
            (r"(^|\.)vit\.layers\.(\d+)\.input_layernorm\.", r"\1vit.layers.\2.layer_norm1."),
            (r"(^|\.)vit\.layers\.(\d+)\.post_attention_layernorm\.", r"\1vit.layers.\2.layer_norm2."),
            (r"\.perceive\.proj\.0\.", ".perceive.proj_conv."),
            (r"\.perceive\.proj\.2\.", ".perceive.proj_out."),
            (r"\.perceive\.", ".patch_merger."),
            (r"^model\.(?!language_model\.|vit\.|vision_tower\.)", "model.language_model."),
            (r"^(model\.)?vit\.", "model.vision_tower."),
        ),
    ),
    Spelling(
        ("cosmos3_edge",),
        (
            (r"^(embed_tokens|norm|layers)\.", r"model.language_model.\1."),
            (r"\.self_attn\.to_(q|k|v)\.", r".self_attn.\1_proj."),
            (r"\.self_attn\.to_out\.", ".self_attn.o_proj."),
            (r"\.mlp\.up_proj\.", ".mlp.fc1."),
            (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        ),
    ),
    Spelling(("lfm3_vl",), ((r"\.patchifier\.", ".patch_embed."),)),
    Spelling(("hyperclovax_vision_v2",), ((r"(^|\.)vision_projector\.", r"\1projector."),)),
    Spelling(("altclip",), ((r"\.encoder\.layer\.", ".encoder.layers."),)),
    Spelling(
        ("qwen2_vl", "qwen2_5_vl"),
        (
            (r"^visual\.", "model.visual."),
            (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
        ),
    ),
    Spelling(
        ("qwen2_5_omni_thinker",),
        (
            (r"^thinker\.", ""),
            (r"^(visual|audio_tower)\.", r"model.\1."),
            (r"^model\.(?!language_model\.|visual\.|audio_tower\.)", "model.language_model."),
        ),
    ),
    Spelling(
        ("t5gemma2",),
        (
            (
                r"^(model\.)?encoder\.(?!text_model\.|vision_tower\.|multi_modal_projector\.)",
                r"\1encoder.text_model.",
            ),
        ),
    ),
    # Mixtures of experts.
    Spelling(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    Spelling(("phimoe",), ((r"\.block_sparse_moe\.gate\.", ".mlp.router."), *_MIXTRAL)),
    Spelling(("kimi_linear",), (*_MIXTRAL, *_FORGET_GATE), _CONVOLUTIONS),
    Spelling(
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        (
            (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
            (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
            (r"\.block_sparse_moe\.router\.layer\.", ".block_sparse_moe.router."),
        ),
    ),
    Spelling(("ernie4_5_moe",), ((r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."),)),
    Spelling(("exaone_moe",), ((r"\.mlp\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),)),
    Spelling(
        ("hy_v3", "hunyuan_v1_moe"),
        (
            (r"\.mlp\.expert_bias$", ".mlp.e_score_correction_bias"),
            (r"\.mlp\.router\.gate\.", ".mlp.gate."),
            (r"\.mlp\.shared_mlp\.", ".mlp.shared_experts."),
        ),
    ),
    Spelling(
        ("kolibri1",),
        (
            (r"\.moe\.router\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
            (r"\.moe\.router\.", ".mlp.gate."),
            (r"\.moe\.", ".mlp."),
            (r"\.post_attn_norm\.", ".post_self_attn_layernorm."),
            (r"\.post_ffn_norm\.", ".post_mlp_layernorm."),
        ),
    ),
    Spelling(
        ("laguna",),
        (
            (r"\.mlp\.experts\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),
            (r"\.mlp\.shared_expert\.", ".mlp.shared_experts."),
        ),
    ),
    Spelling(("nemotron_h",), ((r"^backbone\.", "model."),)),
    Spelling(
        ("glm5_next",), (*_FORGET_GATE, (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2")), _CONVOLUTIONS
    ),
    Spelling(
        ("dory",),
        (
            (r"^backbone\.embeddings\.", "model.embed_tokens."),
            (r"^backbone\.", "model."),
            (r"\.self_attn\.g_proj\.", ".self_attn.gate_proj."),
        ),
    ),
    Spelling(
        ("deepseek_v4",),
        (
            (r"^head\.", "lm_head."),
            (r"^embed\.", "embed_tokens."),
            (r"(^|\.)hc_head_(fn|base|scale)$", r"\1hc_head.hc_\2"),
            (r"\.attn\.", ".self_attn."),
            (r"\.ffn\.", ".mlp."),
            (r"\.attn_norm\.", ".input_layernorm."),
            (r"\.ffn_norm\.", ".post_attention_layernorm."),
            (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
            (r"\.attn_sink$", ".sinks"),
            (r"\.(self_attn|compressor)\.norm\.", r".\1.kv_norm."),
            (r"\.ape$", ".position_bias"),
            (r"\.wq_a\.", ".q_a_proj."),
            (r"\.wq_b\.", ".q_b_proj."),
            (r"\.wkv\.", ".kv_proj."),
            (r"\.wgate\.", ".gate_proj."),
            (r"\.wo_(a|b)\.", r".o_\1_proj."),
            (r"\.self_attn\.q_norm\.", ".self_attn.q_a_norm."),
            (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
            (r"\.(shared_experts|experts\.\d+)\.w1\.", r".\1.gate_proj."),
            (r"\.(shared_experts|experts\.\d+)\.w2\.", r".\1.down_proj."),
            (r"\.(shared_experts|experts\.\d+)\.w3\.", r".\1.up_proj."),
        ),
    ),
    # Decoders.
    Spelling(("gpt_neox",), ((r"^embed_out\.", "lm_head."),)),
    Spelling(
        ("mimo_v2_flash", "flint"),
        ((r"\.self_attn\.(attention_sink_bias|softmax_offset)$", ".self_attn.sinks"),),
    ),
    Spelling(("axk1",), ((r"(?<!\.mlp)\.post_mlp_layernorm\.", ".mlp.post_mlp_layernorm."),)),
    Spelling(
        ("axk2",),
        (
            (r"_layernorm\.W_down\.", "_layernorm.mlp.fc1."),
            (r"_layernorm\.W_up\.", "_layernorm.mlp.fc2."),
            (r"\.self_attn\.q_b_proj\.", ".self_attn.q_gate_proj."),
        ),
    ),
    Spelling(
        ("olmo_hybrid",),
        (
            (r"\.attention_layer_norm\.", ".input_layernorm."),
            (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
        ),
        _CONVOLUTIONS,
    ),
    Spelling(
        ("bailing_hybrid",),
        (
            (r"\.word_embeddings\.", ".embed_tokens."),
            (r"\.attention\.dense\.", ".self_attn.o_proj."),
            (r"\.attention\.", ".self_attn."),
            *_FORGET_GATE,
        ),
        _CONVOLUTIONS,
    ),
    Spelling(
        ("hrm_text",),
        ((r"\.attn\.", ".self_attn."),),
        (("gqkv_proj", ("gate_proj", *_QKV)), _GATE_UP),
    ),
    Spelling(("hy_v4",), _HY_V4),
    Spelling(
        ("hy_v4_vl",),
        (
            *_HY_V4,
            *_HUNYUAN_TOWER,
            (r"^vit\.", "model.vision_tower."),
            (r"^model\.(?!language_model\.|vision_tower\.)", "model.language_model."),
        ),
    ),
    Spelling(
        ("lara_mini",),
        ((r"\.linear_attn\.out_norm\.", ".linear_attn.norm."),),
        (("in_proj", ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")),),
    ),
    Spelling(
        ("qianfan_ocr",),
        (
            (r"^vision_model\.(encoder\.)?", "model.vision_tower."),
            (r"(^|\.)(vision_tower|language_model)\.encoder\.", r"\1\2."),
            (r"\.ls([12])$", r".lambda_\1"),
            (r"(vision_tower\.layers\.\d+)\.attn\.proj\.", r"\1.attention.projection_layer."),
            (r"(vision_tower\.layers\.\d+)\.attn\.qkv\.", r"\1.attention.qkv."),
            (r"(vision_tower\.layers\.\d+)\.norm1\.", r"\1.layernorm_before."),
            (r"(vision_tower\.layers\.\d+)\.norm2\.", r"\1.layernorm_after."),
            (r"\.embeddings\.class_embedding$", ".embeddings.cls_token"),
            (r"\.embeddings\.position_embedding$", ".embeddings.position_embeddings"),
            (r"\.embeddings\.patch_embedding\.", ".embeddings.patch_embeddings.projection."),
            (r"^language_model\.model\.(encoder\.)?", "model.language_model."),
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
            (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
            (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
        ),
        (("qkv", _QKV),),
    ),
    Spelling(
        ("nemo_speechlm",),
        (
            (r"^perception\.encoder\.asr_encoder\.", "model.audio_tower.asr_encoder."),
            (
                r"^perception\.encoder\.diarization_model\.encoder\.",
                "model.audio_tower.diarization_model.model.audio_tower.",
            ),
            (r"^ctc_timestamp\.decoder\.transformer\.", "model.word_timestamp_encoder."),
            (r"^ctc_timestamp\.decoder\.upsample\.", "model.word_timestamp_encoder.upsampler."),
            (r"^ctc_timestamp\.decoder\.decoder_layers\.0\.", "word_timestamp_head."),
            (
                r"^perception\.encoder\.diarization_model\.sortformer_modules\.encoder_proj\.",
                "model.audio_tower.diarization_model.model.proj.",
            ),
            (
                r"^perception\.encoder\.diarization_model\.sortformer_modules\.subpixel_upsample\.",
                "model.audio_tower.diarization_model.model.upsampler.conv.",
            ),
            (
                r"^perception\.encoder\.diarization_model\.sortformer_modules\.first_hidden_to_hidden\.",
                "model.audio_tower.diarization_model.classifier.dense.",
            ),
            (
                r"^perception\.encoder\.diarization_model\.sortformer_modules\.single_hidden_to_spks\.",
                "model.audio_tower.diarization_model.classifier.out_proj.",
            ),
            (
                r"^perception\.encoder\.diarization_model\.sortformer_modules\.learnable_sil_emb$",
                "model.audio_tower.diarization_model.silence_embeds",
            ),
            (r"^perception\.encoder\.asr_norm\.", "model.audio_tower.asr_norm."),
            (r"^perception\.encoder\.diar_norm\.", "model.audio_tower.speaker_norm."),
            (r"^perception\.proj\.", "model.multi_modal_projector."),
            (r"^llm\.model\.embed_tokens\.", "model.language_model.embeddings."),
            (r"^llm\.model\.norm\.", "model.language_model.norm_f."),
            (r"^llm\.model\.layers\.", "model.language_model.layers."),
            (r"^llm\.lm_head\.", "lm_head."),
            (r"\.pre_encode\.proj\.", ".embedder.projection."),
            (r"\.embed_norm\.", ".input_layer_norm."),
            (r"\.final_norm\.", ".layer_norm."),
            (r"\.norm([12])\.", r".layer_norm\1."),
            (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
            (r"\.attn\.(q_norm|k_norm|w_qkv)\.", r".self_attn.\1."),
            (r"\.ffn\.net\.0\.", ".mlp.fc1."),
            (r"\.ffn\.net\.3\.", ".mlp.fc2."),
            (r"\.mixer\._fp32_params\.", ".mixer."),
        ),
        (("w_qkv", _QKV),),
    ),
    # Fused projections, which other programs store apart. The order of rows is that of the parts.
    Spelling(
        ("glm",),
        (
            (r"^transformer\.embedding\.word_embeddings\.", "model.embed_tokens."),
            (r"^transformer\.encoder\.layers\.", "model.layers."),
            (r"^transformer\.encoder\.final_layernorm\.", "model.norm."),
            (r"^transformer\.output_layer\.", "lm_head."),
            (r"\.self_attention\.query_key_value\.", ".self_attn.qkv_proj."),
            (r"\.self_attention\.dense\.", ".self_attn.o_proj."),
            (r"\.mlp\.dense_h_to_4h\.", ".mlp.gate_up_proj."),
            (r"\.mlp\.dense_4h_to_h\.", ".mlp.down_proj."),
        ),
        (("qkv_proj", _QKV), _GATE_UP),
    ),
    Spelling(("phi3", "phi4_multimodal", "glm4"), (), (("qkv_proj", _QKV), _GATE_UP)),
    # Encoders.
    Spelling(
        ("bert", "esm", "roberta"),
        ((r"\.LayerNorm\.gamma$", ".LayerNorm.weight"), (r"\.LayerNorm\.beta$", ".LayerNorm.bias")),
    ),
    Spelling(
        ("gte",),
        (
            (r"(^|\.)encoder\.layer\.", r"\1layers."),
            (r"\.attention\.", ".self_attn."),
            (r"\.attn_ln\.", ".post_attention_layernorm."),
            (r"\.mlp_ln\.", ".post_mlp_layernorm."),
            (r"^lm_head\.norm\.", "lm_head.layer_norm."),
        ),
        (("qkv_proj", _QKV), ("up_gate_proj", ("up_proj", "gate_proj"))),
    ),
    Spelling(
        ("jina_embeddings_v3",),
        (
            (r"(^|\.)emb_ln\.", r"\1embeddings.LayerNorm."),
            (r"(^|\.)encoder\.layers\.", r"\1layers."),
            (r"\.(attn|mixer)\.out_proj\.", ".self_attn.o_proj."),
            (r"\.(attn|mixer)\.", ".self_attn."),
            (r"\.norm1\.", ".post_attention_layernorm."),
            (r"\.norm2\.", ".post_mlp_layernorm."),
        ),
        (("Wqkv", _QKV),),
    ),
    Spelling(
        ("nomic_bert",),
        (
            (r"(^|\.)emb_ln\.", r"\1embeddings.LayerNorm."),
            (r"(^|\.)encoder\.layers\.", r"\1layers."),
            (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
            (r"\.attn\.", ".self_attn."),
            (r"\.norm1\.", ".post_attention_layernorm."),
            (r"\.norm2\.", ".post_mlp_layernorm."),
            (r"\.mlp\.fc11\.", ".mlp.up_proj."),
            (r"\.mlp\.fc12\.", ".mlp.gate_proj."),
            (r"\.mlp\.fc2\.", ".mlp.down_proj."),
        ),
        (("Wqkv", _QKV),),
    ),
    Spelling(("ultrabert",), ((r"^ultrabert\.", "model."), (r"^cls\.", "head.decoder."))),
    Spelling(("ultravbert",), ((r"^head\.decoder\.", "lm_head."), (r"^head\.", "projection_head."))),
    # Images and sound.
    Spelling(
        ("vit", "deit", "beit", "vit_mae", "ijepa", "vivit"),
        ((r"\.decoder_encoder\.layer\.", ".decoder_layers."), *_VIT),
    ),
    Spelling(("vit_msn",), ((r"^encoder\.", "vit.encoder."), *_VIT)),
    Spelling(("pixio",), (*_VIT, (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."))),
    Spelling(
        ("videomae",),
        (
            (r"\.attention\.q_bias$", ".attention.query.bias"),
            (r"\.attention\.v_bias$", ".attention.value.bias"),
        ),
    ),
    Spelling(
        ("yolos",),
        ((r"(^|\.)encoder\.mid_position_embeddings$", r"\1encoder.interpolation.mid_position_embeddings"),),
    ),
    Spelling(
        ("rt_detr", "rt_detr_v2"),
        (
            (r"(^|\.)encoder\.encoder\.", r"\1encoder.aifi."),
            (r"(\.layers\.\d+)\.(fc1|fc2)\.", r"\1.mlp.\2."),
            (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
        ),
    ),
    Spelling(("timesfm2_5",), ((r"\.mlp\.ff0\.", ".mlp.fc1."), (r"\.mlp\.ff1\.", ".mlp.fc2."))),
    Spelling(
        ("dinov2", "dinov2_with_registers", "lw_detr"),
        (
            (r"\.attention\.attention\.query\.", ".attention.q_proj."),
            (r"\.attention\.attention\.key\.", ".attention.k_proj."),
            (r"\.attention\.attention\.value\.", ".attention.v_proj."),
            (r"\.attention\.output(\.dense)?\.", ".attention.o_proj."),
            (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
        ),
        (("weights_in", ("gate_proj", "up_proj")),),
    ),
    Spelling(
        ("swin", "segformer"),
        (
            (r"\.attention\.self\.query\.", ".attention.q_proj."),
            (r"\.attention\.self\.key\.", ".attention.k_proj."),
            (r"\.attention\.self\.value\.", ".attention.v_proj."),
            (
                r"\.attention\.self\.relative_position_bias_table$",
                ".attention.relative_position_bias.relative_position_bias_table",
            ),
            (r"\.attention\.self\.sr\.", ".attention.sequence_reduction.sequence_reduction."),
            (r"\.attention\.self\.layer_norm\.", ".attention.sequence_reduction.layer_norm."),
            (r"\.attention\.output\.dense\.", ".attention.o_proj."),
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"\.output\.dense\.", ".mlp.fc2."),
            (r"(^|\.)encoder\.patch_embeddings\.(\d+)\.", r"\1stages.\2.patch_embeddings."),
            (r"(^|\.)encoder\.block\.(\d+)\.", r"\1stages.\2.blocks."),
            (r"(^|\.)encoder\.layer_norm\.(\d+)\.", r"\1stages.\2.layer_norm."),
            (r"\.mlp\.dense(\d)\.", r".mlp.fc\1."),
            (r"\.layer_norm_1\.", ".layernorm_before."),
            (r"\.layer_norm_2\.", ".layernorm_after."),
            (r"(^|\.)decode_head\.linear_c\.", r"\1decode_head.linear_projections."),
        ),
    ),
    Spelling(
        ("wav2vec2", "hubert", "wavlm"),
        (
            (r"\.weight_g$", ".parametrizations.weight.original0"),
            (r"\.weight_v$", ".parametrizations.weight.original1"),
        ),
    ),
)
"""The table. Each entry is tested on models built by transformers (tests/checkpoint/test_layouts.py)."""

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Components that ``torch.compile``, FSDP and activation checkpointing insert anywhere in names."""

PACKED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
"""Packed parameters of experts, ``(experts, rows, columns)``: the matrices of each expert, in the order of
rows."""

PACKED_EXPERTS = re.compile(r"(?P<stem>.+\.experts)\.(?P<parameter>gate_up_proj|gate_proj|up_proj|down_proj)")
"""Matches the packed parameters of experts in transformers' modules."""
_PACKED_NAME = re.compile(PACKED_EXPERTS.pattern + r"(?:\.weight)?")
_EXPERT_NAME = re.compile(
    r"(?P<stem>.+\.experts)\.(?P<expert>\d+)\.(?P<matrix>gate_proj|up_proj|down_proj)\.weight"
)

PACKING = "some tensors packed in one model and separate in the other"
"""How a title says that tensors are made of several, or are parts of one."""

MIN_SHARE = 0.5
"""Smallest share of the smaller model's tensors that a layout must match."""


@dataclass(frozen=True)
class Piece:
    """A run of consecutive elements of a stored tensor, in row-major order.

    With ``of`` it is a run of a transpose: these pieces, stacked, are a matrix of ``columns`` columns, and ``first`` counts
    the elements of its transpose, (columns, rows). ``name`` is then the tensor of the first of them.
    """

    name: str
    first: int
    elements: int
    of: tuple[Piece, ...] = ()
    columns: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The stored tensors that it is read from."""
        return tuple(dict.fromkeys(piece.name for piece in self.of)) if self.of else (self.name,)

    @property
    def matrix_elements(self) -> int:
        """The elements of the matrix whose transpose it is a run of; 0 if it is a plain run."""
        return sum(piece.elements for piece in self.of)


@dataclass(frozen=True)
class Layout:
    """How the tensors of one model map to the names of another.

    ``stored`` maps each wanted name to the pieces that make up the tensor, in row-major order. ``missing``
    are wanted names that are not stored, ``unused`` stored names that are not wanted. ``title`` says how the
    names differ, '' if they do not. ``halves`` are the packed tensors whose two matrices, gate and up, were
    paired by their order alone. ``respelled`` maps unused names to the spelling of the wanted ones, where that is known.
    """

    title: str
    stored: Mapping[str, tuple[Piece, ...]]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    halves: tuple[str, ...] = ()
    respelled: Mapping[str, str] = field(default_factory=dict)

    def whole(self, name: str) -> str | None:
        """The stored tensor that is the whole of a wanted one; None if that is a part of one or made of
        several."""
        pieces = self.stored.get(name, ())
        return (
            pieces[0].name
            if len(pieces) == 1 and pieces[0].first == 0 and not pieces[0].of and name not in self._parts
            else None
        )

    @functools.cached_property
    def _parts(self) -> frozenset[str]:
        """Wanted names that share their stored tensor with another."""
        users: dict[str, list[str]] = {}
        for name, pieces in self.stored.items():
            for stored in {stored for piece in pieces for stored in piece.names}:
                users.setdefault(stored, []).append(name)
        return frozenset(name for names in users.values() if len(names) > 1 for name in names)

    @property
    def is_identity(self) -> bool:
        return not self.title


def find_layout(have: Mapping[str, Shape], want: Mapping[str, Shape], *, swapped: bool = False) -> Layout:
    """Find the layout that maps the tensors ``have`` of one model to the names and shapes ``want`` of
    another.

    Names that agree give the identity; otherwise the spelling that matches most tensors wins, if that is at
    least half of the smaller model. ``swapped`` takes the up projection as the first half of a
    ``gate_up_proj`` that only one of the two models stores packed. Errors: MismatchError where two spellings
    match equally many tensors and differ.
    """
    few, few_wanted = _sample_shapes(have), _sample_shapes(want)
    unchanged = _LayoutMatch(few, few_wanted, _same, _same, "")
    best_count = unchanged.count()
    if best_count == min(len(few), len(few_wanted)):
        return _LayoutMatch(have, want, _same, _same, "").layout(swapped)
    best: list[_LayoutMatch] = []
    for title, of_have, of_want, joined in _spellings(few, few_wanted):
        if _merges_names(few, of_have) or _merges_names(few_wanted, of_want):
            continue
        candidate = _LayoutMatch(few, few_wanted, of_have, of_want, title, joined)
        count = candidate.count()
        if count > best_count and count >= MIN_SHARE * min(len(few), len(few_wanted)):
            best, best_count = [candidate], count
        elif best and count == best_count:
            best.append(candidate)
    if not best:
        return _LayoutMatch(have, want, _same, _same, "").layout(swapped)
    layouts = [
        _LayoutMatch(have, want, t.of_have, t.of_want, t.title, t.joined).layout(swapped) for t in best
    ]
    others = [other for other in layouts[1:] if other.stored != layouts[0].stored]
    if others:
        name, pieces, others_pieces = next(
            (n, layouts[0].stored[n], other.stored.get(n, ()))
            for other in others
            for n in layouts[0].stored
            if other.stored.get(n) != layouts[0].stored[n]
        )
        readings = [
            " and ".join(dict.fromkeys(stored for p in pieces_of_one for stored in p.names)) or "nothing"
            for pieces_of_one in (pieces, others_pieces)
        ]
        raise MismatchError(
            f"{name}: may be {readings[0]} ({layouts[0].title}) or {readings[1]} ({others[0].title}); "
            "expected names with one possible match. Rename the tensors of one model, or name the intended "
            "module under modules in the recipe."
        )
    return layouts[0]


def closest_names(name: str, names: Iterable[str], count: int = 1) -> list[str]:
    """The names most similar to a missing one, best first.

    >>> closest_names("bert.encoder.layer.0.weight", ["encoder.layer.0.weight", "pooler.weight"])
    ['encoder.layer.0.weight']
    """
    return difflib.get_close_matches(name, list(names), count, 0.6)


def transformers_names(config: Mapping[str, object], names: Iterable[str]) -> dict[str, str]:
    """Map the tensor names of a file to those of transformers 5's modules, by the spellings of the config's
    model types.

    Separately stored matrices of experts keep their names: the module has them packed.

    >>> transformers_names({"model_type": "qwen2_vl"}, ["visual.a", "model.norm.weight"])
    {'visual.a': 'model.visual.a', 'model.norm.weight': 'model.language_model.norm.weight'}
    """
    types = {str(part.get("model_type")) for part in (config, *config.values()) if isinstance(part, Mapping)}
    spellings = [s for s in SPELLINGS if types & set(s.types)]
    result = {}
    for name in names:
        spelled = name
        for spelling in () if re.search(r"\.experts\.\d+\.", name) else spellings:
            spelled = spelling(spelled)
        result[name] = spelled
    return result


def shapes_of(tensors: Mapping[str, object]) -> dict[str, Shape]:
    """The shapes of a source's tensors, or of tensors in memory."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}  # type: ignore[attr-defined]


def _same(name: str) -> str:
    return name


def _sample_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The tensors that decide between spellings: layers and experts with the lowest numbers represent all
    others."""
    lowest = 3
    chosen: dict[str, Shape] = {}
    seen: set[tuple[str, Shape]] = set()
    for name, shape in shapes.items():
        numbers = [int(n) for n in re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)]
        kind = (re.sub(r"\d+", "#", name), shape)
        if kind not in seen or all(n < lowest for n in numbers):
            is_packed = len(shape) == 3 and "experts" in name
            chosen[name] = (min(shape[0], lowest), *shape[1:]) if is_packed else shape
        seen.add(kind)
    return chosen


def _merges_names(shapes: Mapping[str, Shape], rename: Rename) -> bool:
    """Does a spelling give one name to tensors that differ within a model?

    MiniMax has ``o_proj`` in layers with full attention and ``out_proj`` in those with linear attention: two
    modules, not two names.
    """
    kinds: dict[tuple[str, Shape], str] = {}
    for name, shape in shapes.items():
        kind = _NUMBER.sub("#", WRAPPERS.sub("", name))
        if kinds.setdefault((_NUMBER.sub("#", rename(name)), shape), kind) != kind:
            return True
    return False


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _spellings(have: Collection[str], want: Collection[str]) -> Iterator[tuple[str, Rename, Rename, Joined]]:
    """Ways to give the names of two models one spelling: a title, the rename of each, and the modules that
    one stores fused."""
    prefixes: list[tuple[str, Rename, Rename]] = [("", _same, _same)]
    if any(WRAPPERS.search(n) for n in itertools.chain(have, want)):
        bare = functools.partial(WRAPPERS.sub, "")
        prefixes = [("names without what torch.compile or FSDP puts into them", bare, bare)]
    of_have, of_want = prefixes[0][1], prefixes[0][2]
    plain = prefixes[0][0]
    for prefix in _prefixes([of_have(n) for n in have]):
        prefixes.append(
            (
                _join_titles(plain, f"names without the prefix {prefix!r}"),
                _chain(of_have, _strip(prefix)),
                of_want,
            )
        )
    for prefix in _prefixes([of_want(n) for n in want]):
        prefixes.append(
            (
                _join_titles(plain, f"names with the prefix {prefix!r}"),
                of_have,
                _chain(of_want, _strip(prefix)),
            )
        )
    for title, first, second in prefixes:
        if title:
            yield title, first, second, ()
        for spelling in SPELLINGS:
            if (
                any(spelling(first(n)) != first(n) for n in have)
                or any(spelling(second(n)) != second(n) for n in want)
                or _is_fused(spelling, have, want)
            ):
                yield (
                    _join_titles(title, spelling.title),
                    _chain(first, spelling),
                    _chain(second, spelling),
                    spelling.joined,
                )


def _is_fused(spelling: Spelling, have: Iterable[str], want: Iterable[str]) -> bool:
    """Does a spelling that renames nothing have a module that only one of two models stores fused?"""
    if spelling.renames:
        return False
    first, second = ({name.split(".")[-2] for name in names if "." in name} for names in (have, want))
    return any((fused in first) != (fused in second) for fused, _ in spelling.joined)


def _prefixes(names: Collection[str]) -> list[str]:
    """Prefixes of up to three components, and module folders, shared by at least a quarter of the names; the
    shortest first."""
    counts: dict[str, int] = {}
    for name in names:
        folder = name.rpartition("/")[0]
        if folder:
            counts[f"{folder}/"] = counts.get(f"{folder}/", 0) + 1
        parts = name.split(".")
        for length in range(1, min(4, len(parts))):
            prefix = ".".join(parts[:length]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    frequent = [
        p for p, count in counts.items() if 4 * count >= len(names) and not re.search(r"(^|\.)\d+\.", p)
    ]
    return sorted(frequent, key=len)


def _strip(prefix: str) -> Rename:
    return lambda name: name.removeprefix(prefix)


def _chain(first: Rename, second: Rename) -> Rename:
    if first is _same:
        return second
    return lambda name: second(first(name))


def _join_titles(*titles: str) -> str:
    return ", ".join(title for title in titles if title)


class _LayoutMatch:
    """Two models under one spelling."""

    def __init__(
        self,
        have: Mapping[str, Shape],
        want: Mapping[str, Shape],
        of_have: Rename,
        of_want: Rename,
        title: str,
        joined: Joined = (),
    ) -> None:
        self.have, self.want = have, want
        self.of_have, self.of_want, self.title, self.joined = of_have, of_want, title, joined
        self._names: dict[str, list[str]] = {}
        for name in have:
            self._names.setdefault(of_have(name), []).append(name)
        self._wanted = {of_want(name): shape for name, shape in want.items()} if joined else {}

    def count(self) -> int:
        """How many of the smaller model's tensors match."""
        layout = self.layout(False)
        return min(len(layout.stored), len(self.have) - len(layout.unused)) if layout.stored else 0

    def layout(self, swapped: bool) -> Layout:
        stored: dict[str, tuple[Piece, ...]] = {}
        halves: list[str] = []
        used: set[str] = set()
        for name, shape in self.want.items():
            pieces, is_halved = self._pieces(self.of_want(name), shape, swapped)
            if pieces:
                stored[name] = pieces
                used.update(stored for p in pieces for stored in p.names)
                if is_halved:
                    halves.append(name)
        missing = tuple(n for n in self.want if n not in stored)
        is_repacked = any(
            self.have[p.name] != self.want[n] for n, pieces in stored.items() for p in pieces[:1]
        )
        is_turned = any(p.of for pieces in stored.values() for p in pieces)
        packing = (
            "experts are turned, (in, out) in one model and (out, in) in the other" if is_turned else PACKING
        )
        title = _join_titles(self.title, packing if is_repacked else "")
        unused = tuple(n for n in self.have if n not in used)
        is_canonical = all(self.of_want(name) == name for name in self.want)
        respelled = {n: spelled for n in unused if (spelled := self.of_have(n)) != n} if is_canonical else {}
        return Layout(title, stored, missing, unused, tuple(halves), respelled)

    def _stored_name(self, canonical: str, shape: Shape) -> str | None:
        matches = self._names.get(canonical, ())
        return matches[0] if len(matches) == 1 and self.have[matches[0]] == shape else None

    def _pieces(self, canonical: str, shape: Shape, swapped: bool) -> tuple[tuple[Piece, ...], bool]:
        """Where a wanted tensor is stored, and whether gate and up were paired by their order in a packed
        tensor."""
        stored = self._stored_name(canonical, shape)
        if stored is not None:
            return (Piece(stored, 0, math.prod(shape)),), False
        packed = _PACKED_NAME.fullmatch(canonical) if len(shape) == 3 else None
        if packed is not None:
            return self._packed_pieces(packed["stem"], PACKED[packed["parameter"]], shape, swapped)
        single = _EXPERT_NAME.fullmatch(canonical) if len(shape) == 2 else None
        if single is not None:
            match = self._expert_matrix(
                single["stem"], int(single["expert"]), single["matrix"], shape, swapped
            )
            return ((match[0],), match[1]) if match else ((), False)
        return self._fused(canonical, shape), False

    def _fused(self, canonical: str, shape: Shape) -> tuple[Piece, ...]:
        """The separately stored parts of a wanted fused tensor, or the rows of a stored fused tensor that are
        a wanted part."""
        before, _, parameter = canonical.rpartition(".")
        stem, _, module = before.rpartition(".")
        for fused, parts in self.joined:
            names = [f"{stem}.{part}.{parameter}" for part in parts]
            if module == fused:
                matches = [self._names.get(name, ()) for name in names]
                stored = [of[0] for of in matches if len(of) == 1]
                rows = [self.have[name] for name in stored]
                if (
                    len(stored) == len(parts)
                    and sum(r[0] for r in rows) == shape[0]
                    and all(r[1:] == shape[1:] for r in rows)
                ):
                    return tuple(Piece(name, 0, math.prod(self.have[name])) for name in stored)
            elif module in parts:
                matches = [self._names.get(f"{stem}.{fused}.{parameter}", ())]
                siblings = [self._wanted.get(name, ()) for name in names]
                if len(matches[0]) == 1 and all(siblings):
                    fused_shape = (sum(s[0] for s in siblings), *shape[1:])
                    if self.have[matches[0][0]] == fused_shape:
                        width = math.prod(shape[1:])
                        first = sum(s[0] for s in siblings[: parts.index(module)])
                        return (Piece(matches[0][0], first * width, math.prod(shape)),)
        return ()

    def _packed_pieces(
        self, stem: str, matrices: tuple[str, ...], shape: Shape, swapped: bool
    ) -> tuple[tuple[Piece, ...], bool]:
        """Where a wanted stack of experts is stored: as single matrices, or as a stack of their transposes."""
        turned = self._turned_stack(stem, matrices, shape)
        if turned:
            return turned, False
        order = matrices[::-1] if swapped else matrices
        for experts_of in (self._stacked_pieces, self._turned_pieces):
            pieces = experts_of(stem, order, shape)
            if pieces:
                return pieces, len(matrices) > 1
        return (), False

    def _stacked_pieces(self, stem: str, order: Sequence[str], shape: Shape) -> tuple[Piece, ...]:
        """The single matrices of a wanted stack (experts, rows, columns), in the order of its rows."""
        experts, rows, columns = shape
        if rows % len(order):
            return ()
        pieces = []
        for expert in range(experts):
            for matrix in order:
                part = (rows // len(order), columns)
                match = self._expert_matrix(stem, expert, matrix, part, False, is_packed_wanted=True)
                if match is None:
                    return ()
                pieces.append(match[0])
        return tuple(pieces)

    def _turned_pieces(self, stem: str, order: Sequence[str], shape: Shape) -> tuple[Piece, ...]:
        """The same for a wanted stack (experts, columns, rows): that of the transposes, as Llama 4 stores it."""
        experts, columns, rows = shape
        stacked = self._stacked_pieces(stem, order, (experts, rows, columns))
        width = len(order)
        if any(piece.of for piece in stacked):
            return ()
        each = [stacked[i : i + width] for i in range(0, len(stacked), width)]
        return tuple(Piece(of[0].name, 0, rows * columns, tuple(of), columns) for of in each)

    def _turned_stack(self, stem: str, matrices: tuple[str, ...], shape: Shape) -> tuple[Piece, ...]:
        """A wanted stack (experts, rows, columns) of which the stack of the transposes is stored."""
        experts, rows, columns = shape
        parameter = next(p for p, of in PACKED.items() if of == matrices)
        size = rows * columns
        for canonical in (f"{stem}.{parameter}", f"{stem}.{parameter}.weight"):
            name = self._stored_name(canonical, (experts, columns, rows))
            if name is not None:
                blocks = [Piece(name, expert * size, size) for expert in range(experts)]
                return tuple(Piece(name, 0, size, (block,), rows) for block in blocks)
        return ()

    def _expert_matrix(
        self, stem: str, expert: int, matrix: str, shape: Shape, swapped: bool, is_packed_wanted: bool = False
    ) -> tuple[Piece, bool] | None:
        """Where the matrix of one expert is stored: separately, or as rows of a packed tensor, or of the transpose of one."""
        rows, columns = shape
        separate = self._stored_name(f"{stem}.{expert}.{matrix}.weight", shape)
        if separate is not None:
            return Piece(separate, 0, rows * columns), False
        for parameter, matrices in PACKED.items():
            if matrix not in matrices or (is_packed_wanted and len(matrices) > 1):
                continue
            order = matrices[::-1] if swapped else matrices
            height, row = rows * len(matrices), order.index(matrix) * rows
            for name in (f"{stem}.{parameter}", f"{stem}.{parameter}.weight"):
                matches = self._names.get(name, ())
                if len(matches) != 1:
                    continue
                of = self.have[matches[0]]
                if len(of) != 3 or expert >= of[0]:
                    continue
                if of[1:] == (height, columns):
                    first = (expert * height + row) * columns
                    return Piece(matches[0], first, rows * columns), len(matrices) > 1
                if of[1:] == (columns, height):
                    block = Piece(matches[0], expert * height * columns, height * columns)
                    turned = Piece(matches[0], row * columns, rows * columns, (block,), height)
                    return turned, len(matrices) > 1
        return None
