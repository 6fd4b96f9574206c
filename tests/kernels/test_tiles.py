"""The compiled codecs against torch, numpy and exact rational arithmetic: every pattern, every boundary, one rounding."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from numba import njit

from alnico.kernels import tiles
from alnico.kernels.array_tiles import encode as encode_by_numpy
from alnico.kernels.constants import BF16, CODES, F16, F32, F64, WIDE_CODES
from alnico.numerics.dtypes import FLOAT8
from alnico.numerics.dtypes import decode as decode_by_numpy
from alnico.numerics.noise import uniform

# Functions of kernels have no form that Python can call.
decode32 = njit(lambda raw, code, tile: tiles.decode32(raw, code, tile))
decode64 = njit(lambda raw, code, tile: tiles.decode64(raw, code, tile))
encode32 = njit(lambda tile, code, raw: tiles.encode32(tile, code, raw))
encode64 = njit(lambda tile, code, raw: tiles.encode64(tile, code, raw))
fill_noise = njit(lambda key, start, tile: tiles.fill_noise(key, start, tile))

TORCH = {F64: torch.float64, F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
WIDTH = {F64: 8, F32: 4, F16: 2, BF16: 2}
OUT = {F64: np.uint64, F32: np.uint32, F16: np.uint16, BF16: np.uint16}
SIGNED = {F64: np.int64, F32: np.int32, F16: np.int16, BF16: np.int16}
ALL_16_BITS = np.arange(65_536, dtype=np.uint16)


def by_torch(values: np.ndarray, code: int) -> np.ndarray:
    """The bits of ``values`` rounded to a dtype by torch."""
    return (
        torch.from_numpy(values)
        .to(TORCH[code])
        .view(getattr(torch, np.dtype(SIGNED[code]).name))
        .numpy()
        .view(OUT[code])
    )


def encoded(encode, values: np.ndarray, code: int) -> tuple[np.ndarray, bool]:
    raw = np.zeros(values.size * WIDTH[code], np.uint8)
    bad = encode(values.copy(), code, raw)
    return raw.view(OUT[code]), bool(bad)


def is_bad(encode, value, code: int) -> bool:
    """Whether one value among others is flagged."""
    values = np.ones(9, type(value))
    values[5] = value
    return encoded(encode, values, code)[1]


# Decoding.


@pytest.mark.parametrize("code", [BF16, F16])
@pytest.mark.parametrize(("decode", "real"), [(decode32, np.float32), (decode64, np.float64)])
def test_every_16_bit_pattern_decodes_as_in_torch(code, decode, real):
    tile = np.empty(65_536, real)
    assert decode(ALL_16_BITS.view(np.uint8), code, tile)
    expected = torch.from_numpy(ALL_16_BITS.view(np.int16)).view(TORCH[code]).to(torch.float32).numpy()
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(tile[finite], expected[finite].astype(real))
    np.testing.assert_array_equal(np.signbit(tile[finite]), np.signbit(expected[finite]))
    for bits, is_finite in zip(ALL_16_BITS, finite, strict=True):
        if not is_finite or bits % 97 == 0:
            assert decode(np.array([bits]).view(np.uint8), code, np.empty(1, real)) != is_finite


@pytest.mark.parametrize("name", FLOAT8)
@pytest.mark.parametrize(("decode", "real"), [(decode32, np.float32), (decode64, np.float64)])
def test_every_float8_code_decodes_as_numerics_do(name, decode, real):
    codes = np.arange(256, dtype=np.uint8)
    expected = decode_by_numpy(codes, name)
    tile = np.empty(256, real)
    assert decode(codes, CODES[name], tile)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(tile[finite], expected[finite].astype(real))
    np.testing.assert_array_equal(np.signbit(tile[finite]), np.signbit(expected[finite]))
    assert [bool(decode(codes[i : i + 1], CODES[name], np.empty(1, real))) for i in range(256)] == list(
        ~finite
    )


@pytest.mark.parametrize("count", [0, 1, 7, 4095])
def test_an_odd_number_of_elements_is_decoded(count):
    values = np.random.default_rng(count).standard_normal(count)
    tile = np.empty(count, np.float32)
    assert not decode32(values.astype(np.float32).view(np.uint8), F32, tile)
    np.testing.assert_array_equal(tile, values.astype(np.float32))
    wide = np.empty(count)
    assert not decode64(values.view(np.uint8), F64, wide)
    np.testing.assert_array_equal(wide, values)
    assert not decode64(values.astype(np.float32).view(np.uint8), F32, wide)
    np.testing.assert_array_equal(wide, values.astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_flagged_wherever_it_stands(bad):
    for place in (0, 5, 8):
        values = np.full(9, np.finfo(np.float32).max, np.float64)
        values[place] = bad
        assert decode64(values.view(np.uint8), F64, np.empty(9))
        assert decode64(values.astype(np.float32).view(np.uint8), F32, np.empty(9))
        assert decode32(values.astype(np.float32).view(np.uint8), F32, np.empty(9, np.float32))
        for code in (F64, F32, F16, BF16):
            values = np.ones(9)
            values[place] = bad
            assert encoded(encode64, values, code)[1]
            assert encoded(encode32, values.astype(np.float32), code)[1]


# Rounding float32.


def boundaries() -> np.ndarray:
    """float32 at and beside every value of both 16-bit formats, and at and beside every midpoint between two values."""
    with np.errstate(over="ignore"):
        halves = ALL_16_BITS[:0x7C00].view(np.float16).astype(np.float64)
    shorts = (ALL_16_BITS[:0x7F80].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    exact = np.concatenate([np.concatenate([v, (v[1:] + v[:-1]) / 2]) for v in (halves, shorts)])
    at = exact.astype(np.float32)  # midpoints of both are exact in float32
    assert (at == exact).all()
    around = np.concatenate([at, np.nextafter(at, np.float32(np.inf)), np.nextafter(at, np.float32(-np.inf))])
    around = around[np.isfinite(around)]
    return np.concatenate([around, -around])


def random_patterns(count: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32).view(np.float32)
    return values[np.isfinite(values)]


def in_range(values: np.ndarray, code: int) -> np.ndarray:
    """Those values that stay finite, by the definition of rounding: below the midpoint after the largest value."""
    limit = {F16: 65_520.0, BF16: (2 - 2**-8) * 2.0**127, F32: (2 - 2**-24) * 2.0**127, F64: math.inf}[code]
    return values[np.abs(values.astype(np.float64)) < limit]


@pytest.mark.parametrize("code", [BF16, F16, F32, F64])
def test_float32_is_rounded_as_in_torch(code):
    values = in_range(np.concatenate([boundaries(), random_patterns(2_000_000, 1)]), code)
    near = np.random.default_rng(2).standard_normal(500_000).astype(np.float32)
    for part in (values, near, near * np.float32(2.0**-18), values[:1], values[:4097]):
        found, bad = encoded(encode32, part, code)
        assert not bad
        np.testing.assert_array_equal(found, by_torch(part, code))


@pytest.mark.parametrize(
    ("code", "largest"),
    [
        (F16, np.float32(65_519.996)),
        (BF16, np.uint32(0x7F7F7FFF).view(np.float32)),
        (F32, np.finfo(np.float32).max),
    ],
)
def test_overflow_is_flagged_from_the_midpoint_on(code, largest):
    with np.errstate(over="ignore"):
        first = np.nextafter(largest, np.float32(np.inf))
    for sign in (1, -1):
        assert not is_bad(encode32, np.float32(sign * largest), code)
        assert is_bad(encode32, np.float32(sign * first), code)
        assert not is_bad(encode64, np.float64(sign * largest), code)


def test_what_overflows_is_written_as_an_infinity():
    values = np.array([65_520, -65_520, 1e38, 3.4e38, -3.4e38], np.float32)
    np.testing.assert_array_equal(encoded(encode32, values, F16)[0], [0x7C00, 0xFC00, 0x7C00, 0x7C00, 0xFC00])
    np.testing.assert_array_equal(encoded(encode32, values[-2:], BF16)[0], [0x7F80, 0xFF80])


@np.errstate(over="ignore")
@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_wide_outputs_are_the_rounded_values_in_float32(name):
    narrow, wide = CODES[name], WIDE_CODES[name]
    few = in_range(np.concatenate([boundaries()[::7], random_patterns(50_000, 3)]), narrow)
    spoilt = np.array([1.0, 65_520, -3.4e38], np.float32)
    for values in (few, few[:1], few[:0], few[:4097], spoilt):
        for encode, real in ((encode32, np.float32), (encode64, np.float64), (encode_by_numpy, np.float64)):
            given = values.astype(real) * real(1 + 2.0**-40)  # float64 beside the midpoints
            short, is_flagged = encoded(encode, given, narrow)
            expected = (
                torch.from_numpy(short.view(SIGNED[narrow])).view(TORCH[narrow]).to(torch.float32).numpy()
            )
            raw = np.full(4 * values.size, 0xA5, np.uint8)
            assert bool(encode(given.copy(), wide, raw)) == is_flagged == (values is spoilt)
            np.testing.assert_array_equal(raw.view(np.uint32), expected.view(np.uint32))


# Rounding float64 once.

MANTISSA = {F16: 10, BF16: 7, F32: 23}
LOWEST = {F16: -14, BF16: -126, F32: -126}


def rounded(value: float, code: int) -> float:
    """``value`` to nearest, ties to even, in exact rational arithmetic."""
    exact = abs(Fraction(value))
    if exact == 0:
        return value
    exponent = max(math.frexp(value)[1] - 1, LOWEST[code])
    step = Fraction(2) ** (exponent - MANTISSA[code])
    return math.copysign(float(round(exact / step) * step), value)  # round() of a Fraction goes to even


def values_of(bits: np.ndarray, code: int) -> np.ndarray:
    return torch.from_numpy(bits.view(SIGNED[code])).view(TORCH[code]).to(torch.float64).numpy()


@pytest.mark.parametrize("code", [BF16, F16, F32])
def test_float64_is_rounded_once(code):
    # At a midpoint, and so little beside it that a first rounding to float32 would put it on the midpoint.
    random = np.random.default_rng(code)
    patterns = random.integers(0, {F16: 0x7BFF, BF16: 0x7F7F, F32: 0x7F7FFFFF}[code], 1500).astype(OUT[code])
    patterns[:40] = np.arange(40)  # the smallest, subnormal
    low, high = values_of(patterns, code), values_of(patterns + np.ones_like(patterns), code)
    middle = (low + high) / 2
    near = [middle * (1 + sign * 2.0**-p) for p in (25, 30, 40, 52) for sign in (1, -1)]
    values = np.concatenate([middle, *near, np.nextafter(middle, 0), np.nextafter(middle, np.inf), low])
    values = np.concatenate([values, -values])
    found, bad = encoded(encode64, values, code)
    assert not bad
    np.testing.assert_array_equal(values_of(found, code), [rounded(v, code) for v in values.tolist()])
    np.testing.assert_array_equal(np.signbit(values_of(found, code)), np.signbit(values))
    if code != F32:  # the trap is real: rounding twice goes wrong somewhere among these
        assert (by_torch(values.astype(np.float32), code) != found).any()


def test_float64_to_float16_is_numpys():
    random = np.random.default_rng(4)
    values = random.standard_normal(300_000) * 2.0 ** random.integers(-30, 14, 300_000)
    expected = values.astype(np.float16)
    finite = np.isfinite(expected)
    found, bad = encoded(encode64, values[finite], F16)
    assert not bad
    np.testing.assert_array_equal(found, expected[finite].view(np.uint16))


def test_float64_to_float32_and_itself_is_numpys():
    values = np.random.default_rng(5).integers(0, 1 << 64, 300_000, dtype=np.uint64).view(np.float64)
    values = values[np.isfinite(values)]
    assert (encoded(encode64, values, F64)[0] == values.view(np.uint64)).all()
    values = np.concatenate([np.random.default_rng(6).standard_normal(200_000), in_range(values, F32)])
    found, bad = encoded(encode64, values, F32)
    assert not bad
    np.testing.assert_array_equal(found, values.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("code", [BF16, F16, F32])
def test_float64_overflow_is_flagged(code):
    limit = {F16: 65_520.0, BF16: (2 - 2**-8) * 2.0**127, F32: (2 - 2**-24) * 2.0**127}[code]
    for sign in (1, -1):
        assert not is_bad(encode64, np.float64(sign * np.nextafter(limit, 0)), code)
        assert is_bad(encode64, np.float64(sign * limit), code)
        assert is_bad(encode64, np.float64(sign * 1e300), code)


def test_a_float32_tile_is_not_changed_by_encoding_it():
    values = np.random.default_rng(0).standard_normal(99).astype(np.float32)
    tile = values.copy()
    for code in WIDTH:
        encode32(tile, code, np.empty(99 * WIDTH[code], np.uint8))
    np.testing.assert_array_equal(tile, values)


# Noise.


@pytest.mark.parametrize(
    ("key", "start", "count"), [(0, 0, 4096), (2**64 - 1, 4096, 77), (12345, 2**40 + 3, 1), (1, 0, 0)]
)
def test_compiled_noise_is_the_noise_of_numerics(key, start, count):
    tile = np.empty(count, np.float32)
    fill_noise(np.uint64(key), start, tile)
    np.testing.assert_array_equal(tile, uniform(key, start, count))
