"""The random search of scales: what it tries, what it returns, and what it does with evaluations that fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import alnico
from alnico.errors import EvaluationError, RecipeError


def points() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    random = np.random.default_rng(0)
    base = {"w": random.standard_normal((4, 3)).astype(np.float32), "b": np.zeros(3, np.float32)}
    return base, [
        {n: v + 0.1 * random.standard_normal(v.shape).astype(np.float32) for n, v in base.items()}
        for _ in range(2)
    ]


def test_the_best_of_all_trials_is_returned() -> None:
    base, models = points()
    seen: list[np.ndarray] = []
    target = base["w"] + 0.7 * (models[0]["w"] - base["w"]) + 0.2 * (models[1]["w"] - base["w"])

    def near(made: dict[str, Any]) -> float:
        seen.append(made["w"].copy())
        return -float(np.abs(made["w"] - target).sum())

    told: list[Any] = []
    found = alnico.search_scales(base, models, near, trials=30, watch=told.append)
    assert tuple(event.trial for event in told) == found.trials
    assert len(found.trials) == 30
    assert found.trials[0].scales == (0.5, 0.5)
    assert all(0 <= s <= 1 for trial in found.trials for s in trial.scales)
    assert found.score == max(t.score for t in found.trials if t.score is not None)
    assert np.abs(np.array(found.scales) - (0.7, 0.2)).max() < 0.25
    for trial, made in zip(found.trials, seen, strict=True):
        expected = base["w"].astype(np.float64)
        for scale, model in zip(trial.scales, models, strict=True):
            expected = expected + scale * (model["w"].astype(np.float64) - base["w"])
        assert np.abs(made - expected).max() < 1e-6
    least = alnico.search_scales(base, models, lambda made: -near(made), trials=30, minimize=True)
    assert least.scales == found.scales
    assert alnico.search_scales(base, models, near, trials=30, seed=1).scales != found.scales


def test_a_module_gets_the_bits_of_the_merge() -> None:
    torch.manual_seed(0)
    base, *models = (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(3))
    before = {n: v.clone() for n, v in base.state_dict().items()}
    seen: list[tuple[int, dict[str, torch.Tensor]]] = []

    def score(module: torch.nn.Module) -> torch.Tensor:
        seen.append((id(module), {n: v.clone() for n, v in module.state_dict().items()}))
        return module[0].weight.sum()  # type: ignore[index, no-any-return]

    found = alnico.search_scales(base, models, score, trials=4, high=2.0)
    assert len({place for place, _ in seen}) == 1
    assert seen[0][0] != id(base)
    assert all(torch.equal(v, before[n]) for n, v in base.state_dict().items())
    for trial, (_, state) in zip(found.trials, seen, strict=True):
        again = alnico.merge_models(models, "task_arithmetic", base=base, weights=trial.scales).state_dict()
        assert all(torch.equal(again[n], v) for n, v in state.items())


def test_evaluations_that_fail_are_trials_without_a_score() -> None:
    base, models = points()
    answers = iter([1.0, float("nan"), KeyError("data"), "good", 3.0, 2.0])

    def evaluate(_: Any) -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    found = alnico.search_scales(base, models, evaluate, trials=6)
    assert [t.score for t in found.trials] == [1.0, None, None, None, 3.0, 2.0]
    assert found.score == 3.0
    assert [t.failure for t in found.trials[1:4]] == [
        "evaluate of trial 1: the evaluation returned nan; expected a finite number. Check the model for NaN, or correct the called code.",
        "evaluate of trial 2: the evaluation raised KeyError: 'data'; expected a score. Correct the called code, or the data. The function received a dict of tensors, because no model is a module.",
        "evaluate of trial 3: the evaluation returned a str; expected a finite number. Correct the called code.",
    ]
    with pytest.raises(EvaluationError) as caught:
        alnico.search_scales(base, models, lambda _: float("inf"), trials=20)
    assert str(caught.value) == (
        "5 of 5 trials failed; the last: score of trial 4: the evaluation returned inf; expected a finite number. Check the model for NaN, or "
        "correct the called code."
    )
    with pytest.raises(
        EvaluationError, match=r"all 2 trials failed; score of trial 0: the evaluation returned inf"
    ):
        alnico.search_scales(base, models, lambda _: float("inf"), trials=2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"models": []},
            "models is empty; expected at least one model. Each is a path, a hub id, a dict of tensors, an nn.Module, a TaskVector or a LazyModel.",
        ),
        ({"trials": 0}, "trials is 0; expected at least 1."),
        ({"low": 1.0, "high": 1.0}, "scales from 1 to 1; expected two numbers, low below high."),
    ],
)
def test_options_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    base, models = points()
    with pytest.raises(RecipeError) as caught:
        alnico.search_scales(**{"base": base, "models": models, "evaluate": lambda _: 0.0, **wrong})
    assert str(caught.value) == message
