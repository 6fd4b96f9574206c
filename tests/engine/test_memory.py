"""A merge stays inside its budget, measured as the peak resident size of a fresh process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.methods import registry
from alnico.methods.base import MatrixMethod
from alnico.plan.memory import BASELINE_BYTES, BLAS_BYTES, BYTES_A_TENSOR
from alnico.run_options import DEFAULT_BUDGET_BYTES
from alnico.testing.checks import measure_peak
from limits.made_large import fill, save_sparse
from made import family, save_model
from methods.cases import MODELS, SETTINGS, options
from methods.merging import recipe_for
from methods.sides import hashes
from test_house import SOURCE

BUDGET = 400 << 20
SHAPE = (10_600, 10_000)
FILLED = 1_000_000
"""Elements of the large tensor that are not 0; the rest are holes in the file."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four models of one F32 tensor of 424 MB, larger than the budget, and a small one."""
    root = tmp_path_factory.mktemp("large")
    block = (np.random.default_rng(0).standard_normal(FILLED) * 0.02).astype(np.float32)
    paths = []
    for i in range(4):
        path = root / f"m{i}.safetensors"
        save_sparse(path, {"n": (1000,), "w": SHAPE}, "F32")
        fill(path, "n", block[:1000])
        fill(path, "w", block + np.float32(0.001 * i))
        paths.append(path)
    return paths


OF_EACH_KIND = ("slerp", "ties", "della", "passthrough")
"""Methods that read a tensor in different ways: by its Gram matrix, by thresholds, by ranks in rows, copied. All others run each night."""


def is_of_matrices(name: str) -> bool:
    """Does a method hold whole matrices? Those larger than the budget are refused, as a test below says."""
    count = MODELS.get(name, (3,))[0]
    return isinstance(registry()[name].bind(options(SETTINGS[name][-1], count), count), MatrixMethod)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(m.name, marks=pytest.mark.slow if m.name in OF_EACH_KIND else pytest.mark.nightly)
        for m in registry().values()
        if not m.statistics and not is_of_matrices(m.name)
    ],
)
def test_a_tensor_larger_than_the_budget_is_merged_inside_it(
    name: str, large: list[Path], tmp_path: Path
) -> None:
    count = MODELS.get(name, (3,))[0]
    setting = SETTINGS[name][-1]
    models = large[1 : 1 + count]
    recipe = recipe_for(
        name, models, models[0] if registry()[name].base == "first" else large[0], options(setting, count)
    )
    found = measure_peak(recipe, tmp_path / "out.safetensors", BUDGET)
    (tmp_path / "out.safetensors").unlink()
    print(f"{name}: {found['peak'] / 2**20:.0f} of {found['projected'] / 2**20:.0f} MiB")  # shown with -s
    assert found["peak"] <= found["projected"] <= BUDGET < large[0].stat().st_size


@pytest.mark.slow
def test_statistics_as_large_as_the_tensor_are_read_inside_the_budget(
    large: list[Path], tmp_path: Path
) -> None:
    statistics = []
    for model in large[:3]:
        folder = tmp_path / f"{model.stem}-fisher"
        save_sparse(folder / "statistics.safetensors", {"n": (1000,), "w": SHAPE}, "F32")
        fill(folder / "statistics.safetensors", "w", np.full(FILLED, 0.5, np.float32))
        entries = {name: {"digest": digest, "mean": 1e-3} for name, digest in hashes(model).items()}
        (folder / "statistics.json").write_text(
            json.dumps({"schema": 1, "kind": "fisher", "l2_norm": 1.0, "tensors": entries})
        )
        statistics.append(folder)
    models = [
        {"model": str(m), "parameters": {"fisher": str(s)}} for m, s in zip(large, statistics, strict=False)
    ]
    found = measure_peak({"merge_method": "fisher", "models": models}, tmp_path / "out.safetensors", BUDGET)
    (tmp_path / "out.safetensors").unlink()
    assert found["peak"] <= found["projected"] <= BUDGET


