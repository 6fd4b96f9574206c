"""Generates the JSON Schema of recipes from their keys and the registry of methods, for editors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from alnico.checkpoint.image_blocks import LISTS, PRESETS
from alnico.methods import registry
from alnico.methods.base import Between, Method, Option
from alnico.methods.shared.other_words import METHOD_SYNONYMS, OPTION_SYNONYMS
from alnico.numerics.decay_schedule import SHAPES
from alnico.numerics.dtypes import CONFIG_NAMES, Q8_0, TORCH_NAMES
from alnico.numerics.numbers import complement
from alnico.recipe import dialect
from alnico.recipe.experts import GATE_MODES
from alnico.recipe.keys import (
    BLOCKS,
    CASE,
    CHECKPOINTS,
    ENTRY,
    EXPERT,
    LINES,
    MAY_BE_EMPTY,
    MIXTURE,
    MODEL_TOKEN,
    MODULE,
    NORM_WEIGHT,
    PATH,
    PROTECT,
    REFERENCE,
    ROUTERS,
    RULE,
    RULE_MODEL,
    SCHEDULE_WEIGHT,
    SLICE,
    SOURCE,
    TOKEN,
    TOKENIZER,
    TOP,
)
from alnico.recipe.models import MAX_DIGITS, MAX_MODELS
from alnico.recipe.norm_weight import CHOICES, NUMBERS, SCHEDULE, takes_norms
from alnico.recipe.scalars import SEEDS
from alnico.recipe.schema import APPROXIMATIONS, DROP

Schema = dict[str, Any]
Takers = list[tuple[Method, Option]]
"""Methods that have an option, each with the option."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NUMBER_AS_TEXT: Schema = {"type": "string", "pattern": r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"}
"""Numbers such as 1e-5, which YAML 1.1 parses as text and mergekit and alnico read as numbers."""


def _of_any_case(words: Iterable[str]) -> str:
    return (
        f"^({'|'.join(''.join(f'[{c}{c.upper()}]' if c.isalpha() else c for c in word) for word in words)})$"
    )


TRUTH: list[Schema] = [
    {"type": "boolean"},
    {"enum": [0, 1]},
    {"type": "string", "pattern": _of_any_case(dialect.BOOLEAN_WORDS)},
]
"""True or false, and the numbers and text that mergekit reads as true or false."""
TEXT: Schema = {"type": "string", "minLength": 1}
FILTER: Schema = {"type": "string", "minLength": 1, "not": {"enum": ["=", "re:"]}}


def json_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of one document of a recipe.

    It covers keys, methods, options with their ranges, gradients and filters. The loader checks what depends
    on the whole recipe: the number of models of a method, a required base.
    """
    shared = _shared_keys()
    methods = registry().values()
    one_of = [_has(key) for key in ("models", "slices", "modules", "checkpoints")]
    return {
        "$schema": DIALECT,
        "title": "A recipe of alnico",
        "description": "What to merge, and how, in mergekit's dialect with extensions.",
        **_object(TOP, _top_keys(shared), (), dialect.WITHOUT_EFFECT_AT_THE_TOP),
        "oneOf": one_of,
        "anyOf": [{"required": [key]} for key in ("merge_method", "slices", "modules")],
        "not": _has("tokenizer", "tokenizer_source"),
        "$defs": {
            **_model_definitions(shared, one_of[:2]),
            **_reference_definitions(),
            **_tokenizer_definitions(),
            **_parameter_definitions(_takers_by_key(methods)),
        },
    }


def mixture_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of a document that builds a mixture of experts.

    The loader checks what depends on the whole document: prompts for the gate modes of prompts, enough experts.
    """
    top = _top_keys(_shared_keys())
    above: Schema = {"anyOf": [_number(Between(0, without_low=True)), NUMBER_AS_TEXT, {"type": "null"}]}
    prompts: Schema = {"type": ["array", "null"], "items": TEXT}
    expert: dict[str, Schema] = {
        "source_model": _ref("reference"),
        "source_models": {**LISTED, "items": _ref("reference")},
        "positive_prompts": prompts,
        "negative_prompts": prompts,
        "gram": _or_null(TEXT),
        "rank": {"anyOf": [_number(Between(0, 1, without_low=True)), NUMBER_AS_TEXT, {"type": "null"}]},
        "residual_scale": {"anyOf": [_number(Between()), NUMBER_AS_TEXT, {"type": "null"}]},
        "noise_scale": {"enum": [0, None]},
    }
    keys: dict[str, Schema] = {
        **{key: top[key] for key in ("dtype", "out_dtype", "unrelated", "seed", "name")},
        "base_model": _ref("reference"),
        "experts": {**LISTED, "items": {"anyOf": [TEXT, _ref("expert")]}},
        "shared_experts": {
            "type": ["array", "null"],
            "maxItems": 1,
            "items": {"anyOf": [TEXT, _ref("expert")]},
        },
        "architecture": _or_null(TEXT),
        "experts_per_token": {"anyOf": [_whole(1), {"type": "null"}]},
        "gate_mode": {"enum": [*GATE_MODES, None]},
        "gates": TEXT,
        "gate_scale": above,
        "ridge": above,
        "others": {"enum": ["base", "average"]},
    }
    return {
        "$schema": DIALECT,
        "title": "A mixture of experts of alnico",
        "description": "A mixture that is built from dense models: mergekit-moe's keys, with extensions.",
        **_object(MIXTURE, keys, ("base_model", "experts")),
        "$defs": {
            "expert": {
                **_object(EXPERT, expert, ()),
                "oneOf": [{"required": ["source_model"]}, {"required": ["source_models"]}],
            },
            **_reference_definitions(),
        },
    }


