"""Numbers at the ends of their range: in options and in tensors. The result is right, or an error of its class; never another number."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import alnico
from alnico.errors import AlnicoError, MethodError, NonFiniteError, RecipeError
from alnico.methods import registry
from made import save_model
from methods.cases import MODELS, SETTINGS, options
from methods.merging import recipe_for
from references import noise

SHAPE = (6, 10)
NUMBERS = [1e308, -1e39, 1e-46, 10**400]
WITHOUT_STATISTICS = [name for name in registry() if not registry()[name].statistics]


def count_of(name: str) -> int:
    return MODELS.get(name, (3,))[0]


@pytest.fixture(scope="module")
def models() -> list[np.ndarray]:
    """A base, and models of it."""
    random = np.random.default_rng(0)
    base = random.standard_normal(SHAPE).astype(np.float32)
    return [base, *(base + 0.1 * random.standard_normal(SHAPE).astype(np.float32) for _ in range(3))]


@pytest.fixture(scope="module")
def paths(models: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("extremes")
    return [save_model(root / f"m{i}", {"w": ("F32", values)}) for i, values in enumerate(models)]


def reference_of(name: str) -> Any:
    """Its reference; that of arcee_fusion adds 1e-8 to probabilities, as mergekit does, so that very unlike rows count as less so."""
    return importlib.import_module(f"references.{'arcee_fusion_exact' if name == 'arcee_fusion' else name}")


def reference(name: str, values: list[Any], base: Any, given: dict[str, Any]) -> np.ndarray:
    wide = [np.asarray(v).astype(np.longdouble) for v in values]
    uniforms = [noise.uniform(0, "w", i, values[0].shape) for i in range(len(values))]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = reference_of(name).merge(wide, np.asarray(base).astype(np.longdouble), given, uniforms)
    return np.asarray(found, np.longdouble)


def merged(name: str, values: list[Any], base: Any, given: dict[str, Any]) -> Any:
    start = {"first": values[0], "unused": None}.get(registry()[name].base, base)
    given_base = None if start is None else {"w": start}
    states = [given_base if v is start else {"w": v} for v in values]
    return alnico.merge_state_dicts(states, name, base=given_base, unrelated="allow", threads=1, **given)["w"]


def outcome(call: Any) -> type[AlnicoError] | None:
    try:
        call()
    except AlnicoError as error:
        return type(error)
    return None


def settings(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Options of a method with one of them at an end of the range: for one model, and for all."""
    count, found = count_of(name), []
    given = options(SETTINGS[name][-1], count)
    for option in registry()[name].options.values():
        if option.kind != "number":
            continue
        for number in NUMBERS:
            if option.per_model:
                rest = given.get(option.name) or [0.5] * count
                found.append((option.name, {**given, option.name: [number, *rest[1:]]}))
            found.append(
                (option.name, {**given, option.name: [number] * count if option.per_model else number})
            )
    return found


@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
def test_an_option_at_the_end_of_its_range_gives_the_right_result_or_an_error(
    name: str, models: list[np.ndarray], paths: list[Path], tmp_path: Path
) -> None:
    count = count_of(name)
    base, values = models[0], models[1 : count + 1]
    for option, given in settings(name):
        where = f"{option} of {given[option]}"
        start = paths[1] if registry()[name].base == "first" else paths[0]
        recipe = recipe_for(name, paths[1 : count + 1], start, given, unrelated="allow")
        planned = outcome(lambda recipe=recipe: alnico.plan(recipe))
        assert planned in (None, RecipeError, MethodError), where
        kind = outcome(lambda given=given: merged(name, values, base, given))
        if planned is not None:
            assert kind in (RecipeError, MethodError), where
            continue
        assert kind in (None, NonFiniteError), where
        if kind is None and not (
            name == "pcb" and option == "density"
        ):  # one entry at least is kept; the reference keeps none
            found = merged(name, values, base, given).astype(np.longdouble)
            expected = reference(name, values, values[0] if registry()[name].base == "first" else base, given)
            assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), where
    if name in ("linear", "ties", "slerp"):  # the run says what the plan says
        option = {"slerp": "t"}.get(name, "weight")
        given = {**options(SETTINGS[name][-1], count), option: 1e308 if name == "slerp" else [1e308] * count}
        recipe = recipe_for(
            name, paths[1 : count + 1], paths[1] if name == "slerp" else paths[0], given, unrelated="allow"
        )
        with pytest.raises(RecipeError):
            alnico.merge(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        (
            "ties",
            {"weights": [1e39, 1.0]},
            "w: is computed in float32 with 1e\\+39; expected 0, or a magnitude from 1.2e-38 to 3.4e\\+38",
        ),
        (
            "ties",
            {"weights": [3e38, 3e38]},
            "w: is computed in float32 with 6e\\+38; .*also for the sum of all weights",
        ),
        (
            "ties",
            {"weights": [1e-46, 1e-46]},
            "w: is computed in float32 with 1e-46; .*Choose a larger weight",
        ),
        (
            "linear",
            {"weights": [1e308, 1e308]},
            r"the weights of linear \(1e\+308, 1e\+308\) add up to more than float64 holds",
        ),
        (
            "nuslerp",
            {"weights": [1e308, 1e308]},
            r"the weights \(1e\+308, 1e\+308\) add up to more than float64 holds",
        ),
        ("slerp", {"t": 1e20}, r"the place on the arc \(t\) is 1e\+20; expected at most 1e\+06 in size"),
    ],
)
def test_a_number_that_cannot_be_computed_with_is_named(
    method: str, given: dict[str, Any], said: str, models: Any
) -> None:
    states = [{"w": v} for v in models]
    base = {"slerp": states[1], "ties": states[0]}.get(method)
    with pytest.raises(RecipeError, match=said):
        alnico.merge_state_dicts(states[1:3], method, base=base, **given)


