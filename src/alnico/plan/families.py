"""All that alnico knows of families of models: endings of names, keys of configs. Names and shapes in headers say the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alnico.checkpoint.model import Source

TIED = {"lm_head.weight": "embed_tokens.weight", "decoder.weight": "embeddings.word_embeddings.weight"}
"""Heads that a config with ``tie_word_embeddings`` takes from the embedding. Matched at the end of a name."""

EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight", "shared.weight")
HEADS = (
    "lm_head.weight",
    "lm_head.bias",
    "embed_out.weight",
    "predictions.decoder.weight",
    "predictions.decoder.bias",
    "predictions.bias",
)
"""Endings of the tensors with a row for each token."""

BEFORE_LAYERS = ("embed", "wte", "wpe", "shared", "position_ids")
"""Beginnings of the words in the name of a tensor that is used before the layers; what is in no layer else comes after."""

LOOKUPS = (
    "embed_tokens", "embeddings", "embedding", "wte", "wpe", "embed_in", "embed_tokens_per_layer", "shared", "relative_attention_bias",
)  # fmt: skip
"""How the last words of modules end that look rows up: torch's Embedding, whose weight is no matrix that multiplies."""

OTHER_TABLES = ("embed_positions.weight",)
"""Endings of tables whose modules are no plain embeddings: some are called with something else than the rows' numbers."""

TIED_BY_ITSELF = ("gpt2", "t5", "mt5", "bert", "roberta", "distilbert", "opt", "gemma", "gemma2", "gemma3_text", "bart", "mbart")
"""Types of models that tie their head to the embedding unless the config says otherwise."""

ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "router.weight", "feed_forward.gate.weight")
"""Endings of matrices that choose experts; their modules are no linear layers in all versions of transformers."""

TURNED_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
TURNED_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Types of models whose modules of these names are ``Conv1D`` of transformers: a linear layer that stores (in, out)."""

STATISTICS = "running_var"
BATCH_COUNT = "num_batches_tracked"
"""The last words in the names of BatchNorm's buffers: statistics of activations, which averaging weights does not average."""

COUNTERS = {
    BATCH_COUNT: "a count of batches", "model_ema.num_updates": "a count of updates", "ema.num_updates": "a count of updates",
    "model_ema.decay": "a setting of the moving average", "ema.decay": "a setting of the moving average",
    "position_ids": "numbers of positions",
}  # fmt: skip
"""Ends of the names of buffers that are no weights, and what they are: of Stable Diffusion's checkpoints, which store them in any dtype, also."""

COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
"""Keys of a config that give the number of layers."""

TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config")
VISION_CONFIGS = ("vision_config", "visual_config")

PER_LAYER_WORDS = ("layer", "block", "freq", "types", "pattern", "window")
"""A list of a config whose name has one of these words, and that is as long as the model has layers, has an entry for each."""

LAYER_INDICES = (
    "mlp_only_layers", "full_attn_idxs", "full_attention_layers", "attn_layer_indices", "cross_attention_layers",
    "global_attn_indexes", "moe_layers", "dense_layers", "fullatt_block_indexes", "deepstack_visual_indexes",
)  # fmt: skip
"""Lists of a config that hold numbers of layers."""


@dataclass(frozen=True)
class LayerRule:
    """Something that a config says of layer ``i`` by a number, and that must stay true of a layer that moves."""

    key: str
    says: Callable[[Mapping[str, Any], int], object]
    unless: tuple[str, ...] = ()
    """Lists of the config that say it by layer, and win."""


def _every(key: str, config: Mapping[str, Any], i: int, offset: int = 1) -> bool:
    return (i + offset) % int(config[key]) == 0


