"""Words of other texts mean alnico's options: the same bits, one note each, and no two meanings at once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import alnico
from alnico.errors import RecipeError
from alnico.methods.shared.other_words import METHOD_SYNONYMS, OPTION_SYNONYMS, SYNONYMS
from alnico.recipe.load import load_recipe
from alnico.tune.search.settings import read_search
from made import save_model

TWO = "models: [a, b]\n"
OF_BASE = f"base_model: base\n{TWO}"


def parameters(text: str) -> Any:
    """The parameters of a recipe, which loads again as the same recipe."""
    recipe = load_recipe(text)
    data = recipe.canonical()
    assert load_recipe(data).canonical() == data
    return data.get("parameters")


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.7, 0.9, 1e-5])
@pytest.mark.parametrize("word", ["trim_ratio", "drop_rate"])
def test_a_share_that_is_left_out_is_one_minus_the_density_as_people_write_it(
    word: str, share: float
) -> None:
    density = {0.1: 0.9, 0.2: 0.8, 0.3: 0.7, 0.7: 0.3, 0.9: 0.1, 1e-5: 0.99999}[share]
    text = f"merge_method: ties\n{OF_BASE}parameters: {{{word}: {share}}}\n"
    assert parameters(text) == {"density": density}
    assert load_recipe(text).notes == (
        f"recipe:4: parameters.{word} is 1 - density: density is {density:g}.",
    )


PLACES = {
    "models": (
        "merge_method: dare\nbase_model: base\nmodels: [{model: a, parameters: {drop_rate: 0.2}}, b]\n",
        "merge_method: dare_linear\nbase_model: base\nmodels: [{model: a, parameters: {density: 0.8}}, b]\n",
    ),
    "slices": (
        "slices: [{merge_method: dare, sources: [{model: a, layer_range: [0, 2], parameters: {drop_rate: 0.2}}], "
        "parameters: {scaling_factor: 2}}]\nbase_model: base\n",
        "slices: [{merge_method: dare_linear, sources: [{model: a, layer_range: [0, 2], parameters: {density: 0.8}}], "
        "parameters: {scale: 2}}]\nbase_model: base\n",
    ),
    "modules": (
        "modules: {text_decoder: {merge_method: dare, models: [a, b], parameters: {drop_rate: 0.2}}}\nbase_model: base\n",
        "modules: {text_decoder: {merge_method: dare_linear, models: [a, b], parameters: {density: 0.8}}}\nbase_model: base\n",
    ),
    "rules": (
        f"merge_method: linear\n{OF_BASE}methods: [{{filter: mlp, merge_method: dare, parameters: {{drop_rate: [0.2, 0.3]}}}}]\n",
        f"merge_method: linear\n{OF_BASE}methods: [{{filter: mlp, merge_method: dare_linear, parameters: {{density: [0.8, 0.7]}}}}]\n",
    ),
    "gradient": (
        f"merge_method: ties\n{OF_BASE}parameters: {{trim_ratio: [0.2, {{filter: mlp, value: 0.3}}]}}\n".replace(
            "0.2, {", "{filter: attn, value: [0.2, 0.4]}, {"
        ),
        f"merge_method: ties\n{OF_BASE}parameters: {{density: [{{filter: attn, value: [0.8, 0.6]}}, {{filter: mlp, value: 0.7}}]}}\n",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_synonym_works_wherever_its_word_does(place: str) -> None:
    written, plain = PLACES[place]
    assert load_recipe(written).canonical() == load_recipe(plain).canonical()
    assert len(load_recipe(written).notes) > len(load_recipe(plain).notes)
    jsonschema.Draft202012Validator(alnico.schema()).validate(alnico_data(written))


def alnico_data(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def test_trim_ratio_is_the_trim_of_a_method_that_drops_and_trims() -> None:
    text = f"merge_method: dare_ties\n{OF_BASE}parameters: {{drop_rate: 0.7, trim_ratio: 0.8}}\n"
    assert parameters(text) == {"density": 0.3, "trim": 0.2}


def test_a_method_with_an_option_of_that_name_keeps_it() -> None:
    assert parameters(f"merge_method: ramplus_tl\n{OF_BASE}parameters: {{alpha: 0.3}}\n") == {"alpha": 0.3}
    rule = "methods: [{filter: mlp, merge_method: linear}]\n"
    assert parameters(f"merge_method: ramplus_tl\n{OF_BASE}{rule}parameters: {{alpha: 0.3}}\n") == {
        "alpha": 0.3
    }


MISTAKES = {
    "drop_rate: 0.9, density: 0.2": "drop_rate and density are the same option and disagree (drop_rate means density: 0.1, density is 0.2). Remove one.",
    "drop_rate: 0.9, trim_ratio: 0.2": "drop_rate and trim_ratio are the same option and disagree (drop_rate means density: 0.1, trim_ratio means density: 0.8). Remove one.",
    "lambda: 1, scaling_factor: 2": "lambda and scaling_factor are the same option and disagree (lambda means scale: 1, scaling_factor means scale: 2). Remove one.",
    "weight: 0.3, alpha: 0.3": "weight and alpha are the same option and disagree (weight is 0.3, alpha means weight: [0.7, 0.3]). Remove one.",
    "drop_rate: 20": "parameters.drop_rate is 20, and drop_rate is 1 - density; expected a number in [0, 1). Did you mean 0.2?",
    "alpha: {from: l2_norm}": "parameters.alpha is a mapping with `from`; only weight is computed from norms. Write a value.",
}


@pytest.mark.parametrize("written", MISTAKES)
def test_two_words_that_disagree_and_values_out_of_range_are_refused(written: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"merge_method: ties\n{OF_BASE}parameters: {{{written}}}\n")
    assert len(caught.value.args) == 1
    assert MISTAKES[written] in str(caught.value)


def test_a_synonym_with_two_meanings_on_one_level_is_refused() -> None:
    rule = "methods: [{filter: mlp, merge_method: ties}]\n"
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"merge_method: dare_ties\n{OF_BASE}{rule}parameters: {{trim_ratio: 0.2}}\n")
    assert str(caught.value) == (
        "recipe:5: parameters.trim_ratio is 1 - trim under dare_ties and 1 - density under ties; expected one meaning. "
        "Write the options by these names."
    )


@pytest.mark.parametrize(
    ("models", "parameters", "message"),
    [
        ("[a, b, c]", "alpha: 0.3", "parameters.alpha is weight [1 - alpha, alpha] of two models; found 3. Write a weight under each model."),
        ("[{model: a, parameters: {weight: 1}}, b]", "alpha: 0.3", "parameters.alpha is weight [1 - alpha, alpha], and models have a weight, too; expected one of them."),
        ("[{model: a, parameters: {alpha: 0.3}}, b]", "normalize: true", "models[0].parameters.alpha is for two models together; expected it under parameters."),
    ],
)  # fmt: skip
def test_alpha_is_for_exactly_two_models_without_weights(models: str, parameters: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"merge_method: linear\nmodels: {models}\nparameters: {{{parameters}}}\n")
    assert message in str(caught.value)


def test_alpha_of_a_rule_is_for_two_models_too() -> None:
    head = "merge_method: linear\nbase_model: base\nmodels: [a, b, c]\n"
    rule = "methods: [{{filter: mlp, merge_method: dare, {}parameters: {{alpha: 0.3}}}}]\n"
    assert load_recipe(head + rule.format("models: [c, a], ")).methods[0].merge_method == "dare_linear"
    with pytest.raises(RecipeError) as caught:
        load_recipe(head + rule.format(""))
    assert str(caught.value) == (
        "recipe:4: methods[0].parameters.alpha is weight [1 - alpha, alpha] of two models besides base_model; found 3. "
        "Write a weight under each model."
    )
    with pytest.raises(RecipeError, match=r"of two models besides base_model; found 3"):
        load_recipe(head + rule.format("models: [c, a, b], "))


def arrays() -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    random = np.random.default_rng(0)
    names = ("model.layers.0.w", "model.layers.1.w", "head")
    base = {n: random.standard_normal((6, 5)).astype(np.float32) for n in names}
    return base, [
        {n: (v + 0.1 * random.standard_normal(v.shape)).astype(np.float32) for n, v in base.items()}
        for _ in range(2)
    ]


IN_PYTHON: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"method": "linear", "alpha": 0.3}, {"method": "linear", "weights": [0.7, 0.3]}),
    ({"method": "dare", "drop_rate": 0.4, "scaling_factor": 0.5}, {"method": "dare_linear", "density": 0.6, "scale": 0.5}),
    ({"method": "ties", "trim_ratio": np.array([0.2, 0.7]), "alpha": 0.25}, {"method": "ties", "density": [0.8, 0.3], "weights": [0.75, 0.25]}),
    ({"method": "linear", "layers": {"head": {"method": "dare", "drop_rate": 0.4, "alpha": 0.2}}}, {"method": "linear", "layers": {"head": {"method": "dare_linear", "density": 0.6, "weights": [0.8, 0.2]}}}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "plain"), IN_PYTHON)
def test_python_takes_the_same_words_and_logs_them(
    words: dict[str, Any], plain: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    base, models = arrays()
    with caplog.at_level(logging.INFO, "alnico"):
        merged = alnico.merge_state_dicts(models, base=base, **words)
    noted = " ".join(record.getMessage() for record in caplog.records)
    assert all(word in noted for word in ("alpha", "drop_rate", "trim_ratio") if word in str(words))
    expected = alnico.merge_state_dicts(models, base=base, **plain)
    assert {n: v.tobytes() for n, v in merged.items()} == {n: v.tobytes() for n, v in expected.items()}


def test_alpha_may_be_a_gradient_over_the_layers() -> None:
    _, models = arrays()
    merged = alnico.merge_state_dicts(models, alpha=[0.0, 1.0])
    for name, origin in (("model.layers.0.w", 0), ("model.layers.1.w", 1), ("head", 0)):
        np.testing.assert_array_equal(merged[name], models[origin][name])


def test_a_made_recipe_keeps_the_words_and_notes_them() -> None:
    recipe = alnico.make_recipe(["a", "b"], "dare", base="base", drop_rate=0.4)
    assert "drop_rate: 0.4" in recipe.text
    assert recipe.notes == (
        "method is 'dare', which is dare_linear.",
        "drop_rate is 1 - density: density is 0.6.",
    )
    with pytest.raises(RecipeError, match=r"^alpha has no effect on slerp"):
        alnico.make_recipe(["a", "b"], "slerp", t=0.5, alpha=0.4)


def test_the_command_line_takes_the_words(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, models = arrays()
    for name, tensors in zip(("base", "a", "b"), (base, *models), strict=True):
        save_model(tmp_path / name, {n: ("F32", v) for n, v in tensors.items()})
    words = ("merge", "a", "b", "out", "--base", "base", "--method", "dare")
    code, _, stderr = run(
        *words, "--set", "drop_rate=0.4,0.2", "--set", "alpha=0.3", "--set", "scaling_factor=0.5"
    )
    assert code == 0, stderr
    assert stderr.splitlines() == [
        "note: --method is 'dare', which is dare_linear.",
        "note: --set drop_rate of a is 1 - density: density is 0.6.",
        "note: --set drop_rate of b is 1 - density: density is 0.8.",
        "note: --set alpha is weight [1 - alpha, alpha]: weight is [0.7, 0.3].",
        "note: --set scaling_factor is scale: scale is 0.5.",
    ]
    assert run("methods", "dare")[1].startswith("dare_linear")


def test_a_search_takes_the_words_too() -> None:
    space, _ = read_search(
        f"merge_method: {{choice: [ties, dare]}}\n{OF_BASE}parameters: {{trim_ratio: {{search: [0.2, 0.6]}}, alpha: {{search: [0, 1]}}}}\n"
        "search: {tasks: tasks.yml}\n"
    )
    defaults = {d.name: d.default for d in space.dimensions}
    assert defaults == {
        "merge_method": "ties",
        "trim_ratio": 0.2,
        "alpha": 0.5,
    }  # a density of 1 is out of the range


def test_slerp_with_another_base_names_the_method_for_that() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"merge_method: slerp\n{OF_BASE}parameters: {{t: 0.5}}\n")
    assert str(caught.value) == (
        "recipe:3: slerp merges 2 models, base_model one of them; found 3. For two models and a base that is neither of "
        "them, use nuslerp."
    )


def test_no_synonym_is_the_name_of_a_method_and_each_names_an_option_that_exists() -> None:
    methods = alnico.methods()
    assert not set(METHOD_SYNONYMS) & set(methods)
    assert all(s.words[0] in methods for s in METHOD_SYNONYMS.values())
    for synonym in OPTION_SYNONYMS.values():
        assert all(any(word in m.options for m in methods.values()) for word in synonym.words)
    assert [*alnico.methods("dare")] == ["dare_linear"]
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")
    assert all(f"`{s.word}`" in page or f"`alnico.{s.word}`" in page for s in SYNONYMS)


def test_python_and_the_command_line_have_other_words_for_functions() -> None:
    assert alnico.open is alnico.open_model
    assert alnico.weights is alnico.norm_weights
    assert "weights" not in alnico.__all__
