"""Kernels, compiled and with numpy, against plain numpy in float64 (or in float32 where the arithmetic is stated to be float32)."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

from alnico.engine.row_ranks import shares_of, sort_rows
from alnico.errors import MethodError
from alnico.kernels.constants import CODES, LANES, LEAF, TILE, WORD
from alnico.kernels.difference_kernel import DifferenceKernel
from alnico.kernels.facts import (
    Bernoulli,
    Count,
    Derived,
    Gram,
    KthLargest,
    Noise,
    Sum,
    levels,
    magnitude,
    resolve,
)
from alnico.kernels.four_bit_kernel import FourBitKernel
from alnico.kernels.low_rank_kernel import FoldKernel
from alnico.kernels.measure_kernels import ColumnGramKernel, GramKernel, MeasureKernel, RankKernel
from alnico.kernels.mix_kernel import MixKernel
from alnico.numerics.dtypes import DTYPES, decode
from alnico.numerics.noise import uniform
from kernels.both_ways import in_both_ways

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NOTHING = np.empty(0, np.uint8)
SIZES = [1, TILE - 1, TILE + 3, LEAF, LEAF + TILE + 7]


def raw(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of ``values`` in a dtype, by torch."""
    return torch.from_numpy(values.copy()).to(TORCH[dtype]).view(torch.uint8).numpy()


def values_of(data: np.ndarray, dtype: str) -> np.ndarray:
    """What bytes stand for, in float64, by torch."""
    return torch.from_numpy(data.copy()).view(TORCH[dtype]).to(torch.float64).numpy()


def made(count: int, models: int, dtypes: tuple[str, ...], seed: int = 0):
    """Bytes of ``models`` inputs and their values in float64."""
    random = np.random.default_rng(seed)
    chosen = [dtypes[i % len(dtypes)] for i in range(models)]
    raws = [raw(random.standard_normal(count), d) for d in chosen]
    return (
        raws,
        np.array([CODES[d] for d in chosen], np.int64),
        np.array([values_of(r, d) for r, d in zip(raws, chosen, strict=True)]),
    )


# Equations.


def weighted(x, weight, scale):
    total = 0.0
    for i in range(len(x)):
        if x[i] > -1.5:
            total += weight[i] * x[i]
    return scale * total


def noisy(x, draw, kept):
    total = 0.0
    for i in range(len(x)):
        total += draw[i] * x[i] + kept[i]
    return total


def first(x, weight):
    return x[0] * weight[0]


def numbers(values, real: str):
    """Arguments of kind numbers: a tuple is made of an array by the kernel."""
    return np.array(values, real)


def expected_weighted(x: np.ndarray, weight, scale: float, real: str) -> np.ndarray:
    """``weighted`` in arrays, one operation after another in ``real``."""
    total = np.zeros(x.shape[1], real)
    for values, w in zip(x.astype(real), np.array(weight, real), strict=True):
        total = np.where(values > -1.5, total + w * values, total)
    return np.array(scale, real) * total


def unkept(models: int) -> tuple[np.ndarray, bool]:
    """Draws that are not kept."""
    return np.empty((models, 0), np.uint64), False


def run_mix(
    kernel: MixKernel, raws, codes, base, base_dtype, out_dtype, count, *arguments, start=0, keep_equal=False
):
    out = np.zeros(count * TORCH[out_dtype].itemsize, np.uint8)
    found = in_both_ways(kernel)(
        tuple(raws), codes, base, CODES[base_dtype], out, CODES[out_dtype], start, keep_equal, *arguments
    )
    return out, found


MIXES = [
    (1, True, "float32"),
    (3, True, "float32"),
    (3, False, "float64"),
    (10, True, "float64"),
    (10, False, "float32"),
]


