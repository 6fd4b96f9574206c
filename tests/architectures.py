"""Small models of every architecture that transformers has, made from the classes of their configs.

``make("LlamaForCausalLM", layers=3, vocab=96)`` gives a module with random weights: every one of them random, norms and biases too.
``inputs(module)`` gives what a forward pass takes, ``forward(module)`` its logits or last hidden states. ``of_kind("causal_lm")`` lists
the architectures of a kind.

A config is made small by the names of its keys (:func:`small`). What a model needs beyond that stands in ``SPECIAL``, by type of model.
``NOT_MADE`` lists what cannot be made, and why.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

LAYERS, VOCAB = 2, 96
WIDTH, INNER, HEADS, GROUPS, HEAD = 32, 48, 4, 2, 8
"""Hidden size; the feed-forward's; heads; heads for keys and values; numbers in a head."""

KINDS = {
    "causal_lm": "CAUSAL_LM",
    "masked_lm": "MASKED_LM",
    "seq2seq_lm": "SEQ_TO_SEQ_CAUSAL_LM",
    "sequence_classification": "SEQUENCE_CLASSIFICATION",
    "image_classification": "IMAGE_CLASSIFICATION",
    "image_text_to_text": "IMAGE_TEXT_TO_TEXT",
    "multimodal_lm": "MULTIMODAL_LM",
    "clip_like": "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "speech_seq2seq": "SPEECH_SEQ_2_SEQ",
    "ctc": "CTC",
    "rnnt": "RNNT",
    "tdt": "TDT",
    "audio_classification": "AUDIO_CLASSIFICATION",
    "audio_frame_classification": "AUDIO_FRAME_CLASSIFICATION",
    "audio_xvector": "AUDIO_XVECTOR",
    "text_to_spectrogram": "TEXT_TO_SPECTROGRAM",
    "text_to_waveform": "TEXT_TO_WAVEFORM",
    "object_detection": "OBJECT_DETECTION",
    "zero_shot_object_detection": "ZERO_SHOT_OBJECT_DETECTION",
    "semantic_segmentation": "SEMANTIC_SEGMENTATION",
    "instance_segmentation": "INSTANCE_SEGMENTATION",
    "universal_segmentation": "UNIVERSAL_SEGMENTATION",
    "image_segmentation": "IMAGE_SEGMENTATION",
    "mask_generation": "MASK_GENERATION",
    "image_matting": "IMAGE_MATTING",
    "depth_estimation": "DEPTH_ESTIMATION",
    "normal_estimation": "NORMAL_ESTIMATION",
    "pointmap_estimation": "POINTMAP_ESTIMATION",
    "pose_estimation": "POSE_ESTIMATION",
    "keypoint_detection": "KEYPOINT_DETECTION",
    "keypoint_matching": "KEYPOINT_MATCHING",
    "masked_image_modeling": "MASKED_IMAGE_MODELING",
    "causal_image_modeling": "CAUSAL_IMAGE_MODELING",
    "image_to_image": "IMAGE_TO_IMAGE",
    "video_classification": "VIDEO_CLASSIFICATION",
    "visual_question_answering": "VISUAL_QUESTION_ANSWERING",
    "document_question_answering": "DOCUMENT_QUESTION_ANSWERING",
    "table_question_answering": "TABLE_QUESTION_ANSWERING",
    "table_recognition": "TABLE_RECOGNITION",
    "text_recognition": "TEXT_RECOGNITION",
    "question_answering": "QUESTION_ANSWERING",
    "token_classification": "TOKEN_CLASSIFICATION",
    "multiple_choice": "MULTIPLE_CHOICE",
    "next_sentence_prediction": "NEXT_SENTENCE_PREDICTION",
    "time_series_classification": "TIME_SERIES_CLASSIFICATION",
    "time_series_prediction": "TIME_SERIES_PREDICTION",
    "time_series_regression": "TIME_SERIES_REGRESSION",
    "decision": "DECISION",
    "retrieval": "RETRIEVAL",
    "text_encoding": "TEXT_ENCODING",
    "image": "IMAGE",
    "backbone": "BACKBONE",
    "pretraining": "PRETRAINING",
    "base": "",
}
"""What we call a kind, and the mapping of transformers that lists it (``MODEL_FOR_*_MAPPING_NAMES``, ``MODEL_MAPPING_NAMES`` for the base)."""


