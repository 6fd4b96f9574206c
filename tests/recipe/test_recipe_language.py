"""Slices, modules, rules, gradients, filters, vocabularies: what they mean."""

from __future__ import annotations

import dataclasses

import pytest
from good_recipes import GOOD

from alnico.errors import RecipeError
from alnico.methods import find
from alnico.methods.base import Method
from alnico.recipe import scalars
from alnico.recipe.load import load_recipe, load_recipes, parse_recipe, parse_recipes
from alnico.recipe.options import Levels, TensorPlace, merged_entries, options_at, setting_at
from alnico.recipe.schema import (
    Case,
    Cases,
    EachModel,
    Gradient,
    Lines,
    ModelEntry,
    Module,
    Protect,
    Recipe,
    Rule,
    Slice,
    TokenizerSetting,
    TokenSource,
)


def read(text: str) -> Recipe:
    return parse_recipe(text, "r")


def weight(written: str) -> object:
    return read(f"merge_method: linear\nmodels: [a]\nparameters:\n  weight: {written}\n").parameters["weight"]


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD.keys())
def test_plain_data_of_any_recipe_reads_back_as_the_same_recipe(text: str) -> None:
    for recipe in parse_recipes(text, "r"):
        again = load_recipe(recipe.canonical())
        assert again == dataclasses.replace(recipe, name="recipe", notes=again.notes)


def test_slices_take_layers_of_their_sources() -> None:
    found = read(GOOD["slices with everything"])
    assert found.models == ()
    assert found.slices == (
        Slice(
            (
                ModelEntry("a", {"weight": 0.25}, (0, 4)),
                ModelEntry("a", {"weight": Cases((Case("attn", Gradient((1, 2))), Case("*", 3)))}, (4, 8)),
            )
        ),
        Slice(
            (ModelEntry("a", {}, (8, 9)), ModelEntry("b", {}, (3, 4))),
            {"density": Cases((Case("*", 0.5),)), "lambda": 2, "rescale": Gradient(("inverse", "none"))},
            "other",
            "dare_ties",
        ),
    )
    assert found.references == ("a", "b", "other", "base")
    assert found.notes == (
        "r:8: slices[0].residual_weight has no effect, as in mergekit.",
        "r:12: slices[1] is merged by dare_ties, its merge_method; mergekit would use linear.",
    )


@pytest.mark.parametrize(
    "form", ["linear over slices, the method inside", "linear over slices, the method inside only"]
)
def test_a_method_inside_a_slice_is_that_slices_method(form: str) -> None:
    found = read(GOOD[form])
    assert (found.merge_method, [s.merge_method for s in found.slices], dict(found.parameters)) == (
        "linear",
        ["linear"],
        {"weight": 0.5},
    )


def test_modules_have_models_or_slices_and_a_method_of_their_own() -> None:
    found = read(GOOD["modules"])
    assert found.modules == (
        Module(
            "text_decoder", (), (Slice((ModelEntry("a", {}, (0, 4)),)), Slice((ModelEntry("a", {}, (2, 6)),)))
        ),
        Module(
            "vision_tower",
            (ModelEntry("a"), ModelEntry("b@main+c", {"weight": Gradient((0.1, 0.2))})),
            (),
            {"density": 0.5, "scale": 2},
            "ties",
        ),
    )
    assert found.notes == (
        "r:9: modules.vision_tower is merged by ties, its merge_method; mergekit would use passthrough.",
        "r:13: modules.vision_tower.models[1].model.override_architecture has no effect: names and shapes are read from the headers.",
    )


def test_rules_take_a_list_as_a_value_for_each_model_where_the_option_has_one_for_each() -> None:
    found = read(GOOD["rules"])
    assert found.parameters == {"weight": Gradient((0, 1e-5, 1))}
    assert found.methods == (
        Rule(
            "mlp",
            "ties",
            {
                "density": EachModel((0.3, 0.2)),
                "lambda": Gradient((1, 0.5)),
                "weight": Cases((Case("up", EachModel((1, 2))), Case("re:down.*[02]$", 3), Case("*", 1))),
            },
        ),
        Rule("=model.embed_tokens.weight", "passthrough", {}, "base"),
        Rule("lm_head", "passthrough", {}, "c@main"),
    )
    assert found.references == ("a", "b", "c@main", "base")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("[0.25]", Gradient((0.25,))),
        ("['1e-3', 2]", Gradient((0.001, 2.0))),
        ("{value: 2}", Cases((Case("*", 2.0),))),
        ("{filter: , value: 2}", Cases((Case("*", 2.0),))),
        ("{filter: mlp, value: [0, 1]}", Cases((Case("mlp", Gradient((0, 1))),))),
        ("[{filter: mlp, value: 1}, 2]", Cases((Case("mlp", 1.0), Case("*", 2.0)))),
        ("[{filter: mlp, value: 1}, [2, 3]]", Cases((Case("mlp", 1.0), Case("*", Gradient((2, 3)))))),
        (
            "[{filter: mlp, value: [{filter: up, value: 1}, {value: 2}]}, {filter: '*', value: 3}]",
            Cases((Case("mlp", Cases((Case("up", 1.0), Case("*", 2.0)))), Case("*", 3.0))),
        ),
    ],
)
def test_values_may_be_gradients_and_filters_inside_one_another(written: str, meant: object) -> None:
    assert weight(written) == meant


