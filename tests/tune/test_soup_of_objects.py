"""Soups of modules and of other objects in memory, chosen by functions, against plain torch in float64."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_modules import Small, close
from safetensors.torch import save_file

import alnico
from alnico.errors import EvaluationError, RecipeError


def greedy_by_hand(small: Small, score: Any) -> list[int]:
    """The paper's greedy soup in plain torch: the counts of the models."""
    alone = [score(small.mixed([i == j for j in range(len(small.models))])) for i in range(len(small.models))]
    order = sorted(range(len(alone)), key=lambda i: -alone[i])
    counts, best = [0] * len(alone), -math.inf
    for i in order:
        tried = [n + (i == j) for j, n in enumerate(counts)]
        value = score(small.mixed(tried))
        if value >= best:
            counts, best = tried, value
    return counts


@pytest.fixture(scope="module")
def small() -> Small:
    return Small(4, seed=3)


def test_a_greedy_soup_of_modules_is_that_of_plain_torch(small: Small) -> None:
    before = [{n: v.clone() for n, v in model.state_dict().items()} for model in small.models]
    soup = alnico.soup(small.models, lambda module: -small.loss(module))
    counts = greedy_by_hand(small, lambda module: -small.loss(module))
    assert 1 < sum(counts) < 4
    assert soup.counts == {f"models[{i}]": n for i, n in enumerate(counts) if n}
    assert soup.score == pytest.approx(-small.loss(small.mixed(counts)), abs=1e-12)
    assert soup.uniform == pytest.approx(-small.loss(small.mixed([1] * 4)), abs=1e-12)
    assert list(soup.alone.values()) == [-small.loss(model) for model in small.models]
    made = soup.module()
    assert type(made) is torch.nn.Sequential
    assert made.training
    assert all(made is not model for model in small.models)
    assert close(made, small.mixed(counts))
    assert close(soup.state_dict(), small.mixed(counts))
    for model, values in zip(small.models, before, strict=True):
        assert model.training
        assert all(torch.equal(v, values[n]) for n, v in model.state_dict().items())


def test_a_loss_is_minimized(small: Small) -> None:
    by_loss = alnico.soup(small.models, small.loss, minimize=True)
    assert by_loss.counts == alnico.soup(small.models, lambda module: -small.loss(module)).counts
    assert by_loss.goal == "min"


def test_a_uniform_soup_takes_all_models_and_their_names(small: Small) -> None:
    soup = alnico.soup(
        small.models, small.accuracy, order="uniform", names=["a", "b", "c", "d"], base=small.base
    )
    assert soup.counts == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert close(soup.module(), small.mixed([1, 1, 1, 1]))
    assert list(soup.alone) == ["a", "b", "c", "d"]


def test_scores_have_a_mean_by_weights(small: Small) -> None:
    scores = {"A": lambda module: small.accuracy(module, 0), "B": lambda module: small.accuracy(module, 1)}
    by_mean = alnico.soup(small.models, scores)
    assert by_mean.objective == "mean"
    assert by_mean.alone["models[0]"] == pytest.approx(
        (small.accuracy(small.models[0], 0) + small.accuracy(small.models[0], 1)) / 2
    )
    by_weight = alnico.soup(small.models, scores, objective={"A": 3, "B": 1})
    assert by_weight.alone["models[1]"] == pytest.approx(
        (3 * small.accuracy(small.models[1], 0) + small.accuracy(small.models[1], 1)) / 4
    )
    assert alnico.soup(small.models, scores, objective="B").alone["models[1]"] == small.accuracy(
        small.models[1], 1
    )


def test_a_soup_is_reported_on_other_scores(small: Small) -> None:
    soup = alnico.soup(
        small.models,
        lambda module: small.accuracy(module, 0),
        report=lambda module: small.accuracy(module, 1),
        base=small.base,
    )
    assert soup.report is not None
    values = {model.reference: model.scores["score"].value for model in soup.report.models}
    assert values["base"] == small.accuracy(small.base, 1)
    assert values["uniform soup"] == pytest.approx(small.accuracy(small.mixed([1] * 4), 1))


