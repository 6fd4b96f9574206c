"""Runs kernels on a GPU: called as those of the processor, with tensors in the GPU's memory

A call waits for its own result. Calls of several threads run at once: each thread has its own stream.
"""

from __future__ import annotations

from typing import Any

from alnico.kernels.cuda.measuring import column_gram, gram, measure
from alnico.kernels.cuda.memory import GpuMemory
from alnico.kernels.cuda.mixing import mix
from alnico.kernels.measure_kernels import ColumnGramKernel, GramKernel, MeasureKernel
from alnico.kernels.mix_kernel import MixKernel

GpuDescription = MixKernel | MeasureKernel | GramKernel | ColumnGramKernel

_RUNS: dict[type, Any] = {
    MixKernel: mix,
    MeasureKernel: measure,
    GramKernel: gram,
    ColumnGramKernel: column_gram,
}


class CudaKernel:
    """A kernel of a GPU, called as a :class:`alnico.kernels.build.Kernel` is.

    ``raws``, ``base``, ``out`` and ``ranks`` are :class:`DeviceBytes` (ranks may be an array, too); all other arguments are
    numbers and arrays of the processor, which are uploaded, or filled with the result. The result of a mix is -1, or 0 if
    a number is NaN or infinite.

    What has the same bits as on the processor: everything. Decoding, encoding, products, sums, quotients and square roots
    are rounded once each and in the same order, and draws are integers. A difference would be one of the GPU's division or
    square root, which IEEE 754 does not allow.
    """

    def __init__(self, description: GpuDescription, memory: GpuMemory) -> None:
        if type(description) not in _RUNS:
            raise TypeError(f"a {type(description).__name__} runs on the processor only")
        self.interface = description.interface()
        self.description = description
        self.memory = memory

    def __call__(self, *arguments: Any) -> int:
        if len(arguments) != len(self.interface.parameters):
            names = ", ".join(name for name, _ in self.interface.parameters)
            raise TypeError(f"the kernel takes {names}; got {len(arguments)} arguments")
        result: int = _RUNS[type(self.description)](self.description, self.memory, *arguments)
        return result