def test_a_filter_inside_a_filter_that_does_not_fit_leaves_the_value_to_the_next_level() -> None:
    setting = weight("[{filter: mlp, value: {filter: up, value: 1}}, {value: 2}]")
    names = ("mlp.up", "mlp.down", "attn.up")
    assert [setting_at(setting, TensorPlace(n, 0.0)) for n in names] == [1.0, None, 2.0]  # type: ignore[arg-type]


def test_a_filter_after_one_that_fits_all_has_no_effect_and_a_note_says_so() -> None:
    text = "merge_method: linear\nmodels: [a]\nparameters:\n  weight:\n  - value: 1\n  - filter: mlp\n    value: 2\n"
    assert read(text).notes == (
        "r:6: parameters.weight[1] and later entries have no effect: the entry before matches every tensor.",
    )


def test_a_gradient_of_truths_means_the_same_under_mergekits_name() -> None:
    found = read("merge_method: ties\nbase_model: a\nmodels: [b]\nparameters: {normalize: [true, false]}")
    values = [
        options_at(
            find("ties"), Levels({}, (found.parameters,)), found.models, TensorPlace("w", depth), ["w"]
        )["divide"]
        for depth in (0.0, 0.99, 1.0)
    ]
    assert values == ["weight", "weight", "none"]


def test_two_names_of_one_option_agree_if_they_mean_the_same_everywhere() -> None:
    start = "merge_method: ties\nbase_model: a\nmodels: [b]\nparameters: "
    both = "{normalize: {filter: mlp, value: [true, false]}, divide: {filter: mlp, value: [weight, none]}}"
    assert len(read(start + both).parameters) == 2
    with pytest.raises(RecipeError) as caught:
        read(start + "{normalize: [true, false], divide: [weight, weight]}")
    assert str(caught.value) == (
        "r:4: parameters: normalize and divide are the same option and disagree "
        "(normalize means divide: ['weight', 'none'], divide is ['weight', 'weight']). Remove one."
    )


def test_an_option_that_a_level_cannot_use_is_left_out_with_a_note() -> None:
    text = """\
merge_method: linear
base_model: base
parameters: {density: 0.5, weight: 1}
slices:
- sources: [{model: a, layer_range: [0, 1], parameters: {density: 0.25}}]
- sources: [{model: a, layer_range: [1, 2], parameters: {density: 0.75}}]
  merge_method: ties
"""
    found = read(text)
    assert found.parameters == {"density": 0.5, "weight": 1}
    assert [dict(s.models[0].parameters) for s in found.slices] == [{}, {"density": 0.75}]
    assert found.notes == (
        "r:5: slices[0].sources[0].parameters.density has no effect: it is an option of ties, which this level does not use.",
        "r:7: slices[1] is merged by ties, its merge_method; mergekit would use linear.",
    )


def test_a_shared_option_under_models_may_vary_by_layer_if_all_agree() -> None:
    models = "[{model: a, parameters: {t: [0, 1]}}, {model: b, parameters: {t: [0, 1.0]}}]"
    assert read(f"merge_method: slerp\nbase_model: a\nmodels: {models}").models[1].parameters == {
        "t": Gradient((0, 1))
    }


def test_a_slice_may_have_another_shared_value_than_the_recipe() -> None:
    text = """\
merge_method: slerp
base_model: a
parameters: {t: 0.5}
slices:
- sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1], parameters: {t: 0.25}}]
  parameters: {t: 0.25}
"""
    assert read(text).slices[0].parameters == {"t": 0.25}


