"""Makes the keys of a GGUF file out of a model's tokenizer: tokens and their kinds, merges or scores, roles."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alnico.checkpoint.gguf.tokenizer_files import (
    CONTROL,
    SINGLE_DIGITS,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from alnico.errors import ModelError
from alnico.vocabulary.tokenizer import Tokenizer

NORMAL, BYTE = 1, 6
BYTES = re.compile(r"<0x[0-9A-F]{2}>")
"""Tokens of SentencePiece for bytes that no other token holds."""
PREFERRED = {
    None: "gpt-2",
    SPLITS["llama-bpe"]: "llama-bpe",
    SPLITS["qwen2"]: "qwen2",
    SPLITS["gpt-4o"]: "gpt-4o",
}
"""The name in ``tokenizer.ggml.pre`` of an expression that has several."""


def gguf_vocabulary(tokenizer: Tokenizer, rows: int, template: str | None, label: str) -> dict[str, Any]:
    """Return the keys of a tokenizer whose model has ``rows`` rows; those without a token are named ``[PAD<id>]``, as llama.cpp's
    converter names them.

    Errors: ModelError for a tokenizer that is not BPE over bytes or SentencePiece's BPE, cuts text in a way that has no name in
    GGUF, or has tokens beyond the rows.
    """
    document = tokenizer.document or {}
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise ModelError(
            f"{label}: its tokenizer is not a tokenizer.json of BPE; expected that for the GGUF file. Write a folder, and convert that with "
            "llama.cpp."
        )
    highest = max(tokenizer.tokens.values(), default=-1)
    if highest >= rows:
        raise ModelError(
            f"{label}: its tokenizer has the id {highest}, the embedding {rows} rows; expected a row for each token. Check the model."
        )
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = np.full(rows, UNUSED, "<i4")
    is_pieces = bool(model.get("byte_fallback"))
    for token, i in tokenizer.tokens.items():
        tokens[i] = token
        types[i] = BYTE if is_pieces and BYTES.fullmatch(token) else NORMAL
    for entry in tokenizer.added.values():
        types[entry["id"]] = CONTROL if entry.get("special") else USER_DEFINED
    merges = _merges(model.get("merges") or [], label)
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if is_pieces else "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    if is_pieces:
        unknown = tokenizer.special("unk")
        if unknown is not None and unknown in tokenizer.tokens:
            types[tokenizer.tokens[unknown]] = UNKNOWN
        keys["tokenizer.ggml.scores"] = _scores(tokens, merges)
        keys["tokenizer.ggml.add_space_prefix"] = _has_prefix(document)
    else:
        keys["tokenizer.ggml.pre"] = _pre(document, label)
        keys["tokenizer.ggml.merges"] = [f"{first} {second}" for first, second in merges]
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        special = tokenizer.special(role)
        if special is not None and special in tokenizer.tokens:
            keys[f"tokenizer.ggml.{name}_token_id"] = tokenizer.tokens[special]
    keys["tokenizer.ggml.add_bos_token"] = _begins(document)
    if template is not None:
        keys["tokenizer.chat_template"] = template
    return keys


def _merges(stored: Any, label: str) -> list[Sequence[str]]:
    """The pairs of tokens that are merged, in order. Errors: ModelError for anything else."""
    pairs = (
        [m.split(" ", 1) if isinstance(m, str) else m for m in stored]
        if isinstance(stored, list)
        else [stored]
    )
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise ModelError(
                f"{label}: its tokenizer.json has the merge {str(pair)[:40]!r}; expected two tokens. Download the file again."
            )
    return pairs


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> np.ndarray:
    """Scores that give the merges their order: the negative position of the first merge that makes a token; lower for those that none
    makes."""
    scores = np.full(len(tokens), -float(len(merges) + 1), "<f4")
    ids = {token: i for i, token in enumerate(tokens)}
    for position in range(len(merges) - 1, -1, -1):
        made = ids.get("".join(merges[position]))
        if made is not None:
            scores[made] = -float(position)
    return scores


def _steps(part: Any, listed: str) -> list[Mapping[str, Any]]:
    """The steps of a part of ``tokenizer.json``, which may be a sequence."""
    if not isinstance(part, dict):
        return []
    if part.get("type") != "Sequence":
        return [part]
    inside = part.get(listed)
    return [step if isinstance(step, dict) else {} for step in (inside if isinstance(inside, list) else [])]


def _has_prefix(document: Mapping[str, Any]) -> bool:
    """Is a space put before a text?"""
    normalizers = _steps(document.get("normalizer"), "normalizers")
    cuts = _steps(document.get("pre_tokenizer"), "pretokenizers")
    return any(step.get("type") == "Prepend" for step in normalizers) or any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never" for step in cuts
    )


def _begins(document: Mapping[str, Any]) -> bool:
    """Is a first token put before a text?"""
    for step in _steps(document.get("post_processor"), "processors"):
        single = step.get("single") if step.get("type") == "TemplateProcessing" else None
        if (
            isinstance(single, list)
            and single
            and isinstance(single[0], dict)
            and "SpecialToken" in single[0]
        ):
            return True
    return False


def _pre(document: Mapping[str, Any], label: str) -> str:
    """The name of how text is cut before BPE. Errors: ModelError if it has none here."""
    steps = _steps(document.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    patterns = [p.get("Regex") for s in steps if isinstance(p := s.get("pattern"), dict)]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return SINGLE_DIGITS[0]
    expression = patterns[0] if kinds == ["Split", "ByteLevel"] and patterns else None
    if kinds in (["ByteLevel"], ["Split", "ByteLevel"]) and expression in SPLITS.values():
        if expression in PREFERRED:
            return PREFERRED[expression]
        return next(name for name, known in SPLITS.items() if known == expression)
    raise ModelError(
        f"{label}: its tokenizer cuts text before BPE by {', '.join(map(str, kinds))[:80] or 'nothing'}, which has no name in GGUF that is "
        "known here; expected one of Llama 3, Qwen 2, GPT-2, GPT-4o, Tekken or SmolLM. Write a folder, and convert that with llama.cpp."
    )
