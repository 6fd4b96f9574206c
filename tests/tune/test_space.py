"""Spaces: what is searched in a recipe, and the recipes that lie in it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from alnico.errors import RecipeError
from alnico.recipe.load import load_recipe
from alnico.tune.search.settings import Halving, SearchSettings, read_search

BASE = "merge_method: task_arithmetic\nbase_model: base\n"
TWO = BASE + "models: [{model: a, parameters: {weight: {search: [0, 2]}}}, {model: b}]\n"


def mistakes(text: str) -> list[str]:
    with pytest.raises(RecipeError) as told:
        read_search(text)
    return str(told.value).splitlines()


def test_a_point_becomes_the_recipe_with_its_values(tmp_path: Path) -> None:
    file = tmp_path / "search.yml"
    file.write_text(
        BASE
        + """
models:
  - model: some/code
    parameters: {weight: {search: [0.0, 1.5]}}
  - model: math
    parameters:
      weight:
        - {filter: mlp, value: {search: [0.1, 0.9], log: true}}
        - 0.25
parameters: {lambda: {search: [0.3, 2.0], layers: 3}}
lines: {alpha: 0.5, beta: {search: [0, 1], step: 0.25}}
search: {tasks: tasks.yml}
"""
    )
    space, settings = read_search(file)
    names = [
        "code.weight", "math.weight[0].value", "lambda[0]", "lambda[1]", "lambda[2]", "lines.beta",
    ]  # fmt: skip
    assert [d.name for d in space.dimensions] == names
    recipe = space.instantiate(dict(zip(names, (1.25, 0.5, 1.0, 1.5, 0.5, 0.75), strict=True)))
    assert (
        recipe.canonical()
        == load_recipe(
            {
                "merge_method": "task_arithmetic",
                "base_model": "base",
                "models": [
                    {"model": "some/code", "parameters": {"weight": 1.25}},
                    {"model": "math", "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, 0.25]}},
                ],
                "parameters": {"lambda": [1.0, 1.5, 0.5]},
                "lines": {"alpha": 0.5, "beta": 0.75},
            }
        ).canonical()
    )
    assert load_recipe(recipe.text).canonical() == recipe.canonical()
    assert settings.tasks == "tasks.yml"


def test_the_default_is_the_methods_inside_the_ranges() -> None:
    space, _ = read_search(
        """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: {search: [0, 2]}, density: {search: [0.1, 0.9]}}}
  - {model: b, parameters: {weight: {search: [0.6, 2]}, density: {search: [0.1, 1.0], step: 0.2}}}
  - base
parameters: {lambda: {search: [0.3, 2.0]}}
"""
    )
    assert space.default == {
        "a.weight": 0.5,
        "a.density": 0.9,
        "b.weight": 0.6,
        "b.density": pytest.approx(0.9),
        "lambda": 1.0,
    }


def test_what_has_no_default_begins_in_the_middle() -> None:
    space, _ = read_search(
        "merge_method: slerp\nbase_model: a\nmodels: [a, b]\nparameters: {t: {search: [0.2, 0.4]}}\n"
    )
    assert space.default == {"t": pytest.approx(0.3)}


def test_methods_are_a_choice_and_take_their_own_options_alone() -> None:
    space, _ = read_search(
        """
merge_method: {choice: [ties, linear, dare_ties]}
base_model: base
models:
  - {model: a, parameters: {weight: {search: [0, 1]}, density: {search: [0.1, 1.0]}}}
  - {model: b, parameters: {density: 0.5}}
parameters: {lambda: {search: [0.5, 2]}}
lines: {alpha: 0.5, beta: {search: [0, 1]}}
"""
    )
    of_linear = space.instantiate({**space.default, "merge_method": "linear"})
    assert of_linear.models[0].parameters == {"weight": 0.5}
    assert of_linear.models[1].parameters == {}
    assert of_linear.parameters == {}
    assert of_linear.lines is None
    of_ties = space.instantiate(space.default)
    assert of_ties.models[0].parameters == {"weight": 0.5, "density": 1.0}
    assert of_ties.parameters == {"lambda": 1.0}
    assert of_ties.lines is not None


def test_weights_on_the_simplex_are_a_share_of_their_sum() -> None:
    space, _ = read_search(
        BASE
        + """