def test_weights_that_only_their_ratio_counts_of_may_be_beyond_float32(models: Any) -> None:
    states = [{"w": v} for v in models[1:3]]
    found = alnico.merge_state_dicts(states, "linear", weights=[1e39, 3e39])["w"]
    assert np.array_equal(found, alnico.merge_state_dicts(states, "linear", weights=[1.0, 3.0])["w"])


# ---- tensors --------------------------------------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
"""The range of float32 is that of bf16."""


def extreme(kind: str, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    """A base and models of it with extreme values."""
    random, limits = np.random.default_rng(1), torch.finfo(dtype)
    largest, tiny = limits.max, limits.smallest_normal
    draw = lambda: random.standard_normal(SHAPE)  # noqa: E731
    base = draw()
    size = largest * 0.4 / np.abs(base).max()
    make = {
        "largest": lambda: largest * (1 - 0.01 * random.random(SHAPE)),
        "of opposite signs": lambda: np.sign(draw()) * largest * (1 - 0.3 * random.random(SHAPE)),
        "half": lambda: base * size * (1 + 0.1 * draw()),
        "root": lambda: (base + 0.1 * draw()) * np.sqrt(largest),
        "small": lambda: (base + 0.1 * draw()) * tiny * 2.0**12,
        "zeros": lambda: np.zeros(SHAPE),
        "minus zeros": lambda: np.full(SHAPE, -0.0),
        "one": lambda: np.where(np.arange(60).reshape(SHAPE) == 13, 1.0 + random.random(), 0.0),
    }[kind]
    return [torch.tensor(np.asarray(make())).to(dtype) for _ in range(count + 1)]


LARGE = ["largest", "of opposite signs", "half", "root"]


@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
def test_extreme_values_give_the_right_result_or_an_error_that_names_the_tensor(name: str) -> None:
    count = count_of(name)
    for label, dtype in DTYPES.items():
        for kind in [
            *LARGE,
            "zeros",
            "minus zeros",
            "one",
            *(["small"] if label in ("bf16", "f16") and name != "sce" else []),
        ]:
            base, *values = extreme(kind, dtype, count)
            for setting in (SETTINGS[name][0], SETTINGS[name][-1])[label != "bf16" :]:
                given, where = options(setting, count), f"{label}, {kind}, {setting}"
                found = number_or_error(name, values, base, given)
                if isinstance(found, str):
                    assert found.startswith("w") and kind in LARGE, where  # noqa: PT018
                    continue
                wide = [v.double().numpy().astype(np.longdouble) for v in (base, *values)]
                start = wide[1] if registry()[name].base == "first" else wide[0]
                expected = reference(name, wide[1:], start, given)
                assert np.isfinite(expected).all(), where
                limits = torch.finfo(dtype)
                near = 2 * limits.eps * np.abs(expected) + 2 * limits.smallest_normal * limits.eps
                near += (1e-12 if label == "f64" else 3e-6) * np.abs(expected).max()
                wrong = np.abs(found - expected) > near
                undecided = getattr(reference_of(name), "undecided", None)
                if undecided is not None and wrong.any():
                    wrong &= ~undecided(wide[1:], start, given)
                assert not wrong.any(), where


def number_or_error(name: str, values: list[Any], base: Any, given: dict[str, Any]) -> np.ndarray | str:
    try:
        found: np.ndarray = merged(name, values, base, given).double().numpy()
    except NonFiniteError as error:
        return str(error)
    return found


def test_sums_beyond_float64_name_the_tensor_and_a_nan_is_named_first() -> None:
    large = np.full(SHAPE, 1e200)
    with pytest.raises(
        NonFiniteError,
        match="w: its values are so large that sums over them, as karcher takes them, are beyond float64",
    ):
        alnico.merge_state_dicts([{"w": large}, {"w": 2 * large}], "karcher")
    bad = large.copy()
    bad[2, 3] = np.nan
    with pytest.raises(NonFiniteError, match=r"w\[2, 3\]: state_dicts\[1\] has NaN"):
        alnico.merge_state_dicts([{"w": large}, {"w": bad}], "karcher")
