"""Opening a GPU: what is missing is one error that says what to do; what a GPU gives is memory that is sliced as an array."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alnico.devices import Device, made_gpus
from alnico.errors import AlnicoError, ResourceError, RunError
from alnico.installation import install_hint
from alnico.kernels.cuda import compiled, memory
from alnico.kernels.cuda.memory import GpuMemory, gpu_memory

GPU = Device("cuda:0", "Made", 8 << 30)


class CudaAPIError(Exception):
    __module__ = "numba.cuda.cudadrv.driver"


class ModuleOfNumba:
    """numba-cuda with one GPU that has no memory of its own: its buffers are the processor's."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(ENABLE_CUDASIM=0, CUDA_LOW_OCCUPANCY_WARNINGS=1)
        self.runtime = SimpleNamespace(get_version=lambda: (13, 1))
        self.gpus: Any = [ModuleOfNumba.OneGpu()]

    class OneGpu:
        MULTIPROCESSOR_COUNT = 132

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    def stream(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None)

    def pinned_array(self, count: int, dtype: Any) -> np.ndarray:
        return np.empty(count, dtype)

    def device_array(self, count: int, dtype: Any) -> Any:
        raise CudaAPIError("[2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY")


@pytest.fixture
def numba_cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleOfNumba:
    """A numba-cuda whose driver and toolkit work, and whose kernels give what is right."""
    made = ModuleOfNumba()
    monkeypatch.setattr(memory, "_numba_cuda", lambda _device: made)
    monkeypatch.setattr(memory, "_open", {})
    monkeypatch.setitem(sys.modules, "numba.cuda.cudadrv.nvvm", SimpleNamespace(NVVM=lambda: None))
    driver = SimpleNamespace(driver=SimpleNamespace(get_version=lambda: (12, 4)))
    monkeypatch.setitem(sys.modules, "numba.cuda.cudadrv.driver", driver)
    monkeypatch.setattr(compiled, "compiled", lambda text: text)
    monkeypatch.setattr(GpuMemory, "address", lambda _self, array, _dtype: array)
    launches(monkeypatch, lambda out: out.__setitem__(slice(None), [0.0, 2.0**-149, 1.0, 1.0]))
    return made


def launches(monkeypatch: pytest.MonkeyPatch, write: Callable[[np.ndarray], Any]) -> None:
    monkeypatch.setattr(GpuMemory, "launch", lambda _self, _kernel, arguments, **_: write(arguments[1]))


def fails(error: Exception) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


def words(device: Device = GPU) -> str:
    """The error of opening a GPU, which leaves nothing behind: the next try finds the same."""
    found = []
    for _ in range(2):
        with pytest.raises(ResourceError) as caught:
            gpu_memory(device)
        found.append(str(caught.value))
    assert found[0] == found[1]
    return found[0]


def test_a_gpu_is_opened_once(numba_cuda: ModuleOfNumba) -> None:
    assert gpu_memory(GPU) is gpu_memory(GPU)
    assert gpu_memory(GPU).blocks == 132 * 16
    assert numba_cuda.config.CUDA_LOW_OCCUPANCY_WARNINGS == 0


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba_cuda", None)
    with pytest.raises(AlnicoError) as caught:
        gpu_memory(GPU)
    assert (
        str(caught.value)
        == f"a merge on cuda:0 needs numba_cuda, which is not installed. {install_hint('cuda')}"
    )


def test_a_missing_driver_is_said(numba_cuda: ModuleOfNumba) -> None:
    class NoGpus:
        __len__ = fails(
            ImportError("\nError at driver init: \n\nCUDA driver library cannot be found.\nEnsure that\n:")
        )

    numba_cuda.gpus = NoGpus()
    assert words() == (
        "cuda:0: the driver does not work (CUDA driver library cannot be found); expected a driver of NVIDIA that "
        "numba-cuda can use. Install or update it, or choose the device cpu."
    )


def test_a_gpu_that_numba_does_not_find_is_said(numba_cuda: ModuleOfNumba) -> None:
    assert words(Device("cuda:3")) == (
        f"cuda:3: numba-cuda finds {len(numba_cuda.gpus)} GPUs; expected this one among them. Choose another device."
    )


