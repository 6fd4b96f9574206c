"""Makes the tokenizer files of a Hugging Face model out of the vocabulary in a GGUF file.

``tokenizer.ggml.model`` names the kind: ``gpt2`` is BPE over bytes, with merges; ``llama`` is SentencePiece's BPE, whose merges follow
from the scores of its pieces. ``tokenizer.ggml.pre`` names how text is cut before BPE; the expressions are those of the models' own
``tokenizer.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alnico.checkpoint.gguf.metadata import Metadata
from alnico.errors import ModelError

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
"""Kinds of tokens in ``tokenizer.ggml.token_type``."""
SPACE = "\u2581"
"""What SentencePiece writes for a space."""
MAX_TOKEN = 1000
"""Most characters of a token: to find the merges of a token takes the square of its length."""
PADDING = re.compile(r"\[PAD(\d+)\]")
"""Names that llama.cpp's converter gives to rows of the embedding without a token."""

_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_ENDINGS}|{_LETTERS}\p{{L}}+|\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"{_ENDINGS}|{_LETTERS}\p{{L}}+|\p{{N}}{_REST}"
_TEKKEN = rf"{_LETTERS}{_UPPER}*{_LOWER}+|{_LETTERS}{_UPPER}+{_LOWER}*|\p{{N}}{_REST_WITH_SLASH}"
_GPT4O = rf"{_LETTERS}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_LETTERS}{_UPPER}+{_LOWER}*{_ENDINGS}?|\p{{N}}{{1,3}}{_REST_WITH_SLASH}"

LLAMA3_KINDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe")
SPLITS: Mapping[str, str | None] = {
    **dict.fromkeys(("default", "gpt-2", "smollm"), None),
    **dict.fromkeys(LLAMA3_KINDS, _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
"""The expression that cuts text, by ``tokenizer.ggml.pre``; None for GPT-2's, which ``ByteLevel`` has built in."""
WHOLE_FIRST = (*LLAMA3_KINDS, "tekken")
"""Kinds that take a word that is a token as that token, without merges."""
SINGLE_DIGITS = ("smollm",)


def tokenizer_problem(metadata: Metadata) -> str | None:
    """Say why the tokenizer files cannot be made; None if they can. Errors: ModelError."""
    kind = metadata.text("tokenizer.ggml.model", "none")
    tokens = metadata.texts("tokenizer.ggml.tokens")
    pre = metadata.text("tokenizer.ggml.pre", "default")
    if not tokens:
        return "the file has none"
    if kind not in ("gpt2", "llama"):
        return f"it is of the kind {kind[:40]!r}; gpt2 and llama are known"
    if len(set(tokens)) < len(tokens):
        return f"{len(tokens) - len(set(tokens))} of its tokens are there twice"
    return (
        f"it cuts text as {pre[:40]!r}, which is not known" if kind == "gpt2" and pre not in SPLITS else None
    )


def tokenizer_files(metadata: Metadata) -> dict[str, bytes]:
    """Return the tokenizer files by name; none where :func:`tokenizer_problem` says why.

    Errors: ModelError for arrays of different lengths, an id beyond the tokens, a token that is too long, and a merge that is not two
    tokens.
    """
    kind = metadata.text("tokenizer.ggml.model", "none")
    tokens = metadata.texts("tokenizer.ggml.tokens")
    check_vocabulary(metadata, tokens)
    pre = metadata.text("tokenizer.ggml.pre", "default")
    if tokenizer_problem(metadata) is not None:
        return {}
    if kind == "llama" and metadata.architecture.startswith("gemma"):
        tokens = [
            SPACE * len(token) if token.strip(" ") == "" and len(token) > 1 else token for token in tokens
        ]
    types = _types(metadata, len(tokens))
    kept = [
        i
        for i, token in enumerate(tokens)
        if not (types[i] == UNUSED and (match := PADDING.fullmatch(token)) and match[1] == str(i))
    ]
    vocabulary = {tokens[i]: i for i in kept}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types, kept),
        **(
            _byte_level(metadata, vocabulary, pre)
            if kind == "gpt2"
            else _sentencepiece(metadata, vocabulary, tokens)
        ),
    }
    document["post_processor"] = _post_processor(metadata, tokens, kind, pre)
    settings = _settings(metadata, tokens, kind, pre)
    return {
        "tokenizer.json": json.dumps(document, ensure_ascii=False).encode(),
        "tokenizer_config.json": (json.dumps(settings, ensure_ascii=False, indent=2) + "\n").encode(),
    }


def check_vocabulary(metadata: Metadata, tokens: Sequence[str]) -> None:
    """Refuse a vocabulary that contradicts itself. Errors: ModelError."""
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        values = metadata.numbers(key)
        if values is not None and len(values) != len(tokens):
            raise ModelError(
                f"{metadata.where}: has {len(tokens)} tokens and {len(values)} values in {key}; expected one for each token. The file is "
                "damaged; convert the model again."
            )
    longest = max(map(len, tokens), default=0)
    if longest > MAX_TOKEN:
        raise ModelError(
            f"{metadata.where}: has a token of {longest} characters; expected at most {MAX_TOKEN}. The file is damaged; convert the model "
            "again."
        )
    for role in ("bos", "eos", "unknown", "padding"):
        key = f"tokenizer.ggml.{role}_token_id"
        if tokens and key in metadata and metadata.integer(key) >= len(tokens):
            raise ModelError(
                f"{metadata.where}: {key} is {metadata.integer(key)}, there are {len(tokens)} tokens; expected the id of one. The file is "
                "damaged; convert the model again."
            )


