"""The option ``device``: what it may be, which devices it names, and what is said if there is none."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import alnico.devices as devices_module
from alnico.devices import CPU, Device, checked_device, devices_for, devices_here, free_bytes, made_gpus
from alnico.engine.workspace import memory_of
from alnico.errors import AlnicoError, ResourceError
from alnico.run_options import RunOptions

GPUS = (
    Device("cuda:0", "Made A", 24 << 30),
    Device("cuda:1", "Made B", 80 << 30),
)


@pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", "cuda:all"])
def test_the_forms_of_the_option_are_accepted(text):
    assert checked_device(text) == text


@pytest.mark.parametrize(
    "text", ["gpu", "CUDA", "cuda:", "cuda:-1", "cuda:one", "mps", "", "cuda:all,cpu", "cuda:\u0663", None, 0]
)
def test_any_other_form_is_refused_with_those_expected(text):
    with pytest.raises(AlnicoError) as caught:
        checked_device(text)
    assert str(caught.value) == (
        f"device is {str(text)!r}; expected auto, cpu, cuda, cuda:N with the number of a GPU, or cuda:all."
    )


def test_a_torch_device_is_accepted():
    torch = pytest.importorskip("torch")
    assert checked_device(torch.device("cuda", 1)) == "cuda:1"


def test_auto_merges_on_the_processor_and_scores_on_the_first_gpu():
    with made_gpus(GPUS):
        assert devices_for("merging") == (CPU,)
        assert devices_for("scoring") == GPUS[:1]


def test_a_gpu_is_named_by_its_number():
    with made_gpus(GPUS):
        assert devices_for("merging", "cuda") == GPUS[:1]
        assert devices_for("scoring", "cuda:1") == GPUS[1:]
        assert devices_for("scoring", "cuda:all") == GPUS
        assert devices_for("scoring", "cpu") == (CPU,)


def test_a_gpu_that_does_not_exist_is_answered_with_those_that_do():
    with made_gpus(GPUS), pytest.raises(ResourceError) as caught:
        devices_for("merging", "cuda:2")
    assert str(caught.value) == (
        "device is cuda:2; this machine has cpu, cuda:0 (Made A, 25.8 GB), cuda:1 (Made B, 85.9 GB). "
        "Choose one of these."
    )


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "cuda:all"])
def test_a_machine_without_a_gpu_says_so(asked):
    with made_gpus(()), pytest.raises(ResourceError) as caught:
        devices_for("scoring", asked)
    assert str(caught.value) == (
        f"device is {asked}; no GPU can be used here (the machine has no GPU). Choose cpu, or fix that."
    )


def test_auto_on_a_machine_without_a_gpu_is_the_processor():
    with made_gpus(()):
        assert devices_for("scoring") == (CPU,)
        assert devices_here() == (CPU,)


def _torch(**cuda):
    return SimpleNamespace(
        __version__="2.9.0",
        version=SimpleNamespace(cuda=cuda.pop("built", "13.0")),
        cuda=SimpleNamespace(**cuda),
    )


def _raise(error):
    raise error


def test_a_torch_built_without_cuda_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", _torch(built=None))
    with pytest.raises(ResourceError) as caught:
        devices_for("scoring", "cuda")
    assert str(caught.value) == (
        "device is cuda; no GPU can be used here (torch 2.9.0 is built without CUDA: install a build of torch with it). "
        "Choose cpu, or fix that."
    )


def test_a_driver_that_is_too_old_is_told_in_the_words_of_torch(monkeypatch):
    problem = RuntimeError(
        "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver.\nMore."
    )
    monkeypatch.setitem(sys.modules, "torch", _torch(init=lambda: _raise(problem)))
    with pytest.raises(ResourceError) as caught:
        devices_for("scoring", "cuda")
    assert str(caught.value) == (
        "device is cuda; no GPU can be used here (torch: The NVIDIA driver on your system is too old (found version "
        "11040). Please update your GPU driver). Choose cpu, or fix that."
    )


def _numba(list_devices, *, is_simulated=False):
    return SimpleNamespace(list_devices=list_devices, config=SimpleNamespace(ENABLE_CUDASIM=is_simulated))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "raise OSError('libcudart.so.13: cannot open it.')",
            "torch cannot be imported: libcudart.so.13: cannot open it",
        ),
        ("import no_such_module", "torch cannot be imported: No module named 'no_such_module'"),
        (None, "torch is not installed"),
    ],
    ids=["broken", "incomplete", "folder"],
)
def test_a_torch_that_cannot_be_imported_is_no_gpu(tmp_path, monkeypatch, text, why):
    (tmp_path / "torch").mkdir()
    if text is not None:
        (tmp_path / "torch/__init__.py").write_text(text)
    monkeypatch.setitem(sys.modules, "torch", None)  # so that what was there comes back
    del sys.modules["torch"]
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert devices_for("scoring") == (CPU,)
    with pytest.raises(ResourceError) as caught:
        devices_for("scoring", "cuda")
    assert str(caught.value) == f"device is cuda; no GPU can be used here ({why}). Choose cpu, or fix that."


def test_the_simulator_of_numba_is_no_gpu(monkeypatch):
    monkeypatch.setattr(devices_module, "_torch", lambda: (None, "torch is not installed"))
    monkeypatch.setattr(devices_module, "_numba_cuda", lambda: _numba(list, is_simulated=True))
    with pytest.raises(ResourceError) as caught:
        devices_for("merging", "cuda")
    assert str(caught.value) == (
        "device is cuda; no GPU can be used here (torch is not installed; numba-cuda: its simulator is on: unset "
        "NUMBA_ENABLE_CUDASIM). Choose cpu, or fix that."
    )


def test_a_gpu_is_not_simulated_by_accident(monkeypatch):
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    with pytest.raises(ResourceError) as caught:
        memory_of(GPUS[0])
    assert str(caught.value) == (
        "cuda:0: NUMBA_ENABLE_CUDASIM is 1, so numba-cuda would simulate the GPU; expected the GPU itself. Unset it."
    )


def test_a_heading_of_numba_is_no_reason(monkeypatch):
    problem = RuntimeError(
        "Error at driver init: \n\nCUDA driver library cannot be found.\nEnsure that it is installed.\n:"
    )
    monkeypatch.setattr(devices_module, "_torch", lambda: (None, "torch is not installed"))
    monkeypatch.setattr(devices_module, "_numba_cuda", lambda: _numba(lambda: _raise(problem)))
    with pytest.raises(ResourceError) as caught:
        devices_for("merging", "cuda")
    assert str(caught.value) == (
        "device is cuda; no GPU can be used here (torch is not installed; numba-cuda: CUDA driver library cannot be found). "
        "Choose cpu, or fix that."
    )


def test_without_torch_merging_asks_numba(monkeypatch):
    monkeypatch.setattr(devices_module, "_torch", lambda: (None, "torch is not installed"))
    monkeypatch.setattr(devices_module, "_from_numba", lambda: (GPUS, ""))
    assert devices_for("merging", "cuda:1") == GPUS[1:]
    with pytest.raises(ResourceError) as caught:
        devices_for("scoring", "cuda:1")
    assert "(torch is not installed)" in str(caught.value)


def test_what_torch_finds_is_described(monkeypatch):
    found = {
        "init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda _: SimpleNamespace(name="Made", total_memory=1 << 34),
        "mem_get_info": lambda _: (123, 456),
    }
    monkeypatch.setitem(sys.modules, "torch", _torch(**found))
    (gpu,) = devices_for("scoring")
    assert gpu == Device("cuda:0", "Made", 1 << 34, "cuda:0")
    assert (gpu.kind, gpu.number, gpu.is_gpu, str(gpu)) == ("cuda", 0, True, "cuda:0 (Made, 17.2 GB)")
    assert free_bytes(gpu) == 123


def test_run_options_check_the_form_of_the_device():
    assert RunOptions.of(device="cuda:1").device == "cuda:1"
    with pytest.raises(AlnicoError, match="device is 'gpu'"):
        RunOptions.of(device="gpu")
