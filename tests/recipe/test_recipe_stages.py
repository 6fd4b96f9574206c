"""Several documents in one file."""

from __future__ import annotations

from pathlib import Path

import pytest

from alnico.errors import RecipeError
from alnico.recipe.load import decode_recipes, load_recipe, load_recipes, parse_recipe, parse_recipes
from alnico.recipe.stages import order_stages


def document(name: str, *models: str, method: str = "linear") -> str:
    return f"name: {name}\nmerge_method: {method}\nmodels: [{', '.join(models)}]\n"


def together(*documents: str) -> str:
    return "---\n".join(documents)


def labels(text: str) -> list[str]:
    return [s.label for s in order_stages(parse_recipes(text, "r"))]


def test_stages_come_after_those_whose_outputs_they_take() -> None:
    text = together(
        document("last", "two", "one"),
        document("two", "one", "b"),
        document("alone", "c"),
        document("one", "a"),
    )
    found = order_stages(parse_recipes(text, "r"))
    assert [s.label for s in found] == ["alone", "one", "two", "last"]
    assert {s.label: s.uses for s in found} == {
        "alone": (),
        "one": (),
        "two": ("one",),
        "last": ("two", "one"),
    }
    assert {s.label for s in found if s.is_intermediate} == {"one", "two"}


def test_merges_that_do_not_use_one_another_keep_their_order_and_have_numbers() -> None:
    text = together(
        "merge_method: linear\nmodels: [a]\n",
        document("named", "b"),
        "merge_method: passthrough\nmodels: [linear]\n",
    )
    found = order_stages(parse_recipes(text, "r"))
    assert [(s.label, s.number, s.is_intermediate) for s in found] == [
        ("1-linear", 1, False),
        ("named", 2, False),
        ("3-passthrough", 3, False),
    ]


@pytest.mark.parametrize(
    "use",
    [
        "merge_method: slerp\nbase_model: one\nmodels: [a]\nparameters: {t: 0.5}\n",
        "merge_method: passthrough\nslices: [{sources: [{model: one, layer_range: [0, 1]}]}]\n",
        "merge_method: passthrough\nmodules: {text_decoder: {models: [one]}}\n",
        "merge_method: linear\nmodels: [a]\ntokenizer_source: one\n",
        "merge_method: linear\nmodels: [a]\nmethods: [{filter: mlp, merge_method: passthrough, model: one}]\n",
    ],
)
def test_a_stage_is_used_wherever_a_model_is_named(use: str) -> None:
    assert labels(together(use, document("one", "a")))[0] == "one"


def test_only_references_to_models_mean_a_stage() -> None:
    """mergekit-multi rewrites any text that equals a stage's name, the method too."""
    text = together(
        document("linear", "a"), "merge_method: linear\nmodels: [{model: b, parameters: {weight: 1}}]\n"
    )
    assert [s.uses for s in order_stages(parse_recipes(text, "r"))] == [(), ()]


def test_a_document_of_its_own_name_is_no_use_of_itself() -> None:
    assert [
        s.uses for s in order_stages(parse_recipes(together(document("a", "a"), document("b", "c")), "r"))
    ] == [
        (),
        (),
    ]


def test_stages_that_wait_for_one_another_are_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipes(together(document("x", "c"), document("one", "two"), document("two", "one")), "r")
    assert str(caught.value) == (
        "r:5: these stages need each other's outputs: one, two; expected stages without a cycle. Change a reference."
    )
    with pytest.raises(RecipeError, match=r"^r: these stages need each other's outputs: one, two; "):
        order_stages([parse_recipe(document("one", "two"), "r"), parse_recipe(document("two", "one"), "r")])


def test_names_are_names_of_folders_and_each_ones_own() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipes(together(document("one", "a"), document("one", "a"), document("a/b", "a")), "r")
    assert str(caught.value).splitlines() == [
        "r:5: name is 'one', as in line 1; expected different names. Change one.",
        "r:9: name is 'a/b'; expected the name of a folder, without / and \\. Change it.",
    ]


def test_a_name_may_not_be_what_another_is_called_without_one() -> None:
    text = together(document("2-linear", "a"), "merge_method: linear\nmodels: [a]\n")
    with pytest.raises(
        RecipeError,
        match=r"^r:5: name is '2-linear', as in line 1; expected different names\. Change one\.$",
    ):
        parse_recipes(text, "r")


def test_a_stage_goes_before_a_path_of_its_name_and_a_note_says_so(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    data = together(document("one", "a"), document("two", "one")).encode()
    first, second = decode_recipes(data, "r", str(tmp_path))
    assert first.notes == ()
    assert second.notes == ("one means the stage of that name, not the path. Write ./one for the path.",)


def test_each_recipe_has_the_notes_of_its_document() -> None:
    text = "merge_method: linear\nmodels: [a]\nparameters: {int8_mask: true}\n---\nmerge_method: linear\nmodels: [a]\n"
    assert [len(r.notes) for r in parse_recipes(text, "r")] == [1, 0]


def test_each_recipe_has_the_text_of_its_document() -> None:
    text = "# about\n--- # first\nmerge_method: linear\nmodels: [a]\n# between\n---\n---\nmerge_method: linear\nmodels: [b]\n...\n"
    first, second = parse_recipes(text, "r")
    assert first.text + second.text == text
    assert second.text.startswith("---\nmerge_method: linear\nmodels: [b]")
    for recipe in (first, second):
        assert parse_recipe(recipe.text, "r").canonical() == recipe.canonical()


def test_one_document_is_read_the_same_alone_and_among_several(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(document("one", "a"))
    assert load_recipes(path) == (load_recipe(path),)
    assert load_recipes(load_recipe(path), seed=3)[0].seed == 3
    assert load_recipes({"merge_method": "linear", "models": ["a"]})[0].merge_method == "linear"


def test_a_document_without_a_method_takes_none_from_the_one_before() -> None:
    with pytest.raises(
        RecipeError, match=r"^r:5: merge_method is missing\. `alnico methods` lists all methods\.$"
    ):
        parse_recipes(together(document("one", "a"), "models: [a]\n"), "r")
