"""The language as a JSON Schema, for editors: keys from :mod:`alnico.recipe.keys`, options from the registry of methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from alnico.methods import registry
from alnico.methods.base import Between, Method, Option
from alnico.numerics.dtypes import CONFIG_NAMES, TORCH_NAMES
from alnico.recipe import dialect
from alnico.recipe.keys import (
    CASE,
    ENTRY,
    LINES,
    MAY_BE_EMPTY,
    MODEL_TOKEN,
    MODULE,
    NORM_WEIGHT,
    PATH,
    REFERENCE,
    RULE,
    SLICE,
    SOURCE,
    TOKEN,
    TOKENIZER,
    TOP,
)
from alnico.recipe.models import MAX_DIGITS, MAX_MODELS
from alnico.recipe.norm_weight import CHOICES, NUMBERS, takes_norms
from alnico.recipe.scalars import SEEDS

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NUMBER_AS_TEXT: Schema = {"type": "string", "pattern": r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"}
"""What YAML 1.1 reads as text, and mergekit and we as a number: 1e-5."""


def _of_any_case(words: Iterable[str]) -> str:
    return (
        f"^({'|'.join(''.join(f'[{c}{c.upper()}]' if c.isalpha() else c for c in word) for word in words)})$"
    )


TRUTH: list[Schema] = [
    {"type": "boolean"},
    {"enum": [0, 1]},
    {"type": "string", "pattern": _of_any_case(dialect.BOOLEAN_WORDS)},
]
"""True or false, and the numbers and text that mergekit reads as that."""
TEXT: Schema = {"type": "string", "minLength": 1}
FILTER: Schema = {"type": "string", "minLength": 1, "not": {"enum": ["=", "re:"]}}


def json_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of one document of a recipe.

    It knows keys, methods, options with their ranges, and gradients and filters; what only the whole shows (how many models
    a method takes, that a base is there) is left to the loader.
    """
    methods = registry()
    names = [*methods]
    presets = sorted({preset for m in methods.values() for preset in m.presets})
    method: Schema = {
        "enum": names,
        "markdownDescription": "\n".join(f"- `{m.name}`: {m.summary}" for m in methods.values()),
    }
    listed: Schema = {"type": "array", "minItems": 1, "maxItems": MAX_MODELS}
    shared: dict[str, Schema] = {
        "merge_method": method,
        "models": {**listed, "items": {"anyOf": [TEXT, _ref("model")]}},
        "slices": {**listed, "items": _ref("slice")},
        "parameters": _ref("parameters"),
        "base_model": _ref("reference"),
        "model": _ref("reference"),
        "filter": FILTER,
        "preset": {"enum": presets},
    }
    dtypes = [*TORCH_NAMES, *(f"torch.{name}" for name in TORCH_NAMES), *CONFIG_NAMES]
    whole = {
        **shared,
        "base_model": _or_null(_ref("reference")),
        "residual_weight": {},
        "sources": {**listed, "items": _ref("source")},
    }
    top = shared | {
        "modules": {"type": "object", "minProperties": 1, "additionalProperties": _ref("module")},
        "methods": {**listed, "items": _ref("rule")},
        "lines": _object(
            LINES, {key: {"anyOf": [_number(Between()), NUMBER_AS_TEXT]} for key in LINES}, LINES
        ),
        "tokenizer_source": _ref("reference"),
        "tokenizer": _ref("tokenizer"),
        "chat_template": TEXT,
        "dtype": {"enum": dtypes},
        "out_dtype": {"enum": dtypes},
        "missing": {"enum": ["error", "copy", "drop"]},
        "unrelated": {"enum": ["error", "allow"]},
        "seed": {"type": "integer", "minimum": SEEDS.start, "maximum": SEEDS.stop - 1},
        "name": TEXT,
    }
    number: Schema = {
        "anyOf": [
            {"type": "integer", "minimum": 0},
            {"type": "string", "pattern": f"^[0-9]{{1,{MAX_DIGITS - 1}}}$"},
        ]
    }
    layers: Schema = {"type": "array", "items": number, "minItems": 2, "maxItems": 2}
    top |= {key: _or_null(top[key]) for key in MAY_BE_EMPTY}
    path: Schema = {"anyOf": [TEXT, _object(PATH, {"path": TEXT, "revision": _or_null(TEXT)}, ("path",))]}
    one_of = [_has(key) for key in ("models", "slices", "modules")]
    options = _options(methods.values())
    return {
        "$schema": DIALECT,
        "title": "A recipe of alnico",
        "description": "What to merge, and how; the dialect of mergekit, and more.",
        **_object(TOP, top, (), dialect.WITHOUT_EFFECT_AT_THE_TOP),
        "oneOf": one_of,
        "anyOf": [{"required": [key]} for key in ("merge_method", "slices", "modules")],
        "not": _has("tokenizer", "tokenizer_source"),
        "$defs": {
            "model": _object(ENTRY, {**shared, "layer_range": layers}, ("model",), dialect.WITHOUT_EFFECT),
            "source": _object(
                SOURCE, {**shared, "layer_range": layers}, ("model", "layer_range"), dialect.WITHOUT_EFFECT
            ),
            "slice": _object(SLICE, whole, ("sources",), dialect.WITHOUT_EFFECT),
            "module": {
                **_object(
                    MODULE,
                    {**shared, **{k: _or_null(shared[k]) for k in ("models", "slices")}},
                    (),
                    dialect.WITHOUT_EFFECT,
                ),
                "oneOf": one_of[:2],
            },
            "rule": _object(RULE, shared, ("filter", "merge_method"), dialect.WITHOUT_EFFECT),
            "reference": {
                "anyOf": [
                    TEXT,
                    _object(PATH, {"path": TEXT, "revision": _or_null(TEXT)}, ("path",)),
                    _object(
                        REFERENCE,
                        {"model": path, "lora": _or_null(path), "override_architecture": {}},
                        ("model",),
                    ),
                ]
            },
            "tokenizer": _object(
                TOKENIZER,
                {
                    "source": _ref("reference"),
                    "tokens": {"type": ["object", "null"], "additionalProperties": _ref("token")},
                    "pad_to_multiple_of": _or_null(_whole(1)),
                    "tables": {"anyOf": [FILTER, {"type": ["array", "null"], "items": FILTER}]},
                },
                (),
            ),
            "token": _object(TOKEN, {"source": _token_source(), "force": {"anyOf": TRUTH}}, ()),
            "norm_weight": {
                **_object(
                    NORM_WEIGHT,
                    {
                        **{key: {"enum": [*words]} for key, words in CHOICES.items()},
                        **{
                            key: {"anyOf": [_number(limits), NUMBER_AS_TEXT]}
                            for key, limits in NUMBERS.items()
                        },
                        "path": TEXT,
                    },
                    ("from",),
                ),
                "if": {"properties": {"from": {"const": "analysis"}}},
                "then": {"required": ["path"]},
            },
            "parameters": {
                "type": ["object", "null"],
                "additionalProperties": False,
                "properties": {key: _ref(f"option_{key}") for key in options} | _idle(),
            },
            **{f"option_{key}": _setting(key, takers) for key, takers in options.items()},
        },
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _has(*keys: str) -> Schema:
    """These keys are given, and not empty."""
    return {"required": [*keys], "properties": {key: {"not": {"type": "null"}} for key in keys}}


def _whole(least: int) -> Schema:
    return {
        "anyOf": [
            {"type": "integer", "minimum": least},
            {"type": "string", "pattern": "^0*[1-9][0-9]*$" if least else "^[0-9]+$"},
        ]
    }


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(
    keys: Mapping[str, str],
    shapes: Mapping[str, Schema],
    required: Iterable[str],
    idle: Mapping[str, str] | None = None,
) -> Schema:
    """A mapping of these keys and no others, each with what it says; those that are ``idle`` have no effect."""
    properties = {key: _described(shapes[key], meaning) for key, meaning in keys.items()}
    properties |= {key: {"description": f"Without effect: it {why}."} for key, why in (idle or {}).items()}
    needed = {"required": [*required]} if [*required] else {}
    return {"type": "object", "additionalProperties": False, "properties": properties, **needed}


def _described(schema: Schema, meaning: str) -> Schema:
    return {**schema, "description": meaning}


def _token_source() -> Schema:
    return {
        "anyOf": [
            _ref("reference"),
            {"type": "null"},
            _object({"kind": MODEL_TOKEN["kind"]}, {"kind": {"const": "zero"}}, ("kind",)),
            {
                **_object(
                    MODEL_TOKEN,
                    {
                        "kind": {"const": "model_token"},
                        "model": _ref("reference"),
                        "token": TEXT,
                        "token_id": _whole(0),
                    },
                    ("kind", "model"),
                ),
                "oneOf": [{"required": ["token"]}, {"required": ["token_id"]}],
            },
        ]
    }


Takers = list[tuple[Method, Option]]


def _options(methods: Iterable[Method]) -> dict[str, Takers]:
    """Every key of parameters with the options it stands for."""
    found: dict[str, Takers] = {}
    for method in methods:
        for key in dialect.option_names(method):
            option = method.options[dialect.option_name(method, key) or key]
            found.setdefault(key, []).append((method, option))
    return dict(sorted(found.items()))


def _idle() -> dict[str, Schema]:
    """Keys without effect, for all methods or for some, that no method has as an option."""
    found: dict[str, Schema] = {
        key: {"description": f"Without effect: it {why}."} for key, why in dialect.WITHOUT_EFFECT.items()
    }
    taken = _options(registry().values())
    for method, keys in dialect.WITHOUT_EFFECT_FOR.items():
        found |= {
            key: {"description": f"Without effect on {method}{why}."}
            for key, why in keys.items()
            if key not in taken
        }
    return found


def _setting(key: str, takers: Takers) -> Schema:
    """One value, a list over the layers, or filters: values may be filters again."""
    meanings: dict[str, list[str]] = {}
    for method, option in takers:
        said = f"{option.meaning} ({option.describe()})" if option.meaning else option.describe()
        meanings.setdefault(f"{option.name}, {said}" if option.name != key else said, []).append(method.name)
    shapes: list[Schema] = []
    for schema in (s for _, option in takers for s in _scalar(key, option)):
        if schema not in shapes:
            shapes.append(schema)
    scalar = {"anyOf": shapes}
    again = _ref(f"option_{key}")
    lowest = {o.range.low for _, o in takers if o.range.low_in_places}
    varied: Schema = {"anyOf": [*shapes, *({"const": low} for low in lowest)]}
    value = {"anyOf": [again, *({"const": low} for low in lowest)]} if lowest else again
    case = _object(CASE, {"filter": _or_null(FILTER), "value": value}, ("value",))
    measured = [_ref("norm_weight")] if all(takes_norms(option) for _, option in takers) else []
    return {
        "description": "\n".join(f"{', '.join(names)}: {said}" for said, names in meanings.items()),
        "anyOf": [
            scalar,
            case,
            *measured,
            {"type": "array", "minItems": 1, "items": varied},
            {
                "type": "array",
                "minItems": 1,
                "items": {
                    "anyOf": [case, varied, *measured, {"type": "array", "minItems": 1, "items": varied}]
                },
            },
        ],
    }


def _scalar(key: str, option: Option) -> list[Schema]:
    if option.kind == "statistics":
        return [{"type": "string"}]
    if option.kind == "number":
        return [_number(option.range, is_whole=option.is_whole), NUMBER_AS_TEXT]
    alias = dialect.ALIASES.get(key)
    truths = TRUTH if option.kind == "bool" or (alias and alias.option == option.name) else []
    return [
        *truths,
        *([{"enum": [*option.choices]}] if option.kind == "choice" and key == option.name else []),
    ]


def _number(limits: Between, *, is_whole: bool = False) -> Schema:
    schema: Schema = {"type": "integer" if is_whole else "number"}
    if limits.low != -float("inf"):
        schema["exclusiveMinimum" if limits.without_low else "minimum"] = limits.low
    if limits.high != float("inf"):
        schema["maximum"] = limits.high
    return schema
