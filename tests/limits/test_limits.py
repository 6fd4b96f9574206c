"""What is promised of sizes: of plans, of models in one merge, of elements in a tensor, of open files, of merges in a row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.files import MAX_OPEN_FILES
from limits.made_large import CONFIG_405B, fill, llama_405b, save_sparse, save_sparse_model
from made import family, read_model, save_model

MIB = 1 << 20

PLANNED = """
import json, sys
import alnico
plan = alnico.plan(json.loads(sys.argv[1]), memory="8GiB")
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"peak": peak, "jobs": len(plan.jobs), "elements": plan.elements, "shards": len(plan.shards)}))
"""


def in_a_fresh_process(code: str, recipe: dict[str, Any], *words: str) -> Any:
    ended = subprocess.run(
        [sys.executable, "-c", code, json.dumps(recipe), *words], capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_recipe_of_405_billion_parameters_is_planned_in_300_mb(tmp_path: Path) -> None:
    base, one, other = (
        save_sparse_model(tmp_path / n, llama_405b(), shards=191, config=CONFIG_405B)
        for n in ("base", "a", "b")
    )
    recipe = {"merge_method": "ties", "base_model": str(base), "models": [str(one), str(other)]}
    found = in_a_fresh_process(PLANNED, recipe)
    assert (found["jobs"], found["elements"]) == (1137, 405_853_388_800)
    assert found["peak"] < 300_000_000


@pytest.mark.slow
def test_ten_thousand_tensors_are_planned_and_merged(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.experts.{j}.weight": (4, 3) for i in range(100) for j in range(100)}
    for k, name in enumerate(("a", "b", "c")):
        save_sparse(tmp_path / f"{name}.safetensors", shapes, "F32")
        fill(
            tmp_path / f"{name}.safetensors",
            "model.layers.99.mlp.experts.99.weight",
            np.full(12, k, np.float32),
        )
    recipe = {"merge_method": "linear", "models": [str(tmp_path / f"{n}.safetensors") for n in "abc"]}
    assert in_a_fresh_process(PLANNED, recipe)["peak"] < 300_000_000
    result = alnico.merge(recipe, tmp_path / "out", max_shard_size="100kB")
    merged = read_model(tmp_path / "out")
    assert len(result.plan.jobs) == len(merged) == 10_000
    assert (merged["model.layers.99.mlp.experts.99.weight"] == 1).all()
    assert not any(values.any() for name, values in merged.items() if "99.mlp.experts.99" not in name)


@pytest.mark.slow
def test_sixty_four_models_are_merged_in_one(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = [random.standard_normal((6, 5)).astype(np.float32) for _ in range(64)]
    models = [save_model(tmp_path / f"m{i}", {"w": ("F32", v)}) for i, v in enumerate(values)]
    weights = random.uniform(0.5, 1.5, 64).tolist()
    entries = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)]
    alnico.merge({"merge_method": "linear", "models": entries, "unrelated": "allow"}, tmp_path / "out")
    expected = np.average(np.array(values, np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(read_model(tmp_path / "out")["w"], expected, rtol=1e-5, atol=1e-6)


FEW_FILES = """
import json, os, resource, sys
import alnico
recipe, out = json.loads(sys.argv[1]), sys.argv[2]
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
most = 0
def watch(event):
    global most
    most = max(most, len(os.listdir("/proc/self/fd")))
