"""Which tensors of a model have a row for each token: told by shapes and the config, and by names only where sizes coincide."""

from __future__ import annotations

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
"""Endings of names that are tables of tokens in every family that has them."""

LOOKS_UP = (
    "embed_tokens", "embed_tokens_per_layer", "word_embeddings", "word_embedding", "token_embedding", "token_embeddings", "tok_embeddings",
    "tok_emb", "tokens_embed", "embed_in", "text_tokens", "embeddings", "embedding", "embed", "emb", "wte", "shared",
)  # fmt: skip
"""How the last word of a module ends that looks rows up by token; one that is called ``w`` is CTRL's."""
SCORES = (
    "head", "heads", "embed_out", "unembed", "predictions", "decoder", "pred_layer.proj", "vocab_projector", "vocab_proj", "lm_loss", "logits",
    "final_logits_bias", "output_projection", "output_proj", "proj_out", "lm_head.out_proj",
)  # fmt: skip
"""How the name of a module ends that gives each token a score."""
POSITIONS = (
    "position", "pos_emb", "pos_enc", "_pos.", "wpe", "rel_emb", "rel_attn", "type_emb", "segment", "lang_emb", "langs", "pronunciation",
    "shape_emb", "entity", "entities",
)  # fmt: skip
"""Parts of the names of tables that are looked up by something else than a token, whatever their number of rows."""
OTHERS = (
    "norm", "ln_", "layernorm", "patch", "conv", "time", "rel_", "relative", "rotary", "class", "score", "seq_rel", "dense", "pooler",
    "mask", "query", "latent", "codebook", "router", "gate",
)  # fmt: skip
"""Parts of the last words of other tensors."""
LINEAR = ("conv", "projection", "projector", "pooler", "attention", "mlp")
"""Parts of names, wherever they stand, of what has the hidden size."""
MODAL = (
    "audio", "codec", "codebook", "speech_", "vision", "image", "depth_", "t2u", "unit_", "talker", "semantic", "coarse", "fine_", "vocoder", "qformer", "protein",
)  # fmt: skip
"""Parts of the names of what may have a vocabulary of its own."""
BY_ID = "gate.tid2eid"
"""How the name of DeepSeek V4's table of experts by token ends."""
JOINT, NEAR = "joint.head", 128
"""The head of a transducer, in which the lengths of sounds follow the tokens: fewer than this."""
TURNED = "predictions.dense.weight"
"""How the name of MobileBERT's matrix ends that has a column for each token."""


@dataclass(frozen=True)
class Tables:
    """The tensors of a model with a row for each token.

    ``size`` is that of the vocabulary, None where nothing tells; ``rows`` says how many each tensor has; those in ``turned`` have a
    column for each token instead; ``unclear`` are tensors of that size that may be tables or not.
    """

    size: int | None = None
    rows: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    turned: frozenset[str] = frozenset()
    unclear: tuple[str, ...] = ()


