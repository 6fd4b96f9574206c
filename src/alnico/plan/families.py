"""Lists what is specific to model families: name endings, config keys, layer rules, modules."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alnico.checkpoint import tied_weights
from alnico.vocabulary.tables import is_head

TIED = {"lm_head.weight": "embed_tokens.weight", "decoder.weight": "embeddings.word_embeddings.weight"}
"""Heads that ``tie_word_embeddings`` ties to an embedding. Both match the end of a name."""

BEFORE_LAYERS = re.compile(
    r"(^|_)emb|embed(ding)?s?$|^(w[tp]e|shared|position|project_in|altup_projections|per_layer_(model_)?projection|input_hidden_states)|^w$",
    re.IGNORECASE,
)
"""Matches a word in the name of a tensor that is used before the layers. All others outside of layers come
after."""

AFTER_LAYERS = ("embed_out", "embedding_norm", "altup_unembed")
"""Prefixes of words that look like embeddings but come after the layers: heads, and the last norm of LFM2."""

TOWERS = ("audio", "image", "img", "speech", "vision", "visual")
"""Prefixes of words in the names of vision and audio towers."""
LOOKUPS = (
    "embed_tokens", "embeddings", "embedding", "wte", "wpe", "embed_in", "embed_tokens_per_layer", "shared", "relative_attention_bias",
)  # fmt: skip
"""Endings of the names of embedding modules, whose weight is a lookup table and not a matrix to multiply
with."""

OTHER_TABLES = ("embed_positions.weight",)
"""Endings of tables whose modules are not plain embeddings: some take inputs other than row numbers."""

TIED_BY_DEFAULT = (
    "gpt2",
    "t5",
    "mt5",
    "bert",
    "roberta",
    "distilbert",
    "opt",
    "gemma",
    "gemma2",
    "gemma3_text",
    "bart",
    "mbart",
)
"""Model types that tie their head to the embedding by default."""

ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "router.weight", "feed_forward.gate.weight")
"""Endings of router matrices. In some versions of transformers their modules are not linear layers."""


def is_of_mixture(name: str) -> bool:
    """Is a tensor a router, or a part of experts, which only a mixture of experts has?

    >>> is_of_mixture("model.layers.0.mlp.experts.3.up_proj.weight"), is_of_mixture("model.layers.0.mlp.up_proj.weight")
    (True, False)
    """
    return name.endswith(ROUTERS) or ".experts." in name


STATISTICS = "running_var"
BATCH_COUNT = "num_batches_tracked"
"""The last words of BatchNorm's buffers: activation statistics, which averaging weights does not average."""

COUNTERS = {
    BATCH_COUNT: "a count of batches", "model_ema.num_updates": "a count of updates", "ema.num_updates": "a count of updates",
    "model_ema.decay": "a setting of the moving average", "ema.decay": "a setting of the moving average",
    "position_ids": "numbers of positions",
}  # fmt: skip
"""Endings of buffers that are not weights, with their meanings, including those of Stable Diffusion's
checkpoints."""
_COUNTED = tuple(COUNTERS)

COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_blocks",
    "layers",
    "depth",
    "encoder_layers",
    "num_encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
"""Config keys that give the number of layers."""

DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
"""The decoder's keys in a config that also has an encoder. The others belong to the encoder there."""

FURTHER_LAYERS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
    "num_mtp_modules",
)
"""Keys that count multi-token prediction layers."""

TEXT_CONFIGS = tied_weights.TEXT_CONFIGS
VISION_CONFIGS = ("vision_config", "visual_config")
AUDIO_CONFIGS = ("audio_config", "speech_config")

PER_LAYER_WORDS = ("layer", "block", "freq", "types", "pattern", "window")
"""A config list whose key has one of these words and that is as long as the layers has one entry per
layer."""

PER_LAYER_SIZES = (
    "intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts", "num_shared_expert", "moe_topk",
    "num_experts_per_tok", "num_attention_heads", "num_key_value_heads", "num_query_heads", "num_kv_heads", "head_dim",
    "ffn_multipliers", "rope_theta",
)  # fmt: skip
"""Keys with a number in most configs, and a list with one entry per layer in some."""

NOT_BY_LAYER = re.compile(
    r"token|architectures|section|kernel|stride|conv|tdnn|dilation|_dims?$|features?|factor|mean$|std$|image|patch|limit|^mtp_|label"
    r"|suppress|names?$|ratio|depths|sizes$|indices$|auto_map"
)
"""Matches keys of lists that are never by layer, whatever their length."""