LAYER_RULES = (
    LayerRule("decoder_sparse_step", lambda c, i: _every("decoder_sparse_step", c, i)),
    LayerRule("first_k_dense_replace", lambda c, i: i < c["first_k_dense_replace"]),
    LayerRule("num_dense_layers", lambda c, i: i < c["num_dense_layers"]),
    LayerRule("moe_layer_freq", lambda c, i: isinstance(c["moe_layer_freq"], list) or i % int(c["moe_layer_freq"]) == 0),
    LayerRule("interleave_moe_layer_step", lambda c, i: _every("interleave_moe_layer_step", c, i), ("moe_layers",)),
    LayerRule("sliding_window_pattern", lambda c, i: _every("sliding_window_pattern", c, i), ("layer_types",)),
    LayerRule(
        "max_window_layers", lambda c, i: bool(c.get("use_sliding_window")) and i >= c["max_window_layers"], ("layer_types",)
    ),
    LayerRule("full_attention_interval", lambda c, i: _every("full_attention_interval", c, i), ("layer_types",)),
    LayerRule("no_rope_layer_interval", lambda c, i: _every("no_rope_layer_interval", c, i), ("no_rope_layers",)),
    LayerRule("global_attn_every_n_layers", lambda c, i: i % int(c["global_attn_every_n_layers"]) == 0, ("layer_types",)),
    LayerRule("attn_layer_period", lambda c, i: i % int(c["attn_layer_period"]) == c.get("attn_layer_offset", 0)),
    LayerRule("expert_layer_period", lambda c, i: i % int(c["expert_layer_period"]) == c.get("expert_layer_offset", 0)),
    LayerRule("cross_attention_freq", lambda c, i: i % int(c["cross_attention_freq"]) == 0),
)

IMPLIED_TYPES: Mapping[str, Callable[[int], str]] = {
    "gemma2": lambda i: "full_attention" if i % 2 else "sliding_attention",
    "gemma3_text": lambda i: "sliding_attention" if (i + 1) % 6 else "full_attention",
    "cohere2": lambda i: "sliding_attention" if (i + 1) % 4 else "full_attention",
}
"""What a layer is in families whose configs of older days do not say it, by ``model_type``."""

_VISION = ("model.vision_tower.", "vision_tower.", "model.visual.", "visual.", "model.vision_model.", "vision_model.")

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
"""mergekit's names for the modules of a model, and how the names of their tensors begin. A head is part of ``text_decoder``, or of
``shared``; ``text_decoder`` has all that is in no other module, too."""

ONLY_MODULE = "default"
"""mergekit's name for all of a model that it does not take apart."""


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
"""What a tensor is for, by what the words of its name begin with or, from four letters on, contain; the first that fits wins."""

OTHER = "other"
"""The group of a tensor whose name tells nothing."""


def group_of(name: str) -> str:
    """What a tensor is for: one of :data:`GROUPS`, or :data:`OTHER`.

    >>> names = "model.embed_tokens.weight", "h.0.ln_1.bias", "encoder.layer.0.attention.output.dense.weight", "layers.0.mlp.up_proj.weight"
    >>> [group_of(n) for n in names]
    ['embedding', 'norm', 'attention', 'mlp']
    >>> group_of("lm_head.weight"), group_of("encoder.layer.0.output.dense.bias"), group_of("features.0.conv.weight")
    ('head', 'mlp', 'other')
    >>> group_of("layers.0.multihead_attn.in_proj_weight"), group_of("layers.0.mlp.shared_expert.up_proj.weight")
    ('attention', 'mlp')
    """
    words = [word for word in name.lower().split(".") if not word.isdigit()]
    for group, known in GROUPS:
        if any(word.startswith(known) or any(len(k) > 3 and k in word for k in known) for word in words):
            return group
    return OTHER


def vocabulary_tensors(source: Source) -> tuple[str, ...]:
    """The tensors of a model with a row for each token: embeddings and heads."""
    return tuple(n for n in source.tensors if n.endswith((*EMBEDDINGS, *HEADS)))


def is_tied(config: Mapping[str, Any]) -> bool:
    """Does a model of this config take its head, if it has one, from its embedding?

    >>> [is_tied(c) for c in ({"model_type": "gpt2"}, {"model_type": "gpt2", "tie_word_embeddings": False}, {"model_type": "llama"})]
    [True, False, False]
    """
    for part in (config, *(config.get(key) for key in TEXT_CONFIGS)):
        if isinstance(part, Mapping) and "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return config.get("model_type") in TIED_BY_ITSELF


