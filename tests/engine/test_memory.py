"""A merge stays inside its budget, measured as the peak resident size of a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.methods import registry
from made import family, save_file
from methods.cases import MODELS, SETTINGS, options
from methods.merging import recipe_for
from test_house import SOURCE

BUDGET = 400 << 20
MEASURED = """
import json, sys
import alnico
recipe, out, budget = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
result = alnico.merge(recipe, out, memory=budget)
status = open("/proc/self/status").read()  # ru_maxrss would count the parent's size at the fork
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"peak": peak, "projected": result.plan.memory.peak_bytes}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four models of one BF16 tensor of 240 MB and a few small ones: any two are larger than the budget."""
    root = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(0)
    block = (random.standard_normal(4_000_000) * 0.02).astype(np.float32)
    paths = []
    for i in range(4):
        values = np.tile(block + 0.001 * i, 30).reshape(30_000, 4_000)
        paths.append(save_file(root / f"m{i}.safetensors", {"w": ("BF16", values), "n": ("BF16", block[:1000])}))
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("name", [m.name for m in registry().values() if not m.statistics])
def test_a_tensor_larger_than_the_budget_is_merged_inside_it(name: str, large: list[Path], tmp_path: Path) -> None:
    count = MODELS.get(name, (3,))[0]
    setting = SETTINGS[name][-1]
    models = large[1 : 1 + count]
    recipe = recipe_for(name, models, models[0] if registry()[name].base == "first" else large[0], options(setting, count))
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, json.dumps(recipe), str(tmp_path / "out.safetensors"), str(BUDGET)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    measured = json.loads(ended.stdout)
    assert measured["peak"] <= measured["projected"] <= BUDGET, measured


def test_a_budget_that_is_too_small_is_refused_with_one_that_is_enough(tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": [str(p) for p in family(tmp_path)[1]]}
    with pytest.raises(alnico.errors.ResourceError, match=r"Raise --memory to (\d+)MiB\.") as caught:
        alnico.plan(recipe, memory="64MiB")
    enough = str(caught.value).rpartition("--memory to ")[2].rstrip(".")
    assert alnico.plan(recipe, memory=enough).memory.peak_bytes <= alnico.plan(recipe, memory=enough).memory.budget_bytes


def test_the_sources_read_with_positioned_reads_and_map_nothing() -> None:
    assert not [p for p in SOURCE.rglob("*.py") if "import mmap" in p.read_text()]