LISTED: Schema = {"type": "array", "minItems": 1, "maxItems": MAX_MODELS}


def _shared_keys() -> dict[str, Schema]:
    """The schemas of keys that appear at several levels."""
    methods = registry()
    method: Schema = {
        "enum": [*methods, *METHOD_SYNONYMS],
        "markdownDescription": "\n".join(
            [
                *(f"- `{m.name}`: {m.summary}" for m in methods.values()),
                *(f"- `{s.word}`: {s.meaning}" for s in METHOD_SYNONYMS.values()),
            ]
        ),
    }
    return {
        "merge_method": method,
        "models": {**LISTED, "items": {"anyOf": [TEXT, _ref("model")]}},
        "slices": {**LISTED, "items": _ref("slice")},
        "parameters": _ref("parameters"),
        "base_model": _ref("reference"),
        "model": _ref("reference"),
        "filter": FILTER,
        "preset": {"enum": sorted({preset for m in methods.values() for preset in m.presets})},
    }


def _top_keys(shared: Mapping[str, Schema]) -> dict[str, Schema]:
    """The schemas of the top-level keys."""
    dtypes = [*TORCH_NAMES, *(f"torch.{name}" for name in TORCH_NAMES), *CONFIG_NAMES, Q8_0.lower(), Q8_0]
    factor: Schema = {"anyOf": [_number(Between()), NUMBER_AS_TEXT]}
    protected: dict[str, Schema] = {
        "gram": TEXT,
        "energy": {"anyOf": [_number(Between(0, 1, without_low=True)), NUMBER_AS_TEXT]},
        "model": _ref("reference"),
        "others": {"enum": ["keep", "merge"]},
    }
    keys: dict[str, Schema] = {
        **shared,
        "modules": {"type": "object", "minProperties": 1, "additionalProperties": _ref("module")},
        "checkpoints": _checkpoints(),
        "methods": {**LISTED, "items": _ref("rule")},
        "lines": _object(LINES, dict.fromkeys(LINES, factor), LINES),
        "protect": _object(PROTECT, protected, ("gram",)),
        "tokenizer_source": _ref("reference"),
        "tokenizer": _ref("tokenizer"),
        "chat_template": TEXT,
        "dtype": {"enum": dtypes},
        "out_dtype": {"enum": dtypes},
        "missing": {"enum": ["error", "copy", "drop"]},
        "unrelated": {"enum": ["error", "allow"]},
        "base_mismatch": {"enum": ["error", "allow"]},
        "complete_from": _ref("reference"),
        "routers": {
            "anyOf": [_ref("reference"), _object(ROUTERS, dict.fromkeys(ROUTERS, TEXT), tuple(ROUTERS))]
        },
        "requantise": {"enum": ["fp8"]},
        "seed": {"type": "integer", "minimum": SEEDS.start, "maximum": SEEDS.stop - 1},
        "name": TEXT,
    }
    return keys | {key: _or_null(keys[key]) for key in MAY_BE_EMPTY}


