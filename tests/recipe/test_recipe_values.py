"""What a good recipe means."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from alnico.errors import RecipeError
from alnico.methods import find
from alnico.recipe.load import load_recipe, parse_recipe
from alnico.recipe.options import Levels, TensorPlace, merged_entries, options_at
from alnico.recipe.schema import ModelEntry, NormWeight, Recipe

TIES = """\
merge_method: ties
base_model: base
models:
  - model: base
  - model: a
    parameters: {density: 0.5, weight: 2}
  - model: b
parameters: {density: 0.2, lambda: 0.7, normalize: false}
dtype: bfloat16
seed: 5
"""


def read(text: str) -> Recipe:
    return parse_recipe(text, "recipe.yml")


def merged(recipe: Recipe) -> tuple[ModelEntry, ...]:
    return merged_entries(find(recipe.merge_method), recipe.models, recipe.base_model)


def options(recipe: Recipe) -> dict[str, object]:
    entries = merged(recipe)
    levels = Levels({}, (recipe.parameters,), tuple(m.parameters for m in recipe.models))
    return options_at(find(recipe.merge_method), levels, entries, TensorPlace("w", 0.0), ["w"] * len(entries))


def parameters(text: str) -> dict[str, object]:
    return dict(
        read(f"merge_method: ties\nbase_model: base\nmodels: [base, a]\nparameters: {text}\n").parameters
    )


def meanings(text: str) -> dict[str, object]:
    return options(read(f"merge_method: ties\nbase_model: base\nmodels: [base, a]\nparameters: {text}\n"))


def test_a_recipe_says_what_is_asked() -> None:
    assert read(TIES) == Recipe(
        "ties",
        (ModelEntry("base"), ModelEntry("a", {"density": 0.5, "weight": 2.0}), ModelEntry("b")),
        "base",
        {"density": 0.2, "lambda": 0.7, "normalize": False},
        "BF16",
        5,
        "error",
        name="recipe.yml",
    )


def test_an_option_under_a_model_goes_before_the_global_one_before_the_default() -> None:
    recipe = read(TIES)
    assert [e.reference for e in merged(recipe)] == ["a", "b"]
    values = options(recipe)
    assert values["density"] == (0.5, 0.2)
    assert values["weight"] == (2.0, 1.0)
    assert (values["scale"], values["divide"]) == (0.7, "none")
    assert "elect" not in values


def test_slerp_has_the_base_first_wherever_it_is_listed_or_not() -> None:
    for models in ("[a, base]", "[base, a]", "[a]"):
        recipe = read(f"merge_method: slerp\nbase_model: base\nparameters: {{t: 0.5}}\nmodels: {models}\n")
        assert [e.reference for e in merged(recipe)] == ["base", "a"]


def test_linear_merges_the_listed_models_only() -> None:
    recipe = read("merge_method: linear\nbase_model: base\nmodels: [a, b]\n")
    assert [e.reference for e in merged(recipe)] == ["a", "b"]


def test_a_shared_option_may_stand_under_models_that_agree() -> None:
    text = "merge_method: slerp\nbase_model: a\nmodels:\n- {model: a, parameters: {t: 0.5}}\n- {model: b, parameters: {t: 5e-1}}\n"
    recipe = read(text)
    assert options(recipe) == {"t": 0.5}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("{lambda: 2}", {"scale": 2}),
        ("{normalize: true}", {"divide": "weight"}),
        ("{normalize: false}", {"divide": "none"}),
        ("{rescale: true}", {"rescale": "l1"}),
        ("{rescale: false}", {"rescale": "none"}),
        ("{rescale: inverse}", {"rescale": "inverse"}),
        ("{lambda: 2, scale: 2.0}", {"scale": 2}),
        ("{divide: weight, normalize: yes}", {"divide": "weight"}),
    ],
)
def test_mergekits_names_mean_ours(written: str, meant: dict[str, object]) -> None:
    assert {k: v for k, v in meanings(written).items() if k not in ("density", "weight")} == meant


def test_normalize_of_linear_is_its_own_option() -> None:
    assert read("merge_method: linear\nmodels: [a]\nparameters: {normalize: false}").parameters == {
        "normalize": False
    }


@pytest.mark.parametrize(
    ("written", "meant"),
    [("1e-5", 1e-5), ("'0.25'", 0.25), ("1E3", 1000.0), ("-3", -3.0), ("+.5", 0.5), ("1e+2", 100.0)],
)
def test_a_number_may_be_written_in_any_way_that_is_one(written: str, meant: float) -> None:
    value = parameters(f"{{weight: {written}}}")["weight"]
    assert value == meant
    assert type(value) is float


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("bfloat16", "BF16"),
        ("float16", "F16"),
        ("float32", "F32"),
        ("float64", "F64"),
        ("torch.bfloat16", "BF16"),
        ("bf16", "BF16"),
        ("fp16", "F16"),
        ("fp32", "F32"),
        ("BFloat16", "BF16"),
        ("torch.float", "F32"),
    ],
)
def test_dtypes_have_the_names_people_use(written: str, meant: str) -> None:
    for key in ("dtype", "out_dtype"):
        assert read(f"merge_method: linear\nmodels: [a]\n{key}: {written}\n").dtype == meant


def test_out_dtype_is_the_output_dtype_and_a_note_says_so() -> None:
    recipe = read("merge_method: linear\nmodels: [a]\ndtype: float32\nout_dtype: bfloat16\n")
    assert recipe.dtype == "BF16"
    assert recipe.notes == (
        "recipe.yml:3: dtype has no effect: the output has out_dtype, and inputs are not rounded first.",
    )
    assert read("merge_method: linear\nmodels: [a]\ndtype: bf16\nout_dtype: bfloat16\n").notes == ()


def test_what_means_nothing_in_mergekit_is_accepted_with_a_note() -> None:
    text = "merge_method: task_arithmetic\nbase_model: a\nmodels: [b]\nparameters:\n  int8_mask: true\n  density: 0.3\n  rescale: 1\n"
    recipe = read(text)
    assert recipe.parameters == {}
    assert recipe.notes == (
        "recipe.yml:5: int8_mask has no effect: it only changes the dtype of a temporary tensor in mergekit.",
        "recipe.yml:6: parameters.density has no effect on task_arithmetic, as in mergekit.",
        "recipe.yml:7: parameters.rescale has no effect on task_arithmetic, as in mergekit.",
    )


def test_options_under_the_base_have_no_effect_and_a_note_says_so() -> None:
    text = "merge_method: ties\nbase_model: a\nmodels:\n- {model: a, parameters: {weight: 1, density: 0.5, lambda: 2}}\n- b\n"
    recipe = read(text)
    assert recipe.notes == (
        "recipe.yml:3: models[0] is the base; these options have no effect under it: weight, density.",
    )
    assert options(recipe)["scale"] == 2


def test_document_marks_around_one_recipe_are_no_second_document() -> None:
    assert read(f"---\n{TIES}...\n---\n").canonical() == read(TIES).canonical()


def test_a_seed_is_always_set_and_may_come_from_outside() -> None:
    recipe = read("merge_method: linear\nmodels: [a]\n")
    assert recipe.seed == 0
    assert read("merge_method: linear\nmodels: [a]\nseed: -7\n").seed == -7
    changed = load_recipe(recipe, seed=9)
    assert (changed.seed, changed.written_seed) == (9, 0)


def test_anchors_and_merge_keys_are_written_out() -> None:
    text = """\
