"""The JSON Schema for editors, judged by another program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from good_recipes import GOOD

from alnico.methods import registry
from alnico.recipe import dialect, keys
from alnico.recipe.json_schema import TRUTH, json_schema, mixture_schema
from alnico.recipe.load import parse_recipes

EXAMPLES = Path(__file__).parents[2] / "examples"

SCHEMA = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
MIXTURES = jsonschema.Draft202012Validator(mixture_schema())


def is_right(text: str) -> bool:
    return all(
        (MIXTURES if "experts" in document else VALIDATOR).is_valid(document)
        for document in yaml.safe_load_all(text)
    )


def test_it_is_a_json_schema_of_its_draft() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD.keys())
def test_good_recipes_are_right_as_written_and_as_plain_data(text: str) -> None:
    assert is_right(text)
    assert all(VALIDATOR.is_valid(recipe.canonical()) for recipe in parse_recipes(text, "r"))


def test_the_examples_are_right() -> None:
    wrong = [path.name for path in sorted(EXAMPLES.rglob("*.yml")) if not is_right(path.read_text())]
    assert wrong == []


LINEAR = "merge_method: linear\nmodels: [a]\n"
TIES = "merge_method: ties\nbase_model: b\nmodels: [a]\n"


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: linear",
        "models: [a]",
        "merge_method: tise\nmodels: [a]",
        "merge_method: linear\nmodels: []",
        "merge_method: linear\nmodels: [{parameters: {weight: 1}}]",
        "merge_method: linear\nmodels: [{model: a, layer_range: [0, -3]}]",
        "merge_method: linear\nmodels: [{model: a, paramters: {}}]",
        "merge_method: linear\nmodels: [a]\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]",
        "merge_method: linear\nslices: [{sources: [{model: a}]}]",
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1, 2]}]}]",
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [-1, 2]}]}]",
        "merge_method: linear\nslices: [{layer_range: [0, 1]}]",
        "merge_method: linear\nmodules: {text_decoder: {}}",
        LINEAR + "base_modle: a",
        LINEAR + "parameters: {wieght: 1}",
        LINEAR + "parameters: {weight: heavy}",
        LINEAR + "parameters: {weight: []}",
        LINEAR + "parameters: {weight: {filter: mlp}}",
        LINEAR + "parameters: {weight: {filter: '', value: 1}}",
        LINEAR + "parameters: {weight: [{filter: mlp, value: heavy}]}",
        LINEAR + "parameters: {normalize: 2}",
        LINEAR + "parameters: {normalize: weight}",
        LINEAR + "out_pth: x",
        LINEAR + "tokenizer: {smooth: 1}",
        TIES + "parameters: {weight: {from: fisher}}",
        TIES + "parameters: {weight: {from: l2_norm, mode: cubic}}",
        TIES + "parameters: {weight: {from: l2_norm, beta: -1}}",
        TIES + "parameters: {weight: {from: l2_norm, mode: power, alpha: 0}}",
        TIES + "parameters: {weight: {from: l2_norm, gamma: 1}}",
        TIES + "parameters: {weight: {from: analysis}}",
        TIES + "parameters: {density: {from: l2_norm}}",
        TIES + "parameters: {density: 1.4}",
        TIES + "parameters: {density: 0}",
        TIES + "parameters: {density: [0.5, 2]}",
        TIES + "parameters: {elect: majority}",
        TIES + "parameters: {lambda: true}",
        LINEAR + "methods: [{merge_method: linear}]",
        LINEAR + "methods: [{filter: mlp, merge_method: linear, weight: 1}]",
        LINEAR + "preset: no such",
        LINEAR + "dtype: int8",
        LINEAR + "seed: 1.5",
        LINEAR + "missing: ignore",
        LINEAR + "unrelated: true",
        LINEAR + "lines: {alpha: 1}",
        LINEAR + "protect: {energy: 0.9}",
        LINEAR + "protect: {gram: g, energy: 0}",
        LINEAR + "protect: {gram: g, others: base}",
        LINEAR + "protect: {gram: g, enrgy: 0.5}",
        LINEAR + "tokenizer: {sorce: base}",
        LINEAR + "tokenizer: {source: base}\ntokenizer_source: base",
        LINEAR + "tokenizer: {tokens: {<s>: {source: {kind: model_token, model: a}}}}",
        LINEAR + "tokenizer: {pad_to_multiple_of: 0}",
    ],
)
def test_a_mistake_is_none(text: str) -> None:
    assert not is_right(text)


def test_every_key_and_option_is_there_and_says_what_it_is() -> None:
    properties = SCHEMA["properties"]
    idle = {key: f"No effect: it {why}." for key, why in dialect.WITHOUT_EFFECT_AT_THE_TOP.items()}
    assert {k: p["description"] for k, p in properties.items()} == dict(keys.TOP) | idle
    options = SCHEMA["$defs"]["parameters"]["properties"]
    for method in registry().values():
        for option in method.options.values():
            said = SCHEMA["$defs"][f"option_{option.name}"]["description"]
            assert option.name in options
            assert method.name in said
            assert option.describe() in said


def test_a_number_has_the_range_of_its_option() -> None:
    def shapes(schema: Any) -> list[Any]:
        return schema["anyOf"][0]["anyOf"]  # type: ignore[no-any-return]

    share = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert share in shapes(SCHEMA["$defs"]["option_density"])
    assert {"type": "number"} in shapes(SCHEMA["$defs"]["option_lambda"])
    assert shapes(SCHEMA["$defs"]["option_normalize"]) == TRUTH
