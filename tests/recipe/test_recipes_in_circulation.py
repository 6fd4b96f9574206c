"""What recipes in circulation have that mergekit 0.1.5 ignores or reads in its own way: taken with a note, or an error where the
author's intent would be lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import alnico
from alnico.errors import RecipeError
from alnico.recipe.dialect import MERGEKIT_OPTION_NAMES, MERGEKIT_OPTIONS, option_name
from alnico.recipe.json_schema import json_schema
from alnico.recipe.load import parse_recipe
from alnico.recipe.schema import Recipe

TIES = "merge_method: ties\nbase_model: a\nmodels: [b, c]\n"
LINEAR = "merge_method: linear\nmodels: [a, b]\n"
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [a, b]\nparameters: {t: 0.5}\n"

VALIDATOR = jsonschema.Draft202012Validator(json_schema())


WRITTEN = Path(__file__).parents[1] / "golden" / "matrix" / "circulation"
"""Recipes that mergekit ran; what it made of them is held in tests/golden."""


@pytest.mark.parametrize("name", sorted(p.stem for p in WRITTEN.glob("*.yml")))
def test_a_recipe_that_mergekit_ran_is_read_with_notes_and_right_by_the_schema(name: str) -> None:
    text = (WRITTEN / f"{name}.yml").read_text()
    recipe = parse_recipe(text, "r")
    assert VALIDATOR.is_valid(recipe.canonical())
    assert recipe.notes
    assert VALIDATOR.is_valid(yaml.safe_load(text)) == (not name.startswith("anchors-")), (
        "a schema does not see anchors"
    )


def read(text: str) -> Recipe:
    recipe = parse_recipe(text, "r")
    assert VALIDATOR.is_valid(yaml.safe_load(text)), "the JSON Schema says otherwise"
    assert VALIDATOR.is_valid(recipe.canonical())
    return recipe


def mistake(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r")
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "meant"),
    # What pydantic reads as a bool, which is what mergekit asks.
    [(w, True) for w in ("1", "1.0", '"1"', '"true"', '"True"', '"yes"', '"on"', '"t"', '"Y"')]
    + [(w, False) for w in ("0", "0.0", '"0"', '"false"', '"FALSE"', '"no"', '"off"', '"f"', '"n"')],
)
def test_numbers_and_text_are_true_and_false_as_in_mergekit(written: str, meant: bool) -> None:
    recipe = read(LINEAR + f"parameters:\n  normalize: {written}\n")
    assert recipe.parameters == {"normalize": meant}
    quoted = written.replace('"', "'") if '"' in written else written.removesuffix(".0")
    assert recipe.notes == (f"r:4: parameters.normalize: {quoted} as {str(meant).lower()}, as in mergekit.",)


@pytest.mark.parametrize(
    ("head", "option"),
    [
        (TIES, "normalize"),
        (TIES, "rescale"),
        (TIES.replace("ties", "dare_linear"), "rescale"),
        (LINEAR, "normalize"),
        (LINEAR.replace("linear", "nuslerp"), "nuslerp_flatten"),
        (LINEAR.replace("linear", "nuslerp"), "nuslerp_row_wise"),
        (LINEAR.replace("linear", "multislerp"), "normalize_weights"),
        (TIES.replace("ties", "model_stock"), "filter_wise"),
    ],
)
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1.0", "true"),
        ("[1.0, 0.0]", "[true, false]"),
        ("{filter: mlp, value: 0}", "{filter: mlp, value: false}"),
        (
            '[{filter: mlp, value: [1, "false"]}, {value: "on"}]',
            "[{filter: mlp, value: [true, false]}, {value: true}]",
        ),
    ],
)
def test_a_truth_may_be_a_number_at_every_place(head: str, option: str, written: str, meant: str) -> None:
    recipe = read(head + f"parameters: {{{option}: {written}}}\n")
    assert recipe.canonical() == parse_recipe(head + f"parameters: {{{option}: {meant}}}\n", "r").canonical()
    assert len(recipe.notes) == 1


def test_a_truth_may_be_a_number_at_every_level() -> None:
    text = """\