def _model_definitions(shared: Mapping[str, Schema], one_of: list[Schema]) -> dict[str, Schema]:
    """Models, sources, slices, modules and rules; a module has exactly one key of ``one_of``."""
    number: Schema = {
        "anyOf": [
            {"type": "integer", "minimum": 0},
            {"type": "string", "pattern": f"^[0-9]{{1,{MAX_DIGITS - 1}}}$"},
        ]
    }
    layers: Schema = {"type": "array", "items": number, "minItems": 2, "maxItems": 2}
    entry = {**shared, "layer_range": layers}
    of_slice = {
        **shared,
        "base_model": _or_null(_ref("reference")),
        "residual_weight": {},
        "sources": {**LISTED, "items": _ref("source")},
    }
    of_module = {**shared, **{key: _or_null(shared[key]) for key in ("models", "slices")}}
    of_rule = {
        **shared,
        "merge_method": {**shared["merge_method"], "enum": [*shared["merge_method"]["enum"], DROP]},
        "models": {**LISTED, "items": {"anyOf": [TEXT, _ref("rule_model")]}},
        "base_model": _or_null(_ref("reference")),
    }
    idle = dialect.WITHOUT_EFFECT
    return {
        "model": _object(ENTRY, entry, ("model",), idle),
        "source": _object(SOURCE, entry, ("model", "layer_range"), idle),
        "slice": _object(SLICE, of_slice, ("sources",), idle),
        "module": {**_object(MODULE, of_module, (), idle), "oneOf": one_of},
        "rule": {
            **_object(RULE, of_rule, ("filter", "merge_method"), idle),
            "not": {"anyOf": [{"required": ["model", key]} for key in ("models", "base_model")]},
            "if": {"properties": {"merge_method": {"const": DROP}}},
            "then": {"properties": {key: key in ("filter", "merge_method") for key in RULE}},
        },
        "rule_model": _object(RULE_MODEL, entry, ("model",), idle),
    }


def _reference_definitions() -> dict[str, Schema]:
    """References to models, written as text or as a mapping."""
    path = _object(PATH, {"path": TEXT, "revision": _or_null(TEXT)}, ("path",))
    part: Schema = {"anyOf": [TEXT, path]}
    keys = {"model": part, "lora": _or_null(part), "override_architecture": {}}
    return {"reference": {"anyOf": [TEXT, path, _object(REFERENCE, keys, ("model",))]}}


def _tokenizer_definitions() -> dict[str, Schema]:
    """The output's vocabulary and the sources of its tokens."""
    keys: dict[str, Schema] = {
        "source": _ref("reference"),
        "tokens": {"type": ["object", "null"], "additionalProperties": _ref("token")},
        "pad_to_multiple_of": _or_null(_whole(1)),
        "tables": {"anyOf": [FILTER, {"type": ["array", "null"], "items": FILTER}]},
        "approximate": {"enum": [*APPROXIMATIONS, None]},
        "atoms": _or_null(_whole(1)),
    }
    return {
        "tokenizer": _object(TOKENIZER, keys, ()),
        "token": _object(TOKEN, {"source": _token_source(), "force": {"anyOf": TRUTH}}, ()),
    }


def _parameter_definitions(takers_by_key: Mapping[str, Takers]) -> dict[str, Schema]:
    """Parameters, norm weights, and the settings of every option."""
    keys: dict[str, Schema] = {
        **{key: {"enum": [*choices]} for key, choices in CHOICES.items()},
        **{key: {"anyOf": [_number(limits), NUMBER_AS_TEXT]} for key, limits in NUMBERS.items()},
        "path": TEXT,
        "norms": {"type": "array", "minItems": 1, "items": {"anyOf": [_number(Between(0)), NUMBER_AS_TEXT]}},
    }
    needs = {"analysis": "path", "given": "norms"}
    return {
        "norm_weight": {
            **_object(NORM_WEIGHT, keys, ("from",)),
            "allOf": [
                {"if": {"properties": {"from": {"const": origin}}}, "then": {"required": [key]}}
                for origin, key in needs.items()
            ],
        },
        "schedule_weight": _schedule_weight(),
        "parameters": {
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {key: _ref(f"option_{key}") for key in takers_by_key} | _idle(),
        },
        **{f"option_{key}": _setting(key, takers) for key, takers in takers_by_key.items()},
    }


def _schedule_weight() -> Schema:
    factors: Schema = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_number(Between()), NUMBER_AS_TEXT]},
    }
    decay: Schema = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    keys: dict[str, Schema] = {
        "from": {"const": SCHEDULE},
        "shape": {"anyOf": [{"enum": [*SHAPES]}, factors]},
        "decay": {"anyOf": [decay, NUMBER_AS_TEXT]},
    }
    return _object(SCHEDULE_WEIGHT, keys, ("from",))