CYCLES = ("block_types",)
"""Lists by layer that repeat if they are shorter than the number of layers."""

LAYER_INDICES = (
    "mlp_only_layers", "full_attn_idxs", "full_attention_layers", "attn_layer_indices", "cross_attention_layers",
    "global_attn_indexes", "moe_layers", "dense_layers", "fullatt_block_indexes", "deepstack_visual_indexes", "hybrid_layer_ids",
    "local_layer_ids", "window_block_indexes", "rope_scaling_layers", "full_attn_layers", "kda_layers", "ple_layer_ids",
)  # fmt: skip
"""Config lists of layer numbers."""

FROM_ONE = ("full_attn_layers", "kda_layers", "ple_layer_ids")
"""The lists among them in which the first layer is 1."""

LAYER_REFERENCES = ("kv_source_layers",)
"""Lists by layer whose entries are layer numbers."""

ACROSS_LAYERS = (
    "embed_tokens_per_layer.weight", "per_layer_model_projection.weight", "contact_head.regression.weight", "layer_weights",
)  # fmt: skip
"""Endings of tensors outside of layers that have a part for each layer."""

ROOTS_OF_COUNT = ("scale_depth",)
"""Numbers that the model divides by the square root of the number of layers."""


@dataclass(frozen=True)
class LayerRule:
    """A property of layer ``i`` of ``n`` that a config number sets and that a moved layer must keep."""

    key: str
    value: Callable[[Mapping[str, Any], int, int], object]
    unless: tuple[str, ...] = ()
    """Lists by layer that override the number."""
    numbers: Callable[[Sequence[object]], Mapping[str, int]] | None = None
    """Returns the numbers that give the output's layers their properties, if numbers can."""
    types: tuple[str, ...] = ()
    """The model types that the rule applies to; empty for all."""


def _every(key: str, config: Mapping[str, Any], i: int, offset: int = 1) -> bool:
    return not config[key] or (i + offset) % int(config[key]) == 0


def _leading(key: str) -> Callable[[Sequence[object]], Mapping[str, int]]:
    return lambda values: {key: len(list(itertools.takewhile(bool, values)))}


def _in_range(config: Mapping[str, Any], i: int, n: int) -> bool:
    end = config.get("moe_layer_end_index", -1)
    last = n - 1 if end is None or end < 0 else end
    return (
        config["moe_layer_start_index"] <= i <= last
        and (i + 1) % int(config.get("moe_layer_interval", 1)) == 0
    )


def _written_range(values: Sequence[object]) -> Mapping[str, int]:
    sparse = [i for i, is_sparse in enumerate(values) if is_sparse]
    first, last = (sparse[0], sparse[-1]) if sparse else (len(values), len(values))
    return {"moe_layer_start_index": first, "moe_layer_end_index": last}