def _types(metadata: Metadata, count: int) -> np.ndarray:
    types = metadata.numbers("tokenizer.ggml.token_type")
    return types if types is not None else np.ones(count, np.int32)


def _added(tokens: Sequence[str], types: np.ndarray, kept: Sequence[int]) -> list[dict[str, Any]]:
    """The tokens that are found in text before it is cut: control tokens are special, user-defined ones are not."""
    return [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": int(types[i]) != USER_DEFINED,
        }
        for i in kept
        if int(types[i]) in (UNKNOWN, CONTROL, USER_DEFINED) and tokens[i]
    ]


def _byte_level(metadata: Metadata, vocabulary: Mapping[str, int], pre: str) -> dict[str, Any]:
    split = SPLITS[pre]
    cuts: list[dict[str, Any]] = []
    if pre in SINGLE_DIGITS:
        cuts.append({"type": "Digits", "individual_digits": True})
    if split is not None:
        cuts.append({"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False})
    cuts.append(_bytes(use_regex=split is None))
    return {
        "normalizer": {"type": "NFC"} if split == _QWEN2 else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "decoder": _bytes(use_regex=True),
        "model": _bpe(vocabulary, _stored_merges(metadata, vocabulary), ignore_merges=pre in WHOLE_FIRST),
    }


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sentencepiece(
    metadata: Metadata, vocabulary: Mapping[str, int], tokens: Sequence[str]
) -> dict[str, Any]:
    is_gemma = metadata.architecture.startswith("gemma")
    has_prefix = metadata.flag("tokenizer.ggml.add_space_prefix", not is_gemma)
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepended = {"type": "Prepend", "prepend": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = _role(metadata, "unknown")
    if "tokenizer.ggml.merges" in metadata:
        merges = _stored_merges(metadata, vocabulary)
    else:
        merges = derived_merges(vocabulary, _ranks(metadata, tokens, is_gemma))
    return {
        "normalizer": {"type": "Sequence", "normalizers": [prepended, replaced]} if has_prefix else replaced,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            vocabulary,
            merges,
            unk_token=tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _ranks(metadata: Metadata, tokens: Sequence[str], is_gemma: bool) -> np.ndarray:
    """How early each token is merged: by its score, or by its place in Gemma, whose scores do not follow its merges."""
    scores = metadata.numbers("tokenizer.ggml.scores")
    if is_gemma or scores is None:
        return -np.arange(len(tokens), dtype=np.float64)
    return scores.astype(np.float64)


def derived_merges(vocabulary: Mapping[str, int], ranks: np.ndarray) -> list[list[str]]:
    """Return every pair of tokens that together are a token: those of the highest rank first, of equal ranks those with the
    longer first part.

    >>> derived_merges({"a": 0, "b": 1, "ab": 2, "aab": 3}, np.array([-9.0, -9.0, -1.0, -2.0]))
    [['a', 'b'], ['a', 'ab']]
    """
    found = [
        (-float(ranks[i]), -at, at - len(token), token)
        for token, i in vocabulary.items()
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    found.sort(key=lambda merge: merge[:3])
    return [[token[:-at], token[-at:]] for _, at, _, token in found]


def _stored_merges(metadata: Metadata, vocabulary: Mapping[str, int]) -> list[list[str]]:
    merges = []
    for merge in metadata.texts("tokenizer.ggml.merges"):
        first, _, second = merge.partition(" ")
        if first not in vocabulary or second not in vocabulary or first + second not in vocabulary:
            raise ModelError(
                f"{metadata.where}: the merge {merge[:40]!r} is not of two tokens that are a third; expected tokens of the vocabulary. The "
                "file is damaged; convert the model again."
            )
        merges.append([first, second])
    return merges


def _bpe(vocabulary: Mapping[str, int], merges: list[list[str]], **changes: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **changes,
        "vocab": dict(vocabulary),
        "merges": merges,
    }


def _adds(metadata: Metadata, kind: str, pre: str) -> dict[str, bool]:
    """Are the first and the last token of a text added? Files without the keys mean what llama.cpp does."""
    begins = kind == "llama" or pre in WHOLE_FIRST
    return {
        "bos": metadata.flag("tokenizer.ggml.add_bos_token", begins),
        "eos": metadata.flag("tokenizer.ggml.add_eos_token", False),
    }


def _role(metadata: Metadata, role: str) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    return metadata.integer(key) if key in metadata else None


def _post_processor(metadata: Metadata, tokens: Sequence[str], kind: str, pre: str) -> dict[str, Any] | None:
    """Puts the first and the last token around a text, and around each text of a pair."""
    ids = {
        role: i
        for role, is_added in _adds(metadata, kind, pre).items()
        if is_added and (i := _role(metadata, role)) is not None
    }
    if not ids:
        return _bytes(use_regex=True) | {"trim_offsets": False} if kind == "gpt2" else None

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        special = {role: [{"SpecialToken": {"id": tokens[i], "type_id": type_id}}] for role, i in ids.items()}
        return [
            *special.get("bos", []),
            {"Sequence": {"id": sequence, "type_id": type_id}},
            *special.get("eos", []),
        ]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in ids.values()
        },
    }


def _settings(metadata: Metadata, tokens: Sequence[str], kind: str, pre: str) -> dict[str, Any]:
    """``tokenizer_config.json``. The class is the one that takes ``tokenizer.json`` as it is."""
    adds = _adds(metadata, kind, pre)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.integer(".context_length"),
        "add_bos_token": adds["bos"],
        "add_eos_token": adds["eos"],
    }
    for name, role in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (i := _role(metadata, role)) is not None:
            settings[f"{name}_token"] = tokens[i]
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata.text("tokenizer.chat_template")
    return settings
