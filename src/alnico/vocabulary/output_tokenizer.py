"""Builds the output's tokenizer: one model's, with tokens removed and added, and its files."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alnico.errors import ModelError
from alnico.vocabulary.tokenizer import (
    ADDED,
    CONFIG,
    JSON,
    PARTS,
    TokenEntry,
    Tokenizer,
    as_json,
    assign_added_ids,
    plain_entry,
    read_tokenizer_file,
    role_tokens,
)

MAX_GAPS = 100_000
"""Most ids without a token beyond the number of tokens."""


@dataclass(frozen=True)
class OutputTokenizer:
    """The output's tokens with their ids, its files, and the numbers of tokens added and removed."""

    tokens: Mapping[str, int]
    files: Mapping[str, bytes]
    added: int
    removed: int


def union_entries(tokenizers: Sequence[tuple[Tokenizer, int]]) -> list[TokenEntry]:
    """Return the added tokens of a union: plain tokens that the first tokenizer lacks, then all added tokens.

    Each tokenizer comes with the number of rows of its model; tokens beyond have no row and are ignored. A
    token that is an added token of some model gets the description of the first such model.
    """
    first, rows = tokenizers[0]
    added: dict[str, TokenEntry] = {}
    plain: dict[str, None] = {}
    for tokenizer, count in tokenizers:
        entries = {t: entry for t, entry in tokenizer.added.items() if entry["id"] < count}
        for content, entry in entries.items():
            added.setdefault(content, entry)
        if tokenizer is not first:
            new = (
                t
                for t, i in sorted(tokenizer.parts.items(), key=lambda item: item[1])
                if i < count and t not in entries
            )
            plain |= dict.fromkeys(t for t in new if first.parts.get(t, rows) >= rows)
    return [*(plain_entry(t) for t in plain if t not in added), *added.values()]


def combine_tokens(template: Tokenizer, rows: int, entries: Sequence[TokenEntry]) -> OutputTokenizer:
    """Remove the template's tokens that have no row, add ``entries``, assign ids, and write the files.

    Files are the template's bytes unless something changes. A token with a role (such as padding) stays even
    if it has no row: loading the tokenizer would create it again. The pieces of a vocabulary without a
    ``tokenizer.json`` stay too. If the vocabulary's ids have gaps, these are filled before tokens are added:
    the ``tokenizers`` library counts new ids from the number of tokens, which would otherwise be other
    tokens' ids.
    """
    role_names = set(role_tokens(template.settings, template.roles))
    has_document = template.document is not None
    parts = {t: i for t, i in template.parts.items() if i < rows} if has_document else dict(template.parts)
    old = [e for t, e in template.added.items() if e["id"] < rows or t in role_names]
    present = {*parts, *(e["content"] for e in old)}
    new = [
        e for e in entries if e["content"] not in template.added or template.added[e["content"]]["id"] >= rows
    ]
    removed = len(template.tokens) - len(present)
    if not new and not removed:
        return OutputTokenizer(
            template.tokens, {n: read_tokenizer_file(template.directory / n) for n in template.files}, 0, 0
        )
    fillers = _fillers(parts, template) if has_document else {}
    parts |= fillers
    if has_document:
        added = assign_added_ids(parts, [*old, *new])
    else:  # without tokenizer.json the ids in the files are used unchanged
        free = 1 + max([*parts.values(), *(e["id"] for e in old)], default=-1)
        fresh = [e for e in new if e["content"] not in present]
        added = {e["content"]: e for e in old}
        added |= {e["content"]: {**e, "id": free + n} for n, e in enumerate(fresh)}
        added |= {e["content"]: {**e, "id": parts[e["content"]]} for e in new if e["content"] in parts}
    tokens = {**parts, **{t: e["id"] for t, e in added.items()}}
    files = _files(template, parts, added, tokens, bool(fillers) or len(parts) != len(template.parts))
    tokens = {t: i for t, i in tokens.items() if t not in fillers}
    return OutputTokenizer(tokens, files, len(tokens) - len(present), removed)