def regmean(root: Path, rows: int, columns: int) -> dict[str, Any]:
    """A recipe of two models of one matrix and their Gram matrices, sparse but for a diagonal."""
    entries = []
    for i in range(2):
        model = root / f"r{i}.safetensors"
        save_sparse(model, {"w": (rows, columns)}, "F32")
        folder = root / f"r{i}-gram"
        save_sparse(folder / "statistics.safetensors", {"w": (columns, columns)}, "F32")
        for place in range(0, columns, max(columns // 1000, 1)):
            fill(folder / "statistics.safetensors", "w", np.ones(1, np.float32), place * (columns + 1))
        told = {"digest": hashes(model)["w"], "rows": 64, "is_transposed": False}
        (folder / "statistics.json").write_text(
            json.dumps({"schema": 1, "kind": "gram", "tensors": {"w": told}})
        )
        entries.append({"model": str(model), "parameters": {"gram": str(folder)}})
    return {"merge_method": "regmean", "models": entries, "parameters": {"ridge": 1e-3}}


@pytest.mark.slow
def test_a_whole_matrix_stays_inside_what_the_plan_says(tmp_path: Path) -> None:
    found = measure_peak(regmean(tmp_path, 3000, 2000), tmp_path / "out.safetensors", 1 << 30)
    assert found["peak"] <= found["projected"] <= 1 << 30


def spectral(root: Path, name: str, shape: tuple[int, int], models: int) -> dict[str, Any]:
    """A recipe of models of one dense matrix."""
    random = np.random.default_rng(0)
    base = random.standard_normal(shape, np.float32)
    paths = [
        save_model(root / f"{'x'.join(map(str, shape))}-{i}", {"w": ("F32", value)})
        for i in range(models + 1)
        for value in [base + np.float32(0.01) * random.standard_normal(shape, np.float32) if i else base]
    ]
    entries = [str(path) for path in paths[1:]]
    return {
        "merge_method": name,
        "base_model": str(paths[0]),
        "models": entries,
        "parameters": {"lambda": 0.9},
    }


SLACK = BLAS_BYTES + (16 << 20)
"""What a merge of a whole matrix may take besides its numbers and what one of a tiny matrix takes."""


@pytest.mark.parametrize(
    ("name", "shape", "models"),
    [
        pytest.param("tsv", (4000, 1200), 3, marks=pytest.mark.slow),
        pytest.param("dc_merge", (1600, 1600), 2, marks=pytest.mark.slow),
        *(
            pytest.param(name, shape, models, marks=pytest.mark.nightly)
            for name, shape, models in (
                ("tsv", (1200, 4000), 4),
                ("tsv", (1600, 1600), 2),
                ("dc_merge", (4000, 1200), 3),
                ("dc_merge", (1200, 4000), 4),
            )
        ),
    ],
)
def test_a_spectral_method_holds_the_numbers_that_it_says(
    name: str, shape: tuple[int, int], models: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Freed arrays of less than 32 MiB would stay with the C library, as they do not in matrices of large models.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
    empty = measure_peak(spectral(tmp_path, name, (80, 70), 3), tmp_path / "small.safetensors", 1 << 30)
    given = spectral(tmp_path, name, shape, models)
    (job,) = alnico.plan(given).jobs
    assert job.matrix is not None
    held = 8 * job.matrix.numbers(*shape, models, *job.matrix.arguments)
    found = measure_peak(given, tmp_path / "out.safetensors", 1 << 30)
    assert found["peak"] <= found["projected"] <= 1 << 30
    assert 0.5 * held < found["peak"] - empty["peak"] < held + SLACK


def test_a_matrix_of_a_7b_model_fits_the_default_budget() -> None:
    method = registry()["tsv"].bind({}, 4)
    assert isinstance(method, MatrixMethod)
    whole = 8 * method.numbers(14336, 4096, 4, *method.arguments) + BLAS_BYTES
    assert whole + BASELINE_BYTES + 300 * 5 * BYTES_A_TENSOR < DEFAULT_BUDGET_BYTES


@pytest.mark.slow
def test_a_whole_matrix_larger_than_the_budget_is_refused_before_a_tensor_is_read(tmp_path: Path) -> None:
    with pytest.raises(
        alnico.errors.ResourceError, match=r"plan: w is merged as a whole matrix and needs .* at once"
    ) as caught:
        alnico.plan(regmean(tmp_path, 12_000, 10_000), memory=BUDGET)
    assert "Raise --memory to " in str(caught.value)


def test_a_budget_that_is_too_small_is_refused_with_one_that_is_enough(tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": [str(p) for p in family(tmp_path)[1]]}
    with pytest.raises(alnico.errors.ResourceError, match=r"Raise --memory to (\d+)MiB\.") as caught:
        alnico.plan(recipe, memory="64MiB")
    enough = str(caught.value).rpartition("--memory to ")[2].rstrip(".")
    assert (
        alnico.plan(recipe, memory=enough).memory.peak_bytes
        <= alnico.plan(recipe, memory=enough).memory.budget_bytes
    )


def test_the_sources_read_with_positioned_reads_and_map_nothing() -> None:
    assert not [p for p in SOURCE.rglob("*.py") if "import mmap" in p.read_text()]
