"""Kernels that numpy runs: the same bytes as compiled for every dtype and kind of argument, and what must be compiled."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.kernels.array_source import NoArrayForm, on_arrays, select, types_of
from alnico.kernels.choice import forced
from alnico.kernels.constants import CODES, LEAF
from alnico.kernels.measure_kernels import MeasureKernel
from alnico.kernels.mix_kernel import MixKernel
from alnico.numerics.dtypes import decode
from alnico.testing.small_models import random_models
from kernels.both_ways import in_both_ways
from made import save_model

NOTHING = np.empty(0, np.uint8)
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, -1e-310, 1e-45, -1e-40, 1.5, -2.0, 65504.0, 65519.9, 65520.0, 3.3e38, 3.4028236e38]  # fmt: skip


def every_number(dtype: str) -> np.ndarray:
    """The bytes of all numbers of a narrow dtype, or of special and random ones of a wide one."""
    if WIDTHS[dtype] < 4:
        return np.arange(1 << (8 * WIDTHS[dtype]), dtype=f"u{WIDTHS[dtype]}").view(np.uint8)
    wide = np.dtype(f"f{WIDTHS[dtype]}")
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 63, 5000, np.uint64).astype(f"u{wide.itemsize}").view(wide)
    with np.errstate(all="ignore"):
        return np.concatenate([np.array(SPECIAL).astype(wide), bits]).view(np.uint8)


def times(x, weight):
    return x[0] * weight[0]


@pytest.mark.parametrize("real", ["float32", "float64"])
def test_every_number_of_every_dtype_is_decoded_and_rounded_as_compiled(real: Any) -> None:
    run = in_both_ways(MixKernel(times, 1, False, ("numbers",), real))
    for dtype in WIDTHS if real == "float64" else list(WIDTHS)[1:]:
        raw, width = every_number(dtype), WIDTHS[dtype]
        is_finite = np.isfinite(decode(raw, dtype))
        for out_dtype in ("F64", "F32", "F16", "BF16") if real == "float64" else ("F32", "F16", "BF16"):
            # What rounds to an infinity is refused, one by one; all others have the same bits.
            with np.errstate(all="ignore"):
                largest = {"F16": 65519.9, "BF16": 3.3895e38, "F32": 3.4028235e38, "F64": math.inf}[out_dtype]
                fits = is_finite & (np.abs(decode(raw, dtype).astype(np.float64)) < largest)
            parts = [raw.reshape(-1, width)[fits]]
            parts += list(raw.reshape(-1, 1, width)[~fits][:40])
            for n, part in enumerate(parts):
                part = np.ascontiguousarray(part).reshape(-1)
                out = np.zeros(part.size // width * WIDTHS[out_dtype], np.uint8)
                codes = np.array([CODES[dtype]], np.int64)
                found = run((part,), codes, NOTHING, 0, out, CODES[out_dtype], 0, False, np.ones(1, real))
                assert n or found == -1


def test_minima_and_maxima_of_zeros_and_nan_are_numbas() -> None:
    values = np.array([0.0, -0.0, math.nan, 1.0, -1.0, math.inf], np.float32)
    grid = [np.ascontiguousarray(g.ravel()) for g in np.meshgrid(values, values, values)]

    def extreme(x, values):
        return min(values[0], x, values[1], values[2]) + 2.0 * max(values[2], x, values[0])

    run = in_both_ways(MeasureKernel("values", extreme, 3, False, (), "float32", across=True))
    raws = tuple(g.view(np.uint8) for g in grid)
    with np.errstate(all="ignore"):
        run(
            raws,
            np.full(3, CODES["F32"]),
            NOTHING,
            0,
            0,
            np.arange(3),
            np.empty((3, grid[0].size), np.float32),
        )


def noisy(x, draw, kept, ranked, row, column, side):
    total = 0.0
    for i in range(len(x)):
        part = draw[i] * x[i] + kept[i] * row[i] if ranked[i] > 0 else column[i] - side[i]
        total += part * draw[i]
    return total


@pytest.mark.parametrize("real", ["float32", "float64"])
@pytest.mark.parametrize("models", [2])
def test_every_kind_of_argument_is_filled_as_compiled(models: int, real: Any) -> None:
    rows, columns = 30, 40
    count = rows * columns
    random = np.random.default_rng(0)
    kinds = ("noise", "bernoulli", "ranked", "rows", "columns", "side")
    run = in_both_ways(MixKernel(noisy, models, True, kinds, real))
    raws = tuple(random.standard_normal(count).astype(np.float32).view(np.uint8) for _ in range(2 * models))
    keys = [np.arange(a, a + models, dtype=np.uint64) for a in (1, 1000, 5000)]
    chance = random.random(models).astype(real)
    unkept = (np.empty((models, 0), np.uint64), False)
    arguments = [
        chance, keys[0], chance, keys[1], *unkept,
        chance, keys[2], (chance / 2).astype(real), random.random((models, count)).astype(np.float32), *unkept,
        random.standard_normal((models, rows)).astype(real), columns, random.standard_normal((models, columns)).astype(real), columns,
    ]  # fmt: skip
    base = raws[0].copy()
    out = np.zeros(4 * count, np.uint8)
    codes = np.full(2 * models, CODES["F32"])
    assert run(raws, codes, base, CODES["F32"], out, CODES["F32"], 0, False, *arguments) == -1
    assert out.any()


def drawn(x, draw):
    total = 0.0
    for i in range(len(x)):
        total += draw[i] * draw[i] * x[i]
    return total


@pytest.mark.nightly
@pytest.mark.parametrize("real", ["float32", "float64"])
def test_draws_of_more_models_than_have_a_vector_each_have_the_kernels_precision(real: Any) -> None:
    models, count = 70, 300
    raws = tuple(np.random.default_rng(0).standard_normal((models, count)).astype(np.float32).view(np.uint8))
    run = in_both_ways(MixKernel(drawn, models, False, ("noise",), real))
    keys = np.arange(models, dtype=np.uint64)
    out = np.zeros(4 * count, np.uint8)
    codes = np.full(models, CODES["F32"])
    run(raws, codes, NOTHING, 0, out, CODES["F32"], 0, False, np.zeros(models, real), keys)


def with_index(x, weight):
    total = 0.0
    for i in range(len(x)):
        total += i * (weight[i] * x[i])
    return total


def with_remainder(x, weight):
    return x[0] % weight[0]


def with_added_comparison(x, weight):
    return x[0] + (x[1] > weight[0])


def with_truth_of_number(x, weight):
    return x[0] if weight[0] else x[1]


def with_two_types(x, weight):
    y = x[0]
    y = y > weight[0]
    return y


@pytest.mark.parametrize(
    "function", [with_index, with_remainder, with_added_comparison, with_truth_of_number, with_two_types]
)
def test_what_numpy_could_type_differently_is_compiled(function: Callable[..., float]) -> None:
    with pytest.raises(NoArrayForm):
        on_arrays(function, ["reals", *types_of(("numbers",), "float32", per_model=True)], 2, "float32")


def test_a_selection_takes_the_wider_type_and_every_bit() -> None:
    condition = np.array([True, False, True])
    a = np.array([-0.0, 1.0, math.nan], np.float32)
    assert (
        select(condition, a, np.float32(2)).tobytes() == np.array([-0.0, 2, math.nan], np.float32).tobytes()
    )
    assert select(condition, a, np.array([0.1, 0.2, 0.3])).dtype == np.float64
    assert select(np.True_, np.float32(1), 0.5).dtype == np.float32
    assert (select(condition, ~condition, condition) == [False, False, False]).all()


ANALYSED = [("F32", 3), ("BF16", 2), ("F64", 2), ("F16", 1)]


@pytest.mark.parametrize(("dtype", "models"), ANALYSED)
def test_an_analysis_has_the_same_numbers(dtype: str, models: int, tmp_path: Path) -> None:
    shapes = {"large.weight": (1030, 257), "layers.0.weight": (33, 65), "bias": (7,), "one": (1,)}
    base, tuned = random_models(shapes, models, growth=0.05)
    tuned[-1]["large.weight"][::3] = base["large.weight"][::3]
    assert base["large.weight"].size > 4 * LEAF
    storage = {"F32": np.float32, "F64": np.float64, "F16": np.float16}
    paths = []
    for n, tensors in enumerate((base, *tuned)):
        folder = tmp_path / f"m{n}"
        encoded = {
            k: (
                dtype,
                (v.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else v.astype(storage[dtype]),
            )
            for k, v in tensors.items()
        }
        save_model(folder, encoded, {"architectures": ["XModel"]})
        paths.append(str(folder))
    results = []
    for backend in ("compiled", "interpreted"):
        with forced(backend):  # type: ignore[arg-type]
            data = alnico.analyze(paths[1:], base=paths[0]).data()
        data.pop("seconds", None)
        results.append(data)
    assert repr(results[0]) == repr(results[1])


FIRST_USE = """
import sys
import alnico
alnico.merge({"merge_method": "ties", "base_model": "m0", "models": ["m1", "m2"], "parameters": {"density": 0.5}}, "out")
alnico.analyze(["m1", "m2"], base="m0")
print(sorted({"numba", "llvmlite"} & set(sys.modules)))
"""


def test_little_work_imports_no_compiler(tmp_path: Path) -> None:
    base, tuned = random_models({"w": (30, 40), "b": (40,)}, 2)
    for n, tensors in enumerate((base, *tuned)):
        save_model(
            tmp_path / f"m{n}", {k: ("F32", v) for k, v in tensors.items()}, {"architectures": ["XModel"]}
        )
    ended = subprocess.run(
        [sys.executable, "-c", FIRST_USE], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "[]\n"