LAYER_RULES = (
    LayerRule("decoder_sparse_step", lambda c, i, _: _every("decoder_sparse_step", c, i)),
    LayerRule(
        "first_k_dense_replace",
        lambda c, i, _: i < c["first_k_dense_replace"],
        ("mlp_layer_types",),
        _leading("first_k_dense_replace"),
    ),
    LayerRule(
        "num_dense_layers", lambda c, i, _: i < c["num_dense_layers"], (), _leading("num_dense_layers")
    ),
    LayerRule("moe_layer_start_index", _in_range, ("mlp_layer_types",), _written_range),
    LayerRule(
        "moe_layer_freq",
        lambda c, i, _: isinstance(c["moe_layer_freq"], list) or i % int(c["moe_layer_freq"] or 1) == 0,
    ),
    LayerRule(
        "interleave_moe_layer_step",
        lambda c, i, _: _every("interleave_moe_layer_step", c, i),
        ("moe_layers",),
    ),
    LayerRule(
        "sliding_window_pattern", lambda c, i, _: _every("sliding_window_pattern", c, i), ("layer_types",)
    ),
    LayerRule(
        "_sliding_window_pattern", lambda c, i, _: _every("_sliding_window_pattern", c, i), ("layer_types",)
    ),
    LayerRule(
        "max_window_layers",
        lambda c, i, _: bool(c.get("use_sliding_window")) and i >= c["max_window_layers"],
        ("layer_types",),
    ),
    LayerRule(
        "full_attention_interval", lambda c, i, _: _every("full_attention_interval", c, i), ("layer_types",)
    ),
    LayerRule("layer_group_size", lambda c, i, _: _every("layer_group_size", c, i), ("layer_types",)),
    LayerRule(
        "no_rope_layer_interval", lambda c, i, _: _every("no_rope_layer_interval", c, i), ("no_rope_layers",)
    ),
    LayerRule(
        "global_attn_every_n_layers",
        lambda c, i, _: i % int(c["global_attn_every_n_layers"] or 1) == 0,
        ("layer_types",),
    ),
    LayerRule(
        "attn_layer_period",
        lambda c, i, _: i % int(c["attn_layer_period"] or 1) == c.get("attn_layer_offset", 0),
        ("layers_block_type", "layer_types"),
    ),
    LayerRule(
        "expert_layer_period",
        lambda c, i, _: i % int(c["expert_layer_period"] or 1) == c.get("expert_layer_offset", 0),
    ),
    LayerRule("cross_attention_freq", lambda c, i, _: i % int(c["cross_attention_freq"] or 1) == 0),
    LayerRule("cross_attention_frequency", lambda c, i, _: i % int(c["cross_attention_frequency"] or 1) == 0),
    LayerRule("cross_layer_interval", lambda c, i, _: i % int(c["cross_layer_interval"] or 1) == 0),
    LayerRule(
        "num_kv_shared_layers",
        lambda c, i, n: i >= n - c["num_kv_shared_layers"],
        (),
        lambda values: {"num_kv_shared_layers": len(list(itertools.takewhile(bool, reversed(values))))},
    ),
    LayerRule(
        "n_layers_per_attn_res_block", lambda c, i, _: i % int(c["n_layers_per_attn_res_block"] or 1) == 0
    ),
    LayerRule(
        "scale_attn_by_inverse_layer_idx", lambda c, i, _: bool(c["scale_attn_by_inverse_layer_idx"]) and i
    ),
    # Layers compute with constants derived from their numbers.
    LayerRule("model_type", lambda _, i, __: i, types=("diffllama", "beam")),
    # Residuals are scaled by the root of the number of layers; part of a layer is stored under the next number.
    LayerRule("model_type", lambda _, __, n: n, types=("esmc",)),
    LayerRule("model_type", lambda _, i, n: (i, n), types=("inkling2_text", "inkling2_loop_text")),
)

CONSTANTS: Mapping[str, str] = {"minimax": "slope_rate", "minimax_text_01": "slope_rate"}
"""Model types whose layers have a constant derived from their numbers, and the ending of its name if it is
stored."""

ENDS_IN_FULL_ATTENTION = (
    "gemma4_text",
    "gemma4_unified_text",
    "diffusion_gemma_text",
    "embedding_gemma2_text",
)
"""Model types whose last layer always has full attention, whatever the config says."""

OTHER_NUMBERS = re.compile(r"(^|_)(layers?|interval|every|period|frequency|freq)(_|$)|first_k")
NO_LAYER_NUMBERS = re.compile(
    r"_offset$|_input$|_size$|_dim$|_stride$|moe_layer_(end_index|interval)$|diffusion_max_period|update_period|token|norm|dropout|scale"
    r"|(adapter|conv|extract|pooler|residual|lstm|add|predictor|postnet|prenet|wavenet|lqe|proj|head|auxiliary|feature)_layers?$"
    r"|^(r|l|x|t2u_encoder|t2u_decoder|speech_encoder)_layers$|(conf|decoder|encoder|pred|mit|trunk)_num_(hidden_)?layers$"
)
"""Match keys of numbers that may refer to layers by number, and exceptions that do not."""


_Implied = Callable[[Mapping[str, Any], int], list[Any]]


def _cycle(*kinds: str) -> _Implied:
    return lambda _, n: [kinds[i % len(kinds)] for i in range(n)]


def _last_of(
    key: str, default: int, last: str = "full_attention", others: str = "sliding_attention"
) -> _Implied:
    """Every ``key``-th layer, the last of its group, has another type."""
    return lambda c, n: [others if (i + 1) % int(c.get(key) or default) else last for i in range(n)]


def _first_of(key: str, default: int) -> _Implied:
    return lambda c, n: [
        "sliding_attention" if i % int(c.get(key) or default) else "full_attention" for i in range(n)
    ]


def _rotates(config: Mapping[str, Any], n: int) -> list[Any]:
    return [int((i + 1) % int(config.get("no_rope_layer_interval") or 4) != 0) for i in range(n)]


