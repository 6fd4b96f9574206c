"""Plans that are repeated with other numbers are those that are built, and only numbers are repeated."""

from __future__ import annotations

from typing import Any

import pytest

from alnico.checkpoint.open_model import open_model
from alnico.errors import MethodError
from alnico.plan.build import build_plan
from alnico.plan.job import Job, Plan
from alnico.plan.repeat import RepeatedPlans
from alnico.recipe.load import load_recipe
from alnico.recipe.schema import Recipe
from made import family


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    base, tuned = family(tmp_path_factory.mktemp("repeat"), 2, hidden=16, layers=2)
    return str(base), [str(path) for path in tuned]


class Counted:
    """Plans over models that stay open, and how many of them were built."""

    def __init__(self) -> None:
        self.opened: dict[str, Any] = {}
        self.built = 0
        self.plans = RepeatedPlans(self.build)

    def build(self, recipe: Recipe) -> Plan:
        self.built += 1
        return build_plan(recipe, open_source=self.open)

    def open(self, reference: str) -> Any:
        if reference not in self.opened:
            self.opened[reference] = open_model(reference)
        return self.opened[reference]

    def check(self, written: dict[str, Any]) -> int:
        """How many plans were built for a recipe, whose plan is the one that is built."""
        before = self.built
        recipe = load_recipe(written)
        plan = self.plans.plan(recipe)
        count = self.built - before
        expected = build_plan(recipe, open_source=open_model)
        assert plan == expected
        assert plan.memory == expected.memory
        assert plan.notes == expected.notes
        assert list(map(numbers_of, plan.jobs)) == list(map(numbers_of, expected.jobs))
        return count


def numbers_of(job: Job) -> Any:
    merge = job.merge
    return merge and (merge.mix.__code__, merge.arguments, merge.sums_to_one, merge.fixes_equal_inputs)


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        ("linear", [{"weight": w} for w in (0.5, 1, 0.25)]),
        ("task_arithmetic", [{"weight": w, "lambda": s} for w, s in ((0.5, 1.0), (0.25, 0.5), (1, 1))]),
        ("ties", [{"density": d} for d in (0.3, 0.7, 1)]),
        ("dare_ties", [{"density": d, "weight": 0.3} for d in (0.5, 0.2, 1.0)]),
        ("della", [{"density": d, "epsilon": 0.1} for d in (0.5, 0.6)]),
        ("breadcrumbs", [{"density": 0.5, "gamma": g} for g in (0.1, 0.01)]),
        ("model_stock", [{}, {}]),
        ("sce", [{"select_topk": k} for k in (0.5, 0.1)]),
    ],
)
def test_other_numbers_build_no_other_plan(
    method: str, numbers: list[dict[str, float]], models: tuple[str, list[str]]
) -> None:
    base, tuned = models
    counted = Counted()
    based = {} if method == "linear" else {"base_model": base}
    built = [
        counted.check({"merge_method": method, **based, "models": tuned, "parameters": of, "seed": seed})
        for seed, of in enumerate(numbers)
    ]
    assert built == [1, *[0] * (len(numbers) - 1)]


def test_numbers_of_each_model_are_its_own(models: tuple[str, list[str]]) -> None:
    base, tuned = models
    counted = Counted()
    for i, (one, other) in enumerate([(0.3, 0.6), (0.6, 0.3), (1.0, 1.0), (0.9, 0.1)]):
        entries = [
            {"model": m, "parameters": {"density": d}} for m, d in zip(tuned, (one, other), strict=True)
        ]
        assert counted.check({"merge_method": "ties", "base_model": base, "models": entries}) == (i == 0)


def test_what_is_not_a_number_builds_a_plan(models: tuple[str, list[str]]) -> None:
    base, tuned = models
    ties = {"merge_method": "ties", "base_model": base, "models": tuned, "parameters": {"density": 0.5}}
    rules = [{"filter": "mlp", "merge_method": "passthrough", "model": tuned[0]}]
    filtered = {"density": [{"filter": "mlp", "value": 0.2}, {"value": 0.5}]}
    counted = Counted()
    for changed in (
        {},
        {"models": tuned[::-1]},
        {"models": tuned[:1]},
        {"base_model": tuned[0], "models": [base, tuned[1]]},
        {"dtype": "float32"},
        {"merge_method": "dare_ties"},
        {"parameters": {"density": 0.5, "elect": "mass"}},
        {"unrelated": "allow"},
    ):
        assert counted.check({**ties, **changed}) == 1, changed
        assert counted.check({**ties, **changed}) == 0, changed
    lines = {"lines": {"alpha": 0.5, "beta": 0.0}}
    layers = {"parameters": {"density": [0.2, 0.5]}}
    for changed in ({"parameters": filtered}, layers, lines, {"methods": rules}):
        assert counted.check({**ties, **changed}) == counted.check({**ties, **changed}) == 1, changed


def test_numbers_that_make_a_copy_build_a_plan(models: tuple[str, list[str]]) -> None:
    base, tuned = models
    counted = Counted()
    alone = {"merge_method": "task_arithmetic", "base_model": base, "models": tuned[:1]}
    built = [counted.check({**alone, "parameters": {"weight": w}}) for w in (0.5, 1.0, 0.7, 0.0)]
    assert built == [1, 1, 0, 1]


def test_a_refused_number_is_refused_in_the_words_of_the_plan(models: tuple[str, list[str]]) -> None:
    base, tuned = models
    counted = Counted()
    added = {"merge_method": "task_arithmetic", "base_model": base, "models": tuned}
    counted.check({**added, "parameters": {"weight": 0.5}})
    refused = load_recipe({**added, "parameters": {"weight": 1e300}})
    with pytest.raises(MethodError) as expected:
        build_plan(refused, open_source=open_model)
    with pytest.raises(MethodError) as found:
        counted.plans.plan(refused)
    assert found.value.args == expected.value.args
