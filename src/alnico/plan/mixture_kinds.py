"""Knows the kinds of mixtures of experts that are built: names of tensors, and the config of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alnico.errors import MismatchError

DENSE: Mapping[str, Mapping[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}
"""The dense model types that mixtures are built from. A config may leave out keys that have these values; the mixture's
type would read other values there."""

ROPE_THETA = 10000.0
"""The same of ``rope_theta``, for all of them."""

OF_DENSE = ("architectures", "model_type", "auto_map", "pretraining_tp", "mlp_bias", "attention_bias", "max_window_layers",
            "use_sliding_window", "layer_types")  # fmt: skip
"""Keys of dense configs that a mixture has in its own words, or not at all."""

MATRICES = ("gate_proj", "up_proj", "down_proj")
"""The matrices of an MLP. The last one writes into the residual stream."""

_ATTENTION = {
    "llama": r"self_attn\.[qkvo]_proj\.weight",
    "mistral": r"self_attn\.[qkvo]_proj\.weight",
    "qwen2": r"self_attn\.([qkvo]_proj\.weight|[qkv]_proj\.bias)",
    "qwen3": r"self_attn\.([qkvo]_proj\.(weight|bias)|[qk]_norm\.weight)",
}
MLP = re.compile(r"(?P<layer>(?:.*\.)?layers\.\d+\.)mlp\.(?P<matrix>gate_proj|up_proj|down_proj)\.weight")
"""Matches the matrices of MLPs."""

INVERSE_FREQUENCIES = ".rotary_emb.inv_freq"
"""The end of a buffer of old checkpoints, which programs compute from the config."""


@dataclass(frozen=True)
class MixtureKind:
    """A kind of mixture: ``model_type`` and ``architecture`` of its config, and where its tensors are, after the name of
    a layer. ``matrices`` are the names of an expert's matrices, in the order of :data:`MATRICES`."""

    model_type: str
    architecture: str
    block: str
    matrices: tuple[str, str, str] = MATRICES
    shared: str = ""
    """The module of the shared expert; empty if the kind has none."""
    shared_gate: str = ""
    """The gate of the shared expert; empty if all of it is added."""
    bias: str = ""
    """A vector with a number for each expert that is added to its score."""

    @property
    def gate(self) -> str:
        return f"{self.block}.gate.weight"

    def expert(self, number: int, matrix: str) -> str:
        """Return the name of an expert's matrix, in its layer.

        >>> MIXTRAL.expert(7, "down_proj")
        'block_sparse_moe.experts.7.w2.weight'
        """
        return f"{self.block}.experts.{number}.{self.matrices[MATRICES.index(matrix)]}.weight"


MIXTRAL = MixtureKind("mixtral", "MixtralForCausalLM", "block_sparse_moe", ("w1", "w3", "w2"))
QWEN2 = MixtureKind(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    "mlp",
    shared="mlp.shared_expert",
    shared_gate="mlp.shared_expert_gate.weight",
)
QWEN3 = MixtureKind("qwen3_moe", "Qwen3MoeForCausalLM", "mlp")
DEEPSEEK = MixtureKind(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    "mlp",
    shared="mlp.shared_experts",
    bias="mlp.gate.e_score_correction_bias",
)
"""DeepSeek's mixture with the attention of Llama: GLM 4.5 has both, and transformers has no model of DeepSeek that has."""

KINDS: Mapping[tuple[str, str], MixtureKind] = {
    ("llama", "mixtral"): MIXTRAL,
    ("mistral", "mixtral"): MIXTRAL,
    ("llama", "deepseek"): DEEPSEEK,
    ("mistral", "deepseek"): DEEPSEEK,
    ("llama", "qwen"): QWEN2,
    ("mistral", "qwen"): QWEN2,
    ("qwen2", "qwen"): QWEN2,
    ("qwen3", "qwen"): QWEN3,
}
"""The kind of mixture for a dense model type and the ``architecture`` of a recipe."""


def choose_kind(
    dense: str, architecture: str | None, has_shared: bool, asks_shared: bool, label: str
) -> MixtureKind:
    """Return the kind of mixture for models of type ``dense``. ``asks_shared``: the shared expert has prompts.

    Errors: MismatchError for a type of models, or a shared expert, that the architecture has not.
    """
    if dense not in DENSE:
        raise MismatchError(
            f"{label}: is of model_type {dense or 'none'}; expected {', '.join([*DENSE][:-1])} or {[*DENSE][-1]}, of which mixtures "
            "are built. Use models of these types."
        )
    if architecture is None:
        if dense.startswith("qwen"):
            architecture = "qwen"
        elif has_shared:
            architecture = "qwen" if asks_shared else "deepseek"  # as in mergekit
        else:
            architecture = "mixtral"
    kind = KINDS.get((dense, architecture))
    if kind is None:
        fitting = [a for d, a in KINDS if d == dense]
        raise MismatchError(
            f"architecture {architecture}: is not built from models of type {dense}; expected {' or '.join(fitting)}. Change it."
        )
    if has_shared and not kind.shared:
        raise MismatchError(
            f"shared_experts: {kind.model_type} has no shared expert; expected none. Leave it out"
            f"{', or choose architecture deepseek' if (dense, 'deepseek') in KINDS else ''}."
        )
    if kind.shared and not has_shared:
        raise MismatchError(
            f"shared_experts: is missing, and {kind.model_type} has an expert that every token passes; expected one. Add one, such as "
            f"base_model with a residual_scale of 0.1{', or choose architecture mixtral' if (dense, 'mixtral') in KINDS else ''}."
        )
    return kind


