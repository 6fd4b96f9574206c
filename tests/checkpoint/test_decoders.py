"""Decoding stored task vectors: each encoding against its definition, computed element by element."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alnico.checkpoint.task_vectors.decoders import decode_tensor
from alnico.checkpoint.task_vectors.manifest import TensorEntry
from alnico.checkpoint.task_vectors.stored_vector import open_vector
from alnico.errors import ModelError
from made import encoded
from made_vectors import decode, encode, exact_values, random_pair, write_vector

SHAPES = {"a.weight": (7, 37), "b.weight": (3, 5, 41), "c.bias": (131,), "d": (), "e.weight": (300, 301)}
LOSSY = (
    "difference",
    "difference F16",
    "difference BF16",
    "top_k",
    "sign",
    "sign rows",
    "int4",
    "low_rank",
    "low_rank stack",
)


def raw(dtype: str, values: np.ndarray) -> np.ndarray:
    """The array that numpy holds of a stored tensor."""
    kinds = {
        "BF16": np.uint16,
        "F32": np.float32,
        "F16": np.float16,
        "F64": np.float64,
        "I32": np.int32,
        "U8": np.uint8,
    }
    return np.frombuffer(encoded(dtype, values), kinds[dtype]).reshape(values.shape)


def parts_of(
    encoding: str, name: str, dtype: str, old: np.ndarray, new: np.ndarray
) -> tuple[TensorEntry, dict[str, Any]]:
    parts, keys = encode(name, encoding, dtype, old, new)
    entry = TensorEntry(encoding.split()[0], dtype, new.shape, scale=keys.get("scale", 1.0))  # type: ignore[arg-type]
    return entry, parts


def fits(encoding: str, shape: tuple[int, ...]) -> bool:
    if encoding == "low_rank":
        return len(shape) == 2
    if encoding == "low_rank stack":
        return len(shape) == 3
    return bool(shape) or encoding != "sign rows"


@pytest.mark.parametrize("encoding", LOSSY)
@pytest.mark.parametrize("dtype", ["BF16", "F64"])
def test_a_difference_is_what_its_definition_says(encoding: str, dtype: str) -> None:
    base, tuned = random_pair(np.random.default_rng(1), SHAPES, dtype)
    for name, (_, new) in tuned.items():
        if not fits(encoding, new.shape):
            continue
        entry, parts = parts_of(encoding, name, dtype, base[name][1], new)
        arrays = {part: raw(kind, values) for part, (_, kind, values) in parts.items()}
        numbers = {part: exact_values(kind, values) for part, (_, kind, values) in parts.items()}
        expected = decode(encoding, numbers, {"shape": new.shape, "scale": entry.scale})
        found = decode_tensor(entry, arrays, None)
        assert found.dtype == np.float64
        assert found.shape == new.shape
        np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "I32"])
@pytest.mark.parametrize("encoding", ["absent", "sparse", "whole"])
def test_an_exact_encoding_gives_every_bit_back(encoding: str, dtype: str) -> None:
    rng = np.random.default_rng(2)
    old = (100 * rng.standard_normal((9, 33))).astype(np.int32 if dtype == "I32" else np.float32)
    new = np.where(rng.random(old.shape) < 0.1, old + 1, old).astype(old.dtype)
    new = old if encoding == "absent" else new
    entry, parts = parts_of(encoding, "w", dtype, old, new)
    arrays = {part: raw(kind, values) for part, (_, kind, values) in parts.items()}
    found = decode_tensor(entry, arrays, raw(dtype, old))
    assert found.tobytes() == encoded(dtype, new)
    assert found.shape == new.shape


def test_minus_zero_and_nan_are_bits_too() -> None:
    old = np.array([0.0, 1.0, 2.0], np.float32)
    new = np.array([-0.0, np.nan, 2.0], np.float32)
    entry, parts = parts_of("sparse", "w", "F32", old, new)
    assert list(parts["indices"][2]) == [0, 1]
    found = decode_tensor(entry, {p: raw(k, v) for p, (_, k, v) in parts.items()}, old)
    assert found.tobytes() == new.tobytes()


@pytest.mark.parametrize(
    ("indices", "problem"),
    [
        ([3, 2], "not ascending"),
        ([2, 2], "not ascending"),
        ([-1, 2], "not ascending"),
        ([2, 6], "reach 6; expected 0 to 5"),
    ],
)
@pytest.mark.parametrize("encoding", ["sparse", "top_k"])
@pytest.mark.parametrize("width", [np.int32, np.int64])
def test_wrong_indices_are_refused(encoding: str, indices: list[int], problem: str, width: type) -> None:
    entry = TensorEntry(encoding, "F32", (2, 3))  # type: ignore[arg-type]
    parts = {"indices": np.array(indices, width), "values": np.zeros(2, np.float32)}
    with pytest.raises(ModelError, match=problem):
        decode_tensor(entry, parts, np.zeros((2, 3), np.float32))


@pytest.mark.parametrize(
    ("encoding", "parts"),
    [
        ("whole", {"values": np.zeros(6, np.float32)}),
        ("whole", {"values": np.zeros((2, 3), np.float64)}),
        ("difference", {"values": np.zeros((3, 2), np.float32)}),
        ("difference", {"values": np.zeros((2, 3), np.int32)}),
        ("sparse", {"indices": np.zeros(1, np.float32), "values": np.zeros(1, np.float32)}),
        ("sparse", {"indices": np.zeros(2, np.int32), "values": np.zeros(1, np.float32)}),
        ("sparse", {"indices": np.zeros(1, np.int32), "values": np.zeros(1, np.float16)}),
        ("sign", {"bits": np.zeros(2, np.uint8), "scales": np.zeros(1, np.float32)}),
        ("sign", {"bits": np.zeros(1, np.uint8), "scales": np.zeros(3, np.float32)}),
        (
            "int4",
            {
                "codes": np.zeros(3, np.uint8),
                "scales": np.zeros(2, np.float32),
                "minimums": np.zeros(1, np.float32),
            },
        ),
        ("low_rank", {"left": np.zeros((3, 1), np.float32), "right": np.zeros((1, 2), np.float32)}),
        ("low_rank", {"left": np.zeros((2, 2), np.float32), "right": np.zeros((1, 3), np.float32)}),
        ("top_k", {"indices": np.zeros(1, np.int32)}),
    ],
)
def test_parts_that_do_not_fit_are_refused(encoding: str, parts: dict[str, np.ndarray]) -> None:
    with pytest.raises(ModelError, match=r"expected .*Get the task vector again"):
        decode_tensor(TensorEntry(encoding, "F32", (2, 3)), parts, np.zeros((2, 3), np.float32))  # type: ignore[arg-type]


def test_a_tensor_is_read_from_files_as_from_arrays(tmp_path: Path) -> None:
    base, tuned = random_pair(np.random.default_rng(3), SHAPES)
    encodings = {
        "a.weight": "low_rank",
        "b.weight": "int4",
        "c.bias": "difference BF16",
        "d": "whole",
        "e.weight": "sparse",
    }
    write_vector(tmp_path, base, tuned, encodings, shards=2)
    with open_vector(tmp_path) as vector:
        for name, encoding in encodings.items():
            entry, parts = parts_of(encoding, name, "BF16", base[name][1], tuned[name][1])
            arrays = {part: raw(kind, values) for part, (_, kind, values) in parts.items()}
            start = raw("BF16", base[name][1])
            found, expected = vector.read(name, start), decode_tensor(entry, arrays, start)
            assert found.tobytes() == expected.tobytes()
            assert found.dtype == expected.dtype


def test_a_manifest_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "private").write_text('{"secret": 1}')
    (tmp_path / "vector").mkdir()
    (tmp_path / "vector" / "taskvector.json").symlink_to(tmp_path / "private")
    with pytest.raises(ModelError, match=r"is a link to .*outside") as refused:
        open_vector(str(tmp_path / "vector"))
    assert "secret" not in str(refused.value)