models:
  - {model: a, parameters: {weight: {search: simplex}}}
  - {model: b, parameters: {weight: {search: simplex}}}
  - {model: c, parameters: {weight: {search: simplex}}}
"""
    )
    assert [e.parameters["weight"] for e in space.instantiate(space.default).models] == pytest.approx(
        [1 / 3] * 3
    )
    sizes = (0.5, 1.0, 2.5)
    point = {f"{m}.weight": math.exp(-size) for m, size in zip("abc", sizes, strict=True)}
    weights = [e.parameters["weight"] for e in space.instantiate(point).models]
    assert weights == pytest.approx([0.125, 0.25, 0.625])


def test_a_choice_may_be_a_list_or_a_mapping() -> None:
    space, _ = read_search(
        BASE + "models: [a, b]\nparameters: {lambda: {choice: [1, [0.5, 1], [{filter: mlp, value: 2}, 1]]}}\n"
    )
    (dimension,) = space.dimensions
    assert dimension.choices == (1, "[0.5, 1]", '[{"filter": "mlp", "value": 2}, 1]')
    recipe = space.instantiate({"lambda": '[{"filter": "mlp", "value": 2}, 1]'})
    assert recipe.canonical()["parameters"] == {
        "lambda": [{"filter": "mlp", "value": 2.0}, {"filter": "*", "value": 1.0}]
    }


def test_a_stack_takes_blocks_of_layers() -> None:
    space, _ = read_search("stack: {models: [a, b], layers: 6, block: 2, repeat: 2}\n")
    names = [f"stack[{i}].{what}" for i in range(3) for what in ("model", "repeat")]
    assert [d.name for d in space.dimensions] == names
    default = space.instantiate(space.default)
    assert [(s.models[0].reference, s.models[0].layers) for s in default.slices] == [
        ("a", (0, 2)),
        ("a", (2, 4)),
        ("a", (4, 6)),
    ]
    recipe = space.instantiate({**space.default, "stack[1].model": "b", "stack[1].repeat": 2})
    assert [(s.models[0].reference, s.models[0].layers) for s in recipe.slices] == [
        ("a", (0, 2)), ("b", (2, 4)), ("b", (2, 4)), ("a", (4, 6)),
    ]  # fmt: skip
    assert recipe.merge_method == "passthrough"
    assert set(space.references) == {"a", "b"}


def test_a_stack_with_places_takes_any_block_at_any_depth() -> None:
    space, _ = read_search("stack: {models: [a], layers: 3, places: 4}\n")
    names = [d.name for d in space.dimensions if d.name.endswith("block")]
    recipe = space.instantiate({**space.default, **dict(zip(names, (2, 0, 0, 1), strict=True))})
    assert [s.models[0].layers for s in recipe.slices] == [(2, 3), (0, 1), (0, 1), (1, 2)]


def test_mistakes_are_told_together_with_their_lines_before_anything_is_tried() -> None:
    assert mistakes(
        """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: {search: [1, 0]}}}
  - {model: b, parameters: {weight: {serch: [0, 1]}}}
  - {model: c, parameters: {density: {search: [0.1, 1], log: 1}}}
search:
  sampler: tpa
  trials: 0
"""
    ) == [
        "recipe:5: models[0].parameters.weight.search is [1, 0]; expected [least, greatest], two finite numbers in increasing order, or simplex.",
        "recipe:6: models[1].parameters.weight has the unknown key 'serch'. Did you mean search?",
        "recipe:7: models[2].parameters.density.log is 1; expected true or false.",
        "recipe:9: search.sampler is 'tpa'; expected one of tpe, cmaes, nsga2, random, dirichlet, grid.",
        "recipe:10: search.trials is 0; expected a whole number of at least 1.",
    ]


def test_the_corners_of_the_space_are_read_as_recipes() -> None:
    assert mistakes(
        """
merge_method: {choice: [ties, tis]}
base_model: base
models:
  - {model: a, parameters: {density: {search: [0, 1]}}}
  - {model: b, parameters: {weigth: 1}}
