"""Ids of tokens in ``config.json`` and ``generation_config.json``, put over to another vocabulary by what they mean."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

TEXT = ("text_config", "language_config", "llm_config", "thinker_config")
"""Keys of a config under which the language model of a larger one is described."""

ENDINGS = ("_token_id", "_token_ids", "_token_index")
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")

Remap = Callable[[str, int], int | None]
"""From a key and an id to the new id; None if there is none."""


def remapped(config: Mapping[str, Any], remap: Remap) -> dict[str, Any]:
    """The keys of a config whose token ids change, with their new values; inner mappings come whole.

    >>> remapped({"bos_token_id": 1, "eos_token_id": [2, 9], "vocab_size": 10}, lambda _, i: {1: 1, 2: 7}.get(i))
    {'eos_token_id': [7]}
    """
    changes: dict[str, Any] = {}
    for key, value in config.items():
        new = remapped_all(value, remap) if isinstance(value, Mapping) else value
        if key in LISTS or key.endswith(ENDINGS):
            new = _ids(key, value, remap)
        if new != value:
            changes[key] = new
    return changes


def remapped_all(config: Mapping[str, Any], remap: Remap) -> dict[str, Any]:
    """A whole config with its token ids changed."""
    return {**config, **remapped(config, remap)}


def with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A whole config whose language model has a vocabulary of ``rows``, said where the config says it.

    >>> with_rows({"text_config": {"vocab_size": 5}, "vision_config": {"vocab_size": 2}}, 7)
    {'text_config': {'vocab_size': 7}, 'vision_config': {'vocab_size': 2}}
    """
    changed = copy.deepcopy(dict(config))
    inner = [key for key in TEXT if isinstance(changed.get(key), dict)]
    for key in inner:
        changed[key] = with_rows(changed[key], rows)
    if "vocab_size" in changed or not inner:
        changed["vocab_size"] = rows
    return changed


def rows_in(config: Mapping[str, Any]) -> int | None:
    """The rows of the vocabulary that a config states."""
    for key in TEXT:
        if isinstance(config.get(key), Mapping) and (found := rows_in(config[key])) is not None:
            return found
    rows = config.get("vocab_size")
    return rows if type(rows) is int else None


def _ids(key: str, value: Any, remap: Remap) -> Any:
    if isinstance(value, list):
        found = [new for each in value if (new := _ids(key, each, remap)) is not None]
        return found if any(isinstance(each, (list, dict)) for each in found) else list(dict.fromkeys(found))
    return remap(key, value) if type(value) is int and value >= 0 else value