def _fillers(parts: Mapping[str, int], template: Tokenizer) -> dict[str, int]:
    """Return tokens for unused ids, so that the number of tokens is the first free id.

    Errors: ModelError for too many unused ids.
    """
    taken = set(parts.values())
    if 1 + max(taken, default=-1) - len(taken) > MAX_GAPS + len(taken):
        raise ModelError(
            f"{template.directory / JSON}: has {len(taken)} tokens and ids up to {max(taken)}; expected at "
            f"most {MAX_GAPS} more ids without a token than with one. Download the file again."
        )
    gaps = [i for i in range(1 + max(taken, default=-1)) if i not in taken]
    surplus = len(parts) - len(taken)
    if not gaps or surplus >= len(gaps):
        return {}
    return {f"<|no token {i}|>": i for i in gaps}


def _files(
    template: Tokenizer,
    parts: Mapping[str, int],
    added: Mapping[str, TokenEntry],
    tokens: Mapping[str, int],
    has_other_parts: bool,
) -> dict[str, bytes]:
    dropped = PARTS if has_other_parts and template.document is not None else ()
    files = {n: read_tokenizer_file(template.directory / n) for n in template.files if n not in dropped}
    if template.document is not None:
        try:
            files[JSON] = as_json(_document(template.document, parts, added, tokens, has_other_parts))
        except (TypeError, LookupError, AttributeError) as error:
            raise ModelError(
                f"{template.directory / JSON}: its merges, post_processor or padding do not have the format "
                f"of the tokenizers library ({str(error)[:80]}). Download the file again."
            ) from None
    legacy = any(n in files for n in PARTS)
    settings = dict(template.settings)
    if "added_tokens_decoder" in settings or legacy:
        in_order = sorted(added.values(), key=lambda e: int(e["id"]))
        settings["added_tokens_decoder"] = {
            str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in in_order
        }
    if settings != template.settings:
        files[CONFIG] = as_json(settings)
    if ADDED in files:
        files[ADDED] = as_json({t: e["id"] for t, e in added.items() if t not in parts})
    return files


def _document(
    document: Mapping[str, Any],
    parts: Mapping[str, int],
    added: Mapping[str, TokenEntry],
    tokens: Mapping[str, int],
    has_other_parts: bool,
) -> dict[str, Any]:
    changed = dict(document)
    if has_other_parts:
        changed["model"] = _model(document["model"], parts)
    changed["added_tokens"] = sorted(
        ({"id": e["id"], **{k: v for k, v in e.items() if k != "id"}} for e in added.values()),
        key=lambda e: e["id"],
    )
    for name in ("post_processor", "padding"):
        if document.get(name) is not None:
            changed[name] = copy.deepcopy(document[name])
            _renumber(changed[name], tokens)
    return changed


def _model(model: Mapping[str, Any], parts: Mapping[str, int]) -> dict[str, Any]:
    if isinstance(model["vocab"], list):  # Unigram: the position is the id
        return {**model, "vocab": [entry for entry in model["vocab"] if entry[0] in parts]}
    changed = {**model, "vocab": dict(sorted(parts.items(), key=lambda item: item[1]))}
    if isinstance(model.get("merges"), list):
        pairs = (
            (merge, merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]
        )
        changed["merges"] = [
            merge for merge, pair in pairs if all(p in parts for p in pair) and _joined(model, pair) in parts
        ]
    return changed


def _joined(model: Mapping[str, Any], pair: Sequence[str]) -> str:
    """Return the token that a merge produces."""
    prefix = model.get("continuing_subword_prefix") or ""
    return pair[0] + (pair[1].removeprefix(prefix) if prefix else pair[1])


def _renumber(part: Any, tokens: Mapping[str, int]) -> None:
    """Update the ids of the tokens that a post-processor or a padding names."""
    if isinstance(part, list):
        for inner in part:
            _renumber(inner, tokens)
    elif isinstance(part, dict):
        if part.get("pad_token") in tokens and "pad_id" in part:
            part["pad_id"] = tokens[part["pad_token"]]
        for role in ("sep", "cls"):
            pair = part.get(role)
            if isinstance(pair, list) and len(pair) == 2 and pair[0] in tokens:
                pair[1] = tokens[pair[0]]
        special = part.get("special_tokens")
        if isinstance(special, dict):
            for entry in special.values():
                if all(t in tokens for t in entry["tokens"]):
                    entry["ids"] = [tokens[t] for t in entry["tokens"]]
        _renumber(part.get("processors"), tokens)