"""
    ) == [
        "recipe:2: unknown merge method 'tis'; expected one of those that `alnico methods` lists. Did you mean ties?",
        "recipe:5: models[0].parameters.density is 0; density is the share of each tensor's entries that is kept, in (0, 1].",
        "recipe:6: models[1].parameters.weigth is not an option of ties. Did you mean weight?",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BASE + "models: [a, b]\n", "nothing to search"),
        (TWO.replace("[0, 2]", "[0, 2], log: true"), "has log and starts at 0"),
        (TWO.replace("[0, 2]", "[1, 2], log: true, step: 0.1"), "has log and step"),
        (TWO.replace("[0, 2]", "[0, 2], step: 1e-320"), "gives more than 1e+15 values"),
        (TWO.replace("[0, 2]", "[0, 2], step: 3"), "step is 3; expected a number above 0 and at most 2"),
        (TWO.replace("[0, 2]", "[0, 2.5], int: true"), "is a whole number (int)"),
        (TWO.replace("[0, 2]", "simplex"), "is the only value on its simplex"),
        (TWO.replace("[0, 2]", "[0, .inf]"), "search is [0, inf]"),
        (TWO.replace("search: [0, 2]", "choice: []"), "choice is a list of 0"),
        (TWO.replace("search: [0, 2]", "choice: [1, 1]"), "lists a value twice"),
        (TWO.replace("search: [0, 2]", "choice: [1, {search: [0, 1]}]"), "contains a value to search"),
        (TWO.replace("[0, 2]", "[0, 2], setp: 1"), "Did you mean step?"),
        (TWO + "search: {objective: [a, a]}\n", "lists a name twice"),
        (TWO + "search: {held_out: 1}\n", "expected a share above 0 and below 1"),
        (TWO + "search: {report: x.yml, held_out: 0.5}\n", "are both given"),
        (TWO + "search: {objective: [a, b], halving: true}\n", "compares trials by one objective"),
        (TWO + "search: {trial: 5}\n", "Did you mean trials?"),
        ("stack: {models: [a], layers: 5, block: 2}\n", "does not divide the"),
        ("stack: {models: [], layers: 4}\n", "stack.models is missing"),
        ("stack: {models: [a, b], layers: 4, repeat: 0}\n", "stack.repeat is 0"),
        (TWO + "---\n" + TWO, "a second document begins"),
    ],
)
def test_wrong_spaces_are_refused(text: str, told: str) -> None:
    assert told in "\n".join(mistakes(text))


def test_settings_have_their_defaults() -> None:
    _, settings = read_search(
        TWO
        + "search: {halving: true, objective: [pets, mean], seed: 3, halving: {keep: 0.25}}\n".replace(
            "halving: true, objective: [pets, mean], ", ""
        )
    )
    assert settings == SearchSettings(seed=3, halving=Halving(0.25, 0.25))


def test_a_name_that_no_file_can_have_is_told() -> None:
    with pytest.raises(RecipeError, match=r"is not a path\. Check the path of the recipe\."):
        read_search("a\0b.yml")


def test_a_search_takes_what_recipes_in_circulation_have() -> None:
    text = """\
anchors: [&range {search: [0, 1]}]
merge_method: slerp
base_model: a
models: [{model: a, parameters: {weight: 0.3}}, b]
parameters: {t: *range, normalize: 1.0, density: 0.5}
out_path: x
search: {tasks: t.yml}
"""
    space, _ = read_search(text)
    plain = read_search(
        "merge_method: slerp\nbase_model: a\nmodels: [a, b]\nparameters: {t: {search: [0, 1]}}\nsearch: {tasks: t.yml}\n"
    )[0]
    assert space.default == plain.default
    assert space.instantiate(space.default).canonical() == plain.instantiate(plain.default).canonical()


def test_a_choice_of_true_and_false_may_be_of_numbers() -> None:
    text = "merge_method: linear\nmodels: [a, b]\nparameters: {normalize: {choice: [CHOICE]}}\nsearch: {tasks: t.yml}\n"
    space, meant = (read_search(text.replace("CHOICE", c))[0] for c in ("1.0, 0", "true, false"))
    assert space.instantiate(space.default).canonical() == meant.instantiate(meant.default).canonical()