result = alnico.merge(recipe, out, watch=watch, threads=4)
print(json.dumps({"tensors": len(result.plan.jobs), "most": most}))
"""


def test_hundreds_of_shards_are_merged_with_64_descriptors(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (4, 3) for i in range(300)}
    base, one, other = (
        save_sparse_model(tmp_path / n, shapes, "F32", shards=300) for n in ("base", "a", "b")
    )
    recipe = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [str(one), str(other)],
        "unrelated": "allow",
    }
    found = in_a_fresh_process(FEW_FILES, recipe, str(tmp_path / "out"), "64")
    assert found["tensors"] == 300
    assert found["most"] <= 64


@pytest.mark.slow
def test_sixty_four_models_of_many_shards_stay_below_a_thousand_descriptors(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (4, 3) for i in range(24)}
    models = [str(save_sparse_model(tmp_path / f"m{i}", shapes, "F32", shards=24)) for i in range(64)]
    recipe = {"merge_method": "linear", "models": models, "unrelated": "allow"}
    found = in_a_fresh_process(FEW_FILES, recipe, str(tmp_path / "out"), "1024")
    assert found["tensors"] == 24
    assert found["most"] <= 64 * MAX_OPEN_FILES + 64


def test_hundreds_of_checkpoints_are_averaged_with_few_descriptors_and_little_memory(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((300, 8, 5)).astype(np.float32)
    for step, value in enumerate(values):
        tensors = {"model.layers.0.w": ("F32", value), "model.layers.1.w": ("F32", -value)}
        save_model(tmp_path / "run" / f"checkpoint-{step}", tensors, shards=2)
    recipe = {"merge_method": "linear", "checkpoints": {"run": str(tmp_path / "run")}, "unrelated": "allow"}
    found = in_a_fresh_process(FEW_FILES, recipe, str(tmp_path / "out"), "128")
    assert found["tensors"] == 2
    assert found["most"] <= 128
    expected = values.mean(0, dtype=np.float64)
    np.testing.assert_allclose(read_model(tmp_path / "out")["model.layers.0.w"], expected, atol=1e-6)
    assert in_a_fresh_process(PLANNED, recipe)["peak"] < 300_000_000


LARGE = (1 << 16, (1 << 15) + 1)
"""Rows and columns of 2^31 + 2^16 elements."""

PLACES = (0, (1 << 31) - 2, 1 << 31, (1 << 31) + 4097, LARGE[0] * LARGE[1] - 1)
"""Elements before, at and beyond 2^31."""


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("passthrough", marks=pytest.mark.slow),
        pytest.param("linear", marks=pytest.mark.slow),
        pytest.param("ties", marks=pytest.mark.nightly),
    ],
)
def test_a_tensor_of_more_than_two_to_the_31_elements_is_merged(method: str, tmp_path: Path) -> None:
    count = {"passthrough": 1, "linear": 2, "ties": 3}[method]
    paths = []
    for i in range(count):
        path = tmp_path / f"m{i}.safetensors"
        save_sparse(path, {"w": LARGE}, "F8_E4M3")
        for place in PLACES if i or count < 3 else ():
            fill(
                path, "w", np.array([0x38 if i else 0x40], np.uint8), place
            )  # 1.0, and 2.0 in the first model
        paths.append(str(path))
    recipe: dict[str, Any] = {"merge_method": method, "models": paths[-2:], "unrelated": "allow"}
    if method == "ties":
        recipe |= {"base_model": paths[0], "parameters": {"density": 1e-8}}  # the 21 largest of 2,147,549,184
    out = tmp_path / "out.safetensors"
    found = alnico.merge(recipe, out).plan.jobs[0]
    assert found.elements == (1 << 31) + (1 << 16)
    width = 1 if method == "passthrough" else 2  # float8 is copied as it is, and merged to bfloat16
    begin = out.stat().st_size - found.elements * width
    expected = {"passthrough": b"\x40", "linear": b"\xc0\x3f", "ties": b"\x80\x3f"}[method]  # 2, 1.5 and 1
    with out.open("rb") as file:
        for place in PLACES:
            file.seek(begin + (place - 1) * width if place else begin)
            around = file.read(3 * width if place else width)
            assert around.strip(b"\0") == expected.strip(b"\0")
            assert around[width if place else 0 :][:width] == expected, place
    out.unlink()


MANY = """
import json, os, sys
import alnico
recipes, out = json.loads(sys.argv[1]), sys.argv[2]
def size():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) * 1024, len(os.listdir("/proc/self/fd"))
sizes = []
at = json.loads(sys.argv[3])
for i in range(at[-1]):
    alnico.merge(recipes[i % len(recipes)], out, overwrite=True, threads=2)
    if i + 1 in at:
        sizes.append(size())
print(json.dumps(sizes))
"""


@pytest.mark.parametrize(
    "at",
    [
        pytest.param((200, 300, 400), marks=pytest.mark.slow),
        pytest.param((200, 600, 1000), marks=pytest.mark.nightly),
    ],
    ids=["400", "1000"],
)
def test_a_thousand_merges_in_a_row_leak_nothing(at: tuple[int, ...], tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 2, hidden=8, layers=1)
    models = [str(t) for t in tuned]
    recipes = [
        {"merge_method": "linear", "models": models},
        {"merge_method": "ties", "base_model": str(base), "models": models},
    ]
    sizes = in_a_fresh_process(MANY, recipes, str(tmp_path / "out"), json.dumps(at))
    print(
        f"resident and descriptors after {at} merges: {[(round(r / MIB, 1), n) for r, n in sizes]}"
    )  # shown with -s
    descriptors = {files for _, files in sizes}
    assert len(descriptors) == 1
    grown = sizes[2][0] - sizes[1][0]
    assert grown < MIB, (
        sizes
    )  # kernels' descriptions, of which a bounded number is kept, have filled their place
