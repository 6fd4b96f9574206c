"""Claims about kernels of a GPU, each checked in numba-cuda's simulator: ``python -m kernels.simulated_gpu CLAIM``.

The simulator is chosen before numba is imported, so each claim has a process of its own (test_cuda_kernels.py). With
``NUMBA_ENABLE_CUDASIM=0`` a claim is checked on the first GPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from alnico.kernels.constants import CODES, LEAF, WORD
from alnico.kernels.facts import magnitude
from alnico.kernels.measure_kernels import ColumnGramKernel, GramKernel, MeasureKernel
from alnico.kernels.mix_kernel import MixKernel

NOTHING = np.empty(0, np.uint8)
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


def weighted(x, weight, scale):
    total = 0.0
    for i in range(len(x)):
        if x[i] > -1.5:
            total += weight[i] * x[i]
    return scale * total


def everything(x, draw, kept, ranked, row, column, side, scale):
    total = 0.0
    for i in range(len(x)):
        part = draw[i] * x[i] + kept[i] * row[i] if ranked[i] > 0 else column[i] - side[i]
        total += part * draw[i] / len(x) + min(abs(x[i]), max(side[i], 0.5)) * scale
    return total


def average(x):
    total = 0.0
    for i in range(len(x)):
        total += x[i]
    return total / len(x)


def above_mean(x, values, limit):
    total = 0.0
    for i in range(len(values)):
        total += abs(values[i]) * 0.3
    return abs(x) > total * limit


def scaled(x, limit, row, draw):
    return abs(x) * row - limit if draw < 0.7 else abs(x)


def bytes_of(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of values in a dtype; of float8 and BF16 by cutting them off."""
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if dtype == "F8_E5M2":
        return (values.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8)
    if dtype == "F8_E4M3":
        return (np.abs(values) * 20).astype(np.uint8) & 0x77
    return values.astype({"F64": "f8", "F32": "f4", "F16": "f2"}[dtype]).view(np.uint8)


def made(count: int, dtypes: list[str], seed: int = 0) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    random = np.random.default_rng(seed)
    raws = tuple(bytes_of(random.standard_normal(count), dtype) for dtype in dtypes)
    return raws, np.array([CODES[d] for d in dtypes], np.int64)


def on_both(kernel: Any) -> Any:
    from kernels.gpu_ways import OnBoth

    return OnBoth(kernel)