def fits_kind(dense: str, name: str) -> bool:
    """Has a mixture a place for a tensor of a dense model outside of its MLPs?

    >>> fits_kind("llama", "model.layers.0.self_attn.q_proj.weight"), fits_kind("llama", "model.layers.0.self_attn.q_proj.bias")
    (True, False)
    """
    layer = (
        rf"(.*\.)?layers\.\d+\.(input_layernorm\.weight|post_attention_layernorm\.weight|{_ATTENTION[dense]})"
    )
    return bool(re.fullmatch(rf"{layer}|(.*\.)?(embed_tokens|norm|lm_head)\.weight", name))


def mixture_config(
    dense: Mapping[str, Any], kind: MixtureKind, experts: int, experts_per_token: int, label: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the config of a mixture of models with the config ``dense``, and notes on what it cannot say.

    Errors: MismatchError for biases that the mixture has not.
    """
    model_type = str(dense["model_type"])
    if dense.get("mlp_bias") or (dense.get("attention_bias") and kind is not QWEN3):
        key = "mlp_bias" if dense.get("mlp_bias") else "attention_bias"
        raise MismatchError(
            f"{label}: {key} is true in its config, and {kind.model_type} has no such biases; expected a model without them. Use "
            "another model."
        )
    given = {key: value for key, value in dense.items() if key not in OF_DENSE}
    config = {**{k: v for k, v in DENSE[model_type].items() if k not in given}, **given}
    config |= {
        "model_type": kind.model_type,
        "architectures": [kind.architecture],
        "num_experts_per_tok": experts_per_token,
    }
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    if config.get("head_dim") is None:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    config.setdefault("tie_word_embeddings", False)
    if "rope_parameters" not in config and "rope_theta" not in config:
        config["rope_theta"] = ROPE_THETA
    width = config["intermediate_size"]
    notes = _with_window(config, dense, kind)
    if kind is MIXTRAL:
        config["num_local_experts"] = experts
    elif kind is DEEPSEEK:
        _turn_wholly(config)
        config |= {
            "n_routed_experts": experts,
            "n_shared_experts": 1,
            "moe_intermediate_size": width,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "use_qk_norm": False,
            "attention_bias": False,
            "num_nextn_predict_layers": 0,
        }
    else:
        config |= {
            "num_experts": experts,
            "moe_intermediate_size": width,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
        if kind is QWEN2:
            config |= {"shared_expert_intermediate_size": width, "qkv_bias": model_type == "qwen2"}
        else:
            config["attention_bias"] = bool(dense.get("attention_bias", False))
    return config, notes


def _turn_wholly(config: dict[str, Any]) -> None:
    """Say that the whole of each head is turned by its position: the type's default is half."""
    config["partial_rotary_factor"] = 1.0
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping):
        config["rope_parameters"] = {**rope, "partial_rotary_factor": 1.0}


def _with_window(config: dict[str, Any], dense: Mapping[str, Any], kind: MixtureKind) -> list[str]:
    """Write into ``config`` what the dense model's says of sliding windows, in the kind's words; return notes."""
    model_type = dense["model_type"]
    window = config.pop("sliding_window", None)
    if model_type.startswith("qwen") and not dense.get("use_sliding_window", False):
        window = None
    layers = config["num_hidden_layers"]
    is_every = model_type == "mistral"
    if kind is MIXTRAL:
        config["sliding_window"] = window
        return []
    if window is None:
        config |= {"use_sliding_window": False} if kind is not DEEPSEEK else {}
        return []
    if kind is QWEN2:
        first = 0 if is_every else int(dense.get("max_window_layers", 28))
        types = dense.get("layer_types") or [
            "sliding_attention" if i >= first else "full_attention" for i in range(layers)
        ]
        config |= {"use_sliding_window": True, "sliding_window": window, "layer_types": types}
        return []
    config |= {"use_sliding_window": False} if kind is QWEN3 else {}
    return [
        f"attention has no sliding window in {kind.model_type}: texts longer than {window} tokens are read in full, where the dense "
        "models read a window of that length."
    ]