@pytest.mark.parametrize(("models", "of_deltas", "real"), MIXES)
def test_a_mix_is_the_equation_in_the_stated_precision(models, of_deltas, real):
    inputs = ("BF16", "F16", "F32") if real == "float32" else ("F64", "BF16", "F32")
    weight = [0.5 - 0.07 * i for i in range(models)]
    kernel = MixKernel(weighted, models, of_deltas, ("numbers", "number"), real)
    for count in SIZES:
        raws, codes, x = made(count, models, inputs, seed=count)
        base_raw = raw(np.random.default_rng(1).standard_normal(count), "BF16")
        base = values_of(base_raw, "BF16").astype(real)
        values = x.astype(real) - base if of_deltas else x.astype(real)
        mixed = expected_weighted(values, weight, 1.25, real)
        expected = base + mixed if of_deltas else mixed
        rounded = {
            "F16": expected.astype(np.float16),
            "F32": expected.astype(np.float32),
            "F64": expected.astype(np.float64),
        }
        for out_dtype, by_numpy in rounded.items():
            out, bad = run_mix(
                kernel, raws, codes, base_raw, "BF16", out_dtype, count, numbers(weight, real), 1.25
            )
            assert bad == -1
            assert out.tobytes() == by_numpy.tobytes()


@pytest.mark.parametrize("models", [1, 3, 10])
def test_differences_are_mixed_as_the_models_that_they_make(models):
    weight = [0.5 - 0.07 * i for i in range(models)]
    of_models = MixKernel(weighted, models, True, ("numbers", "number"), "float32")
    kernel = dataclasses.replace(of_models, differences=True)
    for count in SIZES:
        raws, codes, x = made(count, models, ("BF16", "F16", "F32"), seed=count)
        base_raw = raw(np.random.default_rng(1).standard_normal(count), "BF16")
        base = values_of(base_raw, "BF16").astype(np.float32)
        values = (base + x.astype(np.float32)) - base  # what is left of a difference in a model
        expected = base + expected_weighted(values, weight, 1.25, "float32")
        arguments = numbers(weight, "float32"), 1.25
        out, bad = run_mix(kernel, raws, codes, base_raw, "BF16", "F32", count, *arguments)
        assert bad == -1
        assert out.tobytes() == expected.astype(np.float32).tobytes()


