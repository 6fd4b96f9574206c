"""Tensors that a model has under several names: which copies a config ties to a stored tensor.

The facts are those of transformers' ``_tied_weights_keys``. There is no table of architectures: names in the file say which head there is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config")

TIED_BY_ITSELF = (
    "gpt2", "t5", "mt5", "umt5", "longt5", "bert", "roberta", "xlm-roberta", "distilbert", "opt", "gemma", "gemma2", "gemma3", "gemma3_text",
    "bart", "mbart", "bloom", "whisper", "electra", "albert", "mamba", "mamba2", "modernbert",
)  # fmt: skip
"""Types of models that are tied unless the config says otherwise, also where a head is stored."""

WITH_HEAD = (
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
"""Endings of the classes whose head has the embedding's rows."""

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
"""Endings of embeddings, and the modules of their heads that are not ``lm_head``, with the types of models that call them so."""

HEAD_OF_WORDS = (
    ("cls.predictions.", "cls.predictions.decoder"),
    ("predictions.", "predictions.decoder"),
    ("generator_predictions.", "generator_lm_head"),
    ("vocab_transform.", "vocab_projector"),
    ("mlm_score.", "mlm_score.decoder"),
    ("lm_head.dense.", "lm_head.decoder"),
    ("lm_head.layer_norm.", "lm_head.decoder"),
)
"""Where a tensor's name begins so, the head of a masked language model is called so."""

SCALED_BY_TIE = ("t5", "umt5", "longt5", "pop2piano")
"""Types of models that scale the decoder's output if ``tie_word_embeddings`` is set, or ``scale_decoder_outputs``."""

BIASES = ("cls.predictions", "predictions", "lm_head")
"""Modules whose bias is also that of their ``decoder``."""


def architectures(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes that a config says its model is of; none where it says no list.

    >>> architectures({"architectures": ["LlamaForCausalLM"]}), architectures({"architectures": 5})
    (('LlamaForCausalLM',), ())
    """
    given = config.get("architectures")
    return tuple(str(name) for name in given) if isinstance(given, list) else ()


def tie_setting(config: Mapping[str, Any]) -> bool | None:
    """Does a config say that a model's head is tied to its embedding? None if it says nothing.

    >>> [is_tied(c) for c in ({"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": False}}, {})]
    [True, False, None]
    """
    for part in (config, *(config.get(key) for key in TEXT_CONFIGS)):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def tied_copies(config: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """Names that a model ties to a tensor among ``names``: copy to original. A copy may be among ``names`` too.

    A head that is not stored is tied, whatever the config leaves out; one that is stored is tied if the config, or its type, says so.

    >>> tied_copies({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, ["model.embed_tokens.weight"])
    {'lm_head.weight': 'model.embed_tokens.weight'}
    >>> tied_copies({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, ["model.embed_tokens.weight", "lm_head.weight"])
    {}
    """
    says = tie_setting(config)
    if says is False or not config:
        return {}
    classes = architectures(config)
    has_head = any(c.endswith(WITH_HEAD) for c in classes)
    found: dict[str, str] = {}
    original = _embedding(names)
    if original is None:
        return {}
    ending = next(e for e, _ in HEADS if original.endswith(e))
    if ending == "shared.weight":
        stem = original.removesuffix(ending)
        sides = ("encoder",) if any(c.endswith("EncoderModel") for c in classes) else ("encoder", "decoder")
        found = {f"{stem}{side}.embed_tokens.weight": original for side in sides}
    if has_head:
        head = _head(str(config.get("model_type")), ending, names)
        if says or f"{head}.weight" not in names or config.get("model_type") in TIED_BY_ITSELF:
            found[f"{head}.weight"] = original
            stem, _, last = head.rpartition(".")
            if (
                last == "decoder"
                and stem.endswith(BIASES)
                and f"{stem}.bias" in names
                and config.get("model_type") != "esm"
            ):
                found[f"{head}.bias"] = f"{stem}.bias"
    return found


def _embedding(names: Collection[str]) -> str | None:
    """The embedding of the text: the one that is shared, or the decoder's."""
    for ending, _ in sorted(HEADS, key=lambda h: h[0] != "shared.weight"):
        held = [n for n in names if n.endswith(ending) and (n == ending or n[-len(ending) - 1] == ".")]
        for word in ("language_model", "text_model", "decoder"):
            held = [n for n in held if word in n.split(".")] or held
        if len(held) == 1:
            return held[0]
    return None


def _head(kind: str, ending: str, names: Collection[str]) -> str:
    """The module of the head that belongs to an embedding."""
    for head, kinds in next(heads for e, heads in HEADS if e == ending):
        if kind in kinds.split():
            return head
    if ending == "word_embeddings.weight":
        for begin, head in HEAD_OF_WORDS:
            held = next((n for n in names if f".{begin}" in f".{n}"), None)
            if held is not None:
                return held[: f".{held}".index(f".{begin}")] + head
    return "lm_head"


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says ``tie_word_embeddings: false``, at the top and wherever else it is said."""
    changed = {
        k: untied_config(v) if isinstance(v, dict) and _says_tied(k, v) else v for k, v in config.items()
    }
    if config.get("model_type") in SCALED_BY_TIE:
        changed.setdefault("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    return {**changed, "tie_word_embeddings": False}


def _says_tied(key: str, section: Mapping[str, Any]) -> bool:
    return (
        key == "text_config"
        or "tie_word_embeddings" in section
        or any(isinstance(v, dict) and _says_tied(k, v) for k, v in section.items())
    )
