"""Translates token ids in ``config.json`` and ``generation_config.json`` to another vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

TEXT = ("text_config", "language_config", "llm_config", "thinker_config")
"""Keys of a config that hold the config of the language model in a larger model."""

SIZES = (
    "vocab_size", "n_words", "n_vocab", "text_vocab_size", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size",
    "text_encoder_vocab_size",
)  # fmt: skip
PER_LAYER = "vocab_size_per_layer_input"
"""Keys of a config that state the rows of token tables; the last is for Gemma's embeddings per layer."""
WITHOUT_TEXT = (
    "vision", "visual", "image", "audio", "speech", "codec", "quant", "vq_", "depth", "talker", "code2wav", "t2u", "timestamp", "protein",
)  # fmt: skip
"""Parts of the keys of sections that describe a vocabulary of something other than text."""

ENDINGS = ("_token_id", "_token_ids", "_token_index")
INDICES = (
    "pad_index", "bos_index", "eos_index", "unk_index", "mask_index", "im_start_id", "im_end_id", "im_newline_id", "image_start_id",
    "image_patch_id", "image_end_id", "slice_start_id", "slice_end_id",
)  # fmt: skip
"""Other keys with a token id, used by XLM, FlauBERT and MiniCPM."""
ROLE_IDS = tuple(
    f"{role}_token_id" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "decoder_start")
)
"""Keys with the ids of marks, which every config of a language model may have."""
MAPS = ("lang_to_id", "task_to_id", "vocabulary_map")
"""Keys with a mapping from names to ids: Whisper's languages and tasks, image tokens."""
FORCED = "forced_decoder_ids"
"""A key with a list of (position, id)."""
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")

Remap = Callable[[str, int], int | None]
"""Returns the new id for a key and an id; None if there is none."""


def changed_ids(config: Mapping[str, Any], remap: Remap) -> dict[str, Any]:
    """Return the keys of a config whose token ids change, with their new values; inner mappings are complete.

    >>> changed_ids({"bos_token_id": 1, "eos_token_id": [2, 9], "vocab_size": 10}, lambda _, i: {1: 1, 2: 7}.get(i))
    {'eos_token_id': [7]}
    >>> changed_ids({"pad_index": 2, "lang_to_id": {"<|en|>": 2}, "forced_decoder_ids": [[1, 2]]}, lambda _, i: 7)
    {'pad_index': 7, 'lang_to_id': {'<|en|>': 7}, 'forced_decoder_ids': [[1, 7]]}
    """
    changes: dict[str, Any] = {}
    for key, value in config.items():
        new = with_new_ids(value, remap) if isinstance(value, Mapping) else value
        if key in MAPS and isinstance(value, Mapping):
            new = {
                name: new_id for name, ids in value.items() if (new_id := _ids(key, ids, remap)) is not None
            }
        elif key == FORCED and isinstance(value, list):
            new = [_forced(pair, remap) for pair in value]
        elif key in (*LISTS, *INDICES) or key.endswith(ENDINGS):
            new = _ids(key, value, remap)
        if new != value:
            changes[key] = new
    return changes


def with_new_ids(config: Mapping[str, Any], remap: Remap) -> dict[str, Any]:
    """Return a whole config with its token ids changed."""
    return {**config, **changed_ids(config, remap)}


def with_rows(
    config: Mapping[str, Any], new: int, old: int | None, per_layer: int | None = None
) -> dict[str, Any]:
    """Return a config whose language model has ``new`` vocabulary rows, wherever it stated ``old``.

    ``per_layer`` is the new number of rows of the embeddings per layer, if it changes.

    >>> with_rows({"text_config": {"vocab_size": 5}, "vision_config": {"vocab_size": 2}}, 7, 5)
    {'text_config': {'vocab_size': 7}, 'vision_config': {'vocab_size': 2}}
    """
    changed = copy.deepcopy(dict(config))
    is_stated = False
    for keys, key, rows in list(stated_rows(config)):
        section = changed
        for name in keys:
            section = section[name]
        if key == PER_LAYER and per_layer is not None:
            section[key] = per_layer
        elif rows == old:
            section[key] = new
            is_stated = is_stated or key != PER_LAYER
    if not is_stated:
        section, inner = (
            changed,
            [key for key in (*TEXT, "text_encoder") if isinstance(changed.get(key), dict)],
        )
        while inner:
            section = section[inner[0]]
            inner = [key for key in TEXT if isinstance(section.get(key), dict)]
        section["vocab_size"] = new
    return changed


def stated_roles(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of marks that a config states: at the top, or for the text.

    >>> stated_roles({"eos_token_id": [1, 106], "text_config": {"eos_token_id": 1, "pad_token_id": 0}, "bos_token_id": None})
    {'eos_token_id': [1, 106], 'pad_token_id': 0}
    """
    roles: dict[str, Any] = {}
    for part in (*(config.get(key) for key in TEXT), config):
        if isinstance(part, Mapping):
            roles |= {key: part[key] for key in ROLE_IDS if _is_ids(part.get(key))}
    return {key: roles[key] for key in ROLE_IDS if key in roles}


def with_roles(config: Mapping[str, Any], roles: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with other ids of marks, wherever it states some; at the top where it states none.

    >>> with_roles({"bos_token_id": 1, "text_config": {"bos_token_id": 1}}, {"bos_token_id": 2, "pad_token_id": 0})
    {'bos_token_id': 2, 'text_config': {'bos_token_id': 2}, 'pad_token_id': 0}
    """
    changed = dict(config)
    for key in TEXT:
        inner = config.get(key)
        if isinstance(inner, Mapping):
            changed[key] = {**inner, **{k: v for k, v in roles.items() if k in inner}}
    return {**changed, **roles}


def _is_ids(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(type(v) is int and v >= 0 for v in values)


def stated_rows(
    config: Mapping[str, Any], keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str, int]]:
    """Yield the vocabulary sizes that a config states: keys of the section, key in the section, rows."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            if not any(word in str(key) for word in WITHOUT_TEXT):
                yield from stated_rows(value, (*keys, str(key)))
        elif key in (*SIZES, PER_LAYER) and type(value) is int:
            yield keys, str(key), value


def is_text(keys: Sequence[str]) -> bool:
    """Do keys lead to the section of the language model, or to the whole config?"""
    return all(key in TEXT for key in keys)


def rows_in(config: Mapping[str, Any]) -> int | None:
    """Return the vocabulary rows that the innermost text section of a config states."""
    stated = [(keys, rows) for keys, key, rows in stated_rows(config) if key == SIZES[0] and is_text(keys)]
    return max(stated, key=lambda entry: len(entry[0]))[1] if stated else None


def _forced(pair: Any, remap: Remap) -> Any:
    """Return a (position, id) with its new id."""
    is_pair = isinstance(pair, list) and len(pair) == 2 and type(pair[1]) is int
    return [pair[0], remap(FORCED, pair[1])] if is_pair else pair


def _ids(key: str, value: Any, remap: Remap) -> Any:
    if isinstance(value, list):
        ids = [new for inner in value if (new := _ids(key, inner, remap)) is not None]
        return ids if any(isinstance(inner, (list, dict)) for inner in ids) else list(dict.fromkeys(ids))
    return remap(key, value) if type(value) is int and value >= 0 else value