@pytest.mark.parametrize("real", ["float32", "float64"])
@pytest.mark.parametrize("count", [0, 1, 64, 65, 8192])
def test_four_bit_codes_are_decoded_by_group(count, real):
    random = np.random.default_rng(count)
    codes = random.integers(0, 256, count, np.uint8)
    groups = -(-count // 64)
    scales, minimums = (random.standard_normal(groups).astype(real) for _ in range(2))
    values = np.array([half for byte in codes.tolist() for half in (byte & 15, byte >> 4)], real)
    expected = values * np.repeat(scales, 128)[: 2 * count] + np.repeat(minimums, 128)[: 2 * count]
    out = np.empty(2 * count, real)
    in_both_ways(FourBitKernel(real))(codes, scales, minimums, out)
    assert out.tobytes() == expected.astype(real).tobytes()


@pytest.mark.parametrize("models", [2, 9])
def test_noise_is_that_of_the_place_of_each_element(models):
    kernel = MixKernel(noisy, models, False, ("noise", "bernoulli"), "float32")
    keys, other = (np.arange(a, a + models, dtype=np.uint64) for a in (3, 90))
    chance = np.linspace(0.2, 0.8, models).astype(np.float32)
    for start, count in ((0, TILE + 5), (LEAF * 3, 11), (2**40, 77)):
        raws, codes, x = made(count, models, ("F32",))
        total = np.zeros(count, np.float32)
        for i in range(models):
            draws = uniform(int(keys[i]), start, count)
            kept = (uniform(int(other[i]), start, count) < chance[i]).astype(np.float32)
            total = total + (draws * x[i].astype(np.float32) + kept)
        out, bad = run_mix(
            kernel,
            raws,
            codes,
            NOTHING,
            "F32",
            "F32",
            count,
            numbers([0] * models, "float32"),
            keys,
            chance,
            other,
            *unkept(models),
            start=start,
        )
        assert bad == -1
        np.testing.assert_array_equal(out.view(np.float32), total)


@pytest.mark.parametrize("models", [1, 3, 10])
def test_where_the_mix_is_zero_the_bits_of_the_base_stay(models):
    kernel = MixKernel(
        weighted, models, True, ("numbers", "number"), "float64" if models == 10 else "float32"
    )
    base = np.array([-0.0, 0.0, 1e-42, 3.0], np.float32)
    data = base.view(np.uint8)
    weight = numbers([0.3] * models, kernel.real)
    out, bad = run_mix(
        kernel, [data] * models, np.full(models, CODES["F32"]), data, "F32", "F32", 4, weight, 1.0
    )
    assert bad == -1
    assert out.tobytes() == base.tobytes()


@pytest.mark.parametrize("models", [3, 10])
def test_where_all_inputs_are_equal_that_value_is_kept_if_asked(models):
    kernel = MixKernel(
        weighted, models, False, ("numbers", "number"), "float64" if models == 3 else "float32"
    )
    random = np.random.default_rng(0)
    values = random.standard_normal(TILE + 1).astype(np.float32)
    values[7] = -0.0
    other = values.copy()
    other[5] += 1
    raws = [values.view(np.uint8)] * (models - 1) + [other.view(np.uint8)]
    weight = numbers([1 / models] * models, kernel.real)  # 1/3 and 1/10 do not sum to 1 in every rounding
    found = {}
    for keep in (True, False):
        out, _ = run_mix(
            kernel,
            raws,
            np.full(models, CODES["F32"]),
            NOTHING,
            "F32",
            "F32",
            values.size,
            weight,
            1.0,
            keep_equal=keep,
        )
        found[keep] = out.view(np.float32)
    equal = np.arange(values.size) != 5
    assert found[True][equal].tobytes() == values[equal].tobytes()
    assert found[False][equal].tobytes() != values[equal].tobytes()
    assert found[True][5] == found[False][5]


@pytest.mark.parametrize("models", [3, 10])
@pytest.mark.parametrize("what", ["input", "base"])
def test_a_value_that_is_not_finite_is_reported_with_its_tile(models, what):
    kernel = MixKernel(weighted, models, True, ("numbers", "number"), "float32" if models == 3 else "float64")
    count = 2 * TILE + 9
    weight = numbers([0.0] * models, kernel.real)
    for place in (0, TILE, 2 * TILE + 8):
        for bad in (math.nan, math.inf):
            values = np.ones((models + 1, count), np.float32)
            values[models - 1 if what == "input" else models, place] = bad
            raws = [v.view(np.uint8) for v in values]
            _, found = run_mix(
                kernel, raws[:-1], np.full(models, CODES["F32"]), raws[-1], "F32", "F32", count, weight, 1.0
            )
            assert found == place // TILE * TILE


def test_an_output_beyond_its_dtype_is_reported():
    kernel = MixKernel(weighted, 3, True, ("numbers", "number"), "float32")
    ones = np.ones(5, np.float32).view(np.uint8)
    big = np.full(5, 60_000, np.float32).view(np.uint8)
    weight = numbers([1, 1, 1], "float32")
    assert (
        run_mix(kernel, [big, big, big], np.full(3, CODES["F32"]), ones, "F32", "F16", 5, weight, 1.0)[1] == 0
    )
    assert (
        run_mix(kernel, [big, big, big], np.full(3, CODES["F32"]), ones, "F32", "BF16", 5, weight, 1.0)[1]
        == -1
    )


# Measures.


def above(x, limit):
    return x if x > limit else 0.0


def plus_drawn(x, drawn, draw):
    return drawn * x + draw


def measure_one(run, data, dtype, base, base_dtype, start, *rest):
    """Call a measuring kernel of one model; ``rest`` are its outputs and arguments, each with a row a model."""
    run((data,), np.array([CODES[dtype]]), base, CODES[base_dtype], start, np.array([0]), *rest)


def leaves_of(count: int) -> int:
    return -(-count // LEAF)


def in_lanes(values: np.ndarray) -> np.ndarray:
    """The stated sum: element i of a leaf goes to lane i modulo LANES; lanes are added in order."""
    sums = []
    for a in range(0, values.size, LEAF):
        lanes = np.zeros(LANES)
        for g in range(a, min(a + LEAF, values.size), LANES):
            part = values[g : min(g + LANES, a + LEAF)]
            lanes[: part.size] += part
        sums.append(functools.reduce(lambda a, b: a + b, lanes.tolist(), 0.0))
    return np.array(sums)


@pytest.mark.parametrize(
    ("of_deltas", "real", "dtype"), [(True, "float32", "BF16"), (False, "float64", "F64")]
)
def test_a_sum_is_that_of_fixed_lanes_in_float64(of_deltas, real, dtype):
    run = in_both_ways(MeasureKernel("sum", magnitude, 1, of_deltas, (), real))
    for count in SIZES:
        (data,), _, x = made(count, 1, (dtype,), seed=count)
        base_raw = raw(np.random.default_rng(1).standard_normal(count), "F16")
        values = (
            x[0].astype(real) - values_of(base_raw, "F16").astype(real) if of_deltas else x[0].astype(real)
        )
        leaves = np.empty(leaves_of(count))
        measure_one(run, data, dtype, base_raw, "F16", 0, leaves[None])
        np.testing.assert_array_equal(leaves, in_lanes(np.abs(values).astype(np.float64)))
        assert math.fsum(leaves) == pytest.approx(math.fsum(np.abs(values)), rel=1e-13)


def test_a_sum_does_not_depend_on_how_blocks_are_cut_at_leaves():
    run = in_both_ways(MeasureKernel("sum", magnitude, 1, True, (), "float32"))
    count = 3 * LEAF + 5001
    (data, base), _, _ = made(count, 2, ("F32",))
    whole = np.empty(4)
    measure_one(run, data, "F32", base, "F32", 0, whole[None])
    parts = np.empty(4)
    for a, b in ((3, 4), (0, 1), (1, 3)):
        part = slice(4 * a * LEAF, 4 * min(b * LEAF, count))
        measure_one(run, data[part], "F32", base[part], "F32", a * LEAF, parts[None, a:b])
    assert parts.tobytes() == whole.tobytes()


def test_a_count_is_of_what_is_not_zero():
    run = in_both_ways(MeasureKernel("count", above, 1, False, ("number",), "float32"))
    for count in SIZES:
        (data,), _, x = made(count, 1, ("F16",), seed=count)
        leaves = np.empty(leaves_of(count), np.int64)
        measure_one(run, data, "F16", NOTHING, "F64", 0, leaves[None], 0.75)
        expected = [np.count_nonzero(x[0, a : a + LEAF] > 0.75) for a in range(0, count, LEAF)]
        assert leaves.tolist() == expected


def test_values_are_those_of_the_function_with_noise_of_their_place():
    run = in_both_ways(MeasureKernel("values", plus_drawn, 1, True, ("bernoulli", "noise"), "float32"))
    start, count = 5 * LEAF, TILE + 9
    (data, base), _, x = made(count, 2, ("F32",))
    found = np.empty(count, np.float32)
    chance, first, unused, second = (
        np.array([v], t) for v, t in ((0.3, "f4"), (11, "u8"), (0.0, "f4"), (12, "u8"))
    )
    measure_one(run, data, "F32", base, "F32", start, found[None], chance, first, *unkept(1), unused, second)
    drawn = (uniform(11, start, count) < np.float32(0.3)).astype(np.float32)
    delta = x[0].astype(np.float32) - x[1].astype(np.float32)
    np.testing.assert_array_equal(found, drawn * delta + uniform(12, start, count))


@pytest.mark.parametrize(("real", "dtype"), [("float32", "BF16"), ("float64", "F64")])
def test_a_bracket_keeps_what_lies_between_its_bounds_and_counts_what_is_above(real, dtype):
    run = in_both_ways(MeasureKernel("bracket", magnitude, 2, True, (), real))
    for count in (1, 63, 64, TILE + 9, 2 * TILE + 130):
        raws, codes, x = made(count, 3, (dtype,), seed=count)
        *raws, base = raws
        values = np.abs(x[:2].astype(real) - x[2].astype(real))
        chosen = np.array([1, 1, 1, 0])  # one model several times
        low, high = np.array([0.1, 0.5, 0.5, 0.0], real), np.array([0.2, np.inf, 0.5, 9.0], real)
        low[2] = high[2] = values[1, count // 2]
        counts = np.zeros((4, 2), np.int64)
        kept = np.zeros((4, count + WORD), real)
        run(tuple(raws), codes[:2], base, codes[2], 0, chosen, low, high, counts, kept)
        for n, i in enumerate(chosen):
            inside = values[i][(values[i] >= low[n]) & (values[i] <= high[n])]
            assert counts[n].tolist() == [np.count_nonzero(values[i] > high[n]), inside.size]
            # Where both bounds are the same, all that lies between is known.
            np.testing.assert_array_equal(kept[n, : inside.size], inside if n != 2 else np.zeros(inside.size))


def non_negative(x):
    return max(-0.0, x) if x > 0 else -0.0


@pytest.mark.parametrize(("real", "dtype"), [("float32", "BF16"), ("float64", "F64")])
def test_a_histogram_counts_upper_bits_then_the_next_of_one_prefix(real, dtype):
    run = in_both_ways(MeasureKernel("histogram", magnitude, 1, False, (), real))
    bits_type, width = (np.uint32, 32) if real == "float32" else (np.uint64, 64)
    count = TILE * 2 + 5
    (data,), _, x = made(count, 1, (dtype,))
    bits = np.abs(x[0]).astype(real).view(bits_type).astype(object)
    prefix = 0
    for shift in range(width - 16, -1, -16):
        bins = np.zeros(65_536, np.int64)
        bins[3] = 5
        measure_one(
            run, data, dtype, NOTHING, "F64", 0, np.uint64(shift), np.array([prefix], np.uint64), bins[None]
        )
        bins[3] -= 5
        inside = [b >> shift & 0xFFFF for b in bits if b >> (shift + 16) == prefix]
        np.testing.assert_array_equal(bins, np.bincount(inside, minlength=65_536))
        prefix = prefix << 16 | inside[len(inside) // 2]
    assert prefix in bits


def test_a_zero_with_a_sign_counts_as_zero():
    run = in_both_ways(MeasureKernel("histogram", non_negative, 1, False, (), "float32"))
    bins = np.zeros(65_536, np.int64)
    values = np.array([-0.0, 0.0, -3.0, 2.0], np.float32).view(np.uint8)
    measure_one(run, values, "F32", NOTHING, "F64", 0, np.uint64(16), np.zeros(1, np.uint64), bins[None])
    assert {int(i): int(bins[i]) for i in np.flatnonzero(bins)} == {0: 3, 0x4000: 1}


def scaled_range(own, values, factor):
    """The distance of a value from the least of all models'."""
    least = values[0]
    for i in range(len(values)):
        least = min(least, values[i])
    return factor * (own - least)


@pytest.mark.parametrize("models", [3, 10])
def test_a_function_across_models_sees_all_values_of_a_place(models):
    run = in_both_ways(
        MeasureKernel("values", scaled_range, models, True, ("number",), "float32", across=True)
    )
    count = TILE + 77
    raws, codes, x = made(count, models, ("BF16", "F32"))
    base_raw = raw(np.random.default_rng(1).standard_normal(count), "F32")
    delta = x.astype(np.float32) - values_of(base_raw, "F32").astype(np.float32)
    found = np.empty((2, count), np.float32)
    run(tuple(raws), codes, base_raw, CODES["F32"], 0, np.array([2, 0]), found, np.float32(0.5))
    np.testing.assert_array_equal(found, np.float32(0.5) * (delta[[2, 0]] - delta.min(0)))


def numbers_of_places(x, by_row, by_column):
    return x[0] * by_row[0] + x[1] * by_row[1] + by_column[0] - by_column[1]


def test_numbers_of_rows_and_columns_follow_the_place_of_an_element():
    kernel = MixKernel(numbers_of_places, 2, False, ("rows", "columns"), "float32")
    rows, columns = 300, 41
    random = np.random.default_rng(0)
    x = random.standard_normal((2, rows, columns)).astype(np.float32)
    by_row = random.standard_normal((2, rows)).astype(np.float32)
    by_column = random.standard_normal((2, columns)).astype(np.float32)
    expected = x[0] * by_row[0][:, None] + x[1] * by_row[1][:, None] + by_column[0] - by_column[1]
    for start, stop in ((0, rows * columns), (5000, 5003), (777, 11_111)):
        parts = [v.reshape(-1)[start:stop].view(np.uint8) for v in x]
        arguments = (by_row, columns, by_column, columns)
        out, bad = run_mix(
            kernel,
            parts,
            np.full(2, CODES["F32"]),
            NOTHING,
            "F32",
            "F32",
            stop - start,
            *arguments,
            start=start,
        )
        assert bad == -1
        np.testing.assert_array_equal(out.view(np.float32), expected.reshape(-1)[start:stop])


def drawn_alone(x, drawn):
    return drawn[0] + 0.0 * x[0]


def test_draws_by_rank_have_the_probability_of_their_rank():
    kernel = MixKernel(drawn_alone, 1, False, ("ranked",), "float32")
    count, start = TILE + 100, 3 * LEAF
    (data,), codes, _ = made(count, 1, ("F32",))
    ranks = np.random.default_rng(2).random((1, count)).astype(np.float32)
    low, step, key = np.array([0.2], np.float32), np.array([0.5], np.float32), np.array([9], np.uint64)
    out, _ = run_mix(
        kernel, [data], codes, NOTHING, "F32", "F32", count, low, key, step, ranks, *unkept(1), start=start
    )
    expected = uniform(9, start, count) < low + step * ranks[0]
    assert 0.4 < expected.mean() < 0.5
    np.testing.assert_array_equal(out.view(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("kind", ["bernoulli", "ranked"])
@pytest.mark.parametrize("chance", [0.0, 2.0**-24, 0.3, 1 - 2.0**-24, 1.0])
def test_draws_are_kept_as_bits_and_read_again_as_far_as_there_is_room(kind, chance):
    run = in_both_ways(MixKernel(drawn_alone, 1, False, (kind,), "float32"))
    count = LEAF + 2 * TILE + 100
    (data,), codes, _ = made(count, 1, ("F32",))
    first, key, other = np.array([chance], np.float32), np.array([9], np.uint64), np.array([8], np.uint64)
    ranked = () if kind == "bernoulli" else (np.zeros(1, np.float32), np.zeros((1, count), np.float32))

    def mixed(keys: np.ndarray, words: np.ndarray, is_known: bool, start: int) -> np.ndarray:
        part = slice(4 * start, 4 * count)
        out = np.zeros(4 * (count - start), np.uint8)
        ranks = [a[:, start:].copy() if a.ndim == 2 else a for a in ranked]
        arguments = (first, keys, *ranks, words, is_known)
        run((data[part],), codes, NOTHING, CODES["F32"], out, CODES["F32"], start, False, *arguments)
        return out.view(np.float32)

    expected, fresh = (uniform(k, 0, count) < first[0] for k in (9, 8))
    bits = np.zeros(-(-count // 64) * 64, bool)
    bits[:count] = expected
    words = np.packbits(bits, bitorder="little").view(np.uint64)[None]
    for room in (words.size, LEAF // 64, 0):
        for start in (LEAF, 0):
            kept = np.zeros((1, room), np.uint64)
            np.testing.assert_array_equal(mixed(key, kept, False, start), expected[start:])
            np.testing.assert_array_equal(kept[0, start // 64 :], words[0, start // 64 : room])
            again, read = mixed(other, kept, True, start), max(min(64 * room, count), start)
            np.testing.assert_array_equal(again, [*expected[start:read], *fresh[read:]])


def test_ranks_are_shares_of_the_way_up_and_equal_values_share_theirs():
    values = np.array([[3.0, 1.0, 2.0, 5.0, 4.0], [7.0, 7.0, 0.0, 9.0, 7.0]], np.float32)
    alone = np.array([[3.0], [1.0]], np.float32)
    for real in (np.float32, np.float64):
        keys, ranks = np.empty((2, 5), np.uint64), np.empty((2, 5), np.float32)
        sort_rows(values.astype(real), keys)
        in_both_ways(RankKernel("float32"))(keys, shares_of(5), ranks)
        assert ranks.tolist() == [[0.5, 0.0, 0.25, 1.0, 0.75], [0.5, 0.5, 0.0, 1.0, 0.5]]
        keys, ranks = np.empty((2, 1), np.uint64), np.empty((2, 1), np.float32)
        sort_rows(alone.astype(real), keys)
        in_both_ways(RankKernel("float32"))(keys, shares_of(1), ranks)
        assert ranks.tolist() == [[0.5], [0.5]]


# Inner products.


def square(pairs: np.ndarray, models: int) -> np.ndarray:
    """The upper half of a matrix from its pairs."""
    matrix = np.zeros((models, models))
    matrix[np.triu_indices(models)] = pairs
    return matrix


@pytest.mark.parametrize(
    ("models", "of_deltas", "real"),
    [
        (1, False, "float32"),
        (2, True, "float32"),
        (3, False, "float64"),
        (5, True, "float64"),
        (10, True, "float32"),
    ],
)
def test_a_gram_matrix_is_numpys(models, of_deltas, real):
    run = in_both_ways(GramKernel(models, of_deltas, real))
    inputs = ("BF16", "F16", "F32") if real == "float32" else ("F64", "BF16", "F32")
    for count in (1, TILE + 3, LEAF + 77):
        raws, codes, x = made(count, models, inputs, seed=count)
        base_raw = raw(np.random.default_rng(1).standard_normal(count), "F16")
        exact = (x.astype(real) - values_of(base_raw, "F16").astype(real) if of_deltas else x).astype(
            np.float64
        )
        leaves = np.zeros((leaves_of(count), models * (models + 1) // 2))
        run(tuple(raws), codes, base_raw, CODES["F16"], 0, count, leaves)
        scale = np.sqrt(np.outer((exact**2).sum(1), (exact**2).sum(1)))
        assert (np.abs(square(leaves.sum(0), models) - np.triu(exact @ exact.T)) <= 1e-13 * scale).all()


def test_inner_products_tell_models_apart_that_float32_cannot():
    run = in_both_ways(GramKernel(2, True, "float32"))
    random = np.random.default_rng(0)
    a = random.standard_normal(LEAF).astype(np.float32)
    b = a.copy()
    b[0] = np.nextafter(b[0], np.float32(9))
    sums = np.zeros((1, 3))
    codes = np.full(2, CODES["F32"])
    zeros = np.zeros(LEAF, np.float32).view(np.uint8)
    run((a.view(np.uint8), b.view(np.uint8)), codes, zeros, CODES["F32"], 0, LEAF, sums)
    difference = float(a[0]) * (float(b[0]) - float(a[0]))
    assert sums[0, 1] - sums[0, 0] == pytest.approx(difference, rel=0.05)
    assert np.float32(sums[0, 1]) == np.float32(sums[0, 0])


@pytest.mark.parametrize("row", [2 * LEAF + 999, 1, 7, 3000, LEAF - 1])
def test_inner_products_of_rows_do_not_depend_on_how_blocks_are_cut_at_leaves(row):
    run = in_both_ways(GramKernel(2, True, "float32"))
    count = 2 * LEAF + 999
    raws, codes, x = made(count, 3, ("BF16",))

    def segment(element: int) -> int:
        return element // row + element // LEAF

    whole, parts = np.zeros((segment(count - 1) + 1, 3)), np.zeros((segment(count - 1) + 1, 3))
    run(tuple(raws[:2]), codes[:2], raws[2], CODES["BF16"], 0, row, whole)
    for a, b in ((2, 3), (0, 2)):
        begin, stop = a * LEAF, min(b * LEAF, count)
        part = slice(2 * begin, 2 * stop)
        into = parts[segment(begin) : segment(stop - 1) + 1]
        run(tuple(r[part] for r in raws[:2]), codes[:2], raws[2][part], CODES["BF16"], begin, row, into)
    assert parts.tobytes() == whole.tobytes()
    delta = x[:2].astype(np.float32).astype(np.float64) - x[2]
    for r in (0, count // row - 1):
        inside = slice(r * row, (r + 1) * row)
        of_row = whole[segment(inside.start) : segment(inside.stop - 1) + 1].sum(0)
        expected = [delta[i, inside] @ delta[j, inside] for i, j in ((0, 0), (0, 1), (1, 1))]
        assert of_row == pytest.approx(expected, rel=1e-6)  # the differences are of float32


@pytest.mark.parametrize("columns", [1, 5, 1000, TILE + 1])
def test_inner_products_of_columns_are_added_block_by_block(columns):
    run = in_both_ways(ColumnGramKernel(2, False, "float32"))
    rows = 2 * LEAF // columns + 3
    raws, codes, x = made(rows * columns, 2, ("F32",))
    sums = np.zeros((3, columns))
    for begin, stop in ((0, LEAF), (LEAF, rows * columns)):
        run(tuple(r[4 * begin : 4 * stop] for r in raws), codes, NOTHING, 0, begin, sums)
    wide = x.reshape(2, rows, columns)
    expected = [(wide[i] * wide[j]).sum(0) for i, j in ((0, 0), (0, 1), (1, 1))]
    np.testing.assert_allclose(sums, expected, rtol=1e-10, atol=1e-10)


# Facts.


def test_facts_are_measured_before_what_uses_them():
    limit = KthLargest((0.5, 0.5))
    kept = Sum(above, (limit,))
    ratio = Derived(lambda a, b: a + b, (kept, Sum(magnitude)))
    last = Count(above, (ratio, Bernoulli((0.5, 0.5)), Noise()))
    found = levels((last, 1.0, Gram()))
    assert [set(level) for level in found] == [{limit, Sum(magnitude), Gram()}, {kept}, {last}]
    assert sum(map(len, found)) == 5
    assert levels((0.5, (1.0, 2.0), Noise())) == []


def test_a_derived_fact_is_a_function_of_numbers():
    total = Sum(magnitude)
    assert resolve(Derived(lambda s, f: tuple(f * x for x in s), (total, 2.0)), {total: (1.0, 3.0)}) == (
        2.0,
        6.0,
    )
    with pytest.raises(MethodError) as caught:
        resolve(Derived(lambda n: n, (Noise(),)), {})
    assert (
        str(caught.value)
        == "Noise() has a value for each element; it cannot be an argument of a derived fact."
    )


@pytest.mark.parametrize("rank", [1, 3, 4, 9])
@pytest.mark.parametrize("real", ["float32", "float64"])
def test_folding_sums_over_the_rank_in_index_order(real: str, rank: int) -> None:
    random = np.random.default_rng(rank)
    dtype = np.dtype(real)
    rows, columns = 5, 1301
    base = random.standard_normal((rows, columns)).astype(dtype)
    left, right = (
        random.standard_normal((rows, rank)).astype(dtype),
        random.standard_normal((rank, columns)).astype(dtype),
    )
    total = np.zeros((rows, columns), dtype)
    for k in range(rank):  # numpy rounds each product and each sum, as the law asks
        total = total + left[:, k, None] * right[k]
    expected = (base + total * dtype.type(0.3)).reshape(-1)
    code = {"float32": "F32", "float64": "F64"}[real]
    for first, last in ((0, rows * columns), (7, 8), (1300, 1303), (1, 4000)):
        out = np.empty(last - first, dtype)
        raw = base.reshape(-1)[first:last].copy().view(np.uint8)
        run = in_both_ways(FoldKernel(real))  # type: ignore[arg-type]
        assert run(raw, CODES[code], left, right, float(dtype.type(0.3)), first, out) == -1
        np.testing.assert_array_equal(out, expected[first:last])


@pytest.mark.parametrize("place", [0, 1300, 1301, 6504])
def test_folding_says_whether_a_result_is_not_finite(place: int) -> None:
    rows, columns = 5, 1301
    left, right = np.zeros((rows, 2), np.float32), np.ones((2, columns), np.float32)
    left[place // columns] = 3e38
    right[:, np.arange(columns) != place % columns] = 0
    raw, out = np.zeros(4 * rows * columns, np.uint8), np.empty(rows * columns, np.float32)
    run = in_both_ways(FoldKernel("float32"))
    assert run(raw, CODES["F32"], left, right, 1.0, 0, out) >= 0
    assert np.flatnonzero(np.isinf(out)).tolist() == [place]
    assert (
        run(raw, CODES["F32"], left, right, 0.1, 0, out) >= 0
    )  # the sum overflows, also where its scale is small
    assert run(raw, CODES["F32"], left / 2, right, 0.1, 0, out) == -1


@pytest.mark.parametrize("codes", [("BF16", "BF16"), ("F32", "F16"), ("F64", "F32"), ("F8_E4M3", "F32")])
@pytest.mark.parametrize("count", [1, 511, 5000])
def test_a_difference_is_rounded_and_its_squares_are_exact(codes: tuple[str, str], count: int) -> None:
    random = np.random.default_rng(count)
    real = "float64" if "F64" in codes else "float32"
    raws = [random.integers(0, 64, count * DTYPES[code].bytes, np.uint8) for code in codes]
    first, second = (decode(raw, code).astype(np.float64) for raw, code in zip(raws, codes, strict=True))
    out, sums = np.empty(count, real), np.empty(2)
    run = in_both_ways(DifferenceKernel(real))  # type: ignore[arg-type]
    run(raws[0], CODES[codes[0]], raws[1], CODES[codes[1]], out, sums)
    assert out.tobytes() == (first - second).astype(real).tobytes()
    np.testing.assert_allclose(sums, [math.fsum((first - second) ** 2), math.fsum(second**2)], rtol=1e-14)
    alone = np.empty(1)
    run(raws[0], CODES[codes[0]], raws[1], CODES[codes[1]], out[:0], alone)
    assert alone[0] == sums[0]
