"""The laws of the house (docs/design.md, section 3), for every method of the registry."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.engine import merge_run
from alnico.engine.run import run_plan
from alnico.events import Event, Started, TensorDone, Watcher
from alnico.kernels import build, measure_kernels, mix_kernel
from alnico.kernels.constants import LEAF
from alnico.methods import registry
from alnico.methods.base import MatrixMethod, Merge
from made import model_bytes, read_model, save_model
from methods.cases import MODELS, OVER_MODEL, SETTINGS, counts, options
from methods.merging import merge_arrays, recipe_for, write_inputs

EVERY = [
    pytest.param(name, setting, id=f"{name}-{i}")
    for name in registry()
    for i, setting in enumerate([*SETTINGS.get(name, [{}]), *OVER_MODEL.get(name, [])])
]
NAMES = list(registry())


def three(name: str) -> int:
    return MODELS.get(name, (3,))[0]


def made(
    shapes: dict[str, tuple[int, ...]], count: int, seed: int = 0
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    random = np.random.default_rng(seed)
    base = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return base, [
        {n: v + 0.1 * random.standard_normal(v.shape).astype(np.float32) for n, v in base.items()}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[Path]]]:
    """A base and three models in BF16: one tensor of several chunks, one of several leaves, small ones."""
    root = tmp_path_factory.mktemp("laws")
    base, models = made({"large": (2200, 1000), "leaves": (300, 257), "odd": (13, 7), "one": (1,)}, 3)
    base_path, paths = write_inputs(root, base, models, "BF16")
    return base_path, {k: paths[:k] for k in (1, 2, 3)}


def run_with(
    root: Path,
    inputs: tuple[Path, dict[int, list[Path]]],
    name: str,
    setting: dict[str, Any],
    watch: Watcher | None = None,
    **memory: Any,
) -> dict[str, bytes]:
    base, models = inputs
    count = three(name)
    recipe = recipe_for(
        name,
        models[count],
        models[count][0] if registry()[name].base == "first" else base,
        options(setting, count),
    )
    plan = alnico.plan(recipe)
    plan = dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, **memory))
    run_plan(plan, root / "out", overwrite=True, watch=watch)
    return model_bytes(root / "out")


@pytest.mark.parametrize(("name", "setting"), EVERY)
def test_threads_blocks_and_budget_change_no_bit(
    name: str, setting: dict, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_with(tmp_path, inputs, name, setting, threads=1, block_elements=64 * LEAF)
    monkeypatch.setattr(merge_run, "SHARED_CHUNKS", 1)  # threads share every tensor
    parts = run_with(tmp_path, inputs, name, setting, threads=4, block_elements=LEAF)
    assert whole == parts


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupt_and_a_resume_change_no_bit(name: str, inputs: Any, tmp_path: Path) -> None:
    setting = SETTINGS[name][-1]
    done: list[str] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, TensorDone):
            done.append(event.tensor)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_with(tmp_path, inputs, name, setting, watch=interrupt)
    resumed: list[int] = []
    watch = lambda event: resumed.append(event.resumed) if isinstance(event, Started) else None  # noqa: E731
    taken_up = run_with(tmp_path, inputs, name, setting, watch=watch)
    assert resumed[0] >= 1
    (tmp_path / "anew").mkdir()
    assert taken_up == run_with(tmp_path / "anew", inputs, name, setting)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tile"), [(name, (512, 1536)[i % 2]) for i, name in enumerate(NAMES)]
)  # compiles all anew
def test_the_tile_changes_no_bit(
    name: str, tile: int, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = SETTINGS[name][-1]
    usual = run_with(tmp_path, inputs, name, setting)
    monkeypatch.setattr(mix_kernel, "TILE", tile)
    monkeypatch.setattr(measure_kernels, "TILE", tile)
    build.compile_kernel.cache_clear()
    try:
        assert run_with(tmp_path, inputs, name, setting) == usual
    finally:
        build.compile_kernel.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_tensors_in_the_files_changes_no_value(name: str, tmp_path: Path) -> None:
    base, models = made({"a": (40, 30), "b": (500,), "c": (7, 3, 5)}, three(name))
    given = options(SETTINGS[name][-1], three(name))
    forwards = merge_arrays(tmp_path / "1", name, base, models, given)
    turned = [{n: m[n] for n in reversed(m)} for m in models]
    backwards = merge_arrays(tmp_path / "2", name, {n: base[n] for n in reversed(base)}, turned, given)
    assert all(forwards[n].tobytes() == backwards[n].tobytes() for n in forwards)


def keeps_equal_models(name: str, setting: dict[str, Any]) -> bool:
    """By declaration; slerp of equal tensors goes along the straight line, whose coefficients sum to 1."""
    method, count = registry()[name], three(name)
    merge = method.bind(options(setting, count), count)
    copies = isinstance(merge, Merge) and merge.copies is not None
    return method.space == "delta" or merge.fixes_equal_inputs or copies or name == "slerp"


@pytest.mark.parametrize(("name", "setting"), [p for p in EVERY if keeps_equal_models(*p.values)])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_models_equal_to_the_base_give_its_bits(name: str, setting: dict, dtype: str, tmp_path: Path) -> None:
    method = registry()[name]
    count = three(name)
    base, _ = made({"w": (65, 33), "n": (17,)}, 1)
    base["w"][0, :5] = [-0.0, 0.0, 1e-30, -1e-30, 3.0]
    merged = merge_arrays(tmp_path, name, base, [base] * count, options(setting, count), dtype)
    expected = read_model(tmp_path / "base")
    assert all(np.array_equal(merged[n], expected[n]) for n in base)
    if method.space == "delta":
        assert all(merged[n].tobytes() == expected[n].tobytes() for n in base)


@pytest.mark.parametrize(("name", "setting"), EVERY)
def test_a_method_does_what_it_declares_of_equal_inputs(name: str, setting: dict, tmp_path: Path) -> None:
    """Elements on which all models agree, among others on which they do not."""
    method = registry()[name]
    count = three(name)
    merge = method.bind(options(setting, count), count)
    base, models = made({"w": (120, 50)}, count)
    frozen = np.random.default_rng(1).random((120, 50)) < 0.5
    for model in models:
        model["w"][frozen] = base["w"][frozen]
    merged = merge_arrays(tmp_path, name, base, models, options(setting, count))["w"]
    kept = np.array_equal(merged[frozen], base["w"][frozen])
    if isinstance(merge, MatrixMethod):  # it keeps matrices that are equal as a whole, not elements
        assert not kept
    elif method.space == "delta" or merge.fixes_equal_inputs or merge.copies is not None:
        assert kept
    elif name != "slerp":
        assert not kept, "declares less than it does"


@pytest.mark.parametrize("shape", [(1,), (5, 1), (1, 7), (0,), (3, 0), (), (2, 3, 1, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_odd_shapes_are_merged(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    count = three(name)
    base, models = made({"w": shape}, count)
    for setting in SETTINGS[name]:
        merged = merge_arrays(tmp_path, name, base, models, options(setting, count))["w"]
        assert merged.shape == shape
        assert np.isfinite(merged).all()


@pytest.mark.parametrize(("name", "setting"), EVERY)
def test_zeros_give_zeros(name: str, setting: dict, tmp_path: Path) -> None:
    count = three(name)
    zeros = {"w": np.zeros((20, 30), np.float32)}
    merged = merge_arrays(tmp_path, name, zeros, [zeros] * count, options(setting, count))
    assert not merged["w"].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["linear", "ties", "model_stock"]
)  # a kernel of its own for each number: one method a kind
def test_any_number_of_models_is_merged(name: str, tmp_path: Path) -> None:
    for count in (*counts(name), 4, 5, 6, 7):
        base, models = made({"w": (9, 31)}, count)
        merged = merge_arrays(tmp_path, name, base, models, options(SETTINGS[name][0], count))
        assert np.isfinite(merged["w"]).all()


@pytest.mark.parametrize(
    "name", ["linear", "karcher", "ties", "dare_linear", "della", "sce"]
)  # each kind of argument
def test_more_models_than_are_unrolled_agree_with_the_reference(name: str, tmp_path: Path) -> None:
    import importlib

    from references import noise

    base, models = made({"w": (70, 40)}, 12)
    given = options(SETTINGS[name][1], 12)
    merged = merge_arrays(tmp_path, name, base, models, given)["w"]
    wide = [m["w"].astype(np.float64) for m in models]
    uniforms = [noise.uniform(0, "w", i, (70, 40)) for i in range(12)]
    expected = importlib.import_module(f"references.{name}").merge(
        wide, base["w"].astype(np.float64), given, uniforms
    )
    assert np.abs(merged - expected).max() / np.abs(expected).max() <= 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes_are_decoded_to_float32_and_rounded_once(name: str, tmp_path: Path) -> None:
    """BF16, F16 and F32 inputs give what the same values in F32 files give."""
    count = three(name)
    base, models = made({"w": (33, 65)}, count)
    dtypes = ["BF16", "F16", "F32"][:count]
    paths = [
        save_model(tmp_path / f"mixed-{i}", {"w": (d, m["w"])})
        for i, (d, m) in enumerate(zip(dtypes, models, strict=True))
    ]
    base_path = save_model(tmp_path / "mixed-base", {"w": ("BF16", base["w"])})
    exact = [read_model(p) for p in paths]
    given = options(SETTINGS[name][-1], count)
    first = registry()[name].base == "first"
    recipe = recipe_for(name, paths, paths[0] if first else base_path, given, dtype="float32")
    alnico.merge(recipe, tmp_path / "mixed")
    expected = merge_arrays(tmp_path / "exact", name, read_model(base_path), exact, given)
    assert read_model(tmp_path / "mixed")["w"].tobytes() == expected["w"].tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_float64_stays_float64(name: str, tmp_path: Path) -> None:
    import importlib

    from references import noise

    count = three(name)
    random = np.random.default_rng(0)
    base = {"w": random.standard_normal((30, 41))}
    models = [{"w": base["w"] + 0.1 * random.standard_normal((30, 41))} for _ in range(count)]
    given = options(SETTINGS[name][-1], count)
    merged = merge_arrays(tmp_path, name, base, models, given, "F64")["w"]
    uniforms = [noise.uniform(0, "w", i, (30, 41)) for i in range(count)]
    expected = importlib.import_module(f"references.{name}").merge(
        [m["w"] for m in models], base["w"], given, uniforms
    )
    assert merged.dtype == np.float64
    assert np.abs(merged - expected).max() / np.abs(expected).max() <= 1e-14


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_nan_or_an_infinity_names_tensor_and_index(name: str, bad: float, tmp_path: Path) -> None:
    count = three(name)
    base, models = made({"w": (70, 40)}, count)
    models[-1]["w"][3, 5] = bad
    setting = {"scale": [0.5]} if name == "passthrough" else SETTINGS[name][0]
    with pytest.raises(
        alnico.errors.NonFiniteError, match=r"w\[3, 5\]: .* has (NaN|an infinity); expected finite numbers\."
    ):
        merge_arrays(tmp_path, name, base, models, options(setting, count))
    left = [p.name for p in tmp_path.iterdir() if not (p / "statistics.json").exists()]
    assert sorted(left) == sorted(["base", *(f"m{i}" for i in range(count))])


def test_an_output_too_large_for_its_dtype_is_an_error(tmp_path: Path) -> None:
    base = {"w": np.full((4, 5), 60_000.0, np.float32)}
    with pytest.raises(
        alnico.errors.NonFiniteError,
        match=r"w\[0, 0\]: the merge gives an infinity in F16; expected a finite number\.",
    ):
        merge_arrays(
            tmp_path, "linear", base, [base, base], {"weight": [1.0, 1.0], "normalize": False}, "F16"
        )