merge_method: ties
base_model: base
parameters: &common {density: 0.5, weight: 1}
models:
  - {model: a, parameters: *common}
  - model: b
    parameters:
      <<: *common
      weight: 3
  - model: c
    parameters:
      <<: [{weight: 4}, *common]
"""
    recipe = read(text)
    assert recipe.models[0].parameters == {"density": 0.5, "weight": 1}
    assert recipe.models[1].parameters == {"density": 0.5, "weight": 3}
    assert recipe.models[2].parameters == {"density": 0.5, "weight": 4}


def test_text_a_file_and_a_mapping_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(TIES)
    mapping = {
        "merge_method": "ties",
        "base_model": Path("base"),
        "models": (
            "base",
            {"model": "a", "parameters": {"density": np.float32(0.5), "weight": np.int64(2)}},
            "b",
        ),
        "parameters": {"density": 0.2, "lambda": np.float64(0.7), "normalize": np.bool_(False)},
        "dtype": np.str_("bfloat16"),
        "seed": 5,
    }
    made = [
        load_recipe(TIES),
        load_recipe(tmp_path / "recipe.yml"),
        load_recipe(str(tmp_path / "recipe.yml")),
        load_recipe(mapping),
    ]
    assert all(m.canonical() == made[0].canonical() for m in made)
    assert made[1].folder == str(tmp_path)
    assert made[1].name == str(tmp_path / "recipe.yml")
    assert made[1].text == TIES


def test_a_file_with_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_bytes(b"\xef\xbb\xbf" + TIES.replace("\n", "\r\n").encode())
    assert load_recipe(tmp_path / "recipe.yml").canonical() == read(TIES).canonical()


def test_equal_recipes_give_equal_plain_data_whatever_the_spelling() -> None:
    text = """\
