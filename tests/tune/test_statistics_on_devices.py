"""Statistics on devices: made GPUs, which are torch's processor, measure the same; memory that runs out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from transformers import BertModel

import alnico
from alnico.devices import Device, made_gpus
from alnico.errors import AlnicoError, ResourceError
from made_tasks import Made

GPUS = [Device("cuda:0", "Made", 8 << 30), Device("cuda:1", "Made", 8 << 30)]
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
Run = Callable[..., tuple[int, str, str]]
MEASURES: dict[str, Any] = {"fisher": alnico.fisher_statistics, "gram": alnico.gram_statistics}


def stored(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "statistics.safetensors")


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "statistics.json").read_text())
    return found


def same(one: Path, other: Path) -> bool:
    a, b = stored(one), stored(other)
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_a_gpu_measures_what_the_processor_does(made: Made, tmp_path: Path, kind: str) -> None:
    measure, options = MEASURES[kind], {"tasks": made.valid, "examples": 5}
    measure(made.references[0], tmp_path / "cpu", device="cpu", **options)
    with made_gpus(GPUS):
        for device in ("auto", "cuda", "cuda:1", "cuda:all"):
            measure(made.references[0], tmp_path / device, device=device, **options)
            assert same(tmp_path / device, tmp_path / "cpu")
        measure(made.references[0], tmp_path / "half", device="cuda", dtype="bfloat16", **options)
    assert not same(tmp_path / "half", tmp_path / "cpu")
    for name, entry in stored(tmp_path / "half").items():
        assert np.abs(entry - stored(tmp_path / "cpu")[name]).max() < 0.1 * np.abs(entry).max() + 1e-6
    places = {
        name: (summary(tmp_path / name)["device"], summary(tmp_path / name)["dtype"])
        for name in ("cpu", "auto", "half")
    }
    assert places == {
        "cpu": ("cpu", "float32"),
        "auto": ("cuda (Made)", "float32"),
        "half": ("cuda (Made)", "bfloat16"),
    }
    assert alnico.plan(
        {
            "merge_method": "fisher" if kind == "fisher" else "regmean",
            "models": [{"model": made.references[0], "parameters": {kind: str(tmp_path / "auto")}}] * 2,
        }
    ).jobs


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_a_gpu_of_the_machine_agrees_with_the_processor(made: Made, tmp_path: Path, kind: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    for device in ("cpu", "cuda"):
        MEASURES[kind](
            made.references[0],
            tmp_path / device,
            tasks=made.valid,
            examples=20,
            device=device,
            dtype="float32",
        )
    found, expected = stored(tmp_path / "cuda"), stored(tmp_path / "cpu")
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # float32 gradients and products, summed in another order
        assert np.abs(found[name] - value).max() <= 1e-3 * np.abs(value).max() + 1e-9


def test_layers_that_see_each_others_merge_are_measured_on_a_gpu(made: Made, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": made.valid, "examples": 4, "plus": True}
    expected = alnico.gram_statistics(made.references[:2], tmp_path / "cpu", device="cpu", **options)
    with made_gpus(GPUS):
        found = alnico.gram_statistics(made.references[:2], tmp_path / "gpu", device="cuda", **options)
    for one, other in zip(found, expected, strict=True):  # equations are solved by torch there
        a, b = stored(one), stored(other)
        assert a.keys() == b.keys()
        assert all(np.abs(a[n] - b[n]).max() <= 1e-4 * np.abs(b[n]).max() for n in a)


def test_equations_that_do_not_fit_are_an_error(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OUT_OF_MEMORY

    monkeypatch.setattr("alnico.tune.statistics.gram.solve", full)
    with made_gpus(GPUS), pytest.raises(ResourceError) as error:
        alnico.gram_statistics(
            made.references[:2], tmp_path / "out", tasks=made.valid, examples=2, plus=True, device="cuda"
        )
    assert str(error.value) == (
        "encoder.layer.0.attention.self.query: cuda:0 (Made, 8.6 GB) has too little memory for the equations of RegMean; expected "
        "room for its matrices and Gram matrices next to the modules. Choose another device."
    )
    assert not (tmp_path / "out").exists()


def test_a_module_spread_over_gpus_measures_the_same(made: Made, tmp_path: Path) -> None:
    size = 4 * sum(p.numel() for p in BertModel.from_pretrained(made.base).parameters())
    small = [Device(f"cuda:{i}", "Made", int(size)) for i in range(8)]  # each has room for nine tenths
    for kind, measure in MEASURES.items():
        measure(made.references[0], tmp_path / kind, tasks=made.valid, examples=5, device="cpu")
        with made_gpus(small):
            measure(
                made.references[0],
                tmp_path / f"{kind}-spread",
                tasks=made.valid,
                examples=5,
                device="cuda:all",
            )
        assert same(tmp_path / kind, tmp_path / f"{kind}-spread")


def test_modules_that_accelerate_has_hooked_measure_the_same(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate wraps each forward of a module that it spreads; a made GPU is one device, so it wraps none there."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    from alnico.evaluation import loaded_model

    load = loaded_model.load_module

    def hooked(*arguments: Any, **options: Any) -> Any:
        module = load(*arguments, **options)
        for part in module.modules():
            hook = AlignDevicesHook(execution_device="cpu", io_same_device=part is module)
            add_hook_to_module(part, hook)
        return module

    for folder in ("plain", "hooked"):
        for kind, measure in MEASURES.items():
            measure(made.references[0], tmp_path / folder / kind, tasks=made.valid, examples=5)
        monkeypatch.setattr(loaded_model, "load_module", hooked)
    for kind in MEASURES:
        assert same(tmp_path / "hooked" / kind, tmp_path / "plain" / kind)


class Tight(nn.Module):
    """Two layers on a device that holds so many inputs at once."""

    def __init__(self, most: int) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)
        self.most = most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.one(x))
        if len(x) > self.most:  # after the inputs of a layer were recorded
            raise OUT_OF_MEMORY
        scores: torch.Tensor = self.two(hidden)
        return scores


def test_out_of_memory_halves_the_batches_of_gram_matrices(tmp_path: Path) -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    with made_gpus(GPUS):
        alnico.gram_statistics([Tight(30)], tmp_path / "whole", inputs=x, device="cuda")
        with pytest.warns(
            UserWarning, match="the memory was too small for batches of 30 inputs; they have 7 now"
        ):
            alnico.gram_statistics([Tight(9)], tmp_path / "parts", inputs=x, device="cuda")
    exact = x.double().T @ x.double()
    for folder in ("whole", "parts"):
        # Sums over rows: those of the parts add up, to the rounding of float32 products. No row counts twice.
        assert stored(tmp_path / folder)["one.weight"] == pytest.approx(exact.numpy(), abs=2e-6 * 30)
        assert summary(tmp_path / folder)["tensors"]["one.weight"]["rows"] == 30


def test_one_input_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    with made_gpus(GPUS), pytest.raises(ResourceError) as error:
        alnico.fisher_statistics(Tight(0), tmp_path / "out", inputs=torch.ones(3, 4), device="cuda")
    assert str(error.value) == (
        "model: cuda:0 (Made, 8.6 GB) has too little memory for the gradients of one input; expected room for the module, "
        "its gradients, their sums and what it computes. Give shorter inputs, or choose another device."
    )
    assert not (tmp_path / "out").exists()


def test_a_gpu_without_room_for_the_gradients_is_refused_before_a_module_is_loaded(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "alnico.evaluation.loaded_model.load_module", lambda *_, **__: pytest.fail("a module was loaded")
    )
    with (
        made_gpus([Device(f"cuda:{i}", "Made", 150_000) for i in range(2)]),
        pytest.raises(ResourceError) as error,
    ):
        alnico.fisher_statistics(
            made.base, tmp_path / "out", tasks=made.valid, device="cuda", dtype="bfloat16"
        )
    assert str(error.value) == (
        f"{made.base}: Fisher information: needs 174.3 kB of GPU memory besides its inputs (43.6 kB for the module, 43.6 kB for "
        "its gradients and 87.2 kB for their sums, in bfloat16), and cuda:0 (Made, 150.0 kB) has 150.0 kB free; expected room "
        "for all of it. Choose device cuda:all, which spreads the module over all GPUs, or cpu."
    )


def test_the_commands_take_a_device(made: Made, tmp_path: Path, run: Run) -> None:
    for kind, measure in MEASURES.items():
        measure(made.references[0], tmp_path / kind, tasks=made.valid, examples=3, device="cpu")
        words = ("--tasks", str(made.valid), "--examples", "3", "--dtype", "float32")
        with made_gpus(GPUS):
            code, _, said = run(
                "statistics",
                kind,
                made.references[0],
                "--out",
                str(tmp_path / f"{kind}-gpu"),
                "--device",
                "cuda:1",
                *words,
            )
            assert code == 0, said
            code, _, said = run(
                "statistics",
                kind,
                made.references[0],
                "--out",
                str(tmp_path / "no"),
                "--device",
                "cuda:2",
                *words,
            )
        assert same(tmp_path / kind, tmp_path / f"{kind}-gpu")
        assert code == 7
        assert (
            "device is cuda:2; this machine has cpu, cuda:0 (Made, 8.6 GB), cuda:1 (Made, 8.6 GB). Choose one of these."
            in said
        )
        assert not (tmp_path / "no").exists()


class Norm(nn.Module):
    """BatchNorm on a device that holds so many inputs at once; remembers where it ran."""

    def __init__(self, most: int = 100) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.most = most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise OUT_OF_MEMORY
        result: torch.Tensor = self.norm(x)
        return result


def test_batchnorm_is_recalibrated_on_a_device() -> None:
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected, found = Norm(), Norm()
    assert alnico.recalibrate_batchnorm(expected, batches) == 3
    with made_gpus(GPUS):
        assert alnico.recalibrate_batchnorm(found, batches, device="cuda") == 3
        with pytest.raises(ResourceError, match="device is cuda:5; this machine has cpu, cuda:0"):
            alnico.recalibrate_batchnorm(found, batches, device="cuda:5")
    assert torch.equal(found.norm.running_mean, expected.norm.running_mean)  # type: ignore[arg-type]
    assert torch.equal(found.norm.running_var, expected.norm.running_var)  # type: ignore[arg-type]
    means = np.mean([b.double().mean(0).numpy() for b in batches], axis=0)
    assert found.norm.running_mean.numpy() == pytest.approx(means, abs=1e-6)  # type: ignore[union-attr]


def test_batchnorm_and_its_batches_are_on_the_named_device() -> None:
    seen: list[tuple[str, str]] = []
    module = Norm()
    module.register_forward_pre_hook(
        lambda m, args: seen.append((m.norm.weight.device.type, args[0].device.type))
    )
    with made_gpus([Device("cuda:0", "Made", 8 << 30, "meta")]), pytest.raises(Exception, match="meta"):
        alnico.recalibrate_batchnorm(module, [torch.ones(3, 4)], device="cuda")
    assert seen == [("meta", "meta")]


def test_a_batch_of_batchnorm_is_not_halved() -> None:
    module = Norm(most=5)
    with pytest.raises(ResourceError) as error:
        alnico.recalibrate_batchnorm(module, [torch.ones(5, 4), torch.ones(6, 4)])
    assert str(error.value) == (
        "recalibrate_batchnorm: the memory is too small for batch 2; expected room for it. Give smaller batches: the halves of a "
        "batch would have other variances, so it is not halved."
    )
    assert torch.equal(module.norm.running_mean, torch.zeros(4))  # type: ignore[arg-type]
    with pytest.raises(AlnicoError, match="device is 'gpu'; expected auto, cpu, cuda"):
        alnico.recalibrate_batchnorm(module, [], device="gpu")
