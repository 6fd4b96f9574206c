"""Weights that follow a schedule are the papers' coefficients, and the plan prints them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.errors import MethodError, RecipeError
from alnico.numerics.decay_schedule import SHAPES, decay_coefficients
from alnico.recipe.schema import ScheduleWeight
from made import read_model, save_model

DECAYED: dict[str, Callable[[float], float]] = {
    "uniform": lambda t: 1 - t,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: math.cos(math.pi * t / 2) ** 2,
    "1-sqrt": lambda t: 1 - t**0.5,
}
"""The factor of a learning rate, at the start 1 and at the end 0."""

COUNTS = (1, 2, 3, 8, 24, 997)
HEAD = "merge_method: linear\nmodels: [a, b, c]\nparameters: {weight: {from: schedule"


@pytest.mark.parametrize("shape", DECAYED)
@pytest.mark.parametrize("count", COUNTS)
def test_an_average_is_the_run_with_a_decayed_rate(shape: str, count: int) -> None:
    """The definition in WSM: each update times the factor of its interval, added up from the oldest checkpoint."""
    updates = np.random.default_rng(count).standard_normal((count, 4))
    checkpoints = np.cumsum(updates, axis=0)
    decayed = updates[0] + sum((DECAYED[shape](i / count) * updates[i] for i in range(1, count)), np.zeros(4))
    averaged = np.array(decay_coefficients(shape, count)) @ checkpoints
    np.testing.assert_allclose(averaged, decayed, rtol=0, atol=1e-12 * max(1, np.abs(checkpoints).max()))


@pytest.mark.parametrize("count", COUNTS)
def test_ema_is_the_average_that_each_checkpoint_updates(count: int) -> None:
    checkpoints = np.eye(count)
    for decay in (0.5, 0.8, 0.9):
        average = checkpoints[0]
        for checkpoint in checkpoints[1:]:
            average = decay * average + (1 - decay) * checkpoint
        np.testing.assert_allclose(decay_coefficients("ema", count, decay), average, rtol=0, atol=1e-12)


def test_coefficients_that_one_can_check_by_hand() -> None:
    expected = {
        "uniform": [1 / 4] * 4,
        "linear": [1 / 4] * 4,
        "cosine": [(2 - 2**0.5) / 4, 2**0.5 / 4, 2**0.5 / 4, (2 - 2**0.5) / 4],
        "1-sqrt": [0.5, (2**0.5 - 1) / 2, (3**0.5 - 2**0.5) / 2, (2 - 3**0.5) / 2],
        "ema": [0.512, 0.128, 0.16, 0.2],
        "wma": [0.1, 0.2, 0.3, 0.4],
    }
    assert tuple(expected) == SHAPES
    for shape, weights in expected.items():
        np.testing.assert_allclose(ScheduleWeight(shape).weights(4), weights, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", COUNTS)
def test_coefficients_sum_to_one_and_none_is_negative(shape: str, count: int) -> None:
    weights = decay_coefficients(shape, count)
    assert len(weights) == count
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
    assert min(weights) >= 0


def test_factors_of_a_rate_give_their_differences() -> None:
    assert ScheduleWeight((1.0, 0.5, 0.125)).weights(3) == (0.5, 0.375, 0.125)
    with pytest.raises(MethodError) as caught:
        ScheduleWeight((1.0, 0.5)).weights(3)
    assert str(caught.value) == (
        "weight.shape has 2 factors, and 3 models have this weight; expected one factor for each of them, the oldest first."
    )


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, np.ndarray]]:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    made = {
        name: {t: random.standard_normal((3, 5)).astype(np.float32) for t in ("mlp.weight", "norm.weight")}
        for name in ("base", "a", "b", "c")
    }
    for name, tensors in made.items():
        save_model(Path(name), {t: ("F32", v) for t, v in tensors.items()}, {"architectures": ["XModel"]})
    return made


def test_the_weights_are_those_of_the_merge(models: dict[str, dict[str, np.ndarray]], tmp_path: Path) -> None:
    alnico.merge(f"{HEAD}, shape: 1-sqrt}}}}\nunrelated: allow\n", tmp_path / "out")
    weights = decay_coefficients("1-sqrt", 3)
    for tensor, values in read_model(tmp_path / "out").items():
        expected = sum(w * models[m][tensor].astype(float) for w, m in zip(weights, "abc", strict=True))
        np.testing.assert_allclose(values, expected, atol=1e-6)


def test_a_filter_may_choose_the_schedule_and_a_base_has_no_place_in_it(
    models: dict[str, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": ["a", "base", "b", "c"],
        "unrelated": "allow",
        "parameters": {
            "weight": [
                {"filter": "norm", "value": {"from": "schedule", "shape": "wma"}},
                {"from": "schedule", "shape": "ema", "decay": 0.5},
            ]
        },
    }
    alnico.merge(recipe, tmp_path / "out")
    out = read_model(tmp_path / "out")
    for tensor, weights in (("norm.weight", (1 / 6, 2 / 6, 3 / 6)), ("mlp.weight", (0.25, 0.25, 0.5))):
        base = models["base"][tensor].astype(float)
        expected = base + sum(w * (models[m][tensor] - base) for w, m in zip(weights, "abc", strict=True))
        np.testing.assert_allclose(out[tensor], expected, atol=1e-6)


@pytest.mark.usefixtures("models")
def test_the_plan_prints_the_numbers(run: Callable[..., tuple[int, str, str]]) -> None:
    Path("r.yml").write_text(f"{HEAD}, shape: cosine}}}}\nunrelated: allow\n")
    code, text, _ = run("plan", "r.yml")
    assert code == 0
    assert (
        "weights   cosine: a schedule over 3 models\nweights     0.25  a\nweights     0.5  b\nweights     0.25  c\n"
        in text
    )
    (schedule,) = json.loads(run("plan", "r.yml", "--json")[1])["schedules"]
    assert (schedule["from"], schedule["shape"]) == ("schedule", "cosine")
    assert [entry["model"] for entry in schedule["models"]] == ["a", "b", "c"]
    np.testing.assert_allclose([e["weight"] for e in schedule["models"]], [0.25, 0.5, 0.25], atol=1e-15)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (", shape: cosin", "parameters.weight.shape is 'cosin'; expected one of uniform, linear, cosine, 1-sqrt, ema, wma, or a list with a factor for each checkpoint. Did you mean cosine?"),
        (", shape: [0, 0.5, 1]", "parameters.weight.shape begins with 0, and coefficients sum to its first factor; expected a sum other than 0. Write the factors from the oldest checkpoint to the newest, as in [1, 0.5]."),
        (", shape: [1, half, 0]", "parameters.weight.shape[1] is 'half'; expected the factor of the learning rate at each checkpoint, as in [1, 0.5]."),
        (", shape: []", "parameters.weight.shape is an empty list; expected the factor of the learning rate at each checkpoint, as in [1, 0.5]."),
        (", shape: [1.7e308, -1.7e308, 0]", "parameters.weight.shape is a list of numbers that are too large; expected the factor of the learning rate at each checkpoint, as in [1, 0.5]."),
        (", shape: [1, 0.5]", "weight.shape has 2 factors, and 3 models have this weight; expected one factor for each of them, the oldest first."),
        (", shape: ema, decay: 1", "parameters.weight.decay is 1; expected a number above 0 and below 1."),
        (", shpe: ema", "parameters.weight has the unknown key 'shpe'. Did you mean shape?"),
    ],
)  # fmt: skip
def test_a_wrong_schedule_is_one_message(setting: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        alnico.load_recipe(f"{HEAD}{setting}}}}}\n")
    assert [line.partition(": ")[2] for line in caught.value.args] == [message]


def test_a_decay_that_no_shape_uses_is_noted() -> None:
    recipe = alnico.load_recipe(f"{HEAD}, shape: cosine, decay: 0.5}}}}\n")
    assert recipe.notes == ("recipe:3: parameters.weight.decay has no effect: it applies to shape: ema.",)
    assert recipe.parameters == {"weight": ScheduleWeight("cosine")}


def test_only_weight_follows_a_schedule() -> None:
    with pytest.raises(
        RecipeError, match=r"parameters.density is a mapping with `from`; only weight follows a schedule"
    ):
        alnico.load_recipe(
            "merge_method: ties\nbase_model: b\nmodels: [a]\nparameters: {density: {from: schedule}}\n"
        )
    with pytest.raises(
        RecipeError, match=r"expected one of l2_norm, analysis, given, schedule. Did you mean schedule"
    ):
        alnico.load_recipe("merge_method: linear\nmodels: [a]\nparameters: {weight: {from: schedul}}\n")