seed: 5
dtype: torch.bfloat16
parameters: {normalize: false, lambda: 7e-1, density: 0.20}
models: [{model: base}, {parameters: {weight: 2.0, density: .5}, model: a}, {model: b, parameters: {}}]
base_model: "base"
merge_method: ties
"""
    assert json.dumps(read(text).canonical()) == json.dumps(read(TIES).canonical())


def test_plain_data_reads_back_as_the_same_recipe() -> None:
    random.seed(0)
    for _ in range(50):
        options = {
            k: random.uniform(0.01, 1) for k in ("density", "weight", "scale") if random.random() < 0.5
        }
        recipe = load_recipe(
            {
                "merge_method": random.choice(["ties", "dare_ties", "dare_linear"]),
                "base_model": "base",
                "models": ["base", {"model": "a", "parameters": options}, "b"],
                "parameters": {} if "scale" in options else {"lambda": random.uniform(-1, 1)},
                "dtype": random.choice(["bfloat16", "float32"]),
                "seed": random.randrange(1 << 40),
            }
        )
        assert load_recipe(recipe.canonical()) == recipe


MEASURED = "merge_method: ties\nbase_model: base\nmodels: [a, b]\nparameters:\n  weight: "


def test_a_measured_weight_has_the_defaults_of_its_mode() -> None:
    assert read(MEASURED + "{from: l2_norm}").parameters["weight"] == NormWeight(
        "l2_norm", "exp", 1.0, 1.5, 1.0, "model", ""
    )
    assert read(MEASURED + "{from: l2_norm, mode: power, alpha: 2}").parameters["weight"] == NormWeight(
        mode="power", alpha=2.0
    )


def test_a_number_that_the_mode_does_not_use_is_told_and_changes_nothing() -> None:
    found = read(MEASURED + "{from: l2_norm, mode: linear, beta: 3, path: x}")
    assert found.parameters["weight"] == NormWeight(mode="linear")
    assert list(found.notes) == [
        "recipe.yml:5: parameters.weight.beta has no effect: it applies to mode: exp.",
        "recipe.yml:5: parameters.weight.path has no effect: it applies to from: analysis.",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "merge_method: linear\nmodels: [a, b]\nparameters: {weight: {from: l2_norm}}",
            "2: weight is computed from distances to the base, but there is no base_model. Add base_model: PATH.",
        ),
        (
            "merge_method: linear\nbase_model: a\nmodels: [a, b]\nparameters: {weight: {from: l2_norm}}",
            "3: a: weight is computed from the distance to the base, and this is the base. Set a number, or remove the base from the models.",
        ),
        (
            "merge_method: ties\nbase_model: base\nmodels:\n- {model: a, parameters: {weight: {from: l2_norm}}}\n"
            "- {model: b, parameters: {weight: {from: l2_norm, mode: linear}}}",
            "3: weight is computed from norms in different ways in one merge; expected one way. Set it once, under parameters.",
        ),
        (
            "merge_method: linear\nbase_model: base\nmodels: [a, b]\nparameters: {weight: {from: l2_norm, scale: 0}}",
            "3: the weights of linear sum to 0 (0, 0), so they cannot be normalised; expected a sum other than 0. "
            "Change a weight, or set normalize: false.",
        ),
    ],
)
def test_a_measured_weight_that_cannot_be_is_refused_with_the_recipe(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as told:
        read(text)
    assert str(told.value) == f"recipe.yml:{expected}"
