"""Makes the config of a Hugging Face model out of the keys of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from alnico.checkpoint.gguf.families import GgufFamily, StoredPart
from alnico.checkpoint.gguf.metadata import Metadata
from alnico.errors import ModelError
from alnico.numerics.dtypes import CONFIG_NAMES

ReadNumbers = Callable[[str], np.ndarray]
"""Returns the values of a tensor of the file; an empty array if there is none of that name."""

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The scaling of rotary embeddings of Llama 3.1 to 3.3, without its factor."""


def make_config(
    metadata: Metadata,
    family: GgufFamily,
    parts: Mapping[str, StoredPart],
    dtype: str,
    read: ReadNumbers,
) -> dict[str, Any]:
    """Return ``config.json`` as transformers reads it. ``dtype`` is alnico's name of the weights' dtype.

    Errors: ModelError for keys that are missing or of another type, and for a scaling of rotary embeddings that a config cannot
    express.
    """
    heads = metadata.integer(".attention.head_count")
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "hidden_size": metadata.integer(".embedding_length"),
        "intermediate_size": metadata.integer(".feed_forward_length"),
        "num_hidden_layers": metadata.integer(".block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer(".attention.head_count_kv", heads),
        "hidden_act": "silu",
        "max_position_embeddings": metadata.integer(".context_length"),
        "rms_norm_eps": metadata.number(".attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number(".rope.freq_base", 10000.0),
        "vocab_size": _vocabulary_size(metadata, parts),
        "tie_word_embeddings": "lm_head.weight" not in parts,
        "torch_dtype": CONFIG_NAMES[dtype],
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            config[f"{role}_token_id"] = metadata.integer(f"tokenizer.ggml.{key}_token_id")
    if (scaling := _rope_scaling(metadata, config, read)) is not None:
        config["rope_scaling"] = scaling
    _OF_FAMILY[family.model_type](metadata, config, parts)
    return config


def _vocabulary_size(metadata: Metadata, parts: Mapping[str, StoredPart]) -> int:
    """The rows of the embedding, which may have more than there are tokens. Errors: ModelError."""
    tokens = len(metadata.texts("tokenizer.ggml.tokens"))
    embedding = parts.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[0] < tokens:
        found = "no embedding" if embedding is None else f"an embedding of the shape {embedding.shape}"
        raise ModelError(
            f"{metadata.where}: has {tokens} tokens and {found}; expected a row for each token. Get the file from its source."
        )
    return embedding.shape[0]


def _head_dim(metadata: Metadata, config: Mapping[str, Any]) -> int:
    heads = max(config["num_attention_heads"], 1)
    return metadata.integer(".attention.key_length", config["hidden_size"] // heads)


def _rope_scaling(metadata: Metadata, config: Mapping[str, Any], read: ReadNumbers) -> dict[str, Any] | None:
    kind = metadata.text(f"{metadata.architecture}.rope.scaling.type", "none")
    frequencies = read("rope_freqs.weight")
    if frequencies.size:
        return _llama3_scaling(metadata, config, frequencies)
    long, short = read("rope_factors_long.weight"), read("rope_factors_short.weight")
    if long.size or short.size:
        return {
            "type": "longrope",
            "short_factor": [float(str(v)) for v in short],
            "long_factor": [float(str(v)) for v in long],
        }
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata.number(".rope.scaling.factor")}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": metadata.number(".rope.scaling.factor")}
        if ".rope.scaling.original_context_length" in metadata:
            scaling["original_max_position_embeddings"] = metadata.integer(
                ".rope.scaling.original_context_length"
            )
        return scaling
    raise ModelError(
        f"{metadata.where}: its rotary embeddings are scaled by {kind[:40]!r}; expected none, linear, yarn, or tensors of factors. Use the "
        "model that it was converted from, as safetensors."
    )


def _llama3_scaling(metadata: Metadata, config: Mapping[str, Any], frequencies: np.ndarray) -> dict[str, Any]:
    """The scaling whose factors of frequencies are these, as Llama 3.1 has them. Errors: ModelError if there is none."""
    factor = float(str(np.float32(frequencies.max())))
    scaling = {"factor": factor, **LLAMA3}
    size = metadata.integer(".rope.dimension_count", _head_dim(metadata, config))
    expected = llama3_factors(scaling, config["rope_theta"], size)
    if expected.shape != frequencies.shape or not np.allclose(expected, frequencies, rtol=1e-4):
        raise ModelError(
            f"{metadata.where}: rope_freqs.weight has other factors than the scaling of Llama 3 by {factor}; expected factors that a config "
            "can express. Use the model that it was converted from, as safetensors."
        )
    return scaling


def llama3_factors(scaling: Mapping[str, Any], theta: float, size: int) -> np.ndarray:
    """By how much Llama 3.1 divides each frequency ``theta^(-2i/size)``, float64 (size / 2).

    Wavelengths above ``context / low`` are divided by ``factor``, those below ``context / high`` by 1, and between them
    ``1 / ((1 - s) / factor + s)`` with ``s = (context / wavelength - low) / (high - low)``.
    """
    wavelengths = 2 * np.pi * theta ** (np.arange(0, size, 2) / size)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    smooth = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    factors: np.ndarray = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors


def _has_bias(parts: Mapping[str, StoredPart], stem: str) -> bool:
    return any(name.endswith(f"{stem}.bias") for name in parts)


def _llama(metadata: Metadata, config: dict[str, Any], parts: Mapping[str, StoredPart]) -> None:
    config["head_dim"] = _head_dim(metadata, config)
    if config["model_type"] == "llama":
        config["attention_bias"] = _has_bias(parts, "q_proj")
        config["mlp_bias"] = _has_bias(parts, "up_proj")
    else:
        config["sliding_window"] = (
            metadata.integer(".attention.sliding_window") if ".attention.sliding_window" in metadata else None
        )


def _mixtral(metadata: Metadata, config: dict[str, Any], parts: Mapping[str, StoredPart]) -> None:
    _llama(metadata, config, parts)
    config["num_local_experts"] = metadata.integer(".expert_count")
    config["num_experts_per_tok"] = metadata.integer(".expert_used_count")


def _qwen2(metadata: Metadata, config: dict[str, Any], parts: Mapping[str, StoredPart]) -> None:
    """Nothing of its own."""


def _qwen_experts(metadata: Metadata, config: dict[str, Any], parts: Mapping[str, StoredPart]) -> None:
    config["num_experts"] = metadata.integer(".expert_count")
    config["num_experts_per_tok"] = metadata.integer(".expert_used_count")
    config["moe_intermediate_size"] = metadata.integer(".expert_feed_forward_length", _expert_width(parts))
    config["decoder_sparse_step"] = 1


def _expert_width(parts: Mapping[str, StoredPart]) -> int:
    found = (part.shape[0] for name, part in parts.items() if name.endswith("experts.0.gate_proj.weight"))
    return next(found, 0)


def _qwen2_moe(metadata: Metadata, config: dict[str, Any], parts: Mapping[str, StoredPart]) -> None:
    _qwen_experts(metadata, config, parts)
    shared = (p.shape[0] for n, p in parts.items() if n.endswith("shared_expert.gate_proj.weight"))
    config["shared_expert_intermediate_size"] = metadata.integer(
        ".expert_shared_feed_forward_length", next(shared, 0)
    )
    config["norm_topk_prob"] = False


def _qwen3(metadata: Metadata, config: dict[str, Any], parts: Mapping[str, StoredPart]) -> None:
    config["head_dim"] = _head_dim(metadata, config)
    config["attention_bias"] = _has_bias(parts, "q_proj")


def _qwen3_moe(metadata: Metadata, config: dict[str, Any], parts: Mapping[str, StoredPart]) -> None:
    _qwen3(metadata, config, parts)
    _qwen_experts(metadata, config, parts)
    config["norm_topk_prob"] = True  # GGUF has no key for it, and llama.cpp computes it so


def _gemma(metadata: Metadata, config: dict[str, Any], _parts: Mapping[str, StoredPart]) -> None:
    config["head_dim"] = _head_dim(metadata, config)
    config["hidden_act"] = config["hidden_activation"] = "gelu_pytorch_tanh"


def _gemma2(metadata: Metadata, config: dict[str, Any], parts: Mapping[str, StoredPart]) -> None:
    _gemma(metadata, config, parts)
    config["sliding_window"] = metadata.integer(".attention.sliding_window")
    config["attn_logit_softcapping"] = metadata.number(".attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = metadata.number(".final_logit_softcapping", 30.0)
    config["query_pre_attn_scalar"] = _attention_scalar(config, layers_of_largest=46)


def _gemma3(metadata: Metadata, config: dict[str, Any], parts: Mapping[str, StoredPart]) -> None:
    _gemma(metadata, config, parts)
    config["sliding_window"] = metadata.integer(".attention.sliding_window")
    config["rope_local_base_freq"] = metadata.number(".rope.freq_base_swa", 10000.0)
    config["sliding_window_pattern"] = 6
    config["query_pre_attn_scalar"] = _attention_scalar(config, layers_of_largest=62)


def _attention_scalar(config: Mapping[str, Any], layers_of_largest: int) -> int:
    """The number whose root divides the products of queries and keys. GGUF has no key for it: the 27B models of Gemma 2 and 3 have the
    width of a head of the hidden size, all others that of a head."""
    if config["num_hidden_layers"] == layers_of_largest:
        return int(config["hidden_size"] // max(config["num_attention_heads"], 1))
    return int(config["head_dim"])


def _phi3(metadata: Metadata, config: dict[str, Any], _parts: Mapping[str, StoredPart]) -> None:
    head = config["hidden_size"] // max(config["num_attention_heads"], 1)
    rotary = metadata.integer(".rope.dimension_count", head)
    if rotary != head:
        config["partial_rotary_factor"] = rotary / max(head, 1)
    config["original_max_position_embeddings"] = metadata.integer(
        ".rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    window = metadata.integer(".attention.sliding_window", 0)
    config["sliding_window"] = window or None


_OF_FAMILY: dict[str, Callable[[Metadata, dict[str, Any], Mapping[str, StoredPart]], None]] = {
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
}