# --- What there is


def mapping_name(kind: str) -> str:
    if kind in ("image", "text_encoding", "retrieval", "pretraining"):
        return f"MODEL_FOR_{KINDS[kind]}_MAPPING_NAMES"
    return f"MODEL_FOR_{KINDS[kind]}_MAPPING_NAMES" if KINDS[kind] else "MODEL_MAPPING_NAMES"


@functools.cache
def listed(kind: str) -> tuple[tuple[str, str], ...]:
    """(type of model, class) of each architecture in transformers' list of a kind."""
    from transformers.models.auto import modeling_auto

    found = {}
    for model_type, classes in getattr(modeling_auto, mapping_name(kind)).items():
        for name in classes if isinstance(classes, tuple | list) else (classes,):
            found[model_type, name] = None
    return tuple(found)


@functools.cache
def types() -> Mapping[str, tuple[str, ...]]:
    """The class of each architecture, and the types of model that transformers lists it under."""
    found: dict[str, dict[str, None]] = {}
    for kind in KINDS:
        for model_type, name in listed(kind):
            found.setdefault(name, {})[model_type] = None
    return {name: tuple(of) for name, of in found.items()}


def of_kind(kind: str) -> list[str]:
    """The architectures of a kind that can be made."""
    return list(dict.fromkeys(name for _, name in listed(kind) if name not in NOT_MADE))


def first_kind(name: str) -> str:
    """The kind under which a sweep counts an architecture: the first of ``KINDS`` that lists it."""
    return next(kind for kind in KINDS if any(name == n for _, n in listed(kind)))


# --- A config made small

NUMBERED = re.compile(r"(_id|_index|_token|_ids)$|token_id|token_index")
KEPT = re.compile(
    r"kernel|stride|dropout|_rate$|ratio|factor|coefficient|cost|^scale|scaling|loss|threshold|buckets|distance|type_vocab|period$"
    r"|dilation|_rates$|temperature|chunk|window_layers|first_k|interval|offset|shared_layers|_step$|_idx$|pad$|padding$|_feature_layer|"
    r"dense_replace|max_(2d|rel)|n_shared|num_shared|epsilon|level|resnet|bbox|mlp_ratio|num_channels$|ffn_mult|ff_mult|levels$|time_step"
)
SIZES: tuple[tuple[str, int], ...] = (
    # The first that fits a key of a whole number decides; -1 is the number of layers, -2 the vocabulary.
    (r"^(src_|tgt_|unpadded_)?vocab_size(_per_layer_input)?$", -2),
    (r"vocab(ulary)?(_size|_sizes)?$|vocab_size_base$", 40),  # of characters, entities, phonemes and the like
    (r"codebook_size|num_embeddings|num_centroids|num_clusters|^num_embeds$", 32),
    (r"(key_value|kv)_(attention_)?heads$", GROUPS),
    (r"heads$|(^|_)n_head$|num_head$|num_attention_heads|attention_heads", HEADS),
    (r"layers$|(^|_)n_layer$|num_layer$|^layers$|depth$|num_blocks$", -1),
    (r"head_dim$|^d_kv$|kv_channels$|head_size$|^d_head$|dim_head$", HEAD),
    (r"lora_rank$|_rank$|lowrank$", 8),
    (r"(experts|experts_num)_?(per_tok|per_token)$|^moe_k$|^moe_topk$|^top_k$|topk$|num_selected_experts", 2),
    (r"topk_group$|n_group$", 1),
    (r"experts$", 4),
    (r"moe.*(inter|size)|expert.*(size|dim)$", 24),
    (r"intermediate|ffn|^d_ff$|feed_?forward|^dff$|dim_ff$|mlp_.*(size|dim)$|n_inner|filter_channels", INNER),
    (r"image_size$|^img_size$|crop_size$|^input_size$|^resolution$", 32),
    (r"patch_size$", 8),
    (r"position|^n_positions$|^n_ctx$|max_seq|max_ep_len|max_.*length|^max_len|^max_source|^max_target", 64),
    (r"num_mel_bins|^feature_size|n_mels", 16),
    (r"state_size$|d_state$", 8),
    (r"n_groups$", 1),
    (r"num_filters$", 4),
    (
        r"hidden|embd|embed|emb_dim|dim$|width|channels?$|channels|model$|proj|size$|dims?$|features?$|units$",
        WIDTH,
    ),
    (r"num_queries|num_query_tokens|num_latents|num_denoising|num_proposals", 8),
    (r"labels$|classes$", 3),
    (r"window$", 8),
)


