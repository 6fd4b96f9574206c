"""Searches over recipes with models in memory, scored by functions, against plain torch in float64."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_modules import Small, close

import alnico
from alnico.errors import EvaluationError, OutputError, RecipeError
from alnico.models.recipe_of_objects import take_objects

pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def small() -> Small:
    return Small(2, seed=4)


def recipe(small: Small, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": small.base,
        "models": [
            {"model": model, "parameters": {"weight": {"search": [0.0, 1.5]}}} for model in small.models
        ],
        "search": {"sampler": "random", "trials": 4, **more},
    }


def test_the_scores_of_a_search_are_those_of_plain_torch(small: Small) -> None:
    found = alnico.search(
        recipe(small), tasks=small.loss, minimize=True, report=lambda module: small.accuracy(module, 1)
    )
    assert found.dimensions == ("models[0].weight", "models[1].weight")
    for trial in found.trials:
        weights = [trial.point[name] for name in found.dimensions]
        assert trial.values[0] == pytest.approx(small.loss(small.added(weights)), abs=1e-12)
    best = [found.best[0].point[name] for name in found.dimensions]
    assert found.best[0].values[0] == min(trial.values[0] for trial in found.trials)
    assert type(found.module()) is torch.nn.Sequential
    assert close(found.module(), small.added(best))
    assert close(found.state_dict(), small.added(best))
    assert found.report is not None
    values = {model.reference: model.scores["score"].value for model in found.report.models}
    assert values["base"] == small.accuracy(small.base, 1)
    assert values["models[0]"] == small.accuracy(small.models[0], 1)
    assert values["best"] == small.accuracy(small.added(best), 1)
    assert small.base.training


def test_a_search_of_objects_is_resumed_and_refuses_other_models(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "search"
    first = alnico.search(recipe(small), tasks=small.accuracy, out=out, trials=2)
    again = alnico.search(recipe(small), tasks=small.accuracy, out=out, trials=3)
    assert [t.values for t in again.trials[:2]] == [t.values for t in first.trials]
    assert (
        "# In memory, so this recipe cannot be merged from files: base, models[0], models[1]."
        in (out / "best.yml").read_text()
    )
    with pytest.raises(OutputError, match="uses models with other contents"):
        alnico.search(recipe(Small(2, seed=5)), tasks=small.accuracy, out=out)


def raises(_: Any) -> float:
    raise KeyError("data")


@pytest.mark.parametrize(
    ("score", "what"),
    [
        (raises, "raises of trial 1: the evaluation raised KeyError: 'data'; expected a score."),
        (lambda _: "good", "score of trial 1: the evaluation returned a str; expected a finite number."),
        (lambda _: math.nan, "score of trial 1: the evaluation returned nan; expected a finite number."),
        (lambda _: None, "score of trial 1: the evaluation returned a NoneType; expected a finite number."),
    ],
)
def test_what_is_no_score_ends_the_search(small: Small, score: Any, what: str) -> None:
    with pytest.raises(EvaluationError, match=re.escape(what)):
        alnico.search(recipe(small, failures=2), tasks=score)


def test_dicts_and_task_vectors_are_in_the_places_of_models(small: Small) -> None:
    base = small.base.state_dict()
    tau = alnico.TaskVector(small.models[0].state_dict(), base)
    found = alnico.search(
        {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": [tau, {"model": small.models[1].state_dict()}],
            "parameters": {"weight": {"search": [0.1, 1.0]}},
            "search": {"sampler": "random", "trials": 2},
        },
        tasks={
            "A": lambda state: float(state["0.bias"].sum()),
            "B": lambda state: float(state["2.bias"].sum()),
        },
    )
    weight = found.best[0].point[found.dimensions[0]]
    assert close(found.state_dict(), small.added([weight, weight]))
    assert dict(found.best[0].scores).keys() == {"A", "B"}
    with pytest.raises(RecipeError, match=r"state_dict\(\) returns the merge"):
        found.module()


def test_one_object_has_one_label_and_options_are_no_models() -> None:
    state = {"w": np.ones(2)}
    taken = take_objects(
        {"base_model": state, "models": [{"model": state, "parameters": {"weight": np.ones(2)}}]}
    )
    assert taken.recipe["models"][0]["model"] == "base"
    assert list(taken.models) == ["base"]
    assert taken.recipe["models"][0]["parameters"]["weight"].shape == (2,)
    assert take_objects("recipe.yml").recipe == "recipe.yml"
