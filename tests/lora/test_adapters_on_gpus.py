"""Adapters extracted and combined by torch on a GPU agree with the processor's, and their locks say which it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import made
from alnico.devices import devices_for, made_gpus
from alnico.engine.matrix_gpu import MatrixGpu
from alnico.errors import OutputError, ResourceError
from alnico.lora import combine, extract, extract_deltas, factorise, gpu_blocks, reduce
from alnico.lora.gpu_blocks import GpuBlocks
from alnico.numerics.arrays import is_numpy, to_torch
from alnico.numerics.low_rank import decompose_matrix, decompose_product
from alnico.numerics.randomized import LowRankFactors, exact_svd, randomized_svd, row_blocks
from lora.made_adapters import factors, linear, save
from lora.references.combined import deltas
from made_gpus import MADE, gpu

__all__ = ["gpu"]

MODULE = sys.modules[extract.__module__]
"""The module that the function of its name hides."""

WITHIN = {"float32": 1e-5, "float64": 1e-9}
"""The tolerance of docs/decisions/0017 for products of factors, as a share of the largest entry."""


def assert_near(found: np.ndarray, wanted: np.ndarray, within: float = WITHIN["float64"]) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=within * np.abs(wanted).max(initial=1e-300))


SHAPES = [(300, 900), (900, 300), (40, 700), (700, 40), (300, 300), (1, 50), (50, 1)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("holds", [True, False])
def test_leading_vectors_by_blocks_agree_with_the_processor(
    dtype: str, shape: tuple[int, int], holds: bool, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    side = min(shape)
    left, right = random.standard_normal((shape[0], side)), random.standard_normal((side, shape[1]))
    matrix = ((left * np.arange(1, side + 1) ** -0.7) @ right).astype(dtype)
    monkeypatch.setattr(gpu_blocks, "GPU_BLOCK_ELEMENTS", 100_000)

    def blocks() -> Iterator[np.ndarray]:
        height = 37
        return (matrix[i : i + height] for i in range(0, shape[0], height))

    there = GpuBlocks(MatrixGpu(devices_for("merging", "cuda")[0]), blocks, shape, holds=holds)
    assert gpu == next(there()).device.type or gpu.startswith("cuda")

    def here() -> Iterator[np.ndarray]:
        return (matrix[first:last] for first, last in row_blocks(*shape))

    # Rank 12 of 300 is found by random directions; the others by eigenvectors.
    for find, arguments in ((randomized_svd, (shape, 12)), (exact_svd, (shape, 12)), (exact_svd, (shape,))):
        one, other = find(there, *arguments), find(here, *arguments)
        assert isinstance(one.left, np.ndarray)
        assert (one.left.dtype, one.right.dtype, one.rank) == (matrix.dtype, matrix.dtype, other.rank)
        assert one.squares == pytest.approx(other.squares, rel=1e-12)
        assert_near(one.values, other.values, WITHIN[dtype])
        assert_near(whole(one), whole(other), WITHIN[dtype])


def whole(found: LowRankFactors) -> np.ndarray:
    return found.left.astype(np.float64) @ found.right


def test_zeros_and_numbers_that_are_not_finite_have_rank_0_there_too(gpu: str) -> None:
    zeros = np.zeros((200, 300), np.float32)
    for matrix in (zeros, zeros.T.copy(), zeros + np.float32("nan")):

        def blocks(matrix: np.ndarray = matrix) -> Iterator[np.ndarray]:
            return iter([matrix])

        there = GpuBlocks(MatrixGpu(devices_for("merging", "cuda")[0]), blocks, matrix.shape, holds=True)
        for found in (randomized_svd(there, matrix.shape, 8), exact_svd(there, matrix.shape)):
            assert found.rank == 0
            assert np.isnan(found.squares) == bool(np.isnan(matrix).any())
    assert gpu


@pytest.mark.parametrize("kind", ["full", "low rank", "zeros", "wide", "no columns"])
def test_small_decompositions_agree_with_the_processor(kind: str, gpu: str) -> None:
    random = np.random.default_rng(2)
    left, right = random.standard_normal((90, 12)), random.standard_normal((12, 60))
    if kind == "low rank":
        left[:, 5:] = left[:, :7]
    if kind == "zeros":
        left[:] = 0
    if kind == "wide":
        left, right = random.standard_normal((20, 50)), random.standard_normal((50, 30))
    if kind == "no columns":
        left, right = left[:, :0], right[:0]
    there = decompose_product(to_torch(left, gpu), to_torch(right, gpu)).to_numpy()
    here = decompose_product(left, right)
    assert there.rank == here.rank
    assert_near(there.values, here.values)
    assert_near(there.left, here.left)  # signs are fixed
    assert_near(there.right, here.right)
    if left.size:
        one, other = decompose_matrix(to_torch(left, gpu)).to_numpy(), decompose_matrix(left)
        assert_near((one.left * one.values) @ one.right, (other.left * other.values) @ other.right)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base, tuned = made.family(tmp_path, 1, dtype="F32", hidden=160, vocabulary=200, tied=False)
    return tuned[0], base


def lock_of(folder: Path) -> dict[str, Any]:
    lock: dict[str, Any] = json.loads((folder / "alnico.lock.json").read_text())
    return lock


@pytest.mark.parametrize(
    "options", [{"rank": 12}, {"energy": 0.6}, {"rank": 12, "exact": True}, {"size": "200KB"}], ids=str
)
def test_an_extracted_adapter_agrees_with_the_processors(
    options: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path, gpu: str
) -> None:
    found = {d: extract(*pair, tmp_path / d, device=d, **options) for d in ("cpu", "cuda")}
    assert found["cuda"].is_verified
    here, there = deltas(tmp_path / "cpu"), deltas(tmp_path / "cuda")
    assert here.keys() == there.keys()
    for module, values in here.items():
        assert_near(there[module], values, WITHIN["float32"])
    assert [t.rank for t in found["cuda"].tensors] == [t.rank for t in found["cpu"].tensors]
    locks = [lock_of(tmp_path / d) for d in ("cpu", "cuda")]
    assert [lock["device"] for lock in locks] == ["cpu", "cuda"]
    assert locks[0]["inputs"] == locks[1]["inputs"]
    assert gpu


def test_an_extraction_decomposes_every_matrix_on_the_gpu(
    pair: tuple[Path, Path], tmp_path: Path, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    real = factorise.randomized_svd
    monkeypatch.setattr(
        factorise,
        "randomized_svd",
        lambda blocks, *a, **k: seen.append(is_numpy(next(blocks()))) or real(blocks, *a, **k),
    )
    extract(*pair, tmp_path / "out", rank=4, device="cuda")
    assert seen
    assert not any(seen)
    assert gpu


def test_products_have_all_digits_of_float32_though_the_process_allows_fewer(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = factorise.randomized_svd

    def noting(*arguments: Any, **named: Any) -> LowRankFactors:
        seen.append(torch.get_float32_matmul_precision())
        return real(*arguments, **named)

    monkeypatch.setattr(factorise, "randomized_svd", noting)
    torch.set_float32_matmul_precision("high")
    try:
        with made_gpus([MADE]):
            extract(*pair, tmp_path / "there", rank=4, device="cuda")
        assert set(seen) == {"highest"}
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_extraction_resumes_on_its_own_kind_of_device_only(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def stop(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(MODULE._ExtractRun, "_write_adapter", stop)
        with pytest.raises(Killed):
            extract(*pair, tmp_path / "out", rank=4)
    with made_gpus([MADE]), pytest.raises(OutputError, match="was begun on cpu, and this run is on cuda"):
        extract(*pair, tmp_path / "out", rank=4, device="cuda")
    assert extract(*pair, tmp_path / "out", rank=4).resumed


def test_a_gpu_that_fills_up_is_an_error_that_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(factorise, "randomized_svd", full)
    with made_gpus([MADE]), pytest.raises(ResourceError) as refused:
        extract(*pair, tmp_path / "out", rank=4, threads=1, device="cuda")
    assert str(refused.value).partition(" of ")[2] == (
        "cuda:0 (Made, 8.6 GB), whose memory is full (CUDA out of memory). End other programs that use the GPU, or choose the device cpu."
    )
    assert not list(tmp_path.glob("out*"))


def test_a_matrix_larger_than_the_gpu_is_read_again_for_each_pass(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []
    real = GpuBlocks.__init__

    def noting(self: GpuBlocks, *arguments: Any, holds: bool) -> None:
        held.append(holds)
        real(self, *arguments, holds=holds)

    monkeypatch.setattr(GpuBlocks, "__init__", noting)
    for share, expected in ((0.9, True), (0.0, False)):
        monkeypatch.setattr(factorise, "GPU_SHARE", share)
        held.clear()
        with made_gpus([MADE]):
            extract(*pair, tmp_path / f"{share}", rank=4, device="cuda")
        assert set(held) == {expected}
    here, there = deltas(tmp_path / "0.9"), deltas(tmp_path / "0.0")
    for name, values in here.items():
        assert_near(there[name], values, WITHIN["float32"])


def test_no_such_gpu_is_an_error_before_anything_is_read(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with made_gpus([MADE]):
        for call in (
            lambda: extract(*pair, tmp_path / "out", device="cuda:1"),
            lambda: combine([pair[0]], tmp_path / "out", device="cuda:1"),
        ):
            with pytest.raises(ResourceError) as refused:
                call()
            assert str(refused.value) == (
                "device is cuda:1; this machine has cpu, cuda:0 (Made, 8.6 GB). Choose one of these."
            )


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    one = linear(tmp_path / "one", rank=3, seed=1, alpha=6)
    tensors = factors("m.q", 30, 20, 5, 7) | factors("m.v", 10, 20, 5, 8) | factors("m.o", 20, 30, 5, 9)
    return [one, save(tmp_path / "two", tensors, r=5, lora_alpha=4, use_rslora=True)]


COMBINED: list[dict[str, Any]] = [
    {"method": "cat"},
    {"method": "svd", "rank": 4},
    {"method": "svd", "energy": 0.8},
    *({"method": m} for m in ("tsv", "dc_merge", "swudi", "iso_c", "iso_cts")),
    {"method": "ties", "density": 0.4, "space": "core"},
    {"method": "ties", "density": 0.4, "space": "knots"},
    {"method": "dare_linear", "density": 0.5, "space": "knots", "seed": 3},
]


@pytest.mark.parametrize("options", COMBINED, ids=str)
def test_a_combined_adapter_agrees_with_the_processors(
    options: dict[str, Any], adapters: list[Path], tmp_path: Path, gpu: str
) -> None:
    found = {
        d: combine(adapters, tmp_path / d, dtype="float64", device=d, **options) for d in ("cpu", "cuda")
    }
    here, there = deltas(tmp_path / "cpu"), deltas(tmp_path / "cuda")
    assert here.keys() == there.keys()
    for module, values in here.items():
        assert_near(there[module], values)
    assert [m.rank for m in found["cuda"].modules] == [m.rank for m in found["cpu"].modules]
    assert found["cuda"].error == pytest.approx(found["cpu"].error, abs=1e-8)
    assert [lock_of(tmp_path / d)["device"] for d in ("cpu", "cuda")] == ["cpu", "cuda"]
    assert gpu


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts"])
def test_adapters_that_cancel_each_other_give_zeros_there_too(method: str, tmp_path: Path, gpu: str) -> None:
    adapters = [linear(tmp_path / name, rank=3, seed=1, alpha=6) for name in ("one", "same")]
    combine(adapters, tmp_path / "out", method=method, weights=[1.0, -1.0], device="cuda")
    assert not any(values.any() for values in deltas(tmp_path / "out").values())
    assert gpu


@pytest.mark.parametrize("most", [None, 8])
@pytest.mark.parametrize("shape", [(60, 50), (700, 600)])
def test_a_merged_whole_matrix_is_decomposed_on_the_gpu(
    most: int | None, shape: tuple[int, int], gpu: str
) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    class Merged:
        def rows(self, _expert: int, _rows: int, _columns: int, first: int, stop: int) -> np.ndarray:
            return matrix[first:stop]

    there = MatrixGpu(devices_for("merging", "cuda")[0])
    one, other = (reduce._decomposed(Merged(), 0, *shape, most, on) for on in (there, None))  # type: ignore[arg-type]
    assert one.rank == other.rank
    assert_near(
        (one.left * one.values) @ one.right, (other.left * other.values) @ other.right, WITHIN["float32"]
    )
    assert isinstance(one.left, np.ndarray)
    assert gpu


def test_the_bytes_of_a_decomposition_are_those_of_the_processors_without_its_blocks() -> None:
    assert gpu_blocks.gpu_bytes((100, 200), 4, 7, holds=True) == 100 * 200 * 12 + 7
    assert extract_deltas.svd_bytes((4096, 14336), 32, 4) < 1 << 30
