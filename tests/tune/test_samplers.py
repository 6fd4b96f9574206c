"""Samplers: functions of the seed, the number and the trials before, and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from made_search import RECIPE

from alnico.errors import RecipeError
from alnico.evaluation.tasks import Goal
from alnico.tune.search.samplers.grid import grid_size
from alnico.tune.search.samplers.registry import SAMPLERS, check_sampler, suggest
from alnico.tune.search.samplers.request import PointRequest, Trial
from alnico.tune.search.settings import read_search
from alnico.tune.search.space import SearchSpace

SIMPLEX = """
merge_method: linear
models:
  - {model: a, parameters: {weight: {search: simplex}}}
  - {model: b, parameters: {weight: {search: simplex}}}
  - {model: c, parameters: {weight: {search: simplex}}}
"""

GRID = """
merge_method: {choice: [task_arithmetic, ties]}
base_model: base
models: [a, b]
parameters: {lambda: {search: [0.5, 1.0], step: 0.25}}
"""


def asked(
    space: SearchSpace, number: int, before: Sequence[Trial], goals: Sequence[Goal] = ("max",), seed: int = 0
) -> PointRequest:
    return PointRequest(space.dimensions, goals, seed, number, before, 5, 1.0)


def course(space: SearchSpace, name: str, count: int, seed: int = 0) -> list[Trial]:
    """Trials of a sampler on a bowl whose best is a third of every range; one fails."""
    trials: list[Trial] = []
    for number in range(count):
        point = suggest(name, asked(space, number, trials, seed=seed))
        value = -sum(
            ((float(point[d.name]) - d.low) / (d.high - d.low) - 1 / 3) ** 2 for d in space.dimensions
        )
        state = "failed" if number == 3 else "complete"
        trials.append(Trial(number, state, point, (value,) if state == "complete" else ()))  # type: ignore[arg-type]
    return trials


def best(trials: Sequence[Trial]) -> float:
    return max(t.values[0] for t in trials if t.values)


@pytest.mark.parametrize("name", ["tpe", "cmaes", "nsga2", "random", "dirichlet"])
def test_a_suggestion_follows_from_the_seed_the_number_and_the_trials_before(name: str) -> None:
    space, _ = read_search(SIMPLEX if name == "dirichlet" else RECIPE)
    trials = course(space, name, 26)
    for number in (0, 1, 5, 19, 25):
        assert suggest(name, asked(space, number, trials[:number])) == trials[number].point
    assert suggest(name, asked(space, 25, trials[:25], seed=1)) != trials[25].point
    assert len({tuple(t.point.values()) for t in trials}) > 20
    for trial in trials:
        space.instantiate(trial.point)


@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_samplers_that_learn_find_more_than_chance(name: str) -> None:
    space, _ = read_search(RECIPE)
    at_random = np.median([best(course(space, "random", 60, seed)) for seed in range(3)])
    assert np.median([best(course(space, name, 60, seed)) for seed in range(3)]) > at_random


def test_nsga2_goes_on_from_the_best_of_the_generations_before() -> None:
    space, _ = read_search(RECIPE)
    trials = course(space, "nsga2", 60)
    values = [t.values[0] for t in trials if t.values]
    assert np.median(values[-20:]) > np.median(values[:20]) / 2


def test_the_first_trial_is_the_default_settings() -> None:
    space, _ = read_search(RECIPE)
    for name in ("tpe", "cmaes", "nsga2", "random"):
        assert suggest(name, asked(space, 0, [])) == space.default


def test_a_grid_has_every_combination_once() -> None:
    space, _ = read_search(GRID)
    assert grid_size(space.dimensions) == 6
    found = {tuple(suggest("grid", asked(space, n, [])).values()) for n in range(6)}
    assert found == {(m, s) for m in ("task_arithmetic", "ties") for s in (0.5, 0.75, 1.0)}


def test_random_weights_on_the_simplex_are_uniform() -> None:
    space, _ = read_search(SIMPLEX)
    drawn = [space.instantiate(suggest("random", asked(space, n, []))) for n in range(1, 401)]
    weights = np.array([[e.parameters["weight"] for e in recipe.models] for recipe in drawn], float)
    assert np.abs(weights.sum(1) - 1).max() < 1e-12
    # Of Dirichlet(1, 1, 1) a weight w has the distribution 1 - (1 - w)^2, the mean 1/3 and the variance 1/18.
    assert np.abs(weights.mean(0) - 1 / 3).max() < 4 * math.sqrt(1 / 18 / 400)
    assert np.abs((weights < 0.5).mean(0) - 0.75).max() < 4 * math.sqrt(0.75 * 0.25 / 400)


def test_the_concentration_of_dirichlet_keeps_to_the_middle() -> None:
    space, _ = read_search(SIMPLEX)

    def spread(concentration: float) -> float:
        points = [
            SAMPLERS["dirichlet"](PointRequest(space.dimensions, ("max",), 0, n, [], 5, concentration))
            for n in range(1, 301)
        ]
        weights = [[float(e.parameters["weight"]) for e in space.instantiate(p).models] for p in points]  # type: ignore[arg-type]
        return float(np.var(weights, axis=0).mean())

    # Of Dirichlet(c, c, c) a weight has the variance (1/3)(2/3) / (3c + 1).
    for concentration in (0.5, 5.0):
        wanted = 2 / 9 / (3 * concentration + 1)
        assert spread(concentration) == pytest.approx(wanted, rel=0.25)


def test_whole_numbers_and_steps_stay_in_their_ranges() -> None:
    space, _ = read_search(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [a]\n"
        "parameters: {weight: {search: [0.5, 2.5], step: 0.5}, lambda: {search: [1, 4], int: true}}\n"
    )
    for name in ("random", "cmaes", "tpe"):
        for trial in course(space, name, 30):
            weight, scale = trial.point.values()
            assert weight in (0.5, 1.0, 1.5, 2.0, 2.5)
            assert scale in (1, 2, 3, 4)
            assert isinstance(scale, int)


def test_cmaes_takes_one_dimension_too() -> None:
    space, _ = read_search(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [a]\nparameters: {lambda: {search: [0.1, 10], log: true}}\n"
    )
    assert best(course(space, "cmaes", 40)) > -1e-3


def test_samplers_refuse_what_they_cannot_search() -> None:
    choices, _ = read_search(GRID)
    plain, _ = read_search(RECIPE)
    for name, space, goals, told in (
        ("cmaes", choices, ["max"], "which searches only numbers, and merge_method is a choice. Use tpe."),
        ("cmaes", plain, ["max", "min"], "which has one objective, and there are 2. Use nsga2 or tpe."),
        (
            "dirichlet",
            plain,
            ["max"],
            "but no value is on the simplex; expected {search: simplex}. Use random.",
        ),
        ("grid", plain, ["max"], "code.weight has no steps; expected `step` for every range. Add it."),
    ):
        with pytest.raises(RecipeError, match="sampler") as error:
            check_sampler(name, space.dimensions, goals)  # type: ignore[arg-type]
        assert told in str(error.value)
