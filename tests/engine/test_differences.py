"""Merges of stored task vectors read the vectors' differences: the bits are those of reading the models that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.engine import merge_run
from alnico.errors import MismatchError, NonFiniteError
from alnico.kernels.choice import forced
from made import read_model, save_model
from made_vectors import random_pair, write_vector

SHAPES = {"model.a.weight": (300, 301), "model.b.weight": (4, 60, 41), "model.c.bias": (131,)}
LOSSY = ("difference", "difference F16", "difference BF16", "top_k", "sign rows", "int4", "low_rank")
"""Of matrices; biases are differences, or absent."""


def make(folder: Path, encoding: str, dtype: str, models: int = 2) -> list[str]:
    """Write a base and vectors on it; returns the references of base and models."""
    base, _ = random_pair(np.random.default_rng(0), SHAPES, dtype, changed=1.0)
    save_model(folder / "base", base, {"model_type": "llama"})
    for i in range(models):
        random = np.random.default_rng(i + 1)
        tuned = {
            n: (d, v + 0.01 * random.standard_normal(v.shape).astype(np.float32))
            for n, (d, v) in base.items()
        }
        kinds = {
            "model.a.weight": encoding,
            "model.b.weight": "difference" if encoding == "low_rank" else encoding,
            "model.c.bias": "absent" if i else "difference",
        }
        tuned["model.c.bias"] = base["model.c.bias"] if i else tuned["model.c.bias"]
        write_vector(folder / f"vector-{i}", base, tuned, kinds)
    return [str(folder / "base"), *(f"{folder / 'base'}+{folder / f'vector-{i}'}" for i in range(models))]


def merge(references: list[str], out: Path, method: str = "task_arithmetic", **keys: Any) -> Any:
    base, *models = references
    weights = [{"weight": w} for w in (0.7, -0.3, 1.2)] if method == "task_arithmetic" else [{}] * 3
    recipe = {
        "merge_method": method,
        "base_model": base,
        "models": [
            {"model": m, **({"parameters": w} if w else {})} for m, w in zip(models, weights, strict=False)
        ],
    }
    alnico.merge(recipe, out, **keys)
    return {n: v.tobytes() for n, v in read_model(out).items()}


def read_digests(out: Path) -> dict[str, dict[str, str]]:
    """What the lock says was read of each input."""
    return {i["model"]: i["tensors"] for i in json.loads((out / "alnico.lock.json").read_text())["inputs"]}


@pytest.fixture
def as_models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it to let merges read the models."""
    return lambda: monkeypatch.setattr(merge_run, "as_differences", lambda jobs, _: list(jobs))


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
@pytest.mark.parametrize("encoding", LOSSY)
def test_the_bits_are_those_of_the_models(tmp_path: Path, encoding: str, dtype: str, as_models: Any) -> None:
    references = make(tmp_path, encoding, dtype)
    with forced("interpreted"):
        fast = merge(references, tmp_path / "fast")
        as_models()
        assert merge(references, tmp_path / "slow") == fast
    base, model, _ = references
    quick, plain = read_digests(tmp_path / "fast"), read_digests(tmp_path / "slow")
    assert quick[base] == plain[base]
    assert quick[model].keys() == plain[model].keys()
    assert quick[model]["model.a.weight"] != plain[model]["model.a.weight"]


@pytest.mark.parametrize("method", ["magmax", "dare_linear", "ties", "nuslerp", "emr", "model_stock"])
def test_other_methods_have_the_same_bits(tmp_path: Path, method: str, as_models: Any) -> None:
    references = make(tmp_path, "difference BF16", "BF16")
    fast = merge(references, tmp_path / "fast", method)
    as_models()
    assert merge(references, tmp_path / "slow", method) == fast


def test_neither_kernels_nor_threads_nor_memory_change_a_bit(tmp_path: Path) -> None:
    references = make(tmp_path, "int4", "BF16", models=3)
    results = []
    for number, (backend, threads, memory) in enumerate(
        (("compiled", 1, "2GiB"), ("interpreted", 1, "2GiB"), ("compiled", 3, "600MiB"))
    ):
        with forced(backend):  # type: ignore[arg-type]
            results.append(merge(references, tmp_path / f"out-{number}", threads=threads, memory=memory))
    assert results[0] == results[1] == results[2]


def test_a_model_besides_the_vectors_is_read_as_it_is(tmp_path: Path, as_models: Any) -> None:
    references = make(tmp_path, "difference BF16", "BF16")
    recipe = {"merge_method": "passthrough", "models": [references[2]], "dtype": "bfloat16"}
    alnico.merge(recipe, tmp_path / "whole")
    mixed = [*references[:2], str(tmp_path / "whole")]
    fast = merge(mixed, tmp_path / "fast")
    as_models()
    assert merge(mixed, tmp_path / "slow") == fast


def test_the_merge_is_verified_and_made_again(tmp_path: Path) -> None:
    references = make(tmp_path, "difference BF16", "BF16")
    merge(references, tmp_path / "out")
    alnico.verify(tmp_path / "out", against_inputs=True, sample=1.0)
    assert alnico.reproduce(tmp_path / "out")
    weights = tmp_path / "vector-1" / "taskvector.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(alnico.errors.AlnicoError):
        alnico.verify(tmp_path / "out", against_inputs=True, sample=1.0)


def test_a_changed_base_and_a_changed_vector_are_refused(tmp_path: Path) -> None:
    references = make(tmp_path, "difference BF16", "BF16")
    weights = tmp_path / "base" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(MismatchError, match="is not the base of"):
        merge(references, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sum_beyond_the_dtype_names_its_tensor(tmp_path: Path) -> None:
    references = make(tmp_path, "difference", "F16")
    base, *models = references
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": m, "parameters": {"weight": 1e30}} for m in models],
    }
    with pytest.raises(NonFiniteError, match=r"model\.\w\.\w+\[.*the merge gives"):
        alnico.merge(recipe, tmp_path / "out")
