"""Noise, digests, dtypes and arcs against published vectors, xxhash, torch and plain mathematics."""

import itertools
import math

import numpy as np
import pytest
import torch
import xxhash

from alnico.numerics.digest import PIECE, piece_digest, pieces_of, tensor_digest
from alnico.numerics.dtypes import DTYPES, FLOAT8, decode, promote
from alnico.numerics.noise import noise_key, uniform
from alnico.numerics.sphere import arc_coefficients

# Noise.


def splitmix64(seed: int, count: int) -> list[int]:
    """The published algorithm, in integers of any size."""
    state, outputs = seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        outputs.append(z ^ (z >> 31))
    return outputs


def test_noise_is_splitmix64_as_published():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert splitmix64(0, 4) == published
    assert uniform(0, 0, 4).tolist() == [(z >> 40) / 2**24 for z in published]


@pytest.mark.parametrize("key", [1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15])
def test_noise_of_any_key_is_splitmix64(key):
    assert uniform(key, 0, 50).tolist() == [(z >> 40) / 2**24 for z in splitmix64(key, 50)]


def test_noise_does_not_depend_on_how_it_is_cut():
    whole = uniform(7, 0, 10_000)
    assert whole.dtype == np.float32
    for cuts in ([0, 1, 4096, 10_000], [0, 9_999, 10_000], [0, 3, 3, 10_000]):
        parts = [uniform(7, a, b - a) for a, b in itertools.pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_noise_far_out_is_the_noise_of_that_place():
    for start in (2**32, 2**53 + 1, 2**62):
        key = 5
        first = (key + start * 0x9E3779B97F4A7C15) % 2**64
        assert uniform(key, start, 3).tolist() == [(z >> 40) / 2**24 for z in splitmix64(first, 3)]


def test_noise_is_uniform_and_its_neighbours_do_not_depend_on_one_another():
    n = 1_000_000
    sigma = 1 / math.sqrt(n)
    draws = uniform(noise_key(42, "model.layers.0.mlp.up_proj.weight", 1), 0, n).astype(np.float64)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 1 / 2) < 5 * sigma * math.sqrt(1 / 12)
    assert abs(draws.var() - 1 / 12) < 5 * sigma * math.sqrt(1 / 180)
    counts = np.bincount((draws * 100).astype(int), minlength=100)
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 99 + 5 * math.sqrt(2 * 99)
    for lag in (1, 2, 4096):
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 5 * sigma


def test_noise_of_other_tensors_models_and_seeds_does_not_depend_on_one_another():
    n = 200_000
    keys = [
        noise_key(seed, tensor, position) for seed in (0, 1) for tensor in ("a", "b") for position in (0, 1)
    ]
    assert len(set(keys)) == 8
    correlation = np.corrcoef([uniform(key, 0, n) for key in keys])
    assert np.abs(correlation - np.eye(8)).max() < 5 / math.sqrt(n)


def test_a_noise_key_is_the_hash_of_what_it_names():
    assert noise_key(42, "w", 3) == xxhash.xxh3_64_intdigest(b"42\x00w\x003")
    assert noise_key(0, "é", 0) == xxhash.xxh3_64_intdigest("0\0é\x000".encode())
    assert noise_key(1, "1", 0) != noise_key(11, "", 0)


# Digests.


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 2 * PIECE + 5])
def test_a_digest_is_what_its_definition_says(size):
    data = np.random.default_rng(size).bytes(size)
    count = pieces_of(size)
    assert count == math.ceil(size / 4_194_304)
    pieces = {}
    for i in reversed(range(count)):  # any order
        pieces[i] = piece_digest(memoryview(data)[i * PIECE : (i + 1) * PIECE])
    joined = b"".join(
        xxhash.xxh3_128(data[i * 4_194_304 : (i + 1) * 4_194_304]).digest() for i in range(count)
    )
    expected = xxhash.xxh3_128(b"U8|" + str(size).encode() + b",1|" + joined).hexdigest()
    assert tensor_digest("U8", (size, 1), [pieces[i] for i in range(count)]) == expected


def test_a_digest_knows_dtype_shape_and_order():
    a, b = piece_digest(b"a"), piece_digest(b"b")
    digests = {
        tensor_digest("F32", (2, 3), [a, b]),
        tensor_digest("I32", (2, 3), [a, b]),
        tensor_digest("F32", (3, 2), [a, b]),
        tensor_digest("F32", (6,), [a, b]),
        tensor_digest("F32", (2, 3), [b, a]),
    }
    assert len(digests) == 5
    assert all(len(d) == 32 for d in digests)