def _dense_first(default: int) -> _Implied:
    def implied(config: Mapping[str, Any], n: int) -> list[Any]:
        dense = config.get("first_k_dense_replace", default)
        return ["dense" if i < dense else "sparse" for i in range(n)]

    return implied


def _sparse_first(_: Mapping[str, Any], n: int) -> list[Any]:
    return [0.95 if n > 10 and i < 10 else 0.0 for i in range(n)]


_QWEN = _last_of("full_attention_interval", 4, others="linear_attention")
IMPLIED: Mapping[str, Mapping[str, _Implied]] = {
    "gemma2": {"layer_types": _last_of("", 2)},
    "vaultgemma": {"layer_types": _last_of("", 2)},
    "t5_gemma_module": {"layer_types": _last_of("", 2)},
    "gpt_oss": {"layer_types": _last_of("", 2)},
    "gemma3_text": {"layer_types": _last_of("sliding_window_pattern", 6)},
    "gemma3n_text": {"layer_types": _last_of("", 5), "activation_sparsity_pattern": _sparse_first},
    "cohere2": {"layer_types": _last_of("sliding_window_pattern", 4)},
    "exaone4": {"layer_types": _last_of("sliding_window_pattern", 4)},
    "olmo3": {"layer_types": _last_of("", 4)},
    "afmoe": {"layer_types": _last_of("global_attn_every_n_layers", 4)},
    "kolibri1": {"layer_types": _last_of("", 5)},
    "cwm": {"layer_types": _first_of("", 4)},
    "granite_swa": {"layer_types": _first_of("", 4)},
    "granitemoe_swa": {"layer_types": _first_of("", 4)},
    "modernbert": {"layer_types": _first_of("global_attn_every_n_layers", 3)},
    "modernbert-decoder": {"layer_types": _first_of("global_attn_every_n_layers", 3)},
    "minimax": {"layer_types": _cycle("full_attention", "linear_attention")},
    "qwen3_next": {"layer_types": _QWEN},
    "qwen3_5_text": {"layer_types": _QWEN},
    "qwen3_5_moe_text": {"layer_types": _QWEN},
    "recurrent_gemma": {"block_types": _cycle("recurrent", "recurrent", "attention")},
    "smollm3": {"no_rope_layers": _rotates},
    "llama4_text": {"no_rope_layers": _rotates},
    **{
        kind: {"mlp_layer_types": _dense_first(1)}
        for kind in (
            "axk1",
            "axk2",
            "ernie4_5_vl_moe_text",
            "glm4_moe_lite",
            "hy_v3",
            "laguna",
            "unlimited_ocr_text",
        )
    },
    "deepseek_v32": {"mlp_layer_types": _dense_first(3)},
    "exaone_moe": {"layer_types": _last_of("sliding_window_pattern", 4), "mlp_layer_types": _dense_first(1)},
    "kimi_linear": {"mlp_layer_types": _dense_first(1)},
}
"""Lists by layer that older configs omit, as the family implies them: ``model_type``, key, list."""

_CHOSEN_BY_CODE = (
    "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v4", "diffusion_gemma_text", "dots3_note_text", "embedding_gemma2_text",
    "flint", "gemma4_text", "gemma4_unified_text", "glm5_next_text", "inkling_text", "inkling2_text", "inkling2_loop_text",
    "kimi_linear", "lara_mini", "lfm3", "lfm3_vl_vision", "mimo_v2_flash", "muse_glimmer_text", "muse_glimmer_vision",
    "muse_spark_text", "muse_spark_vision", "neomme", "olmo_hybrid", "qwen4_exp_text", "t5gemma2_text", "t5gemma2_decoder",
    "ultrabert",
)  # fmt: skip
UNKNOWN_LISTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_CHOSEN_BY_CODE, ("layer_types",)),
    "glm_moe_dsa": ("mlp_layer_types", "indexer_types"),
    "hy_v4": ("mlp_layer_types", "indexer_types"),
    "hy_v4_vl_text": ("mlp_layer_types", "indexer_types"),
    "mistral_large4_text": ("mlp_layer_types", "no_rope_layers", "kv_source_layers"),
    "step3p5": ("mlp_layer_types",),
    "zamba": ("layers_block_type",),
}
"""Lists by layer with unknown defaults, by ``model_type``. If one is missing, layers must not move."""

_VISION = (
    "model.vision_tower.",
    "vision_tower.",
    "model.visual.",
    "visual.",
    "model.vision_model.",
    "vision_model.",
)

