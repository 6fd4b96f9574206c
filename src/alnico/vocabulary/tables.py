"""Finds the tensors of a model that have a row for each token, by shapes, the config and names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from alnico.checkpoint.source import Source
from alnico.recipe.options import matches_filter
from alnico.vocabulary.config_ids import PER_LAYER, SIZES, WITHOUT_TEXT, is_text, stated_rows

EMBEDDINGS = (
    "embed_tokens.weight",
    "word_embeddings.weight",
    "wte.weight",
    "embed_in.weight",
    "shared.weight",
)
HEADS = (
    "lm_head.weight", "lm_head.bias", "embed_out.weight", "predictions.decoder.weight", "predictions.decoder.bias", "predictions.bias",
)  # fmt: skip
"""Endings of names that are token tables in every family that has them."""
USUAL = (*EMBEDDINGS, *HEADS)

LOOKS_UP = (
    "embed_tokens", "embed_tokens_per_layer", "word_embeddings", "word_embedding", "token_embedding", "token_embeddings", "tok_embeddings",
    "tok_emb", "tokens_embed", "embed_in", "text_tokens", "embeddings", "embedding", "embed", "emb", "wte", "shared",
)  # fmt: skip
"""Endings of the last word of modules that look up rows by token. CTRL's is called ``w``."""
SCORES = (
    "head", "heads", "embed_out", "unembed", "predictions", "decoder", "pred_layer.proj", "vocab_projector", "vocab_proj", "lm_loss", "logits",
    "final_logits_bias", "output_projection", "output_proj", "proj_out", "lm_head.out_proj",
)  # fmt: skip
"""Endings of the names of modules that give each token a score."""
POSITIONS = (
    "position", "pos_emb", "pos_enc", "_pos.", "wpe", "rel_emb", "rel_attn", "type_emb", "segment", "lang_emb", "langs", "pronunciation",
    "shape_emb", "entity", "entities",
)  # fmt: skip
"""Parts of the names of tables that are not looked up by token, regardless of their number of rows."""
_OF_POSITIONS = re.compile("|".join(map(re.escape, POSITIONS)))
OTHERS = (
    "norm", "ln_", "layernorm", "patch", "conv", "time", "rel_", "relative", "rotary", "class", "score", "seq_rel", "dense", "pooler",
    "mask", "query", "latent", "codebook", "router", "gate",
)  # fmt: skip
"""Parts of the last words of other tensors."""
LINEAR = ("conv", "projection", "projector", "pooler", "attention", "mlp")
"""Parts of names, anywhere in them, of modules that have the hidden size."""
MODAL = (
    "audio", "codec", "codebook", "speech_", "vision", "image", "depth_", "t2u", "unit_", "talker", "semantic", "coarse", "fine_", "vocoder", "qformer", "protein",
)  # fmt: skip
"""Parts of the names of modules that may have their own vocabulary."""
EXPERTS_BY_TOKEN = "gate.tid2eid"
"""End of the name of DeepSeek V4's table of experts by token."""
TRANSDUCER_HEAD, MAX_DURATIONS = "joint.head", 128
"""The head of a transducer: durations follow the tokens, fewer than this number."""
TURNED = "predictions.dense.weight"
"""End of the name of MobileBERT's matrix, which has a column for each token."""


@dataclass(frozen=True)
class Tables:
    """The tensors of a model with a row for each token.

    ``size`` is the vocabulary's, None if unknown; ``rows`` has the number of rows of each table; those in
    ``turned`` have a column for each token instead; ``unclear`` are tensors of that size that may be tables.
    """

    size: int | None = None
    rows: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    turned: frozenset[str] = frozenset()
    unclear: tuple[str, ...] = ()


