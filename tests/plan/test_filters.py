"""Filters that fit nothing are told: they would leave a merge other than it was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alnico.errors import RecipeError
from alnico.plan.build import build_plan
from alnico.recipe.load import load_recipe
from alnico.run_options import RunOptions
from made import family

ONE_THREAD = RunOptions(threads=1)


def notes(recipe: dict[str, Any]) -> list[str]:
    plan = build_plan(load_recipe(recipe), run=ONE_THREAD)
    for source in plan.sources:
        source.close()
    return list(plan.notes)


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 2, layers=2)


TWO: dict[str, Any] = {"merge_method": "linear", "models": ["tuned-0", "tuned-1"]}


def test_a_filter_that_fits_no_tensor_is_told_with_the_nearest_part_of_a_name() -> None:
    weight = [
        {"filter": "self_atn", "value": 0.3},
        {"filter": "mlp", "value": [{"filter": "q_proj", "value": 0.2}, 0.4]},
        0.5,
    ]
    entries = [{"model": "tuned-0", "parameters": {"weight": weight}}, "tuned-1"]
    assert notes({**TWO, "models": entries}) == [
        "models[0].parameters.weight[0].filter is 'self_atn', which matches no tensor, so it has no effect. Did you mean self_attn?",
        "models[0].parameters.weight[1].value[0].filter is 'q_proj', which matches no tensor, so it has no effect. Did you mean up_proj?",
    ]


def test_a_filter_in_a_slice_is_looked_at_with_the_tensors_of_the_slice() -> None:
    sources = [{"model": f"tuned-{i}", "layer_range": [0, 1]} for i in (0, 1)]
    weight = [{"filter": "layers.1", "value": 0.3}, {"filter": "layers.0", "value": 0.4}]
    slices = [{"sources": sources, "parameters": {"weight": weight}}]
    assert notes({"merge_method": "linear", "slices": slices}) == [
        "slices[0].parameters.weight[0].filter is 'layers.1', which matches no tensor, so it has no effect. Did you mean layers?"
    ]


def test_a_rule_that_fits_no_tensor_is_told() -> None:
    rules = [
        {"filter": f, "merge_method": "passthrough", "model": "tuned-0"} for f in ("mpl", "re:^layers", "mlp")
    ]
    assert notes({**TWO, "methods": rules}) == [
        "methods[0].filter is 'mpl', which matches no tensor, so it has no effect. Did you mean mlp?",
        "methods[1].filter is 're:^layers', which matches no tensor, so it has no effect. "
        "Correct the expression; an example of a name is model.embed_tokens.weight.",
    ]


def test_a_rule_that_others_come_before_everywhere_is_told() -> None:
    rules = [
        {"filter": f, "merge_method": "passthrough", "model": "tuned-0"}
        for f in ("proj", "mlp.up_proj", "norm")
    ]
    assert notes({**TWO, "methods": rules}) == [
        "methods[1] has no effect: earlier rules match all tensors that 'mlp.up_proj' matches. Move it up."
    ]


def test_whole_names_that_no_tensor_has_are_an_error_with_the_nearest_name() -> None:
    weight = [{"filter": "=model.layers.0.mlp.up_proj", "value": 0.3}, 0.5]
    rule = {"filter": "=model.layers.9.mlp.up_proj.weight", "merge_method": "passthrough", "model": "tuned-0"}
    with pytest.raises(RecipeError) as caught:
        notes({**TWO, "parameters": {"weight": weight}, "methods": [rule]})
    assert str(caught.value).splitlines() == [
        "recipe: methods[0].filter is '=model.layers.9.mlp.up_proj.weight', but no tensor has that name; "
        "expected a full name after =. Did you mean model.layers.1.mlp.up_proj.weight?",
        "recipe: parameters.weight[0].filter is '=model.layers.0.mlp.up_proj', but no tensor has that name; "
        "expected a full name after =. Did you mean model.layers.0.mlp.up_proj.weight?",
    ]


def test_filters_that_fit_are_not_told() -> None:
    rule = {"filter": "=model.norm.weight", "merge_method": "passthrough", "model": "tuned-0"}
    assert (
        notes({**TWO, "parameters": {"weight": [{"filter": "mlp", "value": 0.3}, 0.5]}, "methods": [rule]})
        == []
    )