MODULES: Mapping[str, tuple[str, ...]] = {
    "multi_modal_projector": (
        "model.multi_modal_projector.", "multi_modal_projector.", "model.visual.merger.", "visual.merger.",
        "model.visual.deepstack_merger_list.", "visual.deepstack_merger_list.", "model.connector.", "connector.",
    ),
    "vision_tower": _VISION,
    "vision_model": _VISION,
    "text_decoder": ("model.language_model.", "language_model.model.", "language_model.", "model.text_model.", "text_model."),
    "encoder": ("encoder.", "model.encoder."),
    "decoder": ("decoder.", "model.decoder."),
    "shared": ("shared.",),
}  # fmt: skip
"""mergekit's module names, with the prefixes of their tensors. A head belongs to ``text_decoder`` or
``shared``; ``text_decoder`` also has everything that is in no other module."""

ONLY_MODULE = "default"
"""mergekit's module name for a whole model."""


GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("norm", ("norm", "ln_", "ln1", "ln2", "bn1", "bn2", "bn3", "batchnorm")),
    ("attention", ("multihead", "multi_head")),
    ("mlp", ("shared_expert", "sparse_moe")),
    ("head", ("lm_head", "embed_out", "predictions", "classifier", "score", "pooler", "head", "logits")),
    ("embedding", ("embed", "wte", "wpe", "shared", "tok_embeddings", "relative_attention_bias", "class_token", "cls_token")),
    ("attention", ("attn", "attention", "qkv", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "in_proj", "query", "key", "value")),
    (
        "mlp",
        ("mlp", "ffn", "feed_forward", "feedforward", "intermediate", "experts", "moe", "gate_proj", "up_proj", "down_proj", "fc1",
         "fc2", "c_fc", "densereludense", "dense_h_to_4h", "dense_4h_to_h", "output", "linear1", "linear2"),
    ),
)  # fmt: skip
"""Roles of tensors, by prefixes of the words in their names (or, from four letters, substrings); the first
match wins."""

OTHER = "other"
"""The group of a tensor whose name matches none."""


def group_of(name: str) -> str:
    """Return the role of a tensor: one of :data:`GROUPS`, or :data:`OTHER`.

    >>> names = "model.embed_tokens.weight", "h.0.ln_1.bias", "encoder.layer.0.attention.output.dense.weight", "layers.0.mlp.up_proj.weight"
    >>> [group_of(n) for n in names]
    ['embedding', 'norm', 'attention', 'mlp']
    >>> group_of("lm_head.weight"), group_of("encoder.layer.0.output.dense.bias"), group_of("features.0.conv.weight")
    ('head', 'mlp', 'other')
    >>> group_of("layers.0.multihead_attn.in_proj_weight"), group_of("layers.0.mlp.shared_expert.up_proj.weight")
    ('attention', 'mlp')
    """
    words = [word for word in name.lower().split(".") if not word.isdigit()]
    for group, words_of_group in GROUPS:
        if any(
            word.startswith(words_of_group) or any(len(part) > 3 and part in word for part in words_of_group)
            for word in words
        ):
            return group
    return OTHER


def is_tied(config: Mapping[str, Any]) -> bool:
    """Does a config, or else its model type, tie the model's head, if it has one, to its embedding?

    Reads the config only; :mod:`alnico.checkpoint.tied_weights` finds the tied names in a file.

    >>> [is_tied(c) for c in ({"model_type": "gpt2"}, {"model_type": "gpt2", "tie_word_embeddings": False}, {"model_type": "llama"})]
    [True, False, False]
    """
    for part in (config, *(config.get(key) for key in TEXT_CONFIGS)):
        if isinstance(part, Mapping) and "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return config.get("model_type") in TIED_BY_DEFAULT


def tied_heads(config: Mapping[str, Any], names: Collection[str], heads: Iterable[str]) -> dict[str, str]:
    """Return the ``heads`` that a config ties to an embedding among ``names``: head to embedding."""
    if not (
        config.get("tie_word_embeddings")
        or any(isinstance(c := config.get(k), dict) and c.get("tie_word_embeddings") for k in TEXT_CONFIGS)
    ):
        return {}
    embedding_by_head = {}
    for head in heads:
        for ending, embedding in TIED.items():
            tied = [n for n in names if n.endswith(embedding)] if head.endswith(ending) else []
            if tied:
                embedding_by_head[head] = tied[0]
    return embedding_by_head