merge_method: ties
base_model: a
slices:
- sources:
  - {model: a, layer_range: [0, 2]}
  - {model: b, layer_range: [0, 2]}
  parameters: {normalize: 0.0}
- sources:
  - {model: a, layer_range: [2, 4]}
  - {model: b, layer_range: [2, 4], parameters: {rescale: 1}}
parameters: {normalize: 1.0}
methods:
- {filter: norm, merge_method: ties, parameters: {normalize: 1}}
tokenizer: {tokens: {<s>: {source: a, force: 1.0}}}
"""
    recipe = read(text)
    meant = text.replace("0.0", "false").replace("1.0", "true").replace("normalize: 1}", "normalize: true}")
    assert recipe.canonical() == parse_recipe(meant.replace("rescale: 1", "rescale: true"), "r").canonical()
    assert len(recipe.notes) == 5


@pytest.mark.parametrize("written", ["2", "0.5", "-1", '"maybe"', '"l1"', "null"])
def test_what_mergekit_does_not_read_as_true_or_false_is_refused(written: str) -> None:
    assert "expected true or false" in mistake(LINEAR + f"parameters: {{normalize: {written}}}\n")


def test_words_of_ours_keep_their_meaning() -> None:
    recipe = read(TIES + "parameters: {rescale: none, divide: none, scale: 1, density: 1}\n")
    assert recipe.parameters == {"rescale": "none", "divide": "none", "scale": 1, "density": 1}
    assert recipe.notes == ()


@pytest.mark.parametrize("name", MERGEKIT_OPTIONS)
def test_an_option_of_another_method_has_no_effect(name: str) -> None:
    method = alnico.methods()[name]
    models: list[Any] = ["b", "c"][: 1 if method.base == "first" or method.models[1] == 1 else 2]
    recipe = {"merge_method": name, "models": models, "base_model": "a"}
    needed = {"t": 0.5} if "t" in method.options else {}
    meant = {"int8_mask", *(["alpha"] if "weight" in method.options else [])}  # alpha: see test_synonyms.py
    idle = sorted({key for key in MERGEKIT_OPTION_NAMES if option_name(method, key) is None} - meant)
    for key in idle:
        for value in (0.5, [0.1, 0.9], [{"filter": "mlp", "value": [1, 2]}, {"value": 1}], True):
            under = [{"model": m, "parameters": {key: value}} for m in models]
            found = alnico.load_recipe(recipe | {"models": under, "parameters": needed | {key: value}})
            assert found.canonical() == alnico.load_recipe(recipe | {"parameters": needed}).canonical()
            told = [note for note in found.notes if f"parameters.{key} has no effect on {name}" in note]
            assert len(told) == 1 + len(models)


def test_an_option_of_no_method_of_mergekits_is_an_error_where_its_method_is_not_named() -> None:
    assert "parameters.select_topk is not an option of magmax." in mistake(
        "merge_method: magmax\nbase_model: a\nmodels: [b]\nparameters: {select_topk: 1}\n"
    )
    assert "parameters.elect is not an option of slerp." in mistake(
        SLERP.replace("t: 0.5", "t: 0.5, elect: mass")
    )


@pytest.mark.parametrize(
    "key", ["wieght", "densty", "normalise", "lamda", "dare_pruning_rate", "int_space", "dtype"]
)
def test_misspelt_options_and_words_nobody_knows_stay_errors(key: str) -> None:
    for text in (TIES + f"parameters: {{{key}: 1}}\n", SLERP.replace("t: 0.5", f"t: 0.5, {key}: 1")):
        assert f"parameters.{key} is not an option of" in mistake(text)


def test_karcher_says_that_it_weighs_where_mergekit_does_not() -> None:
    text = "merge_method: karcher\nmodels:\n- {model: a, parameters: {weight: 0.3}}\n- b\nparameters: {max_iter: 20000, tol: 1e-10}\n"
    recipe = read(text)
    assert recipe.models[0].parameters == {"weight": 0.3}
    assert recipe.notes == (
        "r:3: models[0].parameters.weight weights the models; mergekit's karcher ignores weights and averages all models equally.",
    )


@pytest.mark.parametrize(
    "key",
    [
        "out_path",
        "output_path",
        "int8_mask",
        "allow_negative_weights",
        "smooth",
        "random_seed",
        "embed_slerp",
        "lazy_unpickle",
        "cuda",
    ],
)
def test_a_harmless_key_at_the_top_is_noted(key: str) -> None:
    recipe = read(TIES + f"{key}: 1\n")
    assert recipe.canonical() == read(TIES).canonical()
    assert len(recipe.notes) == 1
    assert recipe.notes[0].startswith(f"r:4: {key} has no effect: it ")


@pytest.mark.parametrize(
    "key",
    [
        "int8_mask",
        "allow_negative_weights",
        "smooth",
        "random_seed",
        "embed_slerp",
        "out_path",
        "output_path",
    ],
)
def test_a_harmless_key_is_noted_at_every_level(key: str) -> None:
    head = "merge_method: linear\n"
    texts = {
        "parameters": head + "models: [a]\nparameters: {KEY: 1.0}\n",
        "models": head + "models: [{model: a, KEY: true}]\n",
        "under a model": head + "models: [{model: a, parameters: {KEY: [1, 0]}}]\n",
        "slices": head + "slices: [{sources: [{model: a, layer_range: [0, 1]}], KEY: x}]\n",
        "sources": head + "slices: [{sources: [{model: a, layer_range: [0, 1], KEY: x}]}]\n",
        "modules": head + "modules: {text_decoder: {models: [a], KEY: 1}}\n",
    }
    for text in texts.values():
        (note,) = read(text.replace("KEY", key)).notes
        assert f"{key} has no effect: it " in note


@pytest.mark.parametrize(
    "lines",
    [
        "anchors:\n- &one 0.5\n- &two [0.1, 0.9]\n",
        "x-common: &common {weight: 0.5}\n",
        ".half: &half 0.5\n.half: &other 0.7\n",
        "model_a: &a some/path\nbase: &b {density: 0.5}\nmodel: &m x\n",
        "definitions:\n  deep: {er: [&x 1]}\n",
        "parameters2: &p {weight: 1}\nslices_1: &s [1]\ndtype.old: &d bfloat16\n",
    ],
)
def test_places_for_anchors_at_the_top_are_left_out(lines: str) -> None:
    recipe = parse_recipe(lines + TIES, "r")
    assert recipe.canonical() == parse_recipe(TIES, "r").canonical()
    assert recipe.notes
    assert all("is not a key of a recipe; only its YAML anchors are used." in note for note in recipe.notes)


def test_anchors_defined_there_are_used() -> None:
    text = "merge_method: ties\nshared: &shared\n  weight: 0.3\n  density: &d [1, 0.5]\nbase_model: a\nmodels:\n- {model: b, parameters: *shared}\n"
    recipe = parse_recipe(
        text
        + "- {model: c, parameters: {<<: *shared, weight: 0.7}}\n- {model: d, parameters: {density: *d}}\n",
        "r",
    )
    meant = "{density: [1, 0.5], weight: W}"
    plain = "merge_method: ties\nbase_model: a\nmodels:\n" + "".join(
        f"- {{model: {m}, parameters: {meant.replace('W', w)}}}\n" for m, w in (("b", "0.3"), ("c", "0.7"))
    )
    assert (
        recipe.canonical()
        == parse_recipe(plain + "- {model: d, parameters: {density: [1, 0.5]}}\n", "r").canonical()
    )


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("paramters: &p {density: 0.5}\n", "paramters"),
        ("base_modle: &b a\n", "base_modle"),
        ("slces: &b [a]\n", "slces"),
        ("half: 0.5\n", "half"),
        ("anchors: &d 0.5\nuse: *d\n", "use"),
        ("anchors: &d 0.5\nuse: [1, *d]\n", "use"),
    ],
)
def test_a_misspelt_key_and_one_without_an_anchor_of_its_own_stay_errors(lines: str, key: str) -> None:
    told = mistake(lines + TIES)
    assert f"unknown key '{key}'." in told
    assert "\n" not in told


def test_keys_given_twice_stay_errors_where_they_differ() -> None:
    assert mistake("half: &a 0.5\nhalf: 0.7\n" + TIES).startswith(
        "r:2: half appears twice, first in line 1. Remove one."
    )
    assert (
        mistake(TIES + "dtype: &d bfloat16\ndtype: &e float16\n")
        == "r:5: dtype appears twice, first in line 4. Remove one."
    )
    recipe = parse_recipe(
        TIES + "parameters: {density: 0.5}\ndtype: bfloat16\ndtype: bfloat16\nparameters: {density: 0.5}\n",
        "r",
    )
    assert recipe.notes == (
        "r:6: dtype appears twice with the same value, first in line 5.",
        "r:7: parameters appears twice with the same value, first in line 4.",
    )


@pytest.mark.parametrize(
    "key",
    [
        "base_model",
        "tokenizer_source",
        "tokenizer",
        "chat_template",
        "dtype",
        "out_dtype",
        "modules",
        "slices",
        "name",
    ],
)
def test_an_empty_key_counts_as_not_given(key: str) -> None:
    recipe = read(LINEAR + f"{key}:\n")
    assert recipe.canonical() == read(LINEAR).canonical()
    assert recipe.notes == (f"r:3: {key} is empty and is ignored.",)


def test_empty_keys_leave_room_for_the_one_that_is_meant() -> None:
    sources = "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]"
    recipe = read(f"merge_method: linear\nmodels:\n{sources}\ntokenizer:\ntokenizer_source: union\n")
    assert recipe.slices
    assert recipe.tokenizer is not None
    modules = read(f"merge_method: linear\nmodules: {{default: {{models: null, {sources}}}}}\n").modules
    assert modules[0].slices


@pytest.mark.parametrize("written", ["64", "'64'", "64.0"])
def test_whole_numbers_of_vocabularies_may_be_text_or_have_a_point(written: str) -> None:
    tokens = f"tokens: {{<s>: {{source: {{kind: model_token, model: a, token_id: {written}}}}}}}"
    recipe = read(LINEAR + f"tokenizer: {{pad_to_multiple_of: {written}, {tokens}}}\n")
    assert recipe.tokenizer is not None
    assert (recipe.tokenizer.pad_to_multiple_of, recipe.tokenizer.tokens["<s>"].token_id) == (64, 64)
    assert read(LINEAR + "tokenizer: {pad_to_multiple_of: null}\n").tokenizer is not None
    assert "pad_to_multiple_of is '0'; expected a whole number of at least 1" in mistake(
        LINEAR + "tokenizer: {pad_to_multiple_of: '0'}\n"
    ).replace("is 0;", "is '0';")


@pytest.mark.parametrize(
    "line", ["tokenizer_source: model:some/path\n", "tokenizer: {source: 'model:some/path'}\n"]
)
def test_a_tokenizer_source_may_have_the_word_model_before_its_path(line: str) -> None:
    recipe = read(TIES + line)
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.source == "some/path"
    (note,) = recipe.notes
    assert note.endswith(": 'model:some/path' means the model 'some/path', as in old versions of mergekit.")
    assert "expected union, base or the path of a model" in mistake(TIES + "tokenizer_source: 'model:'\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            TIES + "density: 0.5\n",
            "unknown key 'density'. It is an option of ties: write it under parameters.",
        ),
        (
            "merge_method: sce\nbase_model: a\nmodels: [b]\nselect_topk: .15\n",
            "unknown key 'select_topk'. It is an option of sce: write it under parameters.",
        ),
        (
            "merge_method: passthrough\nslices:\n- sources:\n  - model: org/a\n    revision: dpo-v0\n    layer_range: [0, 24]\n",
            "slices[0].sources[0] has the unknown key 'revision'. Write it after the model's name: model: org/a@dpo-v0",
        ),
        (
            "merge_method: linear\nmodels:\n- {model: org/a, lora: org/b}\n",
            "models[0] has the unknown key 'lora'. Write it after the model's name: model: org/a+org/b",
        ),
        (
            TIES + "dtype: bfloat\n",
            "dtype is 'bfloat'; expected bfloat16, float16, float32 or float64. Did you mean bfloat16?",
        ),
        (TIES + "dype: float32\n", "unknown key 'dype'. Did you mean dtype?"),
        (TIES + "pad_to_multiple_of: 8\n", "unknown key 'pad_to_multiple_of'. Write it under tokenizer."),
        (
            TIES + "parameters: {dtype: bfloat16}\n",
            "parameters.dtype is not an option of ties. Write it at the top of the recipe.",
        ),
    ],
)
def test_what_loses_its_authors_intent_stays_an_error_that_says_what_to_write(text: str, told: str) -> None:
    assert mistake(text).partition(": ")[2] == told


def test_numbers_of_layers_may_be_text_or_have_a_point() -> None:
    text = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: ['0', 24.0]}]}]\n"
    assert read(text).slices[0].models[0].layers == (0, 24)
    assert "layer_range is [0, 2.5]; expected" in mistake(text.replace("'0', 24.0", "0, 2.5"))
    assert "layer_range is ['-1', 2]; expected" in mistake(text.replace("'0', 24.0", "'-1', 2"))


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("[1, 0.5, 0]", "parameters.density[2]"),
        ("[0.0, 0.5]", "parameters.density[0]"),
        ("[{filter: mlp, value: 0}, {value: 0.5}]", "parameters.density[0].value"),
        ("[{filter: mlp, value: [0.5, 0]}, {value: 0.5}]", "parameters.density[0].value[1]"),
        ("[{filter: mlp, value: 0.5}, 0]", "parameters.density[1]"),
    ],
)
@pytest.mark.parametrize(
    "method", ["ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"]
)
def test_a_density_of_0_may_stand_for_some_of_the_tensors(method: str, written: str, told: str) -> None:
    recipe = read(TIES.replace("ties", method) + f"parameters:\n  density: {written}\n")
    assert recipe.notes == (f"r:5: {told} is 0: nothing is kept there.",)


def test_a_density_of_0_for_all_tensors_stays_an_error() -> None:
    assert "density is 0; density is the share" in mistake(TIES + "parameters: {density: 0}\n")
    rule = "methods: [{filter: mlp, merge_method: ties, parameters: {density: [0.5, 0]}}]\n"
    assert "density[1] is 0; density is the share" in mistake(TIES + rule)
    assert "density[1] is -0.1; density is the share" in mistake(
        TIES + "parameters: {density: [0.5, -0.1]}\n"
    )
    assert "select_topk is 0; select_topk is the share" in mistake(
        "merge_method: sce\nbase_model: a\nmodels: [b]\nparameters: {select_topk: 0}\n"
    )


def test_a_method_of_a_slice_that_mergekit_would_ignore_is_told() -> None:
    slices = "slices:\n- merge_method: METHOD\n  sources:\n  - {model: a, layer_range: [0, 1]}\n  - {model: b, layer_range: [0, 1]}\n"
    assert read("merge_method: linear\n" + slices.replace("METHOD", "linear")).notes == ()
    assert read("merge_method: linear\n" + slices.replace("METHOD", "karcher")).notes == (
        "r:3: slices[0] is merged by karcher, its merge_method; mergekit would use linear.",
    )
