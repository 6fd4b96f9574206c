"""Weights from norms that a recipe gives: those of the formula, in every mode, in the plan, the lock and every check of a merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import alnico
from alnico.errors import RecipeError
from alnico.numerics.norm_weights import norm_weights
from made import read_model, save_model

Run = Callable[..., tuple[int, str, str]]
NORMS = [3.0, 0.75]
MODES: list[dict[str, Any]] = [
    {},
    {"mode": "exp", "beta": 2.0},
    {"mode": "linear", "scale": 1.5},
    {"mode": "power"},
]


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    base = {"layers.0.w": random.standard_normal((8, 6)), "head": random.standard_normal((4, 6))}
    for name, size in (("base", 0.0), ("a", 0.3), ("b", 0.1)):
        tensors = {
            n: (v + size * random.standard_normal(v.shape)).astype(np.float32) for n, v in base.items()
        }
        save_model(Path(name), {n: ("F32", v) for n, v in tensors.items()}, {"architectures": ["XModel"]})


def recipe(method: str = "task_arithmetic", **setting: Any) -> dict[str, Any]:
    weight = {"from": "given", "norms": NORMS, **setting}
    return {
        "merge_method": method,
        "base_model": "base",
        "models": ["a", "b"],
        "parameters": {"weight": weight},
    }


@pytest.mark.parametrize("setting", MODES)
def test_given_norms_give_the_weights_of_the_formula(setting: dict[str, Any]) -> None:
    weights = norm_weights(NORMS, **setting)
    alnico.merge(recipe(**setting), "out")
    by_hand = recipe()
    by_hand["models"] = [
        {"model": m, "parameters": {"weight": w}} for m, w in zip("ab", weights, strict=True)
    ]
    del by_hand["parameters"]
    alnico.merge(by_hand, "expected")
    for name, value in read_model(Path("expected")).items():
        np.testing.assert_array_equal(read_model(Path("out"))[name], value)
    alnico.verify("out")
    alnico.reproduce("out")
    recorded = json.loads(Path("out/alnico.lock.json").read_text())["weights"][0]
    assert [m["weight"] for m in recorded["models"]] == [*weights]
    assert [m["l2_norm"] for m in recorded["models"]] == NORMS
    jsonschema.Draft202012Validator(alnico.schema()).validate(recipe(**setting))


def test_no_base_is_needed_and_python_takes_arrays() -> None:
    models = ["a", "b"]
    given = {"from": "given", "norms": np.array(NORMS), "mode": "linear"}
    merged = alnico.merge_state_dicts(models, "linear", weights=given)
    a, b = (read_model(Path(m)) for m in models)
    np.testing.assert_allclose(merged["head"].numpy(), 0.2 * a["head"] + 0.8 * b["head"], rtol=1e-6)


def test_the_plan_shows_the_weights_and_measures_nothing(run: Run) -> None:
    Path("r.yml").write_text(json.dumps(recipe()))
    shown = run("plan", "r.yml")[1]
    assert "of the L2 norms of 2 tensors, as the recipe gives them" in shown
    assert "0.1680  a (L2 norm 3)" in shown.replace(f"{norm_weights(NORMS)[0]:.4f}", "0.1680")
    assert not alnico.plan(recipe()).to_measure


def test_a_norm_of_0_is_noted_and_has_the_largest_weight() -> None:
    notes = alnico.plan(recipe(norms=[2.0, 0.0])).notes
    assert notes == (
        "the norm given for b is 0, as of a model that equals the base; mode exp gives it the largest weight.",
    )


def test_norms_near_the_end_of_float64_have_a_mean() -> None:
    assert norm_weights([1e308, 1.5e308, 1e308]) == pytest.approx(norm_weights([1.0, 1.5, 1.0]))
    assert norm_weights([1e308, 1.5e308], mode="linear") == pytest.approx((0.6, 0.4))


MISTAKES = {
    "parameters.weight.norms is missing; expected a list with one number per model. Write norms: [1.5, 0.8].": {"norms": None},
    "weight.norms has 3 values, and 2 models have this weight; expected one norm for each of them, in the order of the recipe.": {"norms": [1, 2, 3]},
    "parameters.weight.norms[1] is 0; expected a number above 0.": {"norms": [1, 0], "mode": "power"},
    "parameters.weight.norms[0] is -1; expected a number of at least 0.": {"norms": [-1, 1]},
    "parameters.weight.norms[0] is 'far'; expected a number of at least 0.": {"norms": ["far", 1]},
    "parameters.weight.per is layer, and a given norm is that of a whole model; expected model. Use from: l2_norm to measure norms of layers and tensors.": {"per": "layer"},
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_norms_that_cannot_be_are_refused(message: str) -> None:
    changed = recipe(**MISTAKES[message])
    weight = changed["parameters"]["weight"]
    changed["parameters"]["weight"] = {key: value for key, value in weight.items() if value is not None}
    with pytest.raises(RecipeError) as caught:
        alnico.plan(changed)
    assert str(caught.value).removeprefix("recipe: ") == message


def test_norms_of_another_source_have_no_effect_and_say_so() -> None:
    notes = alnico.plan(recipe(**{"from": "l2_norm"})).notes
    assert notes[0] == "recipe: parameters.weight.norms has no effect: it applies to from: given."


def test_one_command_weighs_and_merges(run: Run) -> None:
    code, stdout, stderr = run("weights", "--base", "base", "a", "b", "--mode", "linear", "--merge", "out")
    assert code == 0, stderr
    assert stdout.startswith("out: 2 tensors, 72 parameters, ")
    weights = alnico.norm_weights(["a", "b"], base="base", mode="linear")
    for weight, norm, model in zip(weights.weights[0], weights.norms[0], "ab", strict=True):
        assert f"  {weight:.4f}  {model} (L2 norm {norm:.4g})" in stderr
    alnico.merge({**recipe(), "parameters": {"weight": {"from": "l2_norm", "mode": "linear"}}}, "expected")
    for name, value in read_model(Path("expected")).items():
        np.testing.assert_array_equal(read_model(Path("out"))[name], value)


def test_the_command_takes_a_method_and_refuses_options_of_a_merge_without_one(run: Run) -> None:
    words = ("norm-weights", "--base", "base", "a", "b")
    assert run(*words, "--merge", "out", "--method", "ties", "--json")[0] == 0
    assert "merge_method: ties" in Path("out/mergekit_config.yml").read_text()
    code, _, stderr = run(*words, "--method", "ties")
    assert code == 2
    assert "--method is an option of a merge. Add --merge OUT, or leave it out." in stderr
    assert "unknown merge method 'tise'" in run(*words, "--merge", "other", "--method", "tise")[2]


def test_the_output_may_be_called_outdir(run: Run) -> None:
    code, _, stderr = run("merge", "a", "b", "--outdir", "out")
    assert (code, stderr) == (0, "note: --outdir is --out.\n")
    assert run("merge", "a", "b", "--outdir=more", "-q")[2] == ""
    assert Path("more").is_dir()
    assert "No such option: --outdir" in run("inspect", "a", "--outdir", "b")[2]
    assert (
        "No such option: --outdir. Did you mean --out or -o?" in run("soup", "a", "--outdir", "b")[2]
    )  # a file
    assert "note: --outdir is --report." in run("evaluate", "a", "--outdir", "b")[2]