def _checkpoints() -> Schema:
    """The folder of a run, a glob, or a list of them, alone or with what is taken of it."""
    run: Schema = {"anyOf": [TEXT, {"type": "array", "minItems": 1, "items": TEXT}]}
    step: Schema = {"type": "integer", "minimum": 0}
    least: Schema = {"type": "integer", "minimum": 1}
    steps: Schema = {"type": "array", "prefixItems": [step, step, least], "items": False, "minItems": 2}
    keys: dict[str, Schema] = {
        "run": run,
        "last": least,
        "every": least,
        "steps": steps,
        "ema": {"type": "boolean"},
    }
    return {"anyOf": [*run["anyOf"], _object(CHECKPOINTS, keys, ("run",))]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _has(*keys: str) -> Schema:
    """Requires these keys to be present and not null."""
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
    """A mapping of exactly these keys with their meanings, and of ``idle`` keys, which have no effect."""
    properties = {key: _described(shapes[key], meaning) for key, meaning in keys.items()}
    properties |= {key: {"description": f"No effect: it {why}."} for key, why in (idle or {}).items()}
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


def _takers_by_key(methods: Iterable[Method]) -> dict[str, Takers]:
    """Every key of parameters with the methods and options that it stands for."""
    takers: dict[str, Takers] = {}
    for method in methods:
        for key in (*dialect.option_names(method), *OPTION_SYNONYMS):
            name = dialect.meant_option(method, key)
            if name is not None and (method, method.options[name]) not in takers.get(key, []):
                takers.setdefault(key, []).append((method, method.options[name]))
    return dict(sorted(takers.items()))


def _idle() -> dict[str, Schema]:
    """Keys that have no effect on any method or on some methods, and that are not options of any."""
    schemas: dict[str, Schema] = {
        key: {"description": f"No effect: it {why}."} for key, why in dialect.WITHOUT_EFFECT.items()
    }
    options = _takers_by_key(registry().values())
    for method, keys in dialect.WITHOUT_EFFECT_FOR.items():
        schemas |= {
            key: {"description": f"No effect on {method}{why}."}
            for key, why in keys.items()
            if key not in options
        }
    return schemas


def _setting(key: str, takers: Takers) -> Schema:
    """The setting of an option: one value, a list over the layers, or filters, which may be nested."""
    meanings: dict[str, list[str]] = {}
    for method, option in takers:
        meaning = f"{option.meaning} ({option.describe()})" if option.meaning else option.describe()
        synonym = dialect.synonym_of(method, key)
        name = option.name if synonym is None else synonym.describe(option.name)
        meanings.setdefault(f"{name}, {meaning}" if name != key else meaning, []).append(method.name)
    shapes: list[Schema] = []
    for schema in (s for method, option in takers for s in _scalar(key, method, option)):
        if schema not in shapes:
            shapes.append(schema)
    scalar = {"anyOf": shapes}
    nested = _ref(f"option_{key}")
    lowest = {dialect.number_of(m, key, o.range.low) for m, o in takers if o.range.low_in_places}
    varied: Schema = {"anyOf": [*shapes, *({"const": low} for low in lowest)]}
    value = {"anyOf": [nested, *({"const": low} for low in lowest)]} if lowest else nested
    case = _object(CASE, {"filter": _or_null(FILTER), "value": value}, ("value",))
    blocks: Schema = {
        "anyOf": [
            {"enum": [*PRESETS]},
            {"type": "array", "items": value, "minItems": min(LISTS), "maxItems": max(LISTS)},
            {"type": "object", "minProperties": 1, "additionalProperties": value},
        ]
    }
    by_block = _object(BLOCKS, {"blocks": blocks, "value": value}, ("blocks",))
    is_weight = key == "weight" and all(takes_norms(option) for _, option in takers)
    measured = [_ref("norm_weight"), _ref("schedule_weight")] if is_weight else []
    return {
        "description": "\n".join(f"{', '.join(names)}: {meaning}" for meaning, names in meanings.items()),
        "anyOf": [
            scalar,
            case,
            by_block,
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


def _scalar(key: str, method: Method, option: Option) -> list[Schema]:
    if option.kind == "statistics":
        return [{"type": "string"}]
    if option.kind == "number":
        synonym = dialect.synonym_of(method, key)
        if synonym is not None and synonym.relation == "complement":
            return [_complement(option.range), NUMBER_AS_TEXT]
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


def _complement(limits: Between) -> Schema:
    """The numbers whose complement is in a share's range."""
    end = "exclusiveMaximum" if limits.without_low else "maximum"
    return {"type": "number", "minimum": complement(limits.high), end: complement(limits.low)}
