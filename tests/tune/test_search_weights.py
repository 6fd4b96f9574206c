"""The random search of weights: what it tries, against plain torch in float64, and what it refuses."""

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


@pytest.fixture(scope="module")
def small() -> Small:
    return Small(3, seed=9)


def test_weights_on_the_simplex_are_scored_as_in_plain_torch(small: Small) -> None:
    events: list[Any] = []
    found = alnico.search_weights(small.models, small.loss, trials=12, minimize=True, watch=events.append)
    assert tuple(event.trial for event in events) == found.trials
    assert [trial.weights for trial in found.trials[:4]] == [
        (1, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
        (1 / 3, 1 / 3, 1 / 3),
    ]
    drawn = np.random.default_rng(0).dirichlet([1, 1, 1], 8)
    assert np.allclose([trial.weights for trial in found.trials[4:]], drawn)
    for trial in found.trials:
        assert sum(trial.weights) == pytest.approx(1)
        assert trial.score == pytest.approx(small.loss(small.mixed(trial.weights)), abs=1e-12)
    by_score = [trial.score for trial in found.ranked]
    assert by_score == sorted(by_score)
    assert (found.weights, found.score) == (found.ranked[0].weights, found.ranked[0].score)
    assert found.goal == "min"
    made = found.module()
    assert made.training
    assert close(made, small.mixed(found.weights))
    again = alnico.merge_models(small.models, "linear", weights=found.weights)
    assert all(torch.equal(v, made.state_dict()[n]) for n, v in again.state_dict().items())
    assert alnico.search_weights(small.models, small.loss, trials=12, minimize=True) == found
    other = alnico.search_weights(small.models, small.loss, trials=12, minimize=True, seed=1)
    assert other.trials[4].weights != found.trials[4].weights


def test_independent_weights_scale_task_vectors(small: Small) -> None:
    found = alnico.search_weights(
        small.models,
        small.accuracy,
        simplex=False,
        trials=6,
        base=small.base,
        method="task_arithmetic",
        low=0.5,
        high=1.5,
    )
    assert found.trials[0].weights == (1 / 3, 1 / 3, 1 / 3)
    assert all(0.5 <= w <= 1.5 for trial in found.trials[1:] for w in trial.weights)
    for trial in found.trials:
        assert trial.score == small.accuracy(small.added(trial.weights))
    scales = alnico.search_scales(small.base, small.models, small.accuracy, 6, low=0.5, high=1.5)
    assert scales.trials == found.trials
    assert scales.ranked == found.ranked
    assert scales.scales == found.weights
    assert close(scales.module(), small.added(found.weights))


def test_scores_by_name_have_a_mean(small: Small) -> None:
    scores = {"A": lambda module: small.accuracy(module, 0), "B": lambda module: small.accuracy(module, 1)}
    of_scales = alnico.search_scales(small.base, small.models, scores, 3, objective={"A": 3, "B": 1})
    for search, weight in ((alnico.search_weights(small.models, scores, trials=5), 1), (of_scales, 3)):
        for trial in search.trials:
            assert trial.scores.keys() == {"A", "B"}
            assert trial.score == pytest.approx(
                (weight * trial.scores["A"] + trial.scores["B"]) / (weight + 1)
            )
        assert search.scores == search.ranked[0].scores


def test_other_methods_and_kinds_of_models(small: Small, tmp_path: Path) -> None:
    states = [model.state_dict() for model in small.models]
    path = str(tmp_path / "one.safetensors")
    save_file(states[0], path)
    found = alnico.search_weights(
        [path, alnico.TaskVector(states[1], small.base.state_dict())],
        lambda state: float(state["0.bias"].sum()),
        base=small.base.state_dict(),
        method="ties",
        density=0.5,
        trials=4,
        names=["one", "other"],
    )
    assert found.models == ("one", "other")
    by_hand = alnico.merge_state_dicts(
        states[:2], "ties", base=small.base.state_dict(), weights=found.weights, density=0.5
    )
    assert close(found.state_dict(), by_hand)
    with pytest.raises(RecipeError, match="base is in memory, and a recipe names models by their paths"):
        found.recipe()
    of_files = alnico.search_weights([path, path], lambda _: 1.0, trials=2, names=["a", "b"])
    assert of_files.recipe("/elsewhere").count("one.safetensors") == 2
    assert of_files.data()["weights"] == [1.0, 0.0]


def raises(_: Any) -> float:
    raise KeyError("data")


@pytest.mark.parametrize(
    ("score", "what"),
    [
        (raises, "raises of trial 0: the evaluation raised KeyError: 'data'; expected a score."),
        (lambda _: "good", "score of trial 0: the evaluation returned a str; expected a finite number."),
        (lambda _: math.nan, "score of trial 0: the evaluation returned nan; expected a finite number."),
        (lambda _: None, "score of trial 0: the evaluation returned a NoneType; expected a finite number."),
        (lambda _: True, "score of trial 0: the evaluation returned a bool; expected a finite number."),
    ],
)
def test_what_is_no_score_ends_the_search(small: Small, score: Any, what: str) -> None:
    with pytest.raises(EvaluationError, match=re.escape(f"all 3 trials failed; {what}")):
        alnico.search_weights(small.models, score, trials=3)
    with pytest.raises(EvaluationError, match=re.escape(f"all 3 trials failed; {what}")):
        alnico.search_scales(small.base, small.models, score, trials=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": []}, "models is empty; expected at least one model."),
        ({"trials": 0}, "trials is 0; expected at least 1."),
        ({"simplex": False, "low": 2.0}, "weights from 2 to 1; expected two numbers, low below high."),
        ({"concentration": 0}, "concentration is 0; expected a number above 0, such as 1."),
        ({"score": 3}, "score is of type int; expected a function that takes a model and returns a number"),
        ({"method": "ties"}, "ties needs base, the model that the others were fine-tuned from. Pass base."),
    ],
)
def test_a_wrong_option_is_reported(small: Small, arguments: Any, message: str) -> None:
    with pytest.raises((RecipeError, EvaluationError), match=re.escape(message)):
        alnico.search_weights(**{"models": small.models, "score": small.loss, **arguments})
    with pytest.raises(RecipeError, match="models: there is 1; expected at least two"):
        alnico.search_weights(small.models[:1], small.loss)