def comes_first(name: str) -> bool:
    """Is a tensor outside of the layers used before them?

    >>> [comes_first(n) for n in ("model.embed_tokens.weight", "embeddings.LayerNorm.bias", "model.norm.weight", "lm_head.weight")]
    [True, True, False, False]
    >>> [comes_first(n) for n in ("transformer.word_embeddings.weight", "transformer.w.weight", "embed_out.weight")]
    [True, True, False]
    """
    words = name.split(".")
    return any(BEFORE_LAYERS.search(word) for word in words) and not any(
        word.startswith(AFTER_LAYERS) for word in words
    )


def is_predictor(name: str) -> bool:
    """Does a tensor belong to a module for multi-token prediction, by a word in its name?

    >>> [is_predictor(n) for n in ("mtp.fc.weight", "model.mtp_block.0.norm.weight", "model.layers.0.mlp.up_proj.weight")]
    [True, True, False]
    """
    return any(word.startswith("mtp") for word in name.split("."))


def is_vision(name: str) -> bool:
    """Does a tensor belong to a vision tower or its projector?"""
    return name.startswith((*MODULES["vision_tower"], *MODULES["multi_modal_projector"]))


def is_tower(stack: str) -> bool:
    """Does a stack of layers belong to a vision or audio tower, by a word in its name?

    >>> [is_tower(s) for s in ("model.embed_tokens_extend.audio_embed.encoder.encoders.", "model.audio_tower.layers.", "model.layers.")]
    [True, True, False]
    """
    return any(word.startswith(TOWERS) for word in stack.split("."))


def module_of(name: str, modules: Sequence[str], prefixes: Collection[str]) -> tuple[str, str] | None:
    """Return the module of ``modules`` that has a tensor, and the name in it; None if none has it.

    ``prefixes`` are the model's prefixes, from :func:`prefixes_of`. A module name that is not in
    :data:`MODULES` is itself a prefix.

    >>> module_of("model.visual.merger.norm.weight", ["vision_tower"], prefixes_of(["model.visual.merger.norm.weight"]))
    >>> module_of("model.visual.blocks.0.norm.weight", ["vision_tower"], prefixes_of(["model.visual.blocks.0.norm.weight"]))
    ('vision_tower', 'blocks.0.norm.weight')
    >>> module_of("model.layers.0.w", ["text_decoder"], ())
    ('text_decoder', 'layers.0.w')
    >>> module_of("model.layers.0.w", ["default"], ())
    ('default', 'model.layers.0.w')
    """
    if ONLY_MODULE in modules:
        return ONLY_MODULE, name
    own = [m for m in modules if m not in MODULES and name.startswith(m.rstrip(".") + ".")]
    if own:
        longest = max(own, key=len)
        return longest, name[len(longest.rstrip(".")) + 1 :]
    prefix = max((p for p in prefixes if name.startswith(p)), key=len, default="")
    known_modules = [m for m in modules if m in MODULES]
    if prefix:
        holders = [m for m in known_modules if prefix in MODULES[m]]
        return (holders[0], name[len(prefix) :].removeprefix("model.")) if holders else None
    owner = "shared" if "shared" in known_modules and is_head(name) else "text_decoder"
    return (
        (owner, name.removeprefix("language_model.").removeprefix("model."))
        if owner in known_modules
        else None
    )


def prefixes_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the prefixes of :data:`MODULES` that a model's tensors have."""
    all_prefixes = dict.fromkeys(p for prefixes in MODULES.values() for p in prefixes)
    others = [n for n in names if not is_head(n)]
    return tuple(p for p in all_prefixes if any(n.startswith(p) for n in others))


def is_lookup(name: str) -> bool:
    """Is a weight an embedding table?

    >>> [is_lookup(n) for n in ("model.embed_tokens.weight", "embeddings.position_embeddings.weight", "embeddings_project.weight")]
    [True, True, False]
    """
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and module.rpartition(".")[2].endswith(LOOKUPS)


def counter_meaning(name: str) -> str | None:
    """Return the meaning of a buffer that is not a weight; None for all other names.

    >>> counter_meaning("bn1.num_batches_tracked"), counter_meaning("model_ema.decay"), counter_meaning("head.weight")
    ('a count of batches', 'a setting of the moving average', None)
    """
    if not name.endswith(_COUNTED):
        return None
    return next((what for end, what in COUNTERS.items() if name == end or name.endswith(f".{end}")), None)
