"""Reads JSON files of limited size and depth."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from alnico.checkpoint.file_kinds import SNIFFED_BYTES, error_message, kind_of
from alnico.checkpoint.files import read_small
from alnico.errors import ModelError

MAX_JSON_BYTES = 200_000_000
"""Size of the largest index or config that is read."""


MAX_JSON_DEPTH = 100
"""Deepest nesting that is read: the code that uses it recurses, which Python limits to 1,000 calls."""


SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""JSON's escape of a surrogate, which is half of a character unless its other half follows."""


def read_json(path: Path, *, is_ours: bool = False) -> dict[str, Any]:
    """Read a JSON object. A file that alnico wrote may not have duplicate keys or NaN.

    Errors: ModelError naming the file.
    """
    return parse_json(read_small(path, MAX_JSON_BYTES, "a small JSON file"), path, is_ours=is_ours)


def parse_json(data: bytes, path: Path, *, is_ours: bool = False) -> dict[str, Any]:
    """Parse the JSON object of a file, of limited depth and with text that can be written again.

    Errors: ModelError naming the file.
    """
    try:
        loaded = (
            json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse_constant)
            if is_ours
            else json.loads(data)
        )
    except (ValueError, RecursionError) as error:
        kind = None if data.lstrip()[:1] in (b"{", b"[", b'"') else kind_of(data[:SNIFFED_BYTES])
        if kind is not None:
            raise ModelError(f"{path}: is not JSON, but {kind.name}. {kind.advice}") from None
        raise ModelError(
            f"{path}: is not JSON ({str(error)[:120]}). The file is damaged; download it again."
        ) from None
    if not isinstance(loaded, dict):
        raise ModelError(
            f"{path}: holds a JSON {type(loaded).__name__}, expected an object. Check the model."
        )
    if (answer := error_message(loaded)) is not None and not is_ours:
        raise ModelError(f"{path}: holds {answer.name}, not the file itself. {answer.advice}")
    if _is_deep(loaded):
        raise ModelError(
            f"{path}: is nested deeper than {MAX_JSON_DEPTH} levels; expected a file that describes a model. "
            "Check the model."
        )
    if SURROGATE.search(data):
        try:
            json.dumps(loaded, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ModelError(
                f"{path}: contains half of a character (a lone surrogate); expected Unicode text. "
                "Download the file again from its source."
            ) from None
    return loaded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("duplicate key")
    return entries


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _is_deep(value: dict[str, Any]) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            v
            for container in level
            for v in (container.values() if type(container) is dict else container)
            if type(v) in (dict, list)
        ]
        if not level:
            return False
    return True
