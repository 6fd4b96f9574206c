"""Numbers at the ends of their range in extracting, combining and folding: the right result, or an error of its class, in plan and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
import made
from alnico.errors import AlnicoError, MethodError, MismatchError, NonFiniteError, RecipeError
from alnico.lora import combine, extract, fold
from lora.made_adapters import linear

ODD: list[Any] = [10**400, -(10**400), 10**5000, True, "x", float("nan"), float("inf"), None, [], "\ud800"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = np.random.default_rng(0).standard_normal((30, 20)).astype(np.float32)
    return made.save_model(
        tmp_path_factory.mktemp("models") / "base",
        {"m.q.weight": ("F32", values), "m.o.weight": ("F32", values.T.copy())},
    )


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    return made.save_model(
        base.parent / "tuned", {n: ("F32", v * np.float32(1.01)) for n, v in made.read_model(base).items()}
    )


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [linear(tmp_path_factory.mktemp("adapter"), seed=seed) for seed in (0, 1)]


def pair(root: Path, dtype: str, size: float) -> tuple[Path, Path]:
    """A fine-tune and its base of numbers of one size, whose difference has rank 1."""
    random, real = np.random.default_rng(1), np.float32 if dtype == "F32" else np.float64
    values = (random.standard_normal((30, 20)) * 10 * size).astype(real)
    moved = values + np.outer(random.standard_normal(30), random.standard_normal(20) * size).astype(real)
    of = {"base": values, "tuned": moved}
    one, other = (made.save_model(root / name, {"m.q.weight": (dtype, v)}) for name, v in of.items())
    return other, one


@pytest.mark.parametrize(
    ("dtype", "size", "said"),
    [
        (
            "F32",
            1e-43,
            r"^m\.q\.weight: the change is so small \(.*e-43 on average\) that F32 cannot represent its factors",
        ),
        (
            "F64",
            1e-150,
            r"^m\.q\.weight: the change is so small \(.*e-15\d on average\) that F32 cannot represent its factors",
        ),
        (
            "F64",
            1e-300,
            r"^m\.q\.weight: the difference of .* and .* is at most .*e-300, and its square is 0 in float64",
        ),
    ],
)
def test_a_change_that_no_factor_holds_is_neither_a_fault_nor_none(
    tmp_path: Path, dtype: str, size: float, said: str
) -> None:
    with pytest.raises(MismatchError, match=said):
        extract(*pair(tmp_path, dtype, size), tmp_path / "out", rank=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_small_biases_are_saved_in_float16_as_its_nearest_numbers(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    values = random.standard_normal((30, 20)).astype(np.float32)
    bias = (random.standard_normal(30) * 1e-7).astype(np.float32)
    of = {"base": (values, bias), "tuned": (values * np.float32(1.01), 2 * bias)}
    one, other = (
        made.save_model(tmp_path / name, {"m.q.weight": ("F32", w), "m.q.bias": ("F32", b)})
        for name, (w, b) in of.items()
    )
    extract(other, one, tmp_path / "out", rank=4, dtype="float16")
    saved = {
        n.rpartition(".")[2]: v
        for n, v in made.read_file(tmp_path / "out" / "adapter_model.safetensors").items()
    }
    assert np.array_equal(saved["bias"][1], (2 * bias).astype(np.float16))


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_options_that_are_no_number_are_errors_of_their_class(
    odd: Any, tuned: Path, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    calls: list[tuple[str, Any]] = [
        (name, lambda name=name: extract(tuned, base, out, **{name: odd})) for name in ("seed", "dtype")
    ]
    calls += [("include", lambda: extract(tuned, base, out, include=odd))] if odd != [] else []
    if odd is not None:
        calls += [
            (n, lambda n=n: extract(tuned, base, out, **{n: odd})) for n in ("rank", "energy", "max_rank")
        ]
        calls += [(n, lambda n=n: combine(adapters, out, **{n: odd})) for n in ("weights", "rank", "energy")]
    calls += [
        ("method", lambda: combine(adapters, out, method=odd)),
        ("seed", lambda: combine(adapters, out, seed=odd)),
    ]
    calls += [
        ("a weight", lambda m=m: combine(adapters, out, weights=[odd, 1], method=m))
        for m in ("cat", "svd", "ties", "tsv")
    ]
    calls += [
        ("weight", lambda: fold(base, adapters[:1], out, weights=odd)),
        ("weight", lambda: fold(base, [adapters[0]], out, weights=[odd])),
    ]
    calls += [
        ("mode", lambda: alnico.norm_weights([tuned], base=base, mode=odd)),
        ("scale", lambda: alnico.norm_weights([tuned], base=base, scale=odd)),
    ]
    for name, call in calls:
        with pytest.raises(AlnicoError, match=name) as caught:
            call()
        assert len(str(caught.value)) < 600, name
    assert not any(tmp_path.iterdir())


def test_weights_that_float32_cannot_hold_are_refused_in_the_plan_of_a_fold(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    for weight in (1e308, -1e39, 1e-46):
        recipe = {"merge_method": "passthrough", "models": [f"{base}+{weight!r}*{adapters[0]}"]}
        for call in (
            lambda weight=weight: fold(base, adapters[0], tmp_path / "out", weights=weight),
            lambda recipe=recipe: alnico.plan(recipe),
            lambda recipe=recipe: alnico.merge(recipe, tmp_path / "out"),
        ):
            with pytest.raises(RecipeError, match="is computed in float32 with the weight"):
                call()
    with pytest.raises(
        NonFiniteError,
        match=r"m\.[qo]\.weight\[0, \d+\]: is -?inf in .*; expected finite numbers. Choose a smaller weight",
    ):
        fold(base, adapters[0], tmp_path / "out", weights=3e38)
    assert not (tmp_path / "out").exists()


def test_a_combination_beyond_its_dtype_is_an_error(adapters: list[Path], tmp_path: Path) -> None:
    for method in ("svd", "tsv", "iso_c", "cat", "ties"):
        for weights in (1e308, [1e308, -1e308]):
            with pytest.raises((NonFiniteError, MethodError, RecipeError)):
                combine(adapters, tmp_path / "out", method=method, weights=weights)
    assert not any(tmp_path.iterdir())


def test_exponents_of_lines_beyond_their_range_are_refused_by_plan_and_run_alike(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    for name in ("alpha", "beta"):
        for odd in (1e308, float("inf"), float("nan"), 10**400, "x", None):
            recipe = {
                "merge_method": "task_arithmetic", "base_model": str(base), "models": [str(tuned)],
                "lines": {"alpha": 1.0, "beta": 1.0, name: odd},
            }  # fmt: skip
            for call in (
                lambda recipe=recipe: alnico.plan(recipe),
                lambda recipe=recipe: alnico.merge(recipe, tmp_path / "out"),
            ):
                with pytest.raises(RecipeError):
                    call()