def test_models_of_several_kinds_make_one_soup(small: Small, tmp_path: Path) -> None:
    first, second, third, _ = small.models
    path = str(tmp_path / "third.safetensors")
    save_file(third.state_dict(), path)
    lazy = alnico.TaskVector(first, small.base).on(small.base)
    soup = alnico.soup(
        [lazy, second.state_dict(), path, alnico.TaskVector(small.models[3], small.base)],
        small.accuracy,
        order="uniform",
        base=small.base,
    )
    assert soup.counts == {"models[0]": 1, "models[1]": 1, path: 1, "models[3]": 1}
    assert close(soup.module(), small.mixed([1, 1, 1, 1]))
    arrays = [{n: v.numpy() for n, v in model.state_dict().items()} for model in small.models]
    of_arrays = alnico.soup(arrays, lambda state: float(state["0.bias"].sum()), order="uniform")
    assert isinstance(of_arrays.state_dict()["0.bias"], np.ndarray)
    assert close(of_arrays.state_dict(), small.mixed([1, 1, 1, 1]))
    with pytest.raises(RecipeError, match=r"models: holds no nn.Module; .* state_dict\(\) returns the merge"):
        of_arrays.module()


def test_a_recipe_cannot_name_objects(small: Small, tmp_path: Path) -> None:
    soup = alnico.soup(small.models, small.accuracy, order="uniform")
    with pytest.raises(RecipeError) as caught:
        soup.recipe()
    assert str(caught.value) == (
        "models[0] is in memory, and a recipe names models by their paths; expected models on disk. Save the "
        "models and pass their paths, or use module() or state_dict() of this result."
    )
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    for path, model in zip(paths, small.models, strict=False):
        save_file(model.state_dict(), path)
    named = alnico.soup(paths, lambda state: float(state["0.bias"].sum()), order="uniform", names=["a", "b"])
    assert list(named.counts) == ["a", "b"]
    assert f"model: {paths[0]}" in named.recipe("/elsewhere") or "0.safetensors" in named.recipe("/elsewhere")


def raises(_: Any) -> float:
    raise KeyError("data")


@pytest.mark.parametrize(
    ("score", "what"),
    [
        (raises, "raises of models[0]: the evaluation raised KeyError: 'data'; expected a score."),
        (lambda _: "good", "score of models[0]: the evaluation returned a str; expected a finite number."),
        (lambda _: math.nan, "score of models[0]: the evaluation returned nan; expected a finite number."),
        (lambda _: None, "score of models[0]: the evaluation returned a NoneType; expected a finite number."),
        (lambda _: True, "score of models[0]: the evaluation returned a bool; expected a finite number."),
    ],
)
def test_what_is_no_score_ends_with_the_model(small: Small, score: Any, what: str) -> None:
    for call in (alnico.soup, alnico.evaluate):
        with pytest.raises(EvaluationError, match=re.escape(what)):
            call(small.models, score)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": []}, "models is empty; expected at least one model."),
        ({"models": {}}, "models is an empty dict; expected a list of models."),
        ({"objective": "C"}, "objective is 'C', which is not a task; expected mean or loss."),
        ({"objective": {"C": 1}}, "objective names 'C', which is not a task; expected loss."),
        ({"objective": {"loss": -1}}, "objective['loss'] is -1; expected the weight of this score in the mean, above 0."),
        ({"tasks": []}, "tasks: there are none; expected at least one to choose by."),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_reported(small: Small, arguments: Any, message: str) -> None:
    with pytest.raises((RecipeError, EvaluationError), match=re.escape(message)):
        alnico.soup(**{"models": small.models, "tasks": small.loss, **arguments})
    with pytest.raises(RecipeError, match=r"models\[1\]: appears twice in the models"):
        alnico.soup([small.models[0]] * 2, small.loss)


def test_objects_are_evaluated_next_to_their_base_and_merge(small: Small, tmp_path: Path) -> None:
    first, second, *_ = small.models
    path = str(tmp_path / "second.safetensors")
    save_file(second.state_dict(), path)
    merged = alnico.merge_models([first, second], "linear")
    scores = {"A": lambda module: small.accuracy(module, 0), "loss": small.loss}
    card = alnico.evaluate(
        [first, path, small.base, alnico.TaskVector(first, small.base)],
        scores,
        base=small.base,
        merged=merged,
        names=["first", path, "start", "tau"],
        minimize=["loss"],
    )
    roles = {model.reference: model.role for model in card.models}
    assert roles == {"start": "base", "first": "model", path: "model", "tau": "model", "merged": "merged"}
    values = {model.reference: model.scores["loss"].value for model in card.models}
    by_hand = {
        "start": small.base,
        "first": first,
        path: second,
        "tau": first,
        "merged": small.mixed([1, 1, 0, 0]),
    }
    assert values == pytest.approx({name: small.loss(module) for name, module in by_hand.items()}, abs=1e-12)
    assert [task.goal for task in card.tasks] == ["max", "min"]
    assert next(m for m in card.models if m.role == "merged").mean.value == small.accuracy(merged)  # type: ignore[union-attr]
    with pytest.raises(
        RecipeError, match=re.escape("models is one module of type Sequential; expected a list")
    ):
        alnico.evaluate(first, scores)