# Dtypes.

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def test_every_16_bit_pattern_decodes_as_in_torch():
    raw = np.arange(65_536, dtype=np.uint16)
    for name in ("BF16", "F16"):
        expected = torch.from_numpy(raw.view(np.int16)).view(TORCH[name]).float().numpy()
        found = decode(raw.view(np.uint8), name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        numbers = ~np.isnan(expected)
        np.testing.assert_array_equal(found[numbers].view(np.uint32), expected[numbers].view(np.uint32))


def test_wide_floats_decode_to_themselves():
    values = np.array([0.0, -0.0, 1 / 3, 5e-324, -1.7e308, np.inf])
    assert decode(values.view(np.uint8), "F64").tobytes() == values.tobytes()
    narrow = np.array([0.0, -0.0, 1 / 3, 1e-45, -3.4e38, np.inf], np.float32)
    assert decode(narrow.view(np.uint8), "F32").tobytes() == narrow.tobytes()


@pytest.mark.parametrize("a", TORCH)
@pytest.mark.parametrize("b", TORCH)
def test_promotion_is_torchs(a, b):
    assert TORCH[promote([a, b])] == torch.promote_types(TORCH[a], TORCH[b])
    assert promote([a, b, a]) == promote([b, a])


@pytest.mark.parametrize("name", FLOAT8)
def test_every_float8_code_decodes_as_in_torch(name):
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes.copy()).view(
        {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[name]
    )
    np.testing.assert_array_equal(decode(codes, name), expected.float().numpy())
    np.testing.assert_array_equal(np.signbit(decode(codes, name)), np.signbit(expected.float().numpy()))


@pytest.mark.parametrize("name", FLOAT8)
def test_bf16_and_f16_hold_every_float8_value(name):
    values = torch.from_numpy(decode(np.arange(256, dtype=np.uint8), name))
    for wide in (torch.bfloat16, torch.float16):
        assert torch.equal(values.to(wide).float().nan_to_num(), values.nan_to_num())
    assert [promote([name]), promote([name, "BF16"]), promote([name, "F16"]), promote([name, "F32"])] == [
        "BF16",
        "BF16",
        "F16",
        "F32",
    ]
    assert promote(list(FLOAT8)) == "BF16"


def test_sizes_are_those_of_torch():
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "U64": "uint64",
             "I32": "int32", "U32": "uint32", "I16": "int16", "U16": "uint16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
             "C64": "complex64", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu"}  # fmt: skip
    for name, torch_name in names.items():
        size = getattr(torch, torch_name).itemsize
        assert (DTYPES[name].bytes, DTYPES[name].bits, np.dtype(DTYPES[name].storage).itemsize) == (
            size,
            8 * size,
            size,
        )


# Arcs.


def gram(a, b):
    return [[float(a @ a), float(a @ b)], [float(a @ b), float(b @ b)]]


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_an_arc_turns_by_a_share_of_the_angle_and_keeps_the_length(t):
    random = np.random.default_rng(3)
    a, b = random.standard_normal((2, 50))
    b = b / np.linalg.norm(b) * np.linalg.norm(a)
    u, v = arc_coefficients(gram(a, b), t)
    point = u * a + v * b

    def angle(x, y):
        return math.acos(np.clip(x @ y / np.linalg.norm(x) / np.linalg.norm(y), -1, 1))

    assert np.linalg.norm(point) == pytest.approx(np.linalg.norm(a))
    assert angle(a, point) == pytest.approx(t * angle(a, b), abs=1e-7)


def test_an_arc_of_a_right_angle():
    root = math.sqrt(3) / 2
    assert arc_coefficients([[4.0, 0.0], [0.0, 9.0]], 1 / 3) == pytest.approx((root, 0.5))


@pytest.mark.parametrize(
    "inner",
    [
        [[1.0, 0.99951], [0.99951, 1.0]],  # nearly parallel
        [[1.0, -0.99951], [-0.99951, 1.0]],  # nearly opposite
        [[0.0, 0.0], [0.0, 1.0]],
        [[1.0, 0.0], [0.0, 0.0]],
        [[1.0, 1.0 + 1e-15], [1.0 + 1e-15, 1.0]],  # a cosine above 1 by rounding
    ],
)
def test_a_straight_line_is_taken_where_there_is_no_arc(inner):
    assert arc_coefficients(inner, 0.25).tolist() == [0.75, 0.25]


def test_the_arc_begins_just_below_the_bound():
    cosine = 0.9994
    theta = math.acos(cosine)
    expected = (math.sin(0.75 * theta) / math.sin(theta), math.sin(0.25 * theta) / math.sin(theta))
    assert arc_coefficients([[1.0, cosine], [cosine, 1.0]], 0.25) == pytest.approx(expected, rel=1e-12)
    assert expected != (0.75, 0.25)
