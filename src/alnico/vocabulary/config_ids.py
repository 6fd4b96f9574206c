"""Ids of tokens in ``config.json`` and ``generation_config.json``, put over to another vocabulary by what they mean."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

TEXT = ("text_config", "language_config", "llm_config", "thinker_config")
"""Keys of a config under which the language model of a larger one is described."""

SIZES = (
    "vocab_size", "n_words", "n_vocab", "text_vocab_size", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size",
    "text_encoder_vocab_size",
)  # fmt: skip
PER_LAYER = "vocab_size_per_layer_input"
"""Keys of a config that state the rows of tables of tokens; the last one those of Gemma's embeddings per layer."""
WITHOUT_TEXT = (
    "vision", "visual", "image", "audio", "speech", "codec", "quant", "vq_", "depth", "talker", "code2wav", "t2u", "timestamp", "protein",
)  # fmt: skip
"""Parts of the keys of sections that describe a vocabulary of something else."""

ENDINGS = ("_token_id", "_token_ids", "_token_index")
INDICES = (
    "pad_index", "bos_index", "eos_index", "unk_index", "mask_index", "im_start_id", "im_end_id", "im_newline_id", "image_start_id",
    "image_patch_id", "image_end_id", "slice_start_id", "slice_end_id",
)  # fmt: skip
"""Other keys with the id of a token: those of XLM, FlauBERT and MiniCPM."""
MAPS = ("lang_to_id", "task_to_id", "vocabulary_map")
"""Keys with ids by names: languages and tasks of Whisper, pieces of images."""
PLACED = "forced_decoder_ids"
"""A list of places and ids."""
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")

Remap = Callable[[str, int], int | None]
"""From a key and an id to the new id; None if there is none."""


def changed_ids(config: Mapping[str, Any], remap: Remap) -> dict[str, Any]:
    """The keys of a config whose token ids change, with their new values; inner mappings come whole.

    >>> remapped({"bos_token_id": 1, "eos_token_id": [2, 9], "vocab_size": 10}, lambda _, i: {1: 1, 2: 7}.get(i))
    {'eos_token_id': [7]}
    >>> remapped({"pad_index": 2, "lang_to_id": {"<|en|>": 2}, "forced_decoder_ids": [[1, 2]]}, lambda _, i: 7)
    {'pad_index': 7, 'lang_to_id': {'<|en|>': 7}, 'forced_decoder_ids': [[1, 7]]}
    """
    changes: dict[str, Any] = {}
    for key, value in config.items():
        new = with_new_ids(value, remap) if isinstance(value, Mapping) else value
        if key in MAPS and isinstance(value, Mapping):
            new = {
                name: found for name, each in value.items() if (found := _ids(key, each, remap)) is not None
            }
        elif key == PLACED and isinstance(value, list):
            new = [_placed(pair, remap) for pair in value]
        elif key in (*LISTS, *INDICES) or key.endswith(ENDINGS):
            new = _ids(key, value, remap)
        if new != value:
            changes[key] = new
    return changes


def with_new_ids(config: Mapping[str, Any], remap: Remap) -> dict[str, Any]:
    """A whole config with its token ids changed."""
    return {**config, **changed_ids(config, remap)}


def with_rows(
    config: Mapping[str, Any], new: int, old: int | None, per_layer: int | None = None
) -> dict[str, Any]:
    """A whole config whose language model has a vocabulary of ``new`` rows in the place of ``old``, said where the config says it.

    ``per_layer`` are the new rows of the embeddings of layers, where they change.

    >>> with_rows({"text_config": {"vocab_size": 5}, "vision_config": {"vocab_size": 2}}, 7, 5)
    {'text_config': {'vocab_size': 7}, 'vision_config': {'vocab_size': 2}}
    """
    changed = copy.deepcopy(dict(config))
    is_said = False
    for place, key, rows in list(stated_rows(config)):
        section = changed
        for part in place:
            section = section[part]
        if key == PER_LAYER and per_layer is not None:
            section[key] = per_layer
        elif rows == old:
            section[key] = new
            is_said = is_said or key != PER_LAYER
    if not is_said:
        section, inner = (
            changed,
            [key for key in (*TEXT, "text_encoder") if isinstance(changed.get(key), dict)],
        )
        while inner:
            section = section[inner[0]]
            inner = [key for key in TEXT if isinstance(section.get(key), dict)]
        section["vocab_size"] = new
    return changed


def stated_rows(
    config: Mapping[str, Any], place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str, int]]:
    """The sizes of vocabularies of tokens that a config states: the keys down to a section, the key there, and the rows."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            if not any(word in str(key) for word in WITHOUT_TEXT):
                yield from stated_rows(value, (*place, str(key)))
        elif key in (*SIZES, PER_LAYER) and type(value) is int:
            yield place, str(key), value


def is_text(place: Sequence[str]) -> bool:
    """Is a section of a config, by the keys down to it, that of the language model or the whole?"""
    return all(key in TEXT for key in place)


def rows_in(config: Mapping[str, Any]) -> int | None:
    """The rows of the vocabulary that a config states, in its innermost section on text."""
    said = [(place, rows) for place, key, rows in stated_rows(config) if key == SIZES[0] and is_text(place)]
    return max(said, key=lambda found: len(found[0]))[1] if said else None


def _placed(pair: Any, remap: Remap) -> Any:
    """A place and an id."""
    is_pair = isinstance(pair, list) and len(pair) == 2 and type(pair[1]) is int
    return [pair[0], remap(PLACED, pair[1])] if is_pair else pair


def _ids(key: str, value: Any, remap: Remap) -> Any:
    if isinstance(value, list):
        found = [new for each in value if (new := _ids(key, each, remap)) is not None]
        return found if any(isinstance(each, (list, dict)) for each in found) else list(dict.fromkeys(found))
    return remap(key, value) if type(value) is int and value >= 0 else value
