"""The JSON Schema of ``taskvector.json`` and its reader accept and refuse the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import alnico
from alnico.checkpoint.task_vectors import manifest_schema
from alnico.checkpoint.task_vectors.manifest import PARTS, format_manifest, parse_manifest
from alnico.errors import ModelError, RecipeError

H32, H64 = "0123456789abcdef" * 2, "0123456789abcdef" * 4


def whole_manifest(encodings: Sequence[str] = ("int4",)) -> dict[str, Any]:
    """A manifest with every key, and a tensor in each of some encodings."""
    identity = {"id": "org/base", "revision": "main", "root": H64, "files": {"a/model.safetensors": {"size": 3, "sha256": H64}}, "dtype": "BF16", "vocabulary": H64, "licence": "mit"}  # fmt: skip
    tensors = {
        f"layer.{encoding}": {
            "encoding": encoding, "dtype": "F32", "shape": [2, 3], "base": H32, "finetuned": H32,
            "stored": {p: f"{encoding}.{p}" for p in parts}, "digests": dict.fromkeys(parts, H32),
            "scale": 0.5, "error": 0.25, "norm": 1.5, "byte_size": 24, "sketch": ["AAAA", "AA=="],
        }
        for encoding, parts in PARTS.items() if encoding in encodings
    }  # fmt: skip
    return {
        "format": "alnico task vector", "version": 1, "name": "sql.v2", "base": identity, "finetuned": {**identity, "id": None},
        "tensors": tensors, "files": {"taskvector.safetensors": {"size": 10, "sha256": H64}, "chat_template.jinja": {"size": 1, "sha256": H64}},
        "kind": "difference", "description": "what it does", "tasks": ["sql"], "languages": ["en"], "licence": "apache-2.0",
        "training": "how", "evaluations": [{"task": "spider", "metric": "accuracy", "value": 0.5, "base": None, "scale": 1.0, "examples": 10}],
        "scale": {"suggested": 0.7, "least": 0.1, "most": None}, "added_tokens": {"<sql>": 9}, "chat_template": "chat_template.jinja",
        "left_out": {"rope.inv_freq": "a buffer"}, "producer": "alnico 0.1.0",
    }  # fmt: skip


SCHEMA = jsonschema.Draft202012Validator(manifest_schema.manifest_schema())


def is_read(data: Any) -> bool:
    try:
        parse_manifest(data, "taskvector.json")
    except ModelError:
        return False
    return True


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


PLACES = places(whole_manifest())
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 1.0, 2.5, -0.5, 1 << 62, 1 << 63, 1 << 70, 1e300, 1.75e308, 10**400, "", "x", "..", "a..b", "a/b", "../x", "/x", "a//b", "a/",
    "taskvector.json", "BF16", "F128", "whole", "adapter", H32, H64, H32 + "\n", H64.upper(), "AAAA", "AA", "A===", "AAAA\n", "x" * 201, "a" * 97, "n\n",
    "x\\y", [], {}, [1], [-1], [1.0], ["x"], [1] * 33, {"x": 1}, {"size": 1}, {"size": 1, "sha256": H64}, {"": 1}, {"a" * 2001: "x"}, "alnico task vector", 3.0, ["AAAA"] * 3,
]  # fmt: skip


def changed(place: tuple[Any, ...], value: Any, action: str) -> Any:
    data = copy.deepcopy(whole_manifest())
    if not place:
        return value
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    if action == "remove":
        del inner[place[-1]]
    elif action == "rename" and isinstance(inner, dict):
        inner[value if isinstance(value, str) else "other"] = inner.pop(place[-1])
    else:
        inner[place[-1]] = value
    return data


def is_beyond_a_schema(data: Any) -> bool:
    """What only the reader refuses."""
    if not isinstance(data, dict):
        return True  # the reader is given objects
    files, tensors = data.get("files"), data.get("tensors")
    template = data.get("chat_template")
    shapes = (
        [t.get("shape") for t in tensors.values() if isinstance(t, dict)] if isinstance(tensors, dict) else []
    )
    sizes = [n for shape in shapes if isinstance(shape, list) for n in shape if isinstance(n, (int, float))]
    large = any(n > 1 << 40 for n in sizes)
    return large or (isinstance(template, str) and (not isinstance(files, dict) or template not in files))


@pytest.mark.parametrize("first", range(0, len(PLACES), 10))
def test_schema_and_reader_agree_on_every_value(first: int) -> None:
    for place in PLACES[first : first + 10]:
        for action in ("set", "remove", "rename"):
            for value in VALUES if action == "set" else VALUES[15:25] if action == "rename" else [None]:
                data = changed(place, value, action)
                if not is_beyond_a_schema(data):
                    assert SCHEMA.is_valid(data) == is_read(data), (place, action, value)


@pytest.mark.parametrize("encoding", PARTS)
def test_schema_and_reader_agree_on_the_parts_of_each_encoding(encoding: str) -> None:
    for given_parts in PARTS.values():
        for key in ("stored", "digests"):
            data = whole_manifest([encoding])
            data["tensors"][f"layer.{encoding}"][key] = dict.fromkeys(given_parts, H32)
            assert SCHEMA.is_valid(data) == is_read(data) == (sorted(given_parts) == sorted(PARTS[encoding]))  # type: ignore[index]


@given(st.sampled_from(PLACES), st.recursive(st.sampled_from(VALUES) | st.text(max_size=3), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=4), st.sampled_from(["set", "rename"]))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_schema_and_reader_agree_on_strange_values(place: tuple[Any, ...], value: Any, action: str) -> None:
    data = changed(place, value, action)
    if not is_beyond_a_schema(data):
        assert SCHEMA.is_valid(data) == is_read(data)


def test_the_whole_manifest_is_valid_and_read_back_as_it_was() -> None:
    data = whole_manifest(tuple(PARTS))
    SCHEMA.validate(data)
    manifest = parse_manifest(data, "here")
    again = json.loads(format_manifest(manifest))
    SCHEMA.validate(again)
    assert parse_manifest(again, "here") == manifest


def test_a_manifest_that_could_not_be_read_is_not_written() -> None:
    manifest = parse_manifest(whole_manifest(), "here")
    with pytest.raises(ModelError, match=r"taskvector\.json: name is '\.\.'; expected letters"):
        format_manifest(manifest.__class__(**{**vars(manifest), "name": ".."}))


def test_the_file_in_the_package_is_the_schema() -> None:
    assert json.loads(manifest_schema.SCHEMA_FILE.read_text("utf-8")) == manifest_schema.manifest_schema()
    assert alnico.schema(task_vector=True) == manifest_schema.manifest_schema()
    with pytest.raises(RecipeError, match="are both given; expected one of them"):
        alnico.schema(task_vector=True, search=True)
    jsonschema.Draft202012Validator.check_schema(manifest_schema.manifest_schema())


def test_the_schema_refers_to_nothing_outside() -> None:
    text = manifest_schema.SCHEMA_FILE.read_text("utf-8")
    assert text.count("http") == 1
