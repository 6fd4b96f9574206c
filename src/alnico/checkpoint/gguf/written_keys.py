"""Makes the keys of a GGUF file, and the names of its tensors, out of a Hugging Face config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.checkpoint.gguf.families import FAMILIES, WHOLE, GgufFamily
from alnico.checkpoint.gguf.model_config import llama3_factors
from alnico.errors import ModelError

WRITTEN = ("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""Model types that are written."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
"""``general.file_type``: the type that most tensors have."""
NAMED: Mapping[str, str] = {
    "max_position_embeddings": "context_length", "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count", "vocab_size": "vocab_size",
}  # fmt: skip
"""Keys that every config of these model types has, and their names in GGUF, after that of the family."""
OPTIONAL: Mapping[str, str] = {
    "num_key_value_heads": "attention.head_count_kv", "num_local_experts": "expert_count", "num_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length", "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}  # fmt: skip
ROPE_KEYS = frozenset(
    ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "partial_rotary_factor")
)  # fmt: skip
"""Keys of rotary embeddings that are written."""
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
MOST_WHOLE, MOST_REAL = (1 << 32) - 1, 3.4e38
"""The largest numbers of the types that keys have here, u32 and float32."""
MOST_HEAD = 1 << 16
"""Widest head whose frequencies are computed."""
IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class GgufPlace:
    """Where a tensor of the model stands in the file: the name of the file's tensor, the number of the expert in it if it is a stack, and
    the heads in which its rows are reordered."""

    name: str
    expert: int | None = None
    heads: int | None = None


def written_family(config: Mapping[str, Any], label: str) -> GgufFamily:
    """Return the family of a config. Errors: ModelError for one that is not written as GGUF."""
    kind = config.get("model_type")
    if kind not in WRITTEN:
        raise ModelError(
            f"{label}: its config has the model_type {str(kind)[:40]!r}; as GGUF, {', '.join(WRITTEN)} are written. Write a folder, and "
            "convert that with llama.cpp."
        )
    return next(family for family in FAMILIES if family.model_type == kind)


def config_keys(
    config: Mapping[str, Any], family: GgufFamily, label: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the keys that a config becomes, and the tensors of its rotary embedding's factors.

    Errors: ModelError for a key that is missing or no number, and for a scaling of rotary embeddings that GGUF cannot express.
    """
    values: dict[str, Any] = {gguf: _number(config, name, label) for name, gguf in NAMED.items()}
    values |= {
        gguf: _number(config, name, label) for name, gguf in OPTIONAL.items() if config.get(name) is not None
    }
    values["attention.layer_norm_rms_epsilon"] = float(_number(config, "rms_norm_eps", label, is_whole=False))
    values.setdefault("attention.head_count_kv", values["attention.head_count"])
    head = values["embedding_length"] // max(values["attention.head_count"], 1)
    if config.get("head_dim") is not None:
        head = values["attention.key_length"] = values["attention.value_length"] = _number(
            config, "head_dim", label
        )
    if family.architecture == "llama":
        values["rope.dimension_count"] = head
    if family.model_type == "mistral" and config.get("sliding_window") is not None:
        values["attention.sliding_window"] = _number(config, "sliding_window", label)
    scaling = _rope(config)
    theta = 10000.0
    if config.get("rope_theta") or scaling.get("rope_theta"):
        theta = float(
            _number(config if config.get("rope_theta") else scaling, "rope_theta", label, is_whole=False)
        )
    values["rope.freq_base"] = theta
    constants: dict[str, np.ndarray] = {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    is_known = kind == "default"
    if kind in ("linear", "yarn"):
        values["rope.scaling.type"] = kind
        values["rope.scaling.factor"] = float(_number(scaling, "factor", label, is_whole=False))
        is_known = True
        if scaling.get("original_max_position_embeddings") is not None:
            values["rope.scaling.original_context_length"] = _number(
                scaling, "original_max_position_embeddings", label
            )
    elif kind == "llama3" and head <= MOST_HEAD:
        numbers = {key: _number(scaling, key, label, is_whole=False) for key in LLAMA3_KEYS}
        with np.errstate(all="ignore"):
            constants["rope_freqs.weight"] = llama3_factors(numbers, theta, head).astype(np.float32)
        is_known = bool(np.isfinite(constants["rope_freqs.weight"]).all())
    others = [key for key in scaling if key not in ROPE_KEYS and scaling[key] is not None]
    if not is_known or others or scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(
            f"{label}: its rotary embeddings are {str(kind)[:40]!r}{f' with {others[0][:40]}' if others else ''}; as GGUF, whole ones are written, "
            "scaled by linear, yarn or llama3. Write a folder, and convert that with llama.cpp."
        )
    return {f"{family.architecture}.{key}": value for key, value in values.items()}, constants


def _number(config: Mapping[str, Any], name: str, label: str, *, is_whole: bool = True) -> Any:
    """A number of a config that GGUF holds: a whole one in 32 bits, or one that float32 holds. Errors: ModelError."""
    value = config.get(name)
    if type(value) is not int and (is_whole or type(value) is not float):
        fits = False
    else:
        fits = 0 <= value <= (MOST_WHOLE if is_whole else MOST_REAL)
    if not fits:
        raise ModelError(
            f"{label}: config.json has the {name} {str(value)[:40]}; expected a {'whole ' if is_whole else ''}number for the GGUF file. Check "
            "the model."
        )
    return value


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The base and the scaling of rotary embeddings, as transformers 4 and 5 spell them."""
    parameters = config.get("rope_parameters")
    scaling = config.get("rope_scaling")
    return parameters if isinstance(parameters, dict) else scaling if isinstance(scaling, dict) else {}


def place_of(name: str, family: GgufFamily, config: Mapping[str, Any], label: str) -> GgufPlace:
    """Return where a tensor of the model stands in the file. Errors: ModelError for a name that the family does not have."""
    whole = {hf: gguf for gguf, hf in WHOLE.items()}
    if name.removesuffix(".weight") in whole:
        return GgufPlace(f"{whole[name.removesuffix('.weight')]}.weight")
    layers = {hf: gguf for gguf, hf in family.layer.items()}
    experts = {hf: gguf for gguf, hf in family.experts.items()}
    match = IN_LAYER.fullmatch(name)
    stem = match[2] if match is not None else ""
    expert = EXPERT.fullmatch(stem)
    packed = f"{expert[1]}.{{}}.{expert[3]}" if expert is not None else ""
    if match is None or (stem not in layers and packed not in experts):
        raise ModelError(
            f"{label}: {name} has no name in GGUF files of the family {family.architecture!r}; expected tensors of the model_type "
            f"{family.model_type}, experts one by one. Leave it out by a rule, or write a folder and convert that with llama.cpp."
        )
    at = f"blk.{match[1]}."
    if packed in experts and expert is not None:
        return GgufPlace(f"{at}{experts[packed]}.{match[3]}", expert=int(expert[2]))
    heads = None
    if family.is_reordered and layers[stem] in ("attn_q", "attn_k"):
        heads = config["num_attention_heads"]
        if layers[stem] == "attn_k":
            heads = config.get("num_key_value_heads") or heads
    return GgufPlace(f"{at}{layers[stem]}.{match[3]}", heads=heads)