def size_of(key: str, default: int, layers: int, vocab: int) -> int:
    """The small value of a key that is a whole number."""
    if KEPT.search(key):
        return default
    for pattern, value in SIZES:
        if re.search(pattern, key):
            if value == -1:
                is_stack = re.search(
                    r"^(num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|layers)$", key
                )
                return layers if default >= 4 or is_stack else min(default, layers)
            if value == -2:
                return vocab if default > 64 else default
            return min(default, value) if default > 0 else default
    return default


def short(key: str, values: tuple[Any, ...]) -> list[Any]:
    """The small value of a key that is a list of whole numbers: widths by stage, layers by stage."""
    if re.search(r"depths|num_blocks|layers|repeats", key):
        return [1] * len(values)
    if (
        not KEPT.search(key)
        and min(values) >= 16
        and re.search(r"hidden|embed|dim|channels|sizes|width|dims", key)
    ):
        by = max(1, min(values) // 16)
        return [max(8, v // by // 8 * 8) for v in values]
    return list(values)


def fields(config: type) -> dict[str, Any]:
    """The keys of a config that its own classes declare, with their defaults."""
    found: dict[str, Any] = {}
    for part in reversed(config.__mro__):
        if part.__module__.startswith("transformers.models."):
            found |= {k: vars(part).get(k) for k in inspect.get_annotations(part) if not k.startswith("_")}
    return found


def small(config: type, default: Any, layers: int, vocab: int) -> dict[str, Any]:
    """Keyword arguments that make a config small; ``default`` is its value without any."""
    from transformers import PretrainedConfig

    keys: dict[str, Any] = {}
    numbered = vocab
    for key, own in fields(config).items():
        value = vars(default).get(
            key, own
        )  # a plain look-up: some configs forbid getattr of what differs by layer
        if isinstance(value, PretrainedConfig):
            keys[key] = {"model_type": value.model_type, **small(type(value), value, layers, vocab)}
        elif key == "pad_token_id":
            keys[key] = 0  # also where there is none by default: a classifier of texts needs it
        elif isinstance(own, bool | None):
            continue
        elif NUMBERED.search(key) and isinstance(own, int) and not isinstance(own, bool):
            # Numbers of special tokens, all different, from the highest down; bos and eos as they mostly are.
            if own >= vocab or key in ("bos_token_id", "eos_token_id"):
                known = {"bos_token_id": 1, "eos_token_id": 2}
                numbered -= 1
                keys[key] = known.get(key, numbered)
        elif NUMBERED.search(key):
            if isinstance(own, list | tuple) and any(isinstance(v, int) and v >= vocab for v in own):
                keys[key] = [2]
        elif isinstance(own, int) and re.search(r"(key_value|kv)_(attention_)?heads$", key):
            # Groups of heads share keys and values only where the default says so.
            heads = next(
                (
                    v
                    for k, v in vars(default).items()
                    if re.search(r"^(num_)?attention_heads$|^num_heads$", k)
                ),
                None,
            )
            keys[key] = HEADS if own == heads else GROUPS
        elif isinstance(own, int):
            keys[key] = size_of(key, own, layers, vocab)
        elif (
            isinstance(own, list | tuple)
            and own
            and all(isinstance(v, int) and not isinstance(v, bool) for v in own)
        ):
            keys[key] = short(key, tuple(own))
    special = SPECIAL.get(config.model_type, {})
    for key, value in special.items():
        value = settled(value, layers)
        keys[key] = (
            {**keys[key], **value} if isinstance(value, dict) and isinstance(keys.get(key), dict) else value
        )
    return {k: v for k, v in keys.items() if v is not ...}


def settled(value: Any, layers: int) -> Any:
    """A special value for a number of layers."""
    if isinstance(value, dict):
        return {k: settled(v, layers) for k, v in value.items()}
    return value(layers) if callable(value) else value


def cycle(*kinds: str) -> Any:
    """The kinds of the layers, one after the other."""
    return lambda layers: [kinds[i % len(kinds)] for i in range(layers)]


def rope(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary embeddings whose sections for time, height and width fill half a head."""
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": list(sections),
            **more,
        }
    }


SWIN = {"embed_dim": 8, "num_heads": [1, 1, 2, 2], "window_size": 2, "patch_size": 4, "image_size": 64}
MAPPED = {f"<{i}>": i for i in range(VOCAB - 32, VOCAB)} | {
    "<image>": VOCAB - 33,
    "<|extra_200|>": VOCAB - 34,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": rope(2, 1, 1),
    "qwen2_5_vl_text": rope(2, 1, 1),
    "qwen2_5_omni_text": rope(2, 1, 1),
    "qwen2_5_omni_talker": rope(2, 1, 1),
    "paddleocr_vl_text": rope(2, 1, 1),
    "glm4v_text": rope(2, 1, 1),
    "glm4v_moe_text": rope(1, 1, 0, partial_rotary_factor=0.5),
    "glm_ocr_text": rope(2, 1, 1),
    "ernie4_5_vl_moe_text": rope(1, 1, 2),
    "cosmos3_edge_text": rope(2, 1, 1),
    "hy_v4_vl_text": rope(2, 1, 1),
    "hunyuan_vl_text": {"head_dim": HEAD},
    "glm5_next_text": {"index_kpool": 2, "num_key_value_heads": HEADS},
    "chameleon": {"vocabulary_map": MAPPED},
    "emu3": {"vocabulary_map": MAPPED},
    "deepseek_ocr2_text": {"mlp_layer_types": cycle("dense", "sparse"), "num_experts_per_tok": 2},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "vision_config": {"hidden_size": 64}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": WIDTH // 4}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "mimi": {"upsample_groups": WIDTH},
    "autoformer": {"prediction_length": 4, "context_length": 8},
    "time_series_transformer": {"prediction_length": 4, "context_length": 8},
    "informer": {"prediction_length": 4, "context_length": 8},
    "mask2former": {"feature_size": WIDTH, "mask_feature_size": WIDTH},
    "oneformer": {"conv_dim": WIDTH, "mask_dim": WIDTH},
    "pocket_tts_audio_tokenizer": {"upsample_groups": WIDTH},
    "maskformer-swin": SWIN,
    "hiera": {"embed_dim": 16, "decoder_hidden_size": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "dinov3_convnext": {"hidden_sizes": [8, 16, 16, 32]},
    "sam2_hiera_det_model": {
        "hidden_size": 8,
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "num_attention_heads": 1,
        "blocks_per_stage": [1, 1, 1, 1],
        "global_attention_blocks": [2],
        "fpn_hidden_size": 32,
        "backbone_channel_list": [64, 32, 16, 8],
        "window_positional_embedding_background_size": [2, 2],
    },
    "swin2sr": {"embed_dim": 24, "num_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1], "window_size": 2},
    "lw_detr_vit": {"num_windows": 4},
    "BeitForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "muse_spark_audio_encoder": {"num_hidden_layers": 4},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "align_vision_model": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    "fun_asr_nano_adaptor": {"intermediate_size": WIDTH // 4},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 24},
    "qwen3_5_text": {"layer_types": cycle("linear_attention", "full_attention")},
    "qwen3_5_moe_text": {"layer_types": cycle("linear_attention", "full_attention")},
    "qwen4_exp_text": {
        "layer_types": cycle("linear_attention", "full_attention"),
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 40,
        "heads_per_ngram": 2,
        "split_ngram_parts": 2,
    },
    "gemma3_text": {"layer_types": cycle("sliding_attention", "full_attention")},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "voxtral_encoder": {"num_key_value_heads": HEADS},
    "lilt": {"channel_shrink_ratio": 4},
    "bit": {"num_groups": 4},
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "d_model": 32,
        "num_self_attention_heads": 1,
        "num_cross_attention_heads": 1,
        "num_self_attends_per_block": 1,
    },
    "focalnet": {"embed_dim": 16},
    "mobilenet_v1": {"depth_multiplier": 0.2},
    "mobilenet_v2": {"depth_multiplier": 0.2},
    "mobilevit": {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32]},
    "janus_vq_gan": {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "num_groups": 4,
        "latent_channels": 32,
    },
    "vit_mae": {"decoder_intermediate_size": INNER},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": lambda layers: [[["global"], layers]]},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"num_key_value_heads": GROUPS, "head_dim": HEAD},
    "lfm2_moe": {"layer_types": cycle("conv", "full_attention")},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "attn_layers": cycle("local", "lsh"),
    },
    # Two hybrid layers at least: their weights are tied to those of the first.
    "zamba": {
        "num_hidden_layers": lambda n: max(n, 4),
        "layers_block_type": lambda n: cycle("linear_attention", "hybrid")(max(n, 4)),
    },
    "zamba2": {
        "num_hidden_layers": lambda n: max(n, 4),
        "layers_block_type": lambda n: cycle("linear_attention", "hybrid")(max(n, 4)),
    },
    "xmod": {"default_language": "en_XX"},
    "neomme": {"head_dim": 16},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": GROUPS, "clip_qkv": 8.0},
        "n_layers": lambda n: n,
    },
    "ReformerForMaskedLM": {"is_decoder": False},
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": HEAD,
        "swa_qk_nope_head_dim": HEAD,
        "swa_v_head_dim": HEAD,
        "swa_qk_rope_head_dim": HEAD,
    },
    "dots3_note_vision": {"adapter_in_dim": WIDTH},
    "cohere_compass_text": {
        "layer_types": cycle("sliding_attention", "full_attention"),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "granitemoehybrid": {
        "layer_types": cycle("linear_attention", "full_attention"),
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
    },
    "gemma4_assistant": {
        "text_config": {
            "num_hidden_layers": lambda n: n,
            "num_kv_shared_layers": lambda n: n,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "gemma4_text": {
        "num_kv_shared_layers": 0,
        "global_head_dim": HEAD,
        "layer_types": cycle("sliding_attention", "full_attention"),
    },
    "wav2vec2-bert": {"vocab_size": VOCAB},
    "wav2vec2-conformer": {"vocab_size": VOCAB},
    "longcat_flash": {
        "num_layers": 1,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 24,
        "ffn_hidden_size": INNER,
    },
    "xlnet": {"d_head": HEAD, "d_inner": INNER},
    "funnel": {"block_sizes": [1, 1], "d_head": HEAD, "d_inner": INNER},
    "canine": {"num_hash_buckets": 64},
    "align": {},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    "swin": SWIN,
    "swinv2": SWIN,
    "donut-swin": SWIN,
    "levit": {"image_size": 64, "patch_size": 16},
    "mobilevitv2": {"image_size": 128},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 0, "mask_token_id": 3},
}
"""What a config needs beyond small sizes, by its type or by the class of the architecture; ``...`` leaves a key out."""

WHY_NOT_MADE: dict[str, tuple[str, ...]] = {
    "needs the package timm": (
        "ConditionalDetrForObjectDetection",
        "ConditionalDetrModel",
        "DabDetrForObjectDetection",
        "DabDetrModel",
        "DeformableDetrForObjectDetection",
        "DeformableDetrModel",
        "DetrForObjectDetection",
        "DetrForSegmentation",
        "DetrModel",
        "EdgeTamModel",
        "EdgeTamVisionModel",
        "FastVlmForConditionalGeneration",
        "FastVlmModel",
        "Gemma3nForConditionalGeneration",
        "Gemma3nModel",
        "OmDetTurboForObjectDetection",
        "PeAudioVideoEncoder",
        "PeAudioVideoModel",
        "PeVideoEncoder",
        "PeVideoModel",
        "PerceptionLMForConditionalGeneration",
        "PerceptionLMModel",
        "TableTransformerForObjectDetection",
        "TableTransformerModel",
        "TimmBackbone",
        "TimmWrapperForImageClassification",
        "TimmWrapperModel",
    ),
    "needs the package detectron2": (
        "LayoutLMv2ForQuestionAnswering",
        "LayoutLMv2ForSequenceClassification",
        "LayoutLMv2ForTokenClassification",
        "LayoutLMv2Model",
    ),
    "needs the package natten": (
        "DinatBackbone",
        "DinatForImageClassification",
        "DinatModel",
    ),
    "the sizes in its config depend on each other or have no defaults, and no small ones are listed here": (
        "Apertus1p5ForConditionalGeneration",
        "Apertus1p5Model",
        "BridgeTowerModel",
        "DFineForObjectDetection",
        "DFineModel",
        "DiffusionGemmaForBlockDiffusion",
        "DiffusionGemmaModel",
        "Dots3NoteForConditionalGeneration",
        "Dots3NoteModel",
        "EfficientLoFTRForKeypointMatching",
        "EfficientLoFTRModel",
        "Granite4VisionForConditionalGeneration",
        "Granite4VisionModel",
        "MimiDecoderModel",
        "PPOCRV5ServerDetForObjectDetection",
        "PPOCRV6MediumDetForObjectDetection",
        "PPOCRV6MediumDetModel",
        "PocketTTSAudioTokenizerDecoderModel",
        "Qwen3OmniMoeForConditionalGeneration",
        "Sapiens2ForImageMatting",
        "Sapiens2ForNormalEstimation",
        "Sapiens2ForPointmapEstimation",
        "Sapiens2ForPoseEstimation",
        "Sapiens2ForSemanticSegmentation",
        "TvpModel",
        "UperNetForSemanticSegmentation",
    ),
    "no sizes in its config make it small: it has more than 8 million parameters": (
        "CHMv2ForDepthEstimation",
        "DepthProForDepthEstimation",
        "DepthProModel",
        "NeuCodecModel",
        "UnivNetModel",
        "Xcodec2Model",
    ),
    "is part of another model: transformers does not make it from the config of its type": (
        "T5Gemma2Encoder",
        "T5GemmaEncoderModel",
    ),
    "needs the package torchaudio": ("HiggsAudioV2TokenizerModel",),
    "transformers lists it but does not contain it": ("VoxtralRealtimeTextModel",),
}
NOT_MADE: dict[str, str] = {name: why for why, names in WHY_NOT_MADE.items() for name in names}
"""What cannot be made, and why."""

MADE_FOR = "5.24.0"
"""The version of transformers whose lists these are."""


# --- Models


def config_of(
    name: str, *, layers: int = LAYERS, vocab: int = VOCAB, model_type: str = "", **options: Any
) -> Any:
    """The small config of an architecture."""
    import transformers
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type or types()[name][0]]
    own = getattr(transformers, name).config_class
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default = default_of(kind, layers)
        if own is not None and not issubclass(
            kind, own
        ):  # a model of text alone, listed under the type of the whole
            kind = own
            default = default_of(kind, layers)
        own_keys = settled(SPECIAL.get(name, {}), layers)
        return kind(**{**small(kind, default, layers, vocab), **own_keys, **options})


def default_of(kind: type, layers: int) -> Any:
    """A config without options; with its special ones where transformers' own defaults contradict each other."""
    try:
        return kind()
    except Exception:
        return kind(**settled(SPECIAL.get(kind.model_type, {}), layers))


def make(
    name: str,
    *,
    layers: int = LAYERS,
    vocab: int = VOCAB,
    seed: int = 0,
    model_type: str = "",
    **options: Any,
) -> Any:
    """A small model of an architecture (the name of its class); ``options`` are keys of its config."""
    import torch
    import transformers

    config = config_of(name, layers=layers, vocab=vocab, model_type=model_type, **options)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = getattr(transformers, name)(config).eval()
    return shaken(module, seed)


def shaken(module: Any, seed: int, size: float = 0.05) -> Any:
    """Add noise to each parameter, so that none keeps a value that all models start with."""
    import torch

    noise = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(
                    torch.randn(parameter.shape, generator=noise, dtype=torch.float32).to(parameter.dtype)
                    * size
                )
    return module


# --- A forward pass

LENGTH = 12


def inputs(module: Any, seed: int = 0) -> dict[str, Any]:
    """What a forward pass of a module takes, by the names in its signature; texts have 2 rows of 12 tokens.

    A model of text and images gets text alone: its images are tied to their place in the text by rules of its own.
    """
    import torch

    names = inspect.signature(module.forward).parameters
    config = module.config
    noise = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise)

    try:
        text = config.get_text_config()
    except ValueError:  # there are several
        text = config
    vocab = getattr(text, "vocab_size", None) or VOCAB
    # From 3 on, and below those of images and the like: no special token.
    tokens = torch.randint(3, max(5, min(vocab, VOCAB) * 2 // 3), (2, LENGTH), generator=noise)
    found: dict[str, Any] = {}
    if "input_ids" in names:
        found["input_ids"] = tokens
        if (
            text.model_type != "t5"
            and getattr(text, "eos_token_id", None) is not None
            and "decoder_input_ids" in names
        ):
            found["input_ids"] = torch.cat([tokens, torch.full((2, 1), _first(text.eos_token_id))], dim=1)
    if "decoder_input_ids" in names and not type(module).__name__.endswith("SequenceClassification"):
        found["decoder_input_ids"] = tokens[:, :6]
    if "pixel_values" in names and ("input_ids" not in names or not _is_language(module)):
        vision = getattr(config, "vision_config", None) or config
        size = getattr(vision, "image_size", None) or 32
        height, width = size if isinstance(size, list | tuple) else (size, size)
        found["pixel_values"] = numbers(2, getattr(vision, "num_channels", 3) or 3, height, width)
    if "input_features" in names and "input_ids" not in names:
        mel = (
            getattr(config, "num_mel_bins", None)
            or getattr(config, "feature_projection_input_dim", None)
            or 16
        )
        positions = getattr(config, "max_source_positions", None)
        found["input_features"] = (
            numbers(2, mel, 2 * positions)
            if positions and config.model_type == "whisper"
            else numbers(2, 64, mel)
        )
    if "input_values" in names and "input_ids" not in names:
        found["input_values"] = numbers(2, 4000)
    return found


def _first(value: Any) -> int:
    return value[0] if isinstance(value, list | tuple) else int(value)


def _is_language(module: Any) -> bool:
    """Does a model write text, with images or sounds only as a part of it?"""
    return bool(module.can_generate()) or type(module).__name__.endswith(
        ("ForConditionalGeneration", "ForCausalLM")
    )


def forward(module: Any, given: Mapping[str, Any] | None = None) -> Any:
    """The logits of a forward pass, or the last hidden states, or the first tensor of what it returns."""
    import torch

    torch.manual_seed(0)  # some draw masks or durations in evaluation too
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = inspect.signature(module.forward).parameters
        more = {"use_cache": False} if "use_cache" in names else {}
        found = module(**(inputs(module) if given is None else given), **more)
    for key in ("logits", "logits_per_image", "last_hidden_state", "prediction_logits"):
        value = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(value, torch.Tensor):
            return value
    tensors = [
        v
        for v in (found.values() if isinstance(found, Mapping) else found)
        if isinstance(v, torch.Tensor) and v.ndim
    ]
    return tensors[0]