def find_tables(source: Source, tokens: int = 0, named: Sequence[str] = ()) -> Tables:
    """Tell the tables of a model.

    The size of the vocabulary is what the config says of the text model, if a matrix has as many rows; else the rows of the
    embeddings that go by a known name. ``tokens``, the rows that the tokenizer needs, chooses among several. Every tensor of this
    size (in its first dimension, ones left out, or in its second outside of layers) is a table. Where the size is another one of the
    model too, a hidden size say, the names decide, and what they leave open is ``unclear``. An embedding of a few more rows is a table
    (Mllama's), and so is one whose rows the config states by themselves (Gemma 3n's per layer). ``named``, filters of a recipe, stand
    in the place of all this.
    """
    if named:
        rows = {
            n: rows_of(t.shape)
            for n, t in source.tensors.items()
            if t.shape and any(matches_filter(f, n) for f in named)
        }
        return Tables(Counter(rows.values()).most_common(1)[0][0] if rows else None, rows)
    shapes = {
        n: t.shape for n, t in source.tensors.items() if t.shape and "/" not in n
    }  # a module's folder has words of its own
    size = _size(source.config, shapes, tokens)
    if size is None:
        return Tables()
    may_be = {n: shape for n, shape in shapes.items() if not any(word in n.lower() for word in POSITIONS)}
    alike = [n for n, shape in may_be.items() if rows_of(shape) == size]
    turned = [
        n
        for n, s in may_be.items()
        if len(s) == 2 and s[1] == size and s[0] not in (1, size) and not _is_numbered(n)
    ]
    unclear = [n for n in alike if _is_listed(n) and _is_named(n, shapes[n])]
    alike = [n for n in alike if n not in unclear]
    if _is_another_size_too(size, source.config, shapes):
        kinds = {n: _is_table(n, shapes) for n in alike}
        alike = [n for n in alike if kinds[n]]
        turned = [n for n in turned if n.endswith(TURNED)]
        unclear += [n for n in kinds if kinds[n] is None]
    rows = dict.fromkeys([*alike, *turned], size)
    apart = {r for _, key, r in stated_rows(source.config) if key == PER_LAYER}
    others = [
        n
        for n, s in may_be.items()
        if len(s) == 2 and n not in rows and s[0] != size and _looks_up(n) and not _is_apart(n)
    ]
    longer = [n for n in others if shapes[n][0] > size and not _module(n).endswith(SCORES)]
    if len(longer) == 1 and not any(_looks_up(n) for n in alike):
        rows[longer[0]] = shapes[longer[0]][0]
    rows |= {n: r for n in may_be if _module(n) == JOINT and 0 < (r := rows_of(shapes[n])) - size < NEAR}
    rows |= {n: shapes[n][0] for n in others if shapes[n][0] in apart and _module(n).endswith("per_layer")}
    return Tables(size, {n: rows[n] for n in shapes if n in rows}, frozenset(turned), tuple(unclear))


def rows_of(shape: Sequence[int]) -> int:
    """The rows of a tensor, dimensions of 1 before them left out: the bias of a head may be (1, tokens).

    >>> rows_of((5, 3)), rows_of((1, 5)), rows_of((1, 1))
    (5, 5, 1)
    """
    return next((n for n in shape if n != 1), 1)


def is_input(name: str) -> bool:
    """Does a table of tokens look rows up, as its name says? Else it is a head.

    >>> [is_input(n) for n in ("transformer.w.weight", "model.embed_tokens.weight", "embed_out.weight", "cls.predictions.decoder.weight")]
    [True, True, False, False]
    """
    return name.endswith(".weight") and _looks_up(name) and not _module(name).endswith(SCORES)


def is_head(name: str) -> bool:
    """Does a tensor belong to what gives each token a score, as its name says?

    >>> [is_head(n) for n in ("lm_head.bias", "decoder.weight", "embed_out.weight", "decoder.layers.0.fc1.weight")]
    [True, True, True, False]
    """
    return name.endswith(HEADS) or _module(name).endswith(SCORES)


def _module(name: str) -> str:
    """The name of the module that has a tensor, of its last two words that are no numbers."""
    words = [w for w in name.lower().split(".") if not w.isdigit()]
    return ".".join(words[-3:-1] if words[-1] in ("weight", "bias") else words[-2:])


def _looks_up(name: str) -> bool:
    last = _module(name).rpartition(".")[2]
    return f".{name}".endswith(".w.weight") or last.endswith(LOOKS_UP)


def _is_numbered(name: str) -> bool:
    return any(word.isdigit() for word in name.split("."))