def find_tables(source: Source, tokens: int = 0, named: Sequence[str] = ()) -> Tables:
    """Find the token tables of a model.

    The vocabulary size is what the config states for the text model, if a matrix has as many rows; otherwise
    the rows of embeddings with a usual name. ``tokens``, the rows that the tokenizer needs, decides between
    several. Every tensor of this size is a table: in its first dimension other than 1, or outside of layers
    in its second. If the model uses the same number for something else, such as the hidden size, names
    decide; tensors that they do not decide are ``unclear``. An embedding with a few more rows is a table
    (Mllama's), and so is one whose rows have their own key in the config (Gemma 3n's per layer). ``named``,
    filters of a recipe, replaces all of this.
    """
    if named:
        rows = {
            n: rows_of(t.shape)
            for n, t in source.tensors.items()
            if t.shape and any(matches_filter(f, n) for f in named)
        }
        return Tables(Counter(rows.values()).most_common(1)[0][0] if rows else None, rows)
    # Tensors of a module's folder have names with "/", and their module has its own vocabulary.
    shapes = {n: t.shape for n, t in source.tensors.items() if t.shape and "/" not in n}
    size = _vocabulary_size(source.config, shapes, tokens)
    if size is None:
        return Tables()
    candidates = {n: shape for n, shape in shapes.items() if not _OF_POSITIONS.search(n.lower())}
    tables = [n for n, shape in candidates.items() if rows_of(shape) == size]
    turned = [
        n
        for n, s in candidates.items()
        if len(s) == 2 and s[1] == size and s[0] not in (1, size) and not _is_in_layer(n)
    ]
    unclear = [n for n in tables if _is_list_item(n) and _is_named(n, shapes[n])]
    tables = [n for n in tables if n not in unclear]
    if _is_ambiguous(size, source.config, shapes):
        verdicts = {n: _is_table(n, shapes) for n in tables}
        tables = [n for n in tables if verdicts[n]]
        turned = [n for n in turned if n.endswith(TURNED)]
        unclear += [n for n in verdicts if verdicts[n] is None]
    rows = dict.fromkeys([*tables, *turned], size)
    per_layer = {r for _, key, r in stated_rows(source.config) if key == PER_LAYER}
    others = [
        n
        for n, s in candidates.items()
        if len(s) == 2 and n not in rows and s[0] != size and _looks_up(n) and not _is_separate(n)
    ]
    longer = [n for n in others if shapes[n][0] > size and not _module(n).endswith(SCORES)]
    if len(longer) == 1 and not any(_looks_up(n) for n in tables):
        rows[longer[0]] = shapes[longer[0]][0]
    rows |= {
        n: r
        for n in candidates
        if 0 < (r := rows_of(shapes[n])) - size < MAX_DURATIONS and _module(n) == TRANSDUCER_HEAD
    }
    rows |= {
        n: shapes[n][0] for n in others if shapes[n][0] in per_layer and _module(n).endswith("per_layer")
    }
    return Tables(size, {n: rows[n] for n in shapes if n in rows}, frozenset(turned), tuple(unclear))


def rows_of(shape: Sequence[int]) -> int:
    """Return the rows of a tensor, ignoring leading dimensions of 1: a head's bias may be (1, tokens).

    >>> rows_of((5, 3)), rows_of((1, 5)), rows_of((1, 1))
    (5, 5, 1)
    """
    for n in shape:
        if n != 1:
            return n
    return 1


def is_input(name: str) -> bool:
    """Does the name of a token table say that rows are looked up in it? Otherwise it is a head.

    >>> [is_input(n) for n in ("transformer.w.weight", "model.embed_tokens.weight", "embed_out.weight", "cls.predictions.decoder.weight")]
    [True, True, False, False]
    """
    return name.endswith(".weight") and _looks_up(name) and not _module(name).endswith(SCORES)


def is_head(name: str) -> bool:
    """Does the name of a tensor belong to a module that gives each token a score?

    >>> [is_head(n) for n in ("lm_head.bias", "decoder.weight", "embed_out.weight", "decoder.layers.0.fc1.weight")]
    [True, True, True, False]
    """
    return name.endswith(HEADS) or _module(name).endswith(SCORES)


def _module(name: str) -> str:
    """Return the last two words of the name of a tensor's module, without numbers."""
    words = [w for w in name.lower().split(".") if not w.isdigit()]
    return ".".join(words[-3:-1] if words[-1:] in (["weight"], ["bias"]) else words[-2:])


def _last_word(name: str) -> str:
    """Return the last word of the name of a tensor's module, without numbers."""
    words = name.lower().rsplit(".", 2)
    if len(words) == 3 and words[2] in ("weight", "bias") and not words[1].isdigit():
        return words[1]  # of nearly all tensors, in a third of the time
    return _module(name).rpartition(".")[2]


def _looks_up(name: str) -> bool:
    return f".{name}".endswith(".w.weight") or _last_word(name).endswith(LOOKS_UP)


def _is_in_layer(name: str) -> bool:
    return any(word.isdigit() for word in name.split("."))


