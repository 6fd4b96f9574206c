"""Builds the JSON Schema of search files: the schema of recipes, with values to search."""

from __future__ import annotations

from typing import Any

from alnico.recipe.json_schema import Schema, json_schema
from alnico.recipe.scalars import SEEDS
from alnico.tune.search.samplers.registry import SAMPLERS
from alnico.tune.search.settings import HALVING_KEYS, KEYS
from alnico.tune.search.space import MAX_CHOICES, MAX_LAYERS, SEARCH_KEYS
from alnico.tune.search.stack import MOST_LAYERS, STACK_KEYS, WINDOW_KEYS

TEXT: Schema = {"type": "string", "minLength": 1}
TRUTH: Schema = {"type": "boolean"}
SHARE: Schema = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
POSITIVE: Schema = {"type": "number", "exclusiveMinimum": 0}
TEXTS: Schema = {"type": "array", "minItems": 1, "items": TEXT, "uniqueItems": True}
RANGE: Schema = {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "number"}}
LEFT_OPEN: list[Schema] = [{"$ref": "#/$defs/searched"}, {"$ref": "#/$defs/choice"}]


def search_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of a file that ``alnico search`` takes.

    ``search`` and ``choice`` are allowed in place of any option's value, and ``choice`` in place of a method. The loader
    checks that the file searches at least one value.
    """
    schema = json_schema()
    own: dict[str, Any] = schema["$defs"]
    for name in [name for name in own if name.startswith("option_")]:
        scalar = own[name]["anyOf"][0]
        own[name] = {**own[name], "anyOf": [_widened(shape, scalar) for shape in own[name]["anyOf"]]}
    method = schema["properties"]["merge_method"]
    enumerated = {key: value for key, value in method.items() if key != "description"}
    for part in (schema, *own.values()):
        properties = part.get("properties", {})
        if "merge_method" in properties:
            properties["merge_method"] = {**properties["merge_method"], **_or_choice(enumerated)}
            properties["merge_method"].pop("enum", None)
    own["searched"] = _object(
        SEARCH_KEYS,
        {
            "search": {"anyOf": [RANGE, {"const": "simplex"}]},
            "log": TRUTH,
            "step": POSITIVE,
            "int": TRUTH,
            "layers": {"type": "integer", "minimum": 1, "maximum": MAX_LAYERS},
        },
        ["search"],
    )
    own["choice"] = _object(
        {"choice": "The values to try."},
        {"choice": {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES}},
        ["choice"],
    )
    schema["properties"] |= {
        "search": {**_settings(), "description": "The settings of the search."},
        "stack": _stack(),
    }
    schema["title"] = "A search of alnico"
    schema["oneOf"] = [*schema["oneOf"], {"required": ["stack"]}]
    schema["anyOf"] = [*schema["anyOf"], {"required": ["stack"]}]
    return schema


def _or_choice(shape: Schema) -> Schema:
    return {"anyOf": [shape, LEFT_OPEN[1]]}


def _widened(shape: Any, scalar: Schema) -> Any:
    """Return the schema with ``search`` and ``choice`` allowed in place of the scalar."""
    if shape == scalar:
        return {"anyOf": [scalar, *LEFT_OPEN]}
    if isinstance(shape, dict):
        return {key: _widened(inner, scalar) for key, inner in shape.items()}
    return [_widened(inner, scalar) for inner in shape] if isinstance(shape, list) else shape


def _settings() -> Schema:
    whole: Schema = {"type": "integer", "minimum": 1}
    shapes: dict[str, Schema] = {
        "objective": {"anyOf": [TEXT, TEXTS]},
        "sampler": {"enum": [*SAMPLERS]},
        "trials": whole,
        "seed": {"type": "integer", "minimum": SEEDS.start, "maximum": SEEDS.stop - 1},
        "storage": TEXT,
        "study": TEXT,
        "tasks": TEXT,
        "report": TEXT,
        "held_out": SHARE,
        "timeout": POSITIVE,
        "halving": {"anyOf": [TRUTH, _object(HALVING_KEYS, dict.fromkeys(HALVING_KEYS, SHARE), [])]},
        "failures": whole,
        "population": {"type": "integer", "minimum": 2},
        "concentration": POSITIVE,
    }
    return {**_object(KEYS, shapes, []), "not": {"required": ["report", "held_out"]}}


def _stack() -> Schema:
    whole: Schema = {"type": "integer", "minimum": 1}
    ends: Schema = {
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
        "items": {"type": "integer", "minimum": 0, "maximum": 100},
    }
    shapes: dict[str, Schema] = {
        "models": TEXTS,
        "layers": whole,
        "block": whole,
        "places": whole,
        "repeat": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 100}, ends]},
        "window": _object(
            WINDOW_KEYS,
            {"from": _ends(0, MOST_LAYERS), "length": _ends(1, MOST_LAYERS), "times": _ends(2, 100)},
            ["from", "length"],
        ),
    }
    return {
        **_object(STACK_KEYS, shapes, ["models", "layers"]),
        "description": "Layer stacks to search.",
    }


def _ends(least: int, most: int) -> Schema:
    whole: Schema = {"type": "integer", "minimum": least, "maximum": most}
    return {"anyOf": [whole, {"type": "array", "minItems": 2, "maxItems": 2, "items": whole}]}


def _object(keys: dict[str, str], shapes: dict[str, Schema], required: list[str]) -> Schema:
    """Return the schema of a mapping with exactly these keys and their descriptions."""
    properties = {key: {**shapes[key], "description": meaning} for key, meaning in keys.items()}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        **({"required": required} if required else {}),
    }
