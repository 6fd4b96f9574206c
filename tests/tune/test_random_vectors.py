"""The control of a search: random vectors of the right norms, and what the report says of skill and of luck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.source import read_tensor
from alnico.evaluation.tasks import Score
from alnico.models.open_models import open_models
from alnico.recipe.load import load_recipe
from alnico.tune.search.random_vectors import RandomVectorModel, random_control

RANDOM = np.random.default_rng(0)
BASE = {
    "w": RANDOM.standard_normal((300, 301)).astype(np.float32),
    "v": np.ones(50, np.float16),
    "same": np.ones(4, np.float32),
    "wide": np.ones((2, 4), np.float32),
    "count": np.arange(4),
}
TUNED = {
    "w": BASE["w"] + 0.01 * RANDOM.standard_normal((300, 301)).astype(np.float32),
    "v": BASE["v"] + np.float16(0.25),
    "same": BASE["same"],
    "wide": np.ones((3, 4), np.float32),
    "count": np.arange(4) + 1,
    "own": np.full(3, 7, np.float32),
}


def opened(seed: int = 0, position: int = 0) -> RandomVectorModel:
    models = open_models({"base": BASE, "tuned": TUNED})
    return RandomVectorModel(models.sources["tuned"], models.sources["base"], seed, position)


def test_a_random_vector_has_the_norm_of_the_real_one_in_each_tensor() -> None:
    model = opened()
    for name in ("w", "v"):
        delta = TUNED[name].astype(np.float64) - BASE[name].astype(np.float64)
        drawn = read_tensor(model, name) - BASE[name].astype(np.float64)
        assert np.linalg.norm(drawn) == pytest.approx(np.linalg.norm(delta), rel=1e-12)
        assert drawn.shape == delta.shape
    drawn = (read_tensor(model, "w") - BASE["w"]).ravel()
    delta = (TUNED["w"] - BASE["w"]).ravel()
    size = float(np.linalg.norm(drawn))
    assert abs(drawn @ delta) / size / np.linalg.norm(delta) < 5 / np.sqrt(drawn.size)
    assert abs(drawn.mean()) < 5 * drawn.std() / np.sqrt(drawn.size)
    assert np.abs(drawn).max() == pytest.approx(np.sqrt(3) * drawn.std(), rel=1e-2)  # uniform
    assert model.tensors["w"].nominal == "F32"


def test_what_has_no_task_vector_stays() -> None:
    model = opened()
    assert (read_tensor(model, "same") == BASE["same"]).all()
    for name in ("wide", "count", "own"):
        assert read_tensor(model, name).tolist() == TUNED[name].tolist()
        assert model.tensors[name].dtype == model.wrapped.tensors[name].dtype


def test_every_part_of_a_tensor_is_the_same_and_seeds_and_models_differ() -> None:
    whole = read_tensor(opened(), "w").tobytes()
    model = opened()
    for offset, size in ((0, 8), (3, 17), (8 * ((1 << 16) - 1), 24), (len(whole) - 5, 5)):
        part = bytearray(size)
        model.read_into("w", offset, memoryview(part))
        assert bytes(part) == whole[offset : offset + size]
    others = [opened(1), opened(0, 1)]
    drawn = [(read_tensor(m, "w") - BASE["w"]).ravel() for m in (opened(), *others)]
    cosines = np.corrcoef(drawn)
    assert np.abs(cosines - np.eye(3)).max() < 5 / np.sqrt(drawn[0].size)


def test_the_control_of_a_recipe_keeps_its_numbers() -> None:
    added: dict[str, Callable[[], Any]] = {}

    class Known:
        def source(self, reference: str) -> Any:
            return open_models({"base": BASE, "a": TUNED, "b": TUNED}).sources[reference]

        def add(self, reference: str, open_source: Callable[[], Any]) -> None:
            added[reference] = open_source

    recipe = load_recipe(
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": [
                {"model": "a", "parameters": {"weight": 0.3, "density": 0.4}},
                {"model": "base"},
                {"model": "b", "parameters": {"weight": 0.7, "density": 0.2}},
            ],
            "methods": [{"filter": "v", "merge_method": "linear", "models": ["a", "b"]}],
        }
    )
    control = random_control(recipe, Known(), 0)
    first, second = "random vector of a", "random vector of b"
    assert [e.reference for e in control.models] == [first, "base", second]
    assert [e.parameters for e in control.models] == [e.parameters for e in recipe.models]
    assert [e.reference for e in control.methods[0].models] == [first, second]
    assert control.base_model == "base"
    assert {r: make().label for r, make in added.items()} == {first: first, second: second}


SIZE = 400
ONE, OTHER = (np.float32(np.arange(SIZE) % 2 == odd) for odd in (0, 1))
ZERO = {"w": np.zeros(SIZE, np.float32)}
SEARCHED = {
    "merge_method": "task_arithmetic",
    "base_model": ZERO,
    "models": [
        {"model": {"w": ONE}, "parameters": {"weight": {"search": [0.0, 1.0], "step": 0.1}}},
        {"model": {"w": OTHER}, "parameters": {"weight": {"search": [0.0, 1.0], "step": 0.1}}},
    ],
    "search": {"sampler": "grid", "trials": 121},
}
WANTED = 0.8 * ONE + 0.3 * OTHER


def skill(model: Any) -> float:
    return -float(((model["w"] - WANTED) ** 2).sum())


def held_out_skill(model: Any) -> Score:
    each = -((model["w"].astype(np.float64) - WANTED) ** 2)
    return Score(float(each.mean()), each)


def held_out_size(model: Any) -> Score:
    """The length alone counts, which any vector has."""
    each = np.full(20, -abs(float(np.linalg.norm(model["w"])) - 10.0)) + 0.01 * (np.arange(20) % 2)
    return Score(float(each.mean()), each)


def searched(report: Any, **options: Any) -> Any:
    return alnico.search(SEARCHED, tasks=skill, report={"held out": report}, **options)


def test_skill_beats_the_control() -> None:
    found = searched(held_out_skill)
    weights = [e.parameters["weight"] for e in found.recipe.models]
    assert weights == pytest.approx([0.8, 0.3])
    by_name = {m.name: m.scores["held out"].value for m in found.report.models}
    assert by_name["best"] == pytest.approx(0, abs=1e-12)
    # The vectors are random with mean 0: what is wanted, and what they add, both remain as errors.
    expected = -float((WANTED.astype(np.float64) ** 2).mean()) - (0.8**2 + 0.3**2) / 2
    assert by_name["random"] == pytest.approx(expected, rel=0.3)
    difference = next(d for d in found.report.differences if d.other == "random")
    assert difference.mean is not None
    assert difference.mean.low is not None
    assert difference.mean.low > 0
    assert difference.mean.value == pytest.approx(by_name["best"] - by_name["random"])
    assert not found.notes


def test_luck_does_not_and_the_report_says_so() -> None:
    found = searched(held_out_size)
    by_name = {m.name: m.scores["held out"].value for m in found.report.models}
    assert by_name["random"] == pytest.approx(by_name["best"], abs=0.7)
    assert [
        n for n in found.notes if n.startswith("best is not clearly better than random, the same recipe with")
    ]
    assert "random" in [d.other for d in found.report.differences]


def test_lower_is_better_in_one_task_too() -> None:
    def loss(model: Any) -> Score:
        score = held_out_skill(model)
        assert score.examples is not None
        return Score(-score.value, -score.examples)

    found = alnico.search(SEARCHED, tasks=lambda m: -skill(m), report={"held out": loss}, minimize=True)
    assert found.report is not None
    assert [d.mean for d in found.report.differences if d.other == "random"] == [None]
    assert not [n for n in found.notes if "luck" in n]


def test_the_control_can_be_left_out_and_needs_a_base() -> None:
    left_out = searched(held_out_skill, control=False)
    assert "random" not in [m.name for m in left_out.report.models]
    assert not left_out.notes
    recipe = {
        "merge_method": "linear",
        "models": SEARCHED["models"],
        "search": {"sampler": "random", "trials": 2},
    }
    without = alnico.search(recipe, tasks=skill, report={"held out": held_out_skill})
    assert "random" not in [m.name for m in without.report.models]  # type: ignore[union-attr]
    assert without.notes == (
        "random is not in the report: the recipe has no base, so its models have no task vectors.",
    )
