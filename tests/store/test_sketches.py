"""Sketches: their estimates are those of exact cosines within the stated error, and their bytes are fixed."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from alnico.checkpoint.task_vectors.manifest import Manifest, ModelIdentity, TensorEntry
from alnico.store.create import create_vector
from alnico.store.sketch import Sketching, TensorSketch, interference
from alnico.store.target import Target
from made import save_file

SHAPES = {f"layers.{i}.weight": ((192, 384) if i % 2 else (500, 131)) for i in range(12)}


def vectors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s) * rng.uniform(0.2, 3) for n, s in SHAPES.items()}


def sketched(tensors: dict[str, np.ndarray], chunk: int = 1 << 18) -> Manifest:
    entries = {}
    for name, values in tensors.items():
        sketching, flat = Sketching(), values.reshape(-1)
        for first in range(0, flat.size, chunk):
            sketching.add(first, flat[first : first + chunk])
        sketch = tuple(s.stored() for s in sketching.result())
        entries[name] = TensorEntry(
            "difference", "F32", values.shape, norm=float(np.linalg.norm(values)), sketch=sketch
        )
    return Manifest("x", ModelIdentity(), ModelIdentity(), entries)


def cosine(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    x, y = (np.concatenate([v.reshape(-1) for v in t.values()]) for t in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def conflict(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    x, y = (np.concatenate([np.sign(v).reshape(-1) for v in t.values()]) for t in (a, b))
    return float((x != y).mean())


@pytest.mark.parametrize("shared", [-1.0, -0.5, 0.0, 0.3, 0.9, 1.0])
def test_cosines_and_sign_conflicts_are_those_of_the_tensors_within_the_error(shared: float) -> None:
    deviations, scores = [], []
    for seed in range(8):
        a, other = vectors(2 * seed), vectors(2 * seed + 1)
        b = {n: shared * a[n] + np.sqrt(1 - shared**2) * other[n] for n in a}
        found = interference(sketched(a), sketched(b))
        deviations.append((found.cosine - cosine(a, b)) / found.cosine_error)
        scores.append(found.sign_conflict - conflict(a, b))
        assert abs(found.cosine - cosine(a, b)) < 4 * found.cosine_error
        assert found.tensors.keys() == SHAPES.keys()
    assert np.sqrt(np.mean(np.square(deviations))) < 1.6  # standard errors are what they say
    assert np.sqrt(np.mean(np.square(scores))) < 0.06


def test_equal_and_opposite_vectors_are_known_as_such() -> None:
    for seed in range(4):
        a = vectors(seed)
        for factor in (0.5, -2.0):
            found = interference(sketched(a), sketched({n: factor * v for n, v in a.items()}))
            assert abs(found.cosine - np.sign(factor)) < 2 * found.cosine_error < 0.002
            assert abs(found.sign_conflict - (factor < 0)) < 0.002


def test_low_rank_and_sparse_vectors_are_estimated_as_well() -> None:
    rng = np.random.default_rng(0)
    deviations = []
    for _ in range(10):
        common = {
            n: rng.standard_normal((s[0], 2)) @ rng.standard_normal((2, s[1])) for n, s in SHAPES.items()
        }
        a, b = (
            {
                n: v + rng.standard_normal((v.shape[0], 1)) @ rng.standard_normal((1, v.shape[1]))
                for n, v in common.items()
            }
            for _ in range(2)
        )
        masks = {n: rng.random(v.shape) < 0.05 for n, v in common.items()}
        for x, y in (
            (a, b),
            ({n: v * masks[n] for n, v in a.items()}, {n: v * masks[n] for n, v in b.items()}),
        ):
            found = interference(sketched(x), sketched(y))
            deviations.append((found.cosine - cosine(x, y)) / found.cosine_error)
    assert np.sqrt(np.mean(np.square(deviations))) < 1.6


def test_the_blocks_change_no_byte_of_a_sketch() -> None:
    tensors = vectors(3)
    assert sketched(tensors) == sketched(tensors, 1 << 16)


def test_sketches_are_what_the_format_says() -> None:
    """The reference: each entry alone, by plain Python."""

    def mixed(n: int) -> int:
        z = (n + 1) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    values = np.random.default_rng(1).standard_normal(70_000)
    buckets = [0.0] * 64
    for i, value in enumerate(values.tolist()):
        sign = -1 if mixed(2**32 + i // 64) >> i % 64 & 1 else 1
        buckets[(i + mixed(i // 65536)) % 64] += sign * value
    sketching = Sketching()
    sketching.add(0, values)
    found = sketching.result()[0]
    np.testing.assert_allclose(found.buckets, buckets, rtol=1e-9)
    stored = found.stored()
    assert len(stored) == 72
    norm, step = np.frombuffer(stored, "<f4", 2)
    assert norm == np.float32(np.linalg.norm(values))
    np.testing.assert_allclose(
        np.frombuffer(stored, np.int8, 64, 8) * step, buckets, atol=float(step) / 2 * 1.001
    )


def test_the_bytes_of_a_sketch_never_change() -> None:
    """Task vectors of other versions are compared with these: a change would make every estimate noise."""
    sketching = Sketching()
    sketching.add(0, np.arange(-100_000, 100_001, dtype=np.float64))
    stored = b"".join(s.stored() for s in sketching.result())
    assert hashlib.sha256(stored).hexdigest() == EXPECTED


EXPECTED = "6df7e38adfc6cc7c8aeccfe3bc6b54285ef90a2ff35e60af5236df0127622646"


def test_what_is_no_sketch_is_unknown() -> None:
    a, b = sketched(vectors(1)), sketched(vectors(2))
    assert TensorSketch.of(b"x" * 71) is None
    assert TensorSketch.of(np.full(18, np.nan, "<f4").tobytes()) is None
    name = next(iter(SHAPES))
    entry = a.tensors[name]
    without = TensorEntry(entry.encoding, entry.dtype, entry.shape, norm=entry.norm, sketch=(b"short", b""))
    broken = Manifest("x", a.base, a.finetuned, {**a.tensors, name: without})
    assert interference(broken, b).unknown == (name,)
    assert interference(Manifest("x", a.base, a.finetuned, {}), b).cosine == 0


def test_huge_and_tiny_numbers_have_sketches() -> None:
    for size in (1e-300, 1e-40, 1e30, 1e39):
        sketching = Sketching()
        sketching.add(0, np.full(1000, size))
        for sketch in sketching.result():
            assert len(sketch.stored()) == 72
            assert TensorSketch.of(sketch.stored()) is not None


def test_created_task_vectors_have_the_sketches_of_their_differences(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    base = {n: ("F32", rng.standard_normal(s).astype(np.float32)) for n, s in SHAPES.items()}
    changes = [vectors(7), vectors(8)]
    changes[1] = {n: 0.6 * changes[0][n] + 0.8 * v for n, v in changes[1].items()}
    (tmp_path / "base").mkdir()
    save_file(tmp_path / "base" / "model.safetensors", base)
    manifests, true = [], []
    for i, change in enumerate(changes):
        tuned = {n: ("F32", (base[n][1] + 0.01 * v).astype(np.float32)) for n, v in change.items()}
        save_file(tmp_path / f"{i}" / "model.safetensors", tuned)
        target = Target(encoding=("int4", "difference")[i])
        manifests.append(
            create_vector(
                tmp_path / f"{i}", tmp_path / "base", tmp_path / f"v{i}", name="x", target=target
            ).manifest
        )
        true.append({n: tuned[n][1].astype(np.float64) - base[n][1] for n in tuned})
    found = interference(*manifests)
    assert abs(found.cosine - cosine(*true)) < 4 * found.cosine_error
    assert abs(found.sign_conflict - conflict(*true)) < 4 * found.cosine_error
    assert json.loads(json.dumps(found.data()))["tensors"].keys() == SHAPES.keys()
    text = (tmp_path / "v0" / "taskvector.json").read_text()
    stored = json.loads(text)["tensors"][next(iter(SHAPES))]["sketch"]
    assert [len(base64.b64decode(s)) for s in stored] == [72, 72]
