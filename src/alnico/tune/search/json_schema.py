"""The language of searches as a JSON Schema, for editors: that of recipes, with values that are left open."""

from __future__ import annotations

from typing import Any

from alnico.recipe.json_schema import Schema, json_schema
from alnico.recipe.scalars import SEEDS
from alnico.tune.search.samplers.registry import SAMPLERS
from alnico.tune.search.settings import HALVING_KEYS, KEYS
from alnico.tune.search.space import MAX_CHOICES, MAX_LAYERS, SEARCH_KEYS
from alnico.tune.search.stack import STACK_KEYS

TEXT: Schema = {"type": "string", "minLength": 1}
TRUTH: Schema = {"type": "boolean"}
SHARE: Schema = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
POSITIVE: Schema = {"type": "number", "exclusiveMinimum": 0}
TEXTS: Schema = {"type": "array", "minItems": 1, "items": TEXT, "uniqueItems": True}
RANGE: Schema = {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "number"}}
LEFT_OPEN: list[Schema] = [{"$ref": "#/$defs/searched"}, {"$ref": "#/$defs/choice"}]


def search_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of a file that ``alnico search`` takes.

    Wherever a recipe has a value of an option, ``search`` and ``choice`` may stand, and a choice wherever it has a method. That something is
    searched at all is left to the loader.
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
        {"choice": "The values that are tried."},
        {"choice": {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES}},
        ["choice"],
    )
    schema["properties"] |= {
        "search": {**_settings(), "description": "How it is searched."},
        "stack": _stack(),
    }
    schema["title"] = "A search of alnico"
    schema["oneOf"] = [*schema["oneOf"], {"required": ["stack"]}]
    schema["anyOf"] = [*schema["anyOf"], {"required": ["stack"]}]
    return schema


def _or_choice(shape: Schema) -> Schema:
    return {"anyOf": [shape, LEFT_OPEN[1]]}


def _widened(shape: Any, scalar: Schema) -> Any:
    """The shape with ``search`` and ``choice`` wherever it has the scalar."""
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
    }
    return {
        **_object(STACK_KEYS, shapes, ["models", "layers"]),
        "description": "Layer stacks that are searched.",
    }


def _object(keys: dict[str, str], shapes: dict[str, Schema], required: list[str]) -> Schema:
    """A mapping of these keys and no others, each with what it says."""
    properties = {key: {**shapes[key], "description": meaning} for key, meaning in keys.items()}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        **({"required": required} if required else {}),
    }