def test_a_value_need_be_right_only_for_the_methods_of_its_level() -> None:
    text = """\
merge_method: task_arithmetic
base_model: a
slices:
- sources: [{model: b, layer_range: [0, 1]}]
- sources: [{model: b, layer_range: [1, 2]}]
  merge_method: ties
  parameters: {divide: count}
"""
    assert read(text).slices[1].parameters == {"divide": "count"}


def test_slices_may_have_bases_of_their_own_and_the_recipe_none() -> None:
    slices = "slices: [{base_model: b, sources: [{model: a, layer_range: [0, 1]}]}]"
    assert read(f"merge_method: ties\n{slices}").references == ("a", "b")


def test_a_base_that_is_not_listed_stands_for_the_layers_of_the_others() -> None:
    entry = ModelEntry("b", {}, (3, 5))
    assert merged_entries(find("slerp"), (entry,), "a") == (ModelEntry("a", {}, (3, 5)), entry)


def test_a_shared_option_under_the_base_goes_for_the_merge() -> None:
    models = "[{model: a, parameters: {divide: weight}}, {model: b, parameters: {weight: 1}}, {model: c, parameters: {weight: -1}}]"
    with pytest.raises(RecipeError, match=r"^r:3: the weights sum to 0 \(1, -1\)"):
        read(f"merge_method: task_arithmetic\nbase_model: a\nmodels: {models}")


def test_a_vocabulary_says_where_the_rows_of_tokens_come_from() -> None:
    found = read(GOOD["vocabulary"])
    assert found.tokenizer == TokenizerSetting(
        "union",
        {
            "<|im_start|>": TokenSource("model", "a"),
            "<|zero|>": TokenSource("zero", force=True),
            "<|by_id|>": TokenSource("model_token", "a", token_id=3),
            "<|by_name|>": TokenSource("model_token", "b", token="<s>"),
            "<|left|>": TokenSource(),
        },
        64,
    )
    assert (found.base_model, found.dtype, found.missing, found.seed) == ("org/base@v1", "F64", "copy", -3)
    assert found.unrelated == "allow"
    assert found.lines == Lines(0.2, 0.8)
    assert found.protect == Protect("stats/c", 0.9, "c@v2", "merge")
    assert "c@v2" in found.references
    assert found.stage == "everything else"
    assert found.chat_template == "{% for message in messages %}\n{{ message.content }}{% endfor %}\n"
    assert read(GOOD["vocabulary of one"]).tokenizer == TokenizerSetting("base")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("{path: a}", "a"),
        ("{path: org/a, revision: v1}", "org/a@v1"),
        ("{model: a}", "a"),
        ("{model: {path: a, revision: null}, lora: null}", "a"),
        ("{model: a@v1, lora: {path: b, revision: v2}}", "a@v1+b@v2"),
    ],
)
def test_references_may_be_mappings_as_mergekit_writes_them(written: str, meant: str) -> None:
    assert read(
        f"merge_method: linear\nmodels: [{{model: {written}}}]\nbase_model: {written}"
    ).references == (meant,)


def test_a_preset_is_known_to_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_preset(name: str) -> Method:
        found = find(name)
        return dataclasses.replace(found, presets={"paper": {"density": 0.2}}) if name == "ties" else found

    monkeypatch.setattr(scalars, "find", with_preset)
    start = "base_model: a\nmodels: [b]\npreset: "
    assert read(f"merge_method: ties\n{start}paper").preset == "paper"
    rules = "methods: [{filter: mlp, merge_method: ties, preset: paper}]"
    assert read(f"merge_method: linear\nmodels: [b]\nbase_model: a\n{rules}").methods == (
        Rule("mlp", "ties", {}, None, "paper"),
    )
    with pytest.raises(
        RecipeError, match=r"^r:4: preset is 'papr', which is not a preset of ties\. Did you mean paper\?$"
    ):
        read(f"merge_method: ties\n{start}papr")
    with pytest.raises(
        RecipeError,
        match=r"^r:4: preset is 'paper', which is not a preset of linear\. Valid names: uniform_soup, wise_ft\.$",
    ):
        read(f"merge_method: linear\n{start}paper")


def test_all_documents_of_a_file_are_read_with_its_lines() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipes("merge_method: linear\nmodels: [a]\nseed: x\n---\nmerge_method: ties\nmodels: [a]\n")
    assert str(caught.value).splitlines() == [
        "recipe:3: seed is 'x'; expected a whole number of at most 64 bits.",
        "recipe:5: ties needs base_model, the model that the others were fine-tuned from. Add base_model: PATH.",
    ]
