"""The singular vectors that an analysis compares are found by torch on a GPU, and agree with the processor's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import alnico
from alnico.analysis import measure_tensors
from alnico.analysis.journal import AnalysisJournal
from alnico.analysis.results import Analysis
from alnico.devices import made_gpus
from alnico.errors import OutputError, ResourceError, RunError
from alnico.numerics.arrays import is_numpy
from alnico.run_options import RunOptions
from made import family
from made_gpus import MADE, gpu

__all__ = ["gpu"]


def models() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    shapes = {
        "square": (60, 60),
        "tall": (90, 30),
        "wide": (20, 70),
        "row": (1, 40),
        "norm": (40,),
        "same": (30, 20),
    }
    base = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    tuned = [
        {n: v + 0.1 * random.standard_normal(v.shape).astype(np.float32) for n, v in base.items()}
        for _ in range(2)
    ]
    low = (random.standard_normal((90, 2)) @ random.standard_normal((2, 30))).astype(np.float32)
    tuned[0]["tall"] = base["tall"] + low
    tuned[1]["same"] = base["same"]
    return [base, *tuned, {n: 2 * v - base[n] for n, v in tuned[0].items()}]


def subspaces(found: Analysis) -> list[tuple[float, ...] | None]:
    pairs = [pair.subspace for scope in (found.whole, *found.tensors) for pair in scope.pairs]
    return [None if s is None else (s.left, s.right, s.rank, s.matrices) for s in pairs]


def test_subspaces_agree_with_the_processor(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = measure_tensors.subspaces

    def noting(sources, job, place=None):  # type: ignore[no-untyped-def]
        seen.append(place is None or is_numpy(place(np.zeros((1, 1)))))
        return real(sources, job, place) if place else real(sources, job)

    monkeypatch.setattr(measure_tensors, "subspaces", noting)
    base, *tuned = models()
    here = alnico.analyze(tuned, base=base, threads=2)
    assert all(seen)
    seen.clear()
    there = alnico.analyze(tuned, base=base, threads=2, device="cuda")
    assert seen
    assert not any(seen)
    one, other = subspaces(there), subspaces(here)
    assert [s is None for s in one] == [s is None for s in other]
    for a, b in zip(one, other, strict=True):
        if a is not None and b is not None:
            assert a == pytest.approx(b, abs=1e-9)
    assert gpu


def test_a_comparison_uses_the_device_of_its_run(
    gpu: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from alnico.analysis.compare import compare_models

    placed: list[str] = []
    real = measure_tensors.subspaces
    monkeypatch.setattr(
        measure_tensors, "subspaces", lambda *a: placed.append("gpu" if len(a) == 3 else "cpu") or real(*a)
    )
    base, one, other, merged = models()
    found = {
        device: compare_models(
            {"one": one, "other": other}, ("merged", merged), ("base", base), estimates={}, is_named=True,
            out=tmp_path / device, top_share=0.2, run=RunOptions.of(device=device),
        )
        for device in ("cpu", "cuda")
    }  # fmt: skip
    assert set(placed) == {"cpu", "gpu"}
    assert found["cpu"].data()["parents"] == found["cuda"].data()["parents"]
    assert gpu


@pytest.mark.parametrize("names_device", [True, False])
def test_an_analysis_resumes_on_its_own_kind_of_device_only(
    names_device: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal without a device is from before alnico used GPUs."""
    base, tuned = family(tmp_path, 2)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    real = AnalysisJournal.begin
    with monkeypatch.context() as patched:
        if not names_device:
            patched.setattr(
                AnalysisJournal,
                "begin",
                lambda *a, **options: real(*a, **{k: v for k, v in options.items() if k != "device"}),
            )
        patched.setattr("alnico.analysis.analyze.write_analysis", killed)
        with pytest.raises(KeyboardInterrupt):
            alnico.analyze(tuned, base=base, out=tmp_path / "out")
    with made_gpus([MADE]), pytest.raises(OutputError, match="was begun on cpu, and this run is on cuda"):
        alnico.analyze(tuned, base=base, out=tmp_path / "out", device="cuda")
    alnico.analyze(tuned, base=base, out=tmp_path / "out")


def test_a_device_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    base, *tuned = models()
    with made_gpus([MADE]), pytest.raises(ResourceError) as refused:
        alnico.analyze(tuned, base=base, out=tmp_path / "out", device="cuda:7")
    assert not list(tmp_path.iterdir())
    assert str(refused.value) == (
        "device is cuda:7; this machine has cpu, cuda:0 (Made, 8.6 GB). Choose one of these."
    )


@pytest.mark.parametrize(
    "text", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR"]
)
def test_a_gpu_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"{text}, when calling a function\nMore.")

    base, *tuned = models()
    for function in ("svd", "qr", "eigh"):
        monkeypatch.setattr(torch.linalg, function, fail)
    with made_gpus([MADE]), pytest.raises(RunError) as failed:
        alnico.analyze(tuned, base=base, threads=1, device="cuda")
    name, _, said = str(failed.value).partition(": ")
    assert name in base
    assert said == (
        f"cuda:0 (Made, 8.6 GB) failed ({text}, when calling a function). Run the same again; if it fails again, end other "
        "programs that use the GPU, or choose the device cpu."
    )