@pytest.mark.parametrize("part", ["NVVM", "NVRTC"])
def test_a_missing_toolkit_is_said(
    part: str, numba_cuda: ModuleOfNumba, monkeypatch: pytest.MonkeyPatch
) -> None:
    if part == "NVRTC":
        numba_cuda.runtime.get_version = fails(ImportError('Failure finding "libnvrtc.so.13"'))
        assert words() == (
            'cuda:0: kernels cannot be compiled (Failure finding "libnvrtc.so.13"); expected CUDA\'s toolkit. Run: pip '
            "install 'numba-cuda[cu13]', or 'numba-cuda[cu12]' for a driver before 580."
        )
        return
    missing = SimpleNamespace(NVVM=fails(ImportError("libNVVM is not available")))
    monkeypatch.setitem(sys.modules, "numba.cuda.cudadrv.nvvm", missing)
    assert words() == (
        "cuda:0: kernels cannot be compiled (libNVVM is not available); expected CUDA's toolkit. Run: pip install "
        "'numba-cuda[cu13]', or 'numba-cuda[cu12]' for a driver before 580."
    )


@pytest.mark.usefixtures("numba_cuda")
def test_a_driver_that_is_too_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    old = "[222] Call to cuLinkAddData results in CUDA_ERROR_UNSUPPORTED_PTX_VERSION"
    launches(monkeypatch, fails(CudaAPIError(old)))
    assert words() == (
        f"cuda:0: a kernel does not run there ({old}; the driver has CUDA 12.4, the toolkit 13.1); expected a driver as "
        "new as the toolkit. Update the driver, or run: pip install 'numba-cuda[cu12]'."
    )


@pytest.mark.usefixtures("numba_cuda")
def test_a_gpu_that_rounds_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launches(monkeypatch, lambda out: out.__setitem__(slice(None), [2.0**-24, 0.0, 1.0, 1.0]))
    assert words() == (
        "cuda:0: a kernel gives [5.960464477539063e-08, 0.0, 1.0, 1.0] instead of [0.0, 1.401298464324817e-45, 1.0, 1.0]; "
        "expected numbers rounded as on the processor. Update driver and toolkit, or choose the device cpu."
    )


@pytest.mark.usefixtures("numba_cuda")
def test_memory_that_a_gpu_does_not_have_is_said() -> None:
    with pytest.raises(ResourceError) as caught:
        gpu_memory(GPU).bytes(3_000_000_000)
    assert str(caught.value) == (
        "cuda:0: 3.0 GB of the GPU's memory cannot be allocated ([2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY); "
        "expected it to be free. End other programs that use the GPU, or choose the device cpu."
    )


def test_a_gpu_that_fails_while_it_runs_is_said(numba_cuda: ModuleOfNumba) -> None:
    lost = CudaAPIError("[719] Call to cuStreamSynchronize results in CUDA_ERROR_LAUNCH_FAILED")
    opened = gpu_memory(GPU)
    opened._queue().stream = SimpleNamespace(synchronize=fails(lost))
    with pytest.raises(RunError) as caught:
        opened.finish()
    assert str(caught.value) == (
        f"cuda:0: the driver reports {lost}; expected a GPU that works. Run the same command again, or choose the device "
        "cpu."
    )
    opened._queue().stream = SimpleNamespace(synchronize=fails(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):  # a mistake of ours stays one
        opened.finish()
    assert numba_cuda.gpus


@pytest.mark.usefixtures("numba_cuda")
def test_a_made_gpu_needs_the_simulator() -> None:
    with made_gpus([GPU]), pytest.raises(AlnicoError) as caught:
        gpu_memory(GPU)
    assert str(caught.value) == (
        "cuda:0 is made, and numba runs kernels on real GPUs; expected its simulator. Set NUMBA_ENABLE_CUDASIM=1 before "
        "numba is imported."
    )


def test_a_slice_of_a_gpus_bytes_shares_them_and_keeps_them() -> None:
    whole = memory.DeviceBytes(1000, 40, "owner")
    part = whole[8:24][4:]
    assert (part.address, part.size, part.owner, len(part), part.nbytes, part.shape) == (
        1012,
        12,
        "owner",
        12,
        12,
        (12,),
    )
    assert part.__cuda_array_interface__ == {
        "shape": (12,),
        "typestr": "|u1",
        "data": (1012, False),
        "version": 3,
    }
    assert (whole[30:100].size, whole[50:].size, whole[20:10].size) == (10, 0, 0)
    with pytest.raises(ValueError, match="step 1, not 2"):
        whole[::2]
