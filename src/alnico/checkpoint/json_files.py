"""JSON files, read with bounds on size and depth."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from alnico.checkpoint.files import read_small
from alnico.errors import ModelError

MAX_JSON_BYTES = 200_000_000
"""Longest index or config that is read."""


MAX_JSON_DEPTH = 100
"""Deepest one: what is done with it is written by recursion, which Python bounds at a thousand calls."""


HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""Where half of a character may stand, as JSON writes it."""


def read_json(path: Path, *, is_ours: bool = False) -> dict[str, Any]:
    """Read a JSON object; of a file that alnico writes, without a key twice and without NaN. Errors: ModelError naming the file."""
    return parse_json(read_small(path, MAX_JSON_BYTES, "a small JSON file"), path, is_ours=is_ours)


def parse_json(data: bytes, path: Path, *, is_ours: bool = False) -> dict[str, Any]:
    """The JSON object of a file: of bounded depth, and of text that can be written again. Errors: ModelError naming the file."""
    try:
        loaded = (
            json.loads(data, object_pairs_hook=_unique, parse_constant=_no_number)
            if is_ours
            else json.loads(data)
        )
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: is not JSON ({str(error)[:120]}). The file is damaged; download it again."
        ) from None
    if not isinstance(loaded, dict):
        raise ModelError(
            f"{path}: holds a JSON {type(loaded).__name__}, expected an object. Check the model."
        )
    if _is_deep(loaded):
        raise ModelError(
            f"{path}: is nested deeper than {MAX_JSON_DEPTH}; expected a file that describes a model. Check the model."
        )
    if HALF.search(data):
        try:
            json.dumps(loaded, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ModelError(
                f"{path}: holds half of a character, expected Unicode text. Get the file from its source."
            ) from None
    return loaded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _is_deep(value: dict[str, Any]) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [v for c in level for v in (c.values() if type(c) is dict else c) if type(v) in (dict, list)]
        if not level:
            return False
    return True
