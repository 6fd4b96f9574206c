"""Runs a kernel on the processor and on a GPU (or in numba-cuda's simulator), and compares every byte that it writes."""

from __future__ import annotations

from typing import Any

import numpy as np

from alnico.devices import Device
from alnico.kernels.array_source import NoArrayForm
from alnico.kernels.build import Description, compile_kernel
from alnico.kernels.choice import Interpreted, kernel_for
from alnico.kernels.constants import WORD
from alnico.kernels.cuda.kernel import CudaKernel
from alnico.kernels.cuda.memory import GpuMemory, gpu_memory
from alnico.kernels.measure_kernels import MeasureKernel
from alnico.kernels.mix_kernel import MixKernel

GPU = Device("cuda:0", "Made", 8 << 30)
ON_THE_GPU = ("raws", "base", "out")


class OnBoth:
    """A kernel that is run on the processor, after a GPU has made the same of copies of the arguments."""

    def __init__(self, kernel: Description) -> None:
        self.kernel = kernel
        self.memory = gpu_memory(GPU)
        self.interface = kernel.interface()
        self.names = [name for name, _ in self.interface.parameters]
        try:
            self.processor: Any = Interpreted(kernel)
        except NoArrayForm:
            self.processor = compile_kernel(kernel)
        self.seconds = getattr(self.processor, "seconds", 0.0)
        self.calls = 0

    def __call__(self, *arguments: Any) -> int:
        gpu = kernel_for(self.kernel, gpu=self.memory)
        if not isinstance(gpu, CudaKernel):  # there is nothing to run on a GPU
            return self.processor(*arguments)
        given = [self._given(name, value) for name, value in zip(self.names, arguments, strict=True)]
        by_gpu = gpu(*given)
        by_processor: int = self.processor(*arguments)
        self.calls += 1
        if isinstance(self.kernel, MixKernel) and (by_processor >= 0 or by_gpu >= 0):
            # Refused: an element at or before the first fault.
            assert by_processor >= 0, self.kernel
            assert 0 <= by_gpu <= by_processor, self.kernel
            return by_processor
        for name, value, other in zip(self.names, arguments, given, strict=True):
            if isinstance(value, np.ndarray):
                self._compare(name, value, self._back(other), arguments)
        return by_processor

    def _given(self, name: str, value: Any) -> Any:
        if name == "raws":
            return tuple(uploaded(self.memory, raw) for raw in value)
        if name in ON_THE_GPU or name.startswith("ranks"):
            return uploaded(self.memory, value)
        return value.copy() if isinstance(value, np.ndarray) else value

    def _back(self, value: Any) -> np.ndarray:
        return value if isinstance(value, np.ndarray) else downloaded(self.memory, value)

    def _compare(
        self, name: str, by_processor: np.ndarray, by_gpu: np.ndarray, arguments: tuple[Any, ...]
    ) -> None:
        if (
            isinstance(self.kernel, MeasureKernel)
            and self.kernel.reduction == "bracket"
            and name == "gathered"
        ):
            inside = arguments[self.names.index("counts")][:, 1].tolist()
            for n, count in enumerate(inside):
                if (
                    count + WORD <= by_processor.shape[1]
                    and arguments[self.names.index("low")][n] != arguments[self.names.index("high")][n]
                ):
                    kept = np.sort(by_processor[n, :count]), np.sort(by_gpu[n, :count])
                    assert kept[0].tobytes() == kept[1].tobytes(), self.kernel
            return
        assert by_gpu.tobytes() == by_processor.tobytes(), f"{name} of {self.kernel}"


def uploaded(memory: GpuMemory, array: np.ndarray) -> Any:
    on_gpu = memory.bytes(array.nbytes)
    memory.upload(array, on_gpu)
    memory.finish()
    return on_gpu


def downloaded(memory: GpuMemory, on_gpu: Any) -> np.ndarray:
    host = np.empty(on_gpu.size, np.uint8)
    memory.download(on_gpu, host)
    memory.finish()
    return host
