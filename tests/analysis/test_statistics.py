"""Every statistic of an analysis against numpy in float64, on made and on real models, and the same for blocks, threads and budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import alnico
from alnico.analysis.measure import analyze_sources
from alnico.analysis.results import LEVELS, Analysis, Subspace
from alnico.checkpoint.memory_model import MemoryModel
from alnico.errors import MismatchError, NonFiniteError, ResourceError
from alnico.run_options import RunOptions
from analysis.agreement import agree
from analysis.reference import reference_analysis
from made import family, llama_shapes, read_model


def of(values: Any) -> np.ndarray:
    """A tensor as the reference takes it: bf16 and float8 as float32."""
    if isinstance(values, torch.Tensor):
        return (
            values if values.dtype in (torch.float64, torch.float16, torch.int64) else values.float()
        ).numpy()
    return np.asarray(values)


def analysed(base: Mapping[str, Any], *models: Mapping[str, Any], **options: Any) -> Analysis:
    sources = [MemoryModel(f"m{i}", model) for i, model in enumerate(models)]
    run = RunOptions(**{name: options.pop(name) for name in ("threads", "memory_bytes") if name in options})
    return analyze_sources(MemoryModel("base", base), sources, run=run, **options)


def checked(base: Mapping[str, Any], *models: Mapping[str, Any], **options: Any) -> Analysis:
    """Analyse, and hold every number against the reference."""
    found = analysed(base, *models, **options)
    plain = [{name: of(v) for name, v in model.items()} for model in (base, *models)]
    share = {"top_share": options["top_share"]} if "top_share" in options else {}
    agree(found, reference_analysis(plain[0], {f"m{i}": m for i, m in enumerate(plain[1:])}, **share))
    return found


def tensors(
    dtype: torch.dtype, seed: int, shapes: Mapping[str, tuple[int, ...]], size: float = 1.0
) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=random) * size).to(dtype) for name, shape in shapes.items()}


def tuned(base: Mapping[str, torch.Tensor], seed: int, size: float = 0.05) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        n: (v.double() + torch.randn(v.shape, generator=random) * size).to(v.dtype) for n, v in base.items()
    }


LLAMA = llama_shapes(tied=False)
LONG = {"model.embed_tokens.weight": (2**18 + 70_001,), "model.layers.0.mlp.up_proj.weight": (301, 479)}
"""Several blocks and leaves, and a tensor of some leaves."""


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_every_statistic_is_that_of_numpy_in_float64(dtype: torch.dtype) -> None:
    base = tensors(dtype, 0, LLAMA | LONG)
    checked(base, tuned(base, 1), tuned(base, 2, 0.2))


@pytest.mark.parametrize("count", [1, 5])
def test_one_model_and_many_are_measured_alike(count: int) -> None:
    base = tensors(torch.bfloat16, 0, LLAMA | LONG)
    checked(base, *(tuned(base, seed) for seed in range(1, count + 1)))


def test_inputs_of_several_dtypes_are_compared_without_rounding_them() -> None:
    base = tensors(torch.bfloat16, 0, LLAMA | LONG)
    checked(
        base, {n: v.half() for n, v in tuned(base, 1).items()}, {n: v.float() + 1e-4 for n, v in base.items()}
    )


@pytest.mark.parametrize("top_share", [1e-9, 0.01, 1 / 3, 1.0])
def test_the_share_of_top_parameters_is_that_of_each_tensor(top_share: float) -> None:
    base = tensors(torch.float32, 3, LLAMA)
    checked(base, tuned(base, 4), tuned(base, 5), top_share=top_share)


EDGES = {
    "zeros": ([0.0] * 9, [0.0] * 9, [0.0] * 9),
    "negative zeros": ([0.0, -0.0, 1.0], [-0.0, 0.0, 1.0], [-0.0, -0.0, 1.0]),
    "equal to the base": ([1.0, -2.0, 3.0], [1.0, -2.0, 3.0], [1.5, -2.0, 3.0]),
    "a constant shift": ([1.0] * 7, [1.1] * 7, [0.9] * 7),
    "opposite": ([0.0] * 4, [1.0, -2.0, 3.0, 0.0], [-1.0, 2.0, -3.0, 0.0]),
    "ties": (
        [0.0] * 8,
        [1.0, -1.0, 1.0, -1.0, 1.0, 1.0, 0.0, 0.0],
        [1.0, 1.0, -1.0, -1.0, 0.0, 1.0, 1.0, 0.0],
    ),
    "equal to 8 bits": ([0.0] * 5, [1.0, 1.001, 1.002, 1.003, 0.5], [1.003, 1.0, 0.25, 1.001, 1.002]),
    "one element": ([1.0], [2.0], [0.5]),
    "a base of zeros": ([0.0, 0.0], [1.0, 2.0], [2.0, 1.0]),
    "denormal": ([0.0] * 4, [1e-45, -1e-45, 3e-42, 0.0], [1e-45, 1e-45, -1e-40, 1e-38]),
    "large": ([3e38, -3e38, 1.0], [3.1e38, -2e38, 1.0], [2e38, -3e38, -1e38]),
    "one far entry": ([0.0] * 50, [1e6, *([1e-3] * 25), *([-2e-3] * 24)], [1e-3] * 50),
    "far from 0": ([0.0] * 6, [1000.0, 1000.00006, 1000.0, 1000.0, 1000.0, 999.99994], [1.0] * 6),
}


@pytest.mark.parametrize("case", EDGES)
def test_edges_are_as_defined(case: str) -> None:
    base, one, other = (np.array(values, np.float32) for values in EDGES[case])
    checked({"w": base}, {"w": one}, {"w": other})
    repeated = [
        {"w": np.tile(v, 70_000 // v.size)} for v in (base, one, other)
    ]  # no longer sorted as a whole
    checked(repeated[0], repeated[1], repeated[2])


def test_entries_that_are_all_equal_have_no_spread() -> None:
    base = {"layers.0.w": np.zeros(200_003), "layers.1.w": np.zeros(70_001)}
    found = checked(base, {name: v + 0.1 for name, v in base.items()})
    assert [c.std for s in (found.whole, *found.tensors) for c in s.changes if c] == [0.0, 0.0, 0.0]


def test_a_number_and_nothing_are_tensors_too() -> None:
    base = {
        "number": np.float32(2.0),
        "none": np.zeros((0, 4), np.float32),
        "layers.0.w": np.ones(3, np.float32),
    }
    checked(
        base,
        {n: np.asarray(v * np.float32(1.5)) for n, v in base.items()},
        {n: np.asarray(v * np.float32(0.5)) for n, v in base.items()},
    )
    found = analysed({"none": base["none"]}, {"none": base["none"]}, {"none": base["none"]})
    assert found.whole.changes[0] is not None
    assert found.whole.changes[0].elements == 0


def test_what_cannot_be_compared_is_named_and_left_out() -> None:
    base = tensors(torch.float32, 0, LLAMA) | {"ids": torch.arange(5)}
    one, other = (
        tuned({n: v for n, v in base.items() if n != "ids"}, 1),
        tuned({n: v for n, v in base.items() if n != "ids"}, 2),
    )
    one["ids"] = torch.arange(5)
    del one["model.layers.0.mlp.up_proj.weight"]
    other["model.layers.0.mlp.down_proj.weight"] = torch.zeros(3, 4)
    other["model.layers.1.mlp.down_proj.weight"] = torch.zeros(
        LLAMA["model.layers.1.mlp.down_proj.weight"], dtype=torch.int64
    )
    other["adapter.weight"] = torch.zeros(6)
    found = checked(base, one, other)
    assert {(s.tensor, s.model, s.reason) for s in found.skipped} == {
        ("ids", None, "its dtype is I64"),
        ("model.layers.0.mlp.up_proj.weight", "m0", "the model has no such tensor"),
        ("model.layers.0.mlp.down_proj.weight", "m1", "its shape is (3, 4), in the base (16, 48)"),
        ("model.layers.1.mlp.down_proj.weight", "m1", "its dtype is I64"),
        ("adapter.weight", "m1", "the base has no such tensor"),
    }


def test_subspaces_of_few_directions_are_compared_in_these_alone() -> None:
    random = np.random.default_rng(0)
    base = {"w": random.standard_normal((40, 30))}
    low = [random.standard_normal((40, 3)) @ random.standard_normal((3, 30)) for _ in range(2)]
    found = checked(base, {"w": base["w"] + low[0]}, {"w": base["w"] + low[0] * 2})
    pair = found.whole.pairs[0].subspace
    assert pair is not None
    assert pair == Subspace(pytest.approx(1.0), pytest.approx(1.0), 3, 1)
    checked(
        base, {"w": base["w"] + low[0]}, {"w": base["w"] + low[1] + random.standard_normal((40, 30)) * 1e-3}
    )


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["base", "model"])
def test_what_is_no_number_is_an_error_that_names_tensor_and_index(wrong: float, where: str) -> None:
    base, model = {"w": np.ones(70_000, np.float32)}, {"w": np.ones(70_000, np.float32)}
    (base if where == "base" else model)["w"][66_001] = wrong
    found = f"{'base' if where == 'base' else 'm0'} has {'NaN' if np.isnan(wrong) else 'an infinity'}"
    with pytest.raises(NonFiniteError, match=rf"^w\[66001\]: {found}; expected finite numbers"):
        analysed(base, model)


def test_a_difference_too_large_for_float32_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match=r"^w: a difference from base is too large for float32"):
        analysed({"w": np.full(3, -3e38, np.float32)}, {"w": np.full(3, 3e38, np.float32)})


def test_blocks_threads_and_budgets_change_no_number() -> None:
    base = tensors(torch.bfloat16, 0, LLAMA | LONG | {"huge": (2**21 + 1234,)})
    models = [{n: v.float() for n, v in tuned(base, seed).items()} for seed in (1, 2)]
    first = dataclasses.replace(analysed(base, *models), seconds=0.0)
    for options in (
        {"threads": 2},
        {"threads": 3, "block_elements": 2**16},
        {"block_elements": 2**17},
        {"threads": 5, "memory_bytes": 2**33},
    ):
        assert dataclasses.replace(analysed(base, *models, **options), seconds=0.0) == first, options
    with pytest.raises(ResourceError) as caught:
        analysed(base, *models, threads=2, memory_bytes=2**20)
    least = int(str(caught.value).split("--memory to ")[1].split("MiB")[0]) * 2**20
    assert dataclasses.replace(analysed(base, *models, threads=2, memory_bytes=least), seconds=0.0) == first


values = st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(values, values, values)
def test_any_numbers_agree_with_numpy(base: list[float], one: list[float], other: list[float]) -> None:
    size = min(map(len, (base, one, other)))
    w, a, b = (np.array(v[:size], np.float32) for v in (base, one, other))
    checked(
        {"layers.0.w": w, "layers.1.w": a},
        {"layers.0.w": a, "layers.1.w": b},
        {"layers.0.w": b, "layers.1.w": w},
    )


def test_models_in_files_give_what_they_give_in_memory(tmp_path: Path) -> None:
    base, (one, other) = family(tmp_path, 2, shards=3)
    found = alnico.analyze([one, other], base=base)
    agree(found, reference_analysis(read_model(base), {str(p): read_model(p) for p in (one, other)}))
    assert [(m.name, m.reference) for m in (found.base, *found.models)] == [
        (p.name, str(p)) for p in (base, one, other)
    ]


def test_models_without_a_tensor_in_common_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"share no float tensor \(name and shape\)"):
        analysed({"a": np.zeros(2, np.float32)}, {"b": np.zeros(2, np.float32)})


@pytest.mark.slow
def test_quantiles_are_exact_where_torch_refuses() -> None:
    random = np.random.default_rng(0)
    size = 2**24 + 99_991
    base = (random.standard_normal(size) * 0.02).astype(np.float32)
    model = base + (random.standard_normal(size) * 0.001).astype(np.float32)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(torch.from_numpy(model), 0.5)
    (change,) = analysed({"w": base}, {"w": model}, threads=2).tensors[0].changes
    assert change is not None
    expected = np.quantile((model - base).astype(np.float64), LEVELS)
    np.testing.assert_allclose(change.quantiles, expected, rtol=0, atol=1e-18)