def tied_heads(config: Mapping[str, Any], names: Collection[str], heads: Iterable[str]) -> dict[str, str]:
    """Which of ``heads`` a config ties to an embedding among ``names``: head to embedding."""
    if not (
        config.get("tie_word_embeddings")
        or any(isinstance(c := config.get(k), dict) and c.get("tie_word_embeddings") for k in TEXT_CONFIGS)
    ):
        return {}
    found = {}
    for head in heads:
        for ending, embedding in TIED.items():
            tied = [n for n in names if n.endswith(embedding)] if head.endswith(ending) else []
            if tied:
                found[head] = tied[0]
    return found


def comes_first(name: str) -> bool:
    """Is a tensor that is in no layer used before the layers?

    >>> [comes_first(n) for n in ("model.embed_tokens.weight", "embeddings.LayerNorm.bias", "model.norm.weight", "lm_head.weight")]
    [True, True, False, False]
    """
    return any(word.startswith(BEFORE_LAYERS) for word in name.split("."))


def is_vision(name: str) -> bool:
    """Is a tensor of a vision tower, or between it and the text decoder?"""
    return name.startswith((*MODULES["vision_tower"], *MODULES["multi_modal_projector"]))


def module_of(name: str, asked: Sequence[str], prefixes: Collection[str]) -> tuple[str, str] | None:
    """The module of ``asked`` that a tensor belongs to and its name there, None for a tensor of no module asked for.

    ``prefixes`` are the beginnings that the model has, as :func:`prefixes_of` lists them. A name that is no module's known here is
    a beginning itself.

    >>> module_of("model.visual.merger.norm.weight", ["vision_tower"], prefixes_of(["model.visual.merger.norm.weight"]))
    >>> module_of("model.visual.blocks.0.norm.weight", ["vision_tower"], prefixes_of(["model.visual.blocks.0.norm.weight"]))
    ('vision_tower', 'blocks.0.norm.weight')
    >>> module_of("model.layers.0.w", ["text_decoder"], ())
    ('text_decoder', 'layers.0.w')
    >>> module_of("model.layers.0.w", ["default"], ())
    ('default', 'model.layers.0.w')
    """
    if ONLY_MODULE in asked:
        return ONLY_MODULE, name
    own = [m for m in asked if m not in MODULES and name.startswith(m.rstrip(".") + ".")]
    if own:
        longest = max(own, key=len)
        return longest, name[len(longest.rstrip(".")) + 1 :]
    found = max((p for p in prefixes if name.startswith(p)), key=len, default="")
    named = [m for m in asked if m in MODULES]
    if found:
        holders = [m for m in named if found in MODULES[m]]
        return (holders[0], name[len(found) :].removeprefix("model.")) if holders else None
    owner = "shared" if "shared" in named and name.endswith(HEADS) else "text_decoder"
    return (owner, name.removeprefix("language_model.").removeprefix("model.")) if owner in named else None


def prefixes_of(names: Iterable[str]) -> tuple[str, ...]:
    """The beginnings of module names that occur among the names of a model's tensors."""
    known = dict.fromkeys(p for prefixes in MODULES.values() for p in prefixes)
    others = [n for n in names if not n.endswith(HEADS)]
    return tuple(p for p in known if any(n.startswith(p) for n in others))


def is_lookup(name: str) -> bool:
    """Is a weight the table of an embedding?

    >>> [is_lookup(n) for n in ("model.embed_tokens.weight", "embeddings.position_embeddings.weight", "embeddings_project.weight")]
    [True, True, False]
    """
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and module.rpartition(".")[2].endswith(LOOKUPS)


def is_turned_linear(name: str, config: Mapping[str, Any]) -> bool:
    """Is a weight that of a linear layer which stores (in, out)?

    >>> [is_turned_linear("h.0.attn.c_attn.weight", {"model_type": t}) for t in ("gpt2", "gpt_bigcode")]
    [True, False]
    """
    words = name.split(".")
    return config.get("model_type") in TURNED_TYPES and len(words) > 1 and words[-1] == "weight" and words[-2] in TURNED_MODULES


def counted(name: str) -> str | None:
    """What a buffer is that is no weight, by its name; None for all others.

    >>> counted("bn1.num_batches_tracked"), counted("model_ema.decay"), counted("head.weight")
    ('a count of batches', 'a setting of the moving average', None)
    """
    return next((what for end, what in COUNTERS.items() if name == end or name.endswith(f".{end}")), None)
