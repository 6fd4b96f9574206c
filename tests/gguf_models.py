"""Random models of the families of GGUF, made by transformers, with the keys that llama.cpp's converter writes for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from alnico.checkpoint.gguf.metadata import Metadata
from made_gguf import converted, write_gguf

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 48, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 12345.0, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}
MODELS: dict[str, tuple[str, type[Any], dict[str, Any]]] = {
    "llama": ("llama", transformers.LlamaConfig, {"head_dim": 16}),
    "llama-untied": ("llama", transformers.LlamaConfig, {"head_dim": 16, "tie_word_embeddings": False}),
    "llama-yarn": (
        "llama",
        transformers.LlamaConfig,
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "mistral": ("llama", transformers.MistralConfig, {"sliding_window": None}),
    "mixtral": ("llama", transformers.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", transformers.Qwen2Config, {}),
    "qwen2_moe": (
        "qwen2moe",
        transformers.Qwen2MoeConfig,
        {**EXPERTS, "shared_expert_intermediate_size": 48, "norm_topk_prob": False},
    ),
    "qwen3": ("qwen3", transformers.Qwen3Config, {"head_dim": 128}),
    "qwen3_moe": ("qwen3moe", transformers.Qwen3MoeConfig, {**EXPERTS, "head_dim": 128, "norm_topk_prob": True}),
    "gemma": ("gemma", transformers.GemmaConfig, {"head_dim": 32}),
    "gemma2": (
        "gemma2",
        transformers.Gemma2Config,
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    ),
    "gemma3": (
        "gemma3",
        transformers.Gemma3TextConfig,
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7, "rope_local_base_freq": 999.0},
    ),
    "phi3": ("phi3", transformers.Phi3Config, {"pad_token_id": 0, "sliding_window": None}),
}  # fmt: skip


def keys_of(architecture: str, config: Any) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for a config."""
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        keys["rope.freq_base"] = float(rope["rope_theta"])
    elif "full_attention" in rope:
        keys["rope.freq_base"] = float(rope["full_attention"]["rope_theta"])
        keys["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
    if rope.get("rope_type") == "yarn":
        keys["rope.scaling.type"] = "yarn"
        keys["rope.scaling.factor"] = float(rope["factor"])
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if getattr(config, "head_dim", None):
        keys["attention.key_length"] = keys["attention.value_length"] = config.head_dim
    named = {
        "num_experts": "expert_count", "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length", "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        "sliding_window": "attention.sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }  # fmt: skip
    keys |= {key: v for name, key in named.items() if (v := getattr(config, name, None)) is not None}
    return {f"{architecture}.{key}": given for key, given in keys.items()}


def make(name: str, path: Path, kind: str = "F32") -> Any:
    """Make a random model, and write it as GGUF; returns the module."""
    architecture, config_class, changes = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**SIZES, **changes})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    keys = keys_of(architecture, model.config) | {
        "general.name": f"A {name}",
        "tokenizer.ggml.model": "none",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(48)],
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    write_gguf(path, architecture, converted(model, architecture), keys, kind)
    return model


def logits(model: Any) -> np.ndarray:
    ids = torch.arange(24).reshape(2, 12) * 5 % 48
    with torch.no_grad():
        return model(ids).logits.double().numpy()


def byte_alphabet() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def bpe_keys(pre: str) -> dict[str, Any]:
    """A vocabulary of bytes and a few merges of them, with special tokens at its start."""
    words = ["he", "ll", "hell", "hello", "Ġw", "or", "Ġwor", "Ġworld", "it", "20"]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "i t", "2 0"]
    alphabet = byte_alphabet()
    tokens = [
        "<|im_start|>",
        "<s>",
        "</s>",
        *alphabet,
        *[w for w in words if w != "Ġworld"],
        "<think>",
        "[PAD273]",
    ]
    types = [3, 3, 3, *[1] * (len(tokens) - 5), 4, 5]
    tokens[-1] = f"[PAD{len(tokens) - 1}]"
    return {
        "general.architecture": "llama", "llama.context_length": 64, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip


def piece_keys(architecture: str) -> dict[str, Any]:
    """A vocabulary of SentencePiece: bytes, letters, and words whose merges follow from the scores."""
    letters = [*"abcdehilnortw,.'!", "\u2581"]
    words = [
        "he",
        "ll",
        "lo",
        "hel",
        "hello",
        "\u2581h",
        "or",
        "\u2581w",
        "wor",
        "ld",
        "\u2581world",
        "it",
        "\u2581\u2581",
    ]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *words, *letters, "<|im_start|>"]
    scores = (
        [0.0] * 259
        + [-float(i) for i in range(len(words))]
        + [-100.0 - i for i in range(len(letters))]
        + [0.0]
    )
    types = [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(letters)), 4]
    return {
        "general.architecture": architecture, f"{architecture}.context_length": 64, "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": not architecture.startswith("gemma"),
    }  # fmt: skip


def as_metadata(keys: dict[str, Any]) -> Metadata:
    arrays = {
        k: np.array(v) if isinstance(v, list) and not isinstance(v[0], str) else v for k, v in keys.items()
    }
    return Metadata(arrays, "m.gguf")
