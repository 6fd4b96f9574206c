"""`alnico schema --search`: what an editor accepts is what the loader accepts, as far as a schema can say it."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from alnico.cli.main import app
from alnico.errors import RecipeError
from alnico.tune.search.settings import read_search

SEARCH = """
merge_method: {choice: [ties, dare_ties]}
base_model: base
models:
  - model: code
    parameters: {weight: {search: [0.0, 1.5]}, density: {search: [0.1, 0.9], step: 0.1}}
  - model: math
    parameters: {weight: [{filter: mlp, value: {search: [0.0, 1.0], layers: 4}}, 0.3], density: {choice: [0.2, 0.5]}}
parameters: {lambda: {search: [0.3, 3.0], log: true}}
search: {objective: [a, b], sampler: nsga2, population: 10, trials: 50, seed: 1, storage: "sqlite:///study.db", tasks: tasks.yml, held_out: 0.3}
"""
STACK = "stack: {models: [a, b], layers: 30, block: 5, repeat: [0, 2]}\nsearch: {tasks: tasks.yml, halving: {fraction: 0.25, keep: 0.5}}\n"
WINDOW = "stack: {models: [a], layers: 36, window: {from: [8, 24], length: 5, times: [2, 3]}}\n"
SIMPLEX = "merge_method: linear\nmodels: [{model: a, parameters: {weight: {search: simplex}}}, {model: b, parameters: {weight: {search: simplex}}}]\n"


@pytest.fixture(scope="module")
def schema() -> Any:
    printed = CliRunner().invoke(app, ["schema", "--search"])
    assert printed.exit_code == 0
    found = json.loads(printed.output)
    jsonschema.Draft202012Validator.check_schema(found)
    return found


@pytest.mark.parametrize("text", [SEARCH, STACK, WINDOW, SIMPLEX])
def test_what_the_loader_takes_the_schema_takes(schema: Any, text: str) -> None:
    read_search(text, allow_code=True)
    jsonschema.validate(yaml.safe_load(text), schema)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["search", "sampler"], "tpx"),
        (["search", "trails"], 3),
        (["search", "held_out"], 1.5),
        (["models", 0, "parameters", "weight"], {"search": [0.0]}),
        (["models", 0, "parameters", "weight"], {"search": [0.0, 1.0], "layrs": 2}),
        (["models", 1, "parameters", "density"], {"choice": []}),
        (["merge_method"], {"search": [0, 1]}),
    ],
)
def test_what_the_loader_refuses_the_schema_refuses(schema: Any, path: list[Any], value: Any) -> None:
    wrong = copy.deepcopy(yaml.safe_load(SEARCH))
    place = wrong
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(RecipeError):
        read_search(wrong, allow_code=True)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_the_schema_of_recipes_has_no_values_that_are_left_open() -> None:
    printed = CliRunner().invoke(app, ["schema"]).output
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(SEARCH), json.loads(printed))
