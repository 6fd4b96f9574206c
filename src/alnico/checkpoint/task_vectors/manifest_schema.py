"""Builds the JSON Schema of ``taskvector.json``, which accepts what the reader of manifests accepts.

``alnico schema --task-vector`` prints it; taskvector.schema.json next to this file holds the same.
What a schema cannot say is left to the reader: that keys are unique, that ``chat_template`` is one of the files, and that a
tensor has at most 2^48 elements.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from alnico.checkpoint.task_vectors.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MAX_FILES,
    MAX_TENSORS,
    MAX_TEXT,
    MAX_WORD,
    PARTS,
    Encoding,
)
from alnico.numerics.dtypes import DTYPES

SCHEMA_FILE = Path(__file__).with_name("taskvector.schema.json")

END = r"(?![\s\S])"
"""The end of a text. ``$`` also matches before a newline at the end, in some programs."""

NAME = rf"^(?![\s\S]*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{{0,95}}{END}"
FILE_NAME = (
    rf"^(?!{MANIFEST.replace('.', chr(92) + '.')}{END})(?![\s\S]*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{{0,95}}{END}"
)
RELATIVE = rf"^(?:(?!\.\.?(?:/|{END}))[^/\\]+(?:/|{END}))+(?<!/){END}"
SHA256 = f"^[0-9a-f]{{64}}{END}"
XXH3 = f"^[0-9a-f]{{32}}{END}"
BASE64 = rf"^(?:[A-Za-z0-9+/]{{4}})*(?:[A-Za-z0-9+/]{{2}}==|[A-Za-z0-9+/]{{3}}=)?{END}"

LARGEST = 1.7e308


def manifest_schema() -> dict[str, Any]:
    """Return the JSON Schema of a manifest, of draft 2020-12."""
    properties = {
        "format": {"const": FORMAT},
        "version": {"const": FORMAT_VERSION},
        "name": _text(96, NAME),
        "base": _identity(),
        "finetuned": _identity(),
        "tensors": _object(_tensor(), MAX_TENSORS, {"minLength": 1, "maxLength": 2000}),
        "files": _object(_file(required=True), MAX_FILES, {"pattern": FILE_NAME}),
        "kind": {"enum": ["difference", "adapter"]},
        "description": _text(MAX_TEXT),
        "tasks": _words(),
        "languages": _words(),
        "licence": _or_null(_text(MAX_WORD)),
        "training": _text(MAX_TEXT),
        "evaluations": {"type": "array", "maxItems": 10_000, "items": _evaluation()},
        "scale": _closed({"suggested": _number(), "least": _or_null(_number()), "most": _or_null(_number())}),
        "added_tokens": _object(_whole(), MAX_TENSORS, {"maxLength": MAX_WORD}),
        "chat_template": _or_null(_text(MAX_WORD)),
        "left_out": _object(_text(MAX_TEXT), MAX_TENSORS, {"minLength": 1, "maxLength": 2000}),
        "producer": _text(MAX_WORD),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The manifest of a stored task vector",
        **_closed(properties, ("format", "version", "name", "base", "finetuned", "tensors")),
    }


def _tensor() -> dict[str, Any]:
    parts: dict[str, Any] = {
        "encoding": {"enum": list(get_args(Encoding))},
        "dtype": {"enum": list(DTYPES)},
        "shape": {"type": "array", "maxItems": 32, "items": _whole()},
        "base": _or_null(_text(32, XXH3)),
        "finetuned": _or_null(_text(32, XXH3)),
        "stored": {"type": "object"},
        "digests": {"type": "object"},
        "scale": _number(),
        "error": _number(0),
        "norm": _number(0),
        "byte_size": _whole(),
        "sketch": {"type": "array", "maxItems": 2, "items": _text(10_000, BASE64)},
    }
    cases = []
    for encoding, names in PARTS.items():
        of_encoding: dict[str, Any] = {
            "stored": _closed(
                {n: {"type": "string", "minLength": 1, "maxLength": 2000} for n in names}, names
            ),
            "digests": _closed({n: _text(32, XXH3) for n in names}, names),
        }
        then: dict[str, Any] = {"properties": of_encoding}
        if names:
            then["required"] = ["stored", "digests"]
        cases.append({"if": {"properties": {"encoding": {"const": encoding}}}, "then": then})
    return {**_closed(parts, ("encoding", "dtype", "shape")), "allOf": cases}


def _identity() -> dict[str, Any]:
    return _closed(
        {
            "id": _or_null(_text(MAX_WORD)),
            "revision": _or_null(_text(MAX_WORD)),
            "root": _or_null(_text(64, SHA256)),
            "files": _object(_file(required=False), MAX_FILES, {"maxLength": 1000, "pattern": RELATIVE}),
            "dtype": {"enum": [*DTYPES, None]},
            "vocabulary": _or_null(_text(64, SHA256)),
            "licence": _or_null(_text(MAX_WORD)),
        }
    )


def _file(*, required: bool) -> dict[str, Any]:
    digest = _text(64, SHA256)
    return _closed(
        {"size": _whole(), "sha256": digest if required else _or_null(digest)},
        ("size", "sha256") if required else ("size",),
    )


def _evaluation() -> dict[str, Any]:
    return _closed(
        {
            "task": _text(MAX_WORD),
            "metric": _text(MAX_WORD),
            "value": _number(),
            "base": _or_null(_number()),
            "scale": _number(),
            "examples": _or_null(_whole()),
        },
        ("task", "metric", "value"),
    )


def _closed(properties: dict[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the schema of an object with these keys and no others."""
    closed = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**closed, "required": list(required)} if required else closed


def _object(values: dict[str, Any], most: int, names: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object whose keys are names."""
    return {
        "type": "object",
        "maxProperties": most,
        "propertyNames": {"type": "string", **names},
        "additionalProperties": values,
    }


def _text(most: int, pattern: str = "") -> dict[str, Any]:
    return {"type": "string", "maxLength": most, **({"pattern": pattern} if pattern else {})}


def _words() -> dict[str, Any]:
    return {"type": "array", "maxItems": 1000, "items": _text(MAX_WORD)}


def _whole() -> dict[str, Any]:
    return {"type": "integer", "minimum": 0, "maximum": (1 << 63) - 1}


def _number(least: float = -LARGEST) -> dict[str, Any]:
    return {"type": "number", "minimum": least, "maximum": LARGEST}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a value that may be null."""
    return {**schema, "type": [schema["type"], "null"]}