def _size(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], tokens: int) -> int | None:
    """The size of the vocabulary that the tokenizer is of."""
    held = {rows_of(shape) for shape in shapes.values() if len(shape) > 1}
    said = [(place, rows) for place, key, rows in stated_rows(config) if key != PER_LAYER]
    is_there = [(place, rows) for place, rows in said if rows in held]
    main = [rows for place, rows in is_there if is_text(place)] or [rows for _, rows in is_there]
    known = {
        n: rows_of(s) for n, s in shapes.items() if n.endswith((*EMBEDDINGS, *HEADS)) and not _is_apart(n)
    }
    if not main and (
        longer := _longer(shapes, [rows for place, rows in said if is_text(place) and rows >= tokens])
    ):
        return longer
    if not main or (tokens and max(main) < tokens):
        main += [rows for n, rows in known.items() if rows >= tokens] or (
            list(known.values()) if not main else []
        )
    enough = [rows for rows in main if rows >= tokens]
    return (min(enough) if tokens else max(main)) if enough else max(main, default=None)


def _longer(shapes: Mapping[str, tuple[int, ...]], said: Sequence[int]) -> int | None:
    """The size that a config states where one embedding has more rows and no head has as many: Mllama's without its head."""
    tables = [
        s[0]
        for n, s in shapes.items()
        if len(s) == 2 and _looks_up(n) and not _is_apart(n) and not is_head(n)
    ]
    heads = {rows_of(s) for n, s in shapes.items() if is_head(n)}
    most = max(tables, default=0)
    return next(
        (rows for rows in said if rows < most and tables.count(most) == 1 and most not in heads), None
    )


def _is_another_size_too(size: int, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Is the vocabulary as large as something else: what the config states, or a dimension of a tensor in a layer?"""
    said = [is_text(place) for place, _, rows in stated_rows(config) if rows == size]
    if size in _numbers(config) or (any(said) and not all(said)):
        return True
    return any(
        size in shape and _is_numbered(n) and not (shape[0] == size and _is_named(n, shape))
        for n, shape in shapes.items()
    )


def _numbers(config: Mapping[str, Any], is_other: bool = False) -> Iterator[int]:
    """The sizes that a config states, but for those of vocabularies of text, ids of tokens and settings of generation.

    ``is_other`` says that it is the section of something else than text.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            if key in ("id2label", "label2id"):
                yield len(value)
            elif key != "vocabulary_map":
                is_apart = any(word in str(key) for word in WITHOUT_TEXT)
                yield from _numbers({str(k): v for k, v in value.items()}, is_apart or is_other)
        elif any(
            word in str(key) for word in ("token", "_id", "index", "max_length", "min_length", "top_k")
        ) or (not is_other and key in (*SIZES, PER_LAYER, "unpadded_vocab_size")):
            continue
        else:
            yield from (v for v in (value if isinstance(value, list) else [value]) if type(v) is int)


def _is_table(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool | None:
    """What a name says of a tensor whose size may be that of the vocabulary or another; None if nothing."""
    is_named = name.endswith((*EMBEDDINGS, *HEADS)) or _is_named(name, shapes[name])
    is_other = any(word in _module(name).rpartition(".")[2] for word in OTHERS)
    is_other |= any(word in name.lower() for word in (*LINEAR, *MODAL))
    if not is_named and (_is_numbered(name) or is_other or _is_scale(name, shapes)):
        return False
    return True if is_named and not _is_apart(name) else None


def _is_scale(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Is a tensor the weight or the bias of a norm: a vector each?"""
    module, _, parameter = name.rpartition(".")
    return parameter in ("weight", "bias") and len(shapes.get(f"{module}.weight", ())) == 1


def _is_apart(name: str) -> bool:
    return _is_listed(name) or any(word in name.lower() for word in MODAL)


def _is_listed(name: str) -> bool:
    """Is a tensor of one of several modules in a list, as the heads of codebooks are?"""
    words = name.split(".")
    return len(words) > 1 and words[-2].isdigit()


def _is_named(name: str, shape: tuple[int, ...]) -> bool:
    """Is a tensor of a table of tokens, as its name says?"""
    module = _module(name)
    is_other = any(word in module.rpartition(".")[2] for word in OTHERS)
    return not is_other and (
        module.endswith((*SCORES, BY_ID))
        or module.startswith("lm_head.")
        or (len(shape) == 2 and _looks_up(name))
    )