def _vocabulary_size(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], tokens: int
) -> int | None:
    """Return the size of the vocabulary that belongs to the tokenizer."""
    existing = {rows_of(shape) for shape in shapes.values() if len(shape) > 1}
    stated = [(keys, rows) for keys, key, rows in stated_rows(config) if key != PER_LAYER]
    confirmed = [(keys, rows) for keys, rows in stated if rows in existing]
    sizes = [rows for keys, rows in confirmed if is_text(keys)] or [rows for _, rows in confirmed]
    named = {n: rows_of(s) for n, s in shapes.items() if n.endswith(USUAL) and not _is_separate(n)}
    if not sizes and (
        smaller := _size_below_embedding(
            shapes, [rows for keys, rows in stated if is_text(keys) and rows >= tokens]
        )
    ):
        return smaller
    if not sizes or (tokens and max(sizes) < tokens):
        sizes += [rows for n, rows in named.items() if rows >= tokens] or (
            list(named.values()) if not sizes else []
        )
    sufficient = [rows for rows in sizes if rows >= tokens]
    return (min(sufficient) if tokens else max(sizes)) if sufficient else max(sizes, default=None)


def _size_below_embedding(shapes: Mapping[str, tuple[int, ...]], stated: Sequence[int]) -> int | None:
    """Return a stated size if one embedding has more rows, and no head as many: Mllama's without its head."""
    if not stated:
        return None
    tables = [
        s[0]
        for n, s in shapes.items()
        if len(s) == 2 and _looks_up(n) and not _is_separate(n) and not is_head(n)
    ]
    heads = {rows_of(s) for n, s in shapes.items() if is_head(n)}
    longest = max(tables, default=0)
    return next(
        (rows for rows in stated if rows < longest and tables.count(longest) == 1 and longest not in heads),
        None,
    )


def _is_ambiguous(size: int, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Is the vocabulary size also another number of the config, or a dimension of a tensor in a layer?"""
    is_of_text = [is_text(keys) for keys, _, rows in stated_rows(config) if rows == size]
    if size in _numbers(config) or (any(is_of_text) and not all(is_of_text)):
        return True
    return any(
        size in shape and _is_in_layer(n) and not (shape[0] == size and _is_named(n, shape))
        for n, shape in shapes.items()
    )


def _numbers(config: Mapping[str, Any], is_other: bool = False) -> Iterator[int]:
    """Yield the numbers of a config, except text vocabulary sizes, token ids and generation settings.

    ``is_other`` says that the section is not about text.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            if key in ("id2label", "label2id"):
                yield len(value)
            elif key != "vocabulary_map":
                is_without_text = any(word in str(key) for word in WITHOUT_TEXT)
                yield from _numbers({str(k): v for k, v in value.items()}, is_without_text or is_other)
        elif any(
            word in str(key) for word in ("token", "_id", "index", "max_length", "min_length", "top_k")
        ) or (not is_other and key in (*SIZES, PER_LAYER, "unpadded_vocab_size")):
            continue
        else:
            yield from (v for v in (value if isinstance(value, list) else [value]) if type(v) is int)


def _is_table(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool | None:
    """Does the name of a tensor of ambiguous size say that it is a token table? None if it does not say."""
    is_named = name.endswith(USUAL) or _is_named(name, shapes[name])
    is_other = any(word in _module(name).rpartition(".")[2] for word in OTHERS)
    is_other |= any(word in name.lower() for word in (*LINEAR, *MODAL))
    if not is_named and (_is_in_layer(name) or is_other or _is_scale(name, shapes)):
        return False
    return True if is_named and not _is_separate(name) else None


def _is_scale(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Is a tensor the weight or the bias of a norm, which are both vectors?"""
    module, _, parameter = name.rpartition(".")
    return parameter in ("weight", "bias") and len(shapes.get(f"{module}.weight", ())) == 1


def _is_separate(name: str) -> bool:
    """May a table have its own vocabulary, not the text's?"""
    return _is_list_item(name) or any(word in name.lower() for word in MODAL)


def _is_list_item(name: str) -> bool:
    """Does a tensor belong to one of a list of modules, such as the heads of codebooks?"""
    words = name.split(".")
    return len(words) > 1 and words[-2].isdigit()


def _is_named(name: str, shape: tuple[int, ...]) -> bool:
    """Does the name of a tensor say that it belongs to a token table?"""
    module = _module(name)
    is_other = any(word in module.rpartition(".")[2] for word in OTHERS)
    return not is_other and (
        module.endswith((*SCORES, EXPERTS_BY_TOKEN))
        or module.startswith("lm_head.")
        or (len(shape) == 2 and _looks_up(name))
    )