def every_number_is_decoded_and_rounded() -> None:
    def times(x, weight):
        return x[0] * weight[0]

    special = [0.0, -0.0, 5e-324, -1e-310, 1e-45, -1e-40, 1.5, -2.0, 65504.0, 65519.9, 65520.0, 3.3e38, 3.4028236e38, 6e-8, 2.98e-8, 6.1e-5, -3.39e38]  # fmt: skip
    random = np.random.default_rng(0)
    for real in ("float32", "float64"):
        run = on_both(MixKernel(times, 1, False, ("numbers",), real))
        for dtype, width in WIDTHS.items():
            if dtype == "F64" and real == "float32":
                continue
            if width == 1:
                raw = np.arange(256, dtype=np.uint8)
            elif width == 2:
                raw = np.arange(0, 65536, 37, dtype=np.uint16).view(np.uint8)
            else:
                bits = random.integers(0, 1 << 63, 500, np.uint64).astype(f"u{width}").view(f"f{width}")
                near = random.standard_normal(300) * 10.0 ** random.integers(-9, 6, 300)
                with np.errstate(all="ignore"):
                    raw = np.concatenate([np.array(special), near]).astype(f"f{width}")
                raw = np.concatenate([raw, bits]).view(np.uint8)
            for out in ("F64", "F32", "F16", "BF16"):
                fits = []
                parts = raw.reshape(-1, width)
                for part in parts:
                    written = np.zeros(WIDTHS[out], np.uint8)
                    arguments = (written, CODES[out], 0, False, np.ones(1, real))
                    bad = run.processor((part.copy(),), np.array([CODES[dtype]]), NOTHING, 0, *arguments)
                    fits.append(bad < 0)
                good = np.array(fits)
                chosen = [np.ascontiguousarray(parts[good]).reshape(-1), *parts[~good][:25].copy()]
                for part in chosen:
                    written = np.zeros(part.size // width * WIDTHS[out], np.uint8)
                    run(
                        (part,),
                        np.array([CODES[dtype]]),
                        NOTHING,
                        0,
                        written,
                        CODES[out],
                        0,
                        False,
                        np.ones(1, real),
                    )


def every_argument_is_filled() -> None:
    rows, columns = 11, 30
    count, start = 260, 41
    random = np.random.default_rng(0)
    kinds = ("noise", "bernoulli", "ranked", "rows", "columns", "side", "number")
    for models, real, deltas in (
        (2, "float32", True),
        (3, "float64", False),
        (10, "float32", True),
        (70, "float64", True),
        (70, "float32", False),
    ):
        run = on_both(MixKernel(everything, models, deltas, kinds, real))
        raws, codes = made(count, ["F32", "BF16", "F16"] * models)
        raws, codes = raws[: 2 * models], codes[: 2 * models]
        keys = [np.arange(a, a + models, dtype=np.uint64) + (1 << 60) for a in (1, 1000, 5000)]
        chance = random.random(models).astype(real)
        unkept = (np.empty((models, 0), np.uint64), False)
        arguments = [
            chance, keys[0], chance, keys[1], *unkept,
            chance, keys[2], (chance / 2).astype(real), random.random((models, count)).astype(np.float32), *unkept,
            random.standard_normal((models, rows)).astype(real), columns,
            random.standard_normal((models, columns)).astype(real), columns, np.dtype(real).type(0.7),
        ]  # fmt: skip
        base, out = bytes_of(random.standard_normal(count), "BF16"), np.zeros(4 * count, np.uint8)
        assert run(raws, codes, base, CODES["BF16"], out, CODES["F32"], start, False, *arguments) == -1
        assert out.any()


def differences_and_equal_inputs_keep_their_bits() -> None:
    for models in (1, 3, 10, 70):
        raws, codes = made(203, (["F32", "BF16", "F16"] * models)[:models])
        weight = np.linspace(0.1, 0.9, models).astype(np.float32)
        for base_dtype in ("BF16", "F32"):
            base = bytes_of(np.random.default_rng(9).standard_normal(203), base_dtype)
            run = on_both(
                MixKernel(weighted, models, True, ("numbers", "number"), "float32", differences=True)
            )
            out = np.zeros(203 * 2, np.uint8)
            run(raws, codes, base, CODES[base_dtype], out, CODES["BF16"], 0, False, weight, 1.25)
        same = tuple(raws[0].copy() for _ in range(models))
        for keeps in (False, True):
            out = np.zeros(203 * 4, np.uint8)
            run = on_both(MixKernel(average, models, False, (), "float32"))
            run(same, np.full(models, codes[0]), NOTHING, 0, out, CODES["F32"], 0, keeps)
            assert not keeps or out.tobytes() == raws[0].tobytes()


def what_is_not_finite_is_found() -> None:
    count = 61
    for models in (3, 70):
        for place in (0, 3, 4, 59, 60):
            for value in (np.nan, np.inf, -np.inf):
                for hurt in (0, models - 1, "base"):
                    values = np.random.default_rng(1).standard_normal((models + 1, count)).astype(np.float32)
                    values[models if hurt == "base" else hurt, place] = value
                    raws = tuple(values[:models].view(np.uint8))
                    run = on_both(MixKernel(weighted, models, True, ("numbers", "number"), "float32"))
                    arguments = (
                        np.zeros(4 * count, np.uint8),
                        CODES["F32"],
                        0,
                        False,
                        np.ones(models, np.float32),
                        1.0,
                    )
                    bad = run(
                        raws,
                        np.full(models, CODES["F32"]),
                        values[models].view(np.uint8),
                        CODES["F32"],
                        *arguments,
                    )
                    assert 0 <= bad <= place
        values = np.full(count, 3e38, np.float32).view(np.uint8)
        run = on_both(MixKernel(weighted, models, False, ("numbers", "number"), "float32"))
        arguments = (np.zeros(4 * count, np.uint8), CODES["F32"], 0, False, np.ones(models, np.float32), 2.0)
        assert run((values,) * models, np.full(models, CODES["F32"]), NOTHING, 0, *arguments) >= 0


def every_reduction_is_the_processors() -> None:
    narrow, wide = ["BF16", "F32", "F16"], ["F64", "BF16", "F32"]
    _reduce("float32", narrow, True, 250, 24, start=0)
    _reduce("float32", narrow, False, 21, 1, start=0)
    _reduce("float32", narrow, True, 700, 700, start=3 * LEAF)
    _reduce("float64", wide, True, 150, 31, start=3 * LEAF)
    _reduce("float32", ["BF16"] * 70, True, 130, 13, start=0)


def _reduce(real: str, dtypes: list[str], deltas: bool, count: int, row: int, start: int) -> None:
    random = np.random.default_rng(count)
    models = len(dtypes)
    raws, codes = made(count, dtypes, count)
    base = bytes_of(random.standard_normal(count), "BF16") if deltas else NOTHING
    first = (raws, codes, base, CODES["BF16"], start)
    leaves, parts = (
        -(-count // LEAF),
        (start + count - 1) // row + (start + count - 1) // LEAF - start // row - start // LEAF + 1,
    )
    every = np.array([0, models - 1, 1][: min(models, 3)])
    limit = np.dtype(real).type(0.4)
    functions: list[tuple[Any, bool, tuple[Any, ...], list[Any]]] = [
        (magnitude, False, (), []),
        (above_mean, True, ("numbers",), [random.random(models).astype(real)]),
        (scaled, False, ("number", "rows", "noise"), [
            limit, random.random((models, -(-(start + count) // row))).astype(real), row,
            np.zeros(models, real), np.arange(models, dtype=np.uint64),
        ]),
    ]  # fmt: skip
    word = 8 * np.dtype(real).itemsize
    for of, across, kinds, arguments in functions:
        for chosen in (every, every[1:2]) if not kinds else (every[:2],):
            n = chosen.size
            outputs: list[tuple[str, list[Any]]] = [
                ("sum", [np.zeros((n, leaves))]),
                ("count", [np.zeros((n, leaves), np.int64)]),
                ("sum of rows", [row, np.zeros((n, parts))]),
                ("largest of rows", [row, np.zeros((n, parts))]),
                ("values", [np.zeros((n, count), real)]),
                ("histogram", [word - 16, np.zeros(n, np.uint64), np.ones((n, 65_536), np.int64)]),
                ("histogram", [word - 32, np.full(n, int(np.array(0.5, real).view(f"u{word // 8}")) >> (word - 16), np.uint64), np.zeros((n, 65_536), np.int64)]),
                ("bracket", [np.full(n, 0.3, real), np.full(n, 0.9, real), np.zeros((n, 2), np.int64), np.zeros((n, count + WORD), real)]),
                ("bracket", [np.full(n, 0.0, real), np.full(n, np.inf, real), np.zeros((n, 2), np.int64), np.zeros((n, 40), real)]),
                ("bracket", [np.full(n, 0.0, real), np.full(n, 0.0, real), np.zeros((n, 2), np.int64), np.zeros((n, count + WORD), real)]),
            ]  # fmt: skip
            for reduction, given in outputs:
                kernel = MeasureKernel(reduction, of, models, deltas, kinds, real, across)
                on_both(kernel)(*first, chosen, *given, *arguments)


def sums_over_leaves_have_the_processors_order() -> None:
    """Of float64: sums of as many float32 are exact in any order."""
    count = LEAF + 700
    raws, codes = made(count, ["F64"], 5)
    leaves = np.zeros((1, 2))
    kernel = MeasureKernel("sum", magnitude, 1, False, (), "float64")
    on_both(kernel)(raws, codes, NOTHING, 0, 0, np.array([0]), leaves)
    assert leaves.all()
    parts = np.zeros((1, 7))
    kernel = MeasureKernel("sum of rows", magnitude, 1, False, (), "float64")
    on_both(kernel)(raws, codes, NOTHING, 0, 0, np.array([0]), LEAF // 4, parts)


def products_are_the_processors() -> None:
    for real, dtypes in (("float32", ["BF16", "F16", "F32"]), ("float64", ["F64", "F32", "F64"])):
        for models in (1, 2, 3, 7):
            for deltas in (False, True):
                count, columns = 310, 31
                chosen = (dtypes * models)[:models]
                raws, codes = made(count, chosen, models)
                base = bytes_of(np.random.default_rng(3).standard_normal(count), "F32") if deltas else NOTHING
                pairs = models * (models + 1) // 2
                for row in (31, count, 4):
                    for start in (0, 2 * LEAF):
                        parts = (
                            (start + count - 1) // row
                            + (start + count - 1) // LEAF
                            - start // row
                            - start // LEAF
                            + 1
                        )
                        run = on_both(GramKernel(models, deltas, real))
                        run(raws, codes, base, CODES["F32"], start, row, np.zeros((parts, pairs)))
                sums = np.zeros((pairs, columns))
                run = on_both(ColumnGramKernel(models, deltas, real))
                run(raws, codes, base, CODES["F32"], 0, sums)
                run(raws, codes, base, CODES["F32"], count + 5, sums)
                assert sums.any()


def threads_run_at_once() -> None:
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for models in (2, 3):
                raws, codes = made(150, ["BF16"] * models, seed)
                kernel = MixKernel(weighted, models, False, ("numbers", "number"), "float32")
                arguments = (
                    np.zeros(300, np.uint8),
                    CODES["BF16"],
                    0,
                    False,
                    np.full(models, seed, np.float32),
                    0.1,
                )
                on_both(kernel)(raws, codes, NOTHING, 0, *arguments)
                sums = MeasureKernel("sum", magnitude, models, False, (), "float32")
                on_both(sums)(raws, codes, NOTHING, 0, 0, np.arange(models), np.zeros((models, 1)))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def unaligned_bytes_give_the_same() -> None:
    from alnico.kernels.cuda.kernel import CudaKernel
    from alnico.kernels.cuda.memory import gpu_memory
    from kernels.gpu_ways import GPU, downloaded, uploaded

    memory = gpu_memory(GPU)
    raws, codes = made(101, ["BF16", "F32"])
    mixes = MixKernel(weighted, 2, False, ("numbers", "number"), "float32")
    counts = MeasureKernel("count", above_mean, 2, False, ("numbers",), "float32", across=True)
    results = []
    for shift in (0, 4):
        before = np.zeros(shift, np.uint8)
        moved = tuple(uploaded(memory, np.concatenate([before, raw]))[shift:] for raw in raws)
        out = memory.bytes(202)
        arguments = (out, CODES["BF16"], 0, False, np.ones(2, np.float32), 1.0)
        CudaKernel(mixes, memory)(moved, codes, NOTHING, 0, *arguments)
        leaves = np.zeros((2, 1), np.int64)
        limits = np.ones(2, np.float32)
        CudaKernel(counts, memory)(moved, codes, NOTHING, 0, 0, np.arange(2), leaves, limits)
        assert leaves.all()
        results.append((downloaded(memory, out).tobytes(), leaves.tobytes()))
    assert results[0] == results[1]


def methods_of(share: int, shares: int) -> None:
    """Every setting of every method, merged by the engine, with each of its kernels run both ways; brackets and
    histograms too, which the engine has for large tensors."""
    import alnico
    from alnico.engine import measure
    from alnico.kernels import choice
    from alnico.methods import registry
    from alnico.testing.small_models import random_models
    from kernels.gpu_ways import OnBoth
    from methods.cases import MODELS, OVER_MODEL, SETTINGS, options
    from methods.merging import recipe_for, write_inputs

    made_of: dict[Any, OnBoth] = {}
    choice._interpreted = lambda kernel: made_of.setdefault(kernel, OnBoth(kernel))
    cases = [
        (name, setting) for name in registry() for setting in [*SETTINGS[name], *OVER_MODEL.get(name, [])]
    ]
    kinds = set()
    for number, (name, setting) in enumerate(cases[share::shares]):
        count = MODELS.get(name, (3,))[0]
        base, models = random_models({"w": (14, 20), "b": (20,), "c": (3, 2, 2)}, count, growth=0.05)
        for tensors in models:
            tensors["w"][2] = base["w"][2]
        dtype = ("BF16", "F32", "F16")[number % 3]
        with tempfile.TemporaryDirectory() as folder, choice.forced("interpreted"):
            base_path, paths = write_inputs(Path(folder), base, models, dtype)
            place = paths[0] if registry()[name].base == "first" else base_path
            recipe = recipe_for(
                name, paths, place if registry()[name].base != "unused" else None, options(setting, count)
            )
            for small in (measure.SMALL, 100):
                measure.SMALL = small
                made_of.clear()
                alnico.merge(recipe, Path(folder) / "out", overwrite=True)
                kinds |= {
                    getattr(k, "reduction", type(k).__name__) for k, both in made_of.items() if both.calls
                }
            measure.SMALL = 65_536
    print(*sorted(kinds), sep="\n")


CLAIMS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        every_number_is_decoded_and_rounded,
        every_argument_is_filled,
        differences_and_equal_inputs_keep_their_bits,
        what_is_not_finite_is_found,
        every_reduction_is_the_processors,
        sums_over_leaves_have_the_processors_order,
        products_are_the_processors,
        threads_run_at_once,
        unaligned_bytes_give_the_same,
    )
}
SHARES = 4
CLAIMS |= {f"methods_{n}_of_{SHARES}": (lambda n=n: methods_of(n, SHARES)) for n in range(SHARES)}


if __name__ == "__main__":
    if os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1") == "1":
        warnings.simplefilter("error")
    CLAIMS[sys.argv[1]]()
