"""Finds tied weights: tensors that a config stores once and uses under several names.

Follows transformers' ``_tied_weights_keys``, without a table of architectures: the names in the file show
which head a model has. No values are read; :mod:`alnico.checkpoint.duplicate_tensors` finds copies by their
bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config")

TIED_BY_DEFAULT = (
    "gpt2", "t5", "mt5", "umt5", "longt5", "bert", "roberta", "xlm-roberta", "distilbert", "opt", "gemma", "gemma2", "gemma3", "gemma3_text",
    "bart", "mbart", "bloom", "whisper", "electra", "albert", "mamba", "mamba2", "modernbert",
)  # fmt: skip
"""Model types that are tied unless the config says otherwise, even where a head is stored."""

CLASSES_WITH_HEAD = (
    "ForCausalLM",
    "ForConditionalGeneration",
    "LMHeadModel",
    "ForMaskedLM",
    "ForPreTraining",
    "LMHead",
    "ForSpeechSeq2Seq",
    "MTModel",
    "GenerationDecoder",
)
"""Ends of the names of classes whose head shares the embedding's rows."""

HEADS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("embed_tokens.weight", (("proj_out", "whisper moonshine moonshine_streaming canary cohere_asr"), ("output_projection", "biogpt trocr fsmt"),
                             ("lm_head.out_proj", "t5gemma t5gemma2"), ("text_model.lm_head", "kosmos-2 kosmos-2.5"), ("language_model.lm_head", "blip-2 instructblip instructblipvideo"))),
    ("shared.weight", ()),
    ("wte.weight", ()),
    ("word_embeddings.weight", (("output", "git"), ("lm_head.decoder", "bert-generation"))),
    ("tok_embeddings.weight", (("decoder", "modernbert modernbert-decoder"),)),
    ("backbone.embeddings.weight", ()),
    ("rwkv.embeddings.weight", (("head", "rwkv"),)),
    ("transformer.embeddings.weight", (("pred_layer.proj", "xlm flaubert"),)),
    ("transformer.w.weight", ()),
    ("transformer.word_embedding.weight", (("lm_loss", "xlnet"),)),
    ("tokens_embed.weight", ()),
    ("embed_in.weight", (("embed_out", "gpt_neox gpt_neox_japanese"),)),
)  # fmt: skip
"""Ends of embeddings' names, with the modules of their heads other than ``lm_head`` and the model types that
have these."""

MASKED_LM_HEADS = (
    ("cls.predictions.", "cls.predictions.decoder"),
    ("predictions.", "predictions.decoder"),
    ("generator_predictions.", "generator_lm_head"),
    ("vocab_transform.", "vocab_projector"),
    ("mlm_score.", "mlm_score.decoder"),
    ("lm_head.dense.", "lm_head.decoder"),
    ("lm_head.layer_norm.", "lm_head.decoder"),
)
"""Start of a tensor's name, and the module of a masked language model's head that it implies."""

SCALED_BY_TIE = ("t5", "umt5", "longt5", "pop2piano")
"""Model types that scale the decoder's output if ``tie_word_embeddings`` or ``scale_decoder_outputs`` is
set."""

SHARED_BIASES = ("cls.predictions", "predictions", "lm_head")
"""Modules that share their bias with their ``decoder``."""


def architectures(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in a config's ``architectures``; none if that is not a list.

    >>> architectures({"architectures": ["LlamaForCausalLM"]}), architectures({"architectures": 5})
    (('LlamaForCausalLM',), ())
    """
    names = config.get("architectures")
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def tie_setting(config: Mapping[str, Any]) -> bool | None:
    """The config's ``tie_word_embeddings``, at the top or for the text; None if it is not set.

    >>> [tie_setting(c) for c in ({"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": False}}, {})]
    [True, False, None]
    """
    for part in (config, *(config.get(key) for key in TEXT_CONFIGS)):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def tied_copies(config: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """Map each name that a config ties to a tensor in ``names`` to that tensor. A copy may itself be in
    ``names``.

    A head that is not stored is tied, unless the config says otherwise; a stored one is tied if the config or
    the model type says so.

    >>> tied_copies({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, ["model.embed_tokens.weight"])
    {'lm_head.weight': 'model.embed_tokens.weight'}
    >>> tied_copies({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, ["model.embed_tokens.weight", "lm_head.weight"])
    {}
    """
    setting = tie_setting(config)
    if setting is False or not config:
        return {}
    classes = architectures(config)
    has_head = any(c.endswith(CLASSES_WITH_HEAD) for c in classes)
    copies: dict[str, str] = {}
    original = _find_embedding(names)
    if original is None:
        return {}
    ending = next(e for e, _ in HEADS if original.endswith(e))
    if ending == "shared.weight":
        stem = original.removesuffix(ending)
        sides = ("encoder",) if any(c.endswith("EncoderModel") for c in classes) else ("encoder", "decoder")
        copies = {f"{stem}{side}.embed_tokens.weight": original for side in sides}
    if has_head:
        head = _head_of(str(config.get("model_type")), ending, names)
        if setting or f"{head}.weight" not in names or config.get("model_type") in TIED_BY_DEFAULT:
            copies[f"{head}.weight"] = original
            stem, _, last = head.rpartition(".")
            if (
                last == "decoder"
                and stem.endswith(SHARED_BIASES)
                and f"{stem}.bias" in names
                and config.get("model_type") != "esm"
            ):
                copies[f"{head}.bias"] = f"{stem}.bias"
    return copies


def _find_embedding(names: Collection[str]) -> str | None:
    """Find the embedding of the text: the shared one, or the decoder's."""
    for ending, _ in sorted(HEADS, key=lambda h: h[0] != "shared.weight"):
        matches = [n for n in names if n.endswith(ending) and (n == ending or n[-len(ending) - 1] == ".")]
        for word in ("language_model", "text_model", "decoder"):
            matches = [n for n in matches if word in n.split(".")] or matches
        if len(matches) == 1:
            return matches[0]
    return None


def _head_of(model_type: str, ending: str, names: Collection[str]) -> str:
    """The module of the head that belongs to an embedding."""
    for head, types in next(heads for e, heads in HEADS if e == ending):
        if model_type in types.split():
            return head
    if ending == "word_embeddings.weight":
        for begin, head in MASKED_LM_HEADS:
            match = next((n for n in names if f".{begin}" in f".{n}"), None)
            if match is not None:
                return match[: f".{match}".index(f".{begin}")] + head
    return "lm_head"


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with ``tie_word_embeddings: false``, at the top and wherever else it is set."""
    changed = {
        k: untied_config(v) if isinstance(v, dict) and _may_say_tied(k, v) else v for k, v in config.items()
    }
    if config.get("model_type") in SCALED_BY_TIE:
        changed.setdefault("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    return {**changed, "tie_word_embeddings": False}


def _may_say_tied(key: str, section: Mapping[str, Any]) -> bool:
    return (
        key == "text_config"
        or "tie_word_embeddings" in section
        or any(isinstance(v, dict) and _may_say_tied(k, v) for k, v in section.items())
    )
