"""Recipes made to harm: refused in bounded time, and nothing of them is run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alnico.errors import RecipeError
from alnico.recipe.load import load_recipe, parse_recipe, parse_recipes
from alnico.recipe.stages import order_stages

TOO_LARGE = "is nested deeper than 32 or has more than 50000 values; expected a recipe"


def message(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r")
    return str(caught.value)


@pytest.mark.parametrize(
    "tagged",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/object/new:os.system ['touch {}']",
        "!!python/name:os.system ''",
        "!!python/module:os ''",
        "!!python/object:alnico.errors.RunError {{}}",
        "!!python/tuple [1, 2]",
        "!custom x",
        "!!binary AAAA",
        "!!omap [a: 1]",
    ],
)
@pytest.mark.parametrize("key", ["merge_method", "models", "parameters", "anything"])
def test_a_tag_makes_no_object_and_is_refused(tmp_path: Path, key: str, tagged: str) -> None:
    mark = tmp_path / "was-run"
    told = message(f"{key}: {tagged.format(mark)}\n")
    assert told.startswith("r:1: ")
    assert "which a recipe cannot hold" in told
    assert "\n" not in told
    assert not mark.exists()


def test_aliases_that_multiply_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert message("\n".join(lines)) == f"r:1: {TOO_LARGE}, aliases written out."


def test_merge_keys_that_multiply_are_refused() -> None:
    lines = ["a0: &a0 {k: x}"]
    lines += [f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert message("\n".join(lines)) == f"r:1: {TOO_LARGE}, aliases written out."


def test_an_anchor_inside_itself_is_refused() -> None:
    assert message("a: &a [*a]\n") == f"r:1: {TOO_LARGE}, aliases written out."
    assert message("a: &a\n  b: *a\n") == f"r:1: {TOO_LARGE}, aliases written out."


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_deep_nesting_is_refused_where_it_gets_too_deep(opening: str) -> None:
    assert message(opening * 100_000) == f"r:1: {TOO_LARGE}."


def test_too_many_values_are_refused() -> None:
    assert message("a:\n" + "- 1\n" * 60_000).endswith(f": {TOO_LARGE}.")


def test_documents_that_multiply_are_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipes("---\na: 1\n" * 20_000, "r")
    assert str(caught.value).endswith(f": {TOO_LARGE}.")


def test_a_long_chain_of_stages_is_ordered_in_bounded_time() -> None:
    count = 1_000
    chain = [f"name: s{i}\nmerge_method: linear\nmodels: [s{i + 1}]\n" for i in range(count)]
    assert [s.number for s in order_stages(parse_recipes("---\n".join(chain), "r"))] == list(
        range(count, 0, -1)
    )


def test_nesting_of_32_is_read() -> None:
    assert message("a: " + "[" * 31 + "]" * 31).startswith("r:1: merge_method is missing")


@pytest.mark.parametrize(
    "text",
    [
        "%YAML " + "1" * 5000 + ".1\n---\na: 1\n",
        "%TAG ! x\n%TAG ! y\n---\na",
        "a: !<> b",
        "\ufeff",
        "a: \ud800",
    ],
)
def test_odd_corners_of_yaml_are_told_as_mistakes_of_the_recipe(text: str) -> None:
    assert message(text).startswith("r:")


WORDS = [
    "merge_method",
    "models",
    "model",
    "base_model",
    "parameters",
    "weight",
    "density",
    "t",
    "ties",
    "slerp",
    "linear",
    "lambda",
    "dtype",
    "seed",
    "missing",
    "filter",
    "value",
    "slices",
    "sources",
    "layer_range",
    "modules",
    "methods",
    "tokenizer",
    "tokens",
    "lines",
    "protect",
    "gram",
    "energy",
    "others",
    "preset",
    "name",
    "base",
    "re:(a",
    "kind",
    "model_token",
    "path",
    "lora",
    "<<",
    "&a",
    "*a",
    "!!int",
    "!!python/name:x",
    "!!set",
    "!!timestamp",
    "1e-5",
    ".nan",
    "0x",
    "1:30",
    "2001-01-01",
    "~",
    "true",
    "[",
    "]",
    "{",
    "}",
    ":",
    ">",
    ": ",
    "- ",
    ", ",
    "\n",
    "\n  ",
    "\n- ",
    "? ",
    "'",
    '"',
    "#",
    "%YAML 1.1",
    "---",
    "...",
    "\t",
    "\x00",
    "é",
    "😀",
    "1",
    "-",
    ".",
]


@pytest.mark.parametrize(
    "text",
    [
        '{merge_method: ties, base_model: a, models: [a, b], parameters: {"x\\ny": 1}}',
        '{merge_method: ties, base_model: a, modules: {"x\\ny": 1}}',
        '{merge_method: linear, models: [b], tokenizer: {tokens: {"x\\ny": 1}}}',
        '{merge_method: linear, models: [b], "x\\ny": 1}',
        '{merge_method: linear, models: [b], "x\\ny": 1, "x\\ny": 1}',
    ],
)
def test_a_name_of_two_lines_stays_on_one_in_messages(text: str) -> None:
    told = message(text).splitlines()
    assert all(line.startswith("r:1: ") for line in told)
    assert "x\\ny" in told[-1]


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(WORDS), max_size=30).map("".join) | st.text(max_size=60))
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    try:
        recipe = parse_recipe(text, "r")
    except RecipeError as error:
        lines = str(error).split("\n")
        assert all(line.startswith("r:") for line in lines)
    else:
        assert recipe.entries


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
RECIPES = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(["ties", "linear", "slerp", "passthrough", "dare_ties"]) | VALUES},
    optional={
        "models": st.lists(
            st.just("a") | st.fixed_dictionaries({"model": st.just("b")}, optional={"parameters": VALUES}),
            max_size=3,
        )
        | VALUES,
        "base_model": st.just("a") | VALUES,
        "parameters": st.dictionaries(
            st.sampled_from(["weight", "density", "t", "scale", "normalize", "rescale", "elect"]), VALUES
        )
        | VALUES,
        "slices": st.lists(
            st.fixed_dictionaries(
                {
                    "sources": st.lists(
                        st.fixed_dictionaries(
                            {"model": st.just("a"), "layer_range": st.just([0, 2]) | VALUES}
                        ),
                        max_size=2,
                    )
                },
                optional={
                    "parameters": VALUES,
                    "merge_method": st.just("ties") | VALUES,
                    "base_model": VALUES,
                },
            ),
            max_size=2,
        )
        | VALUES,
        "modules": st.dictionaries(
            st.text(max_size=3), st.fixed_dictionaries({"models": st.just(["a", "b"])}) | VALUES, max_size=2
        )
        | VALUES,
        "methods": st.lists(
            st.fixed_dictionaries(
                {
                    "filter": st.sampled_from(["mlp", "*", "re:["]) | VALUES,
                    "merge_method": st.sampled_from(["ties", "passthrough"]),
                },
                optional={
                    "parameters": st.dictionaries(st.sampled_from(["density", "lambda"]), VALUES),
                    "model": VALUES,
                },
            ),
            max_size=2,
        )
        | VALUES,
        "tokenizer": st.fixed_dictionaries(
            {}, optional={"source": VALUES, "tokens": VALUES, "pad_to_multiple_of": VALUES}
        )
        | VALUES,
        "lines": VALUES,
        "protect": st.fixed_dictionaries(
            {}, optional={"gram": VALUES, "energy": VALUES, "model": VALUES, "others": VALUES}
        )
        | VALUES,
        "name": VALUES,
        "dtype": VALUES,
        "seed": VALUES,
        "missing": VALUES,
        "unrelated": VALUES,
    },
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(RECIPES)
def test_any_mapping_is_a_recipe_or_a_recipe_error(mapping: dict[str, object]) -> None:
    try:
        recipe = load_recipe(mapping)
    except RecipeError as error:
        lines = str(error).split("\n")
        assert all(line.startswith("recipe: ") for line in lines)
    else:
        assert recipe.entries
