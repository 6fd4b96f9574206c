"""Reads a matrix into the memory of a GPU: once, or again for each pass where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from alnico.engine.matrix_gpu import MatrixGpu
from alnico.numerics.arrays import AnyArray
from alnico.numerics.randomized import Blocks

GPU_BLOCK_ELEMENTS = 1 << 26
"""Elements in a block of rows on a GPU: enough for its products to take longer than to be started."""


class GpuBlocks:
    """The blocks of a matrix on a GPU, from its ``blocks`` on the processor.

    With ``holds`` the matrix is one block, which stays on the GPU; without, each reading makes blocks of
    :data:`GPU_BLOCK_ELEMENTS`.
    """

    def __init__(self, gpu: MatrixGpu, blocks: Blocks, shape: tuple[int, int], *, holds: bool) -> None:
        self._gpu = gpu
        self._blocks = blocks
        self._shape = shape
        self._holds = holds
        self._held: AnyArray = None

    def __call__(self) -> Iterator[AnyArray]:
        if self._held is None:
            yield from self._read()
        else:
            yield self._held

    def _read(self) -> Iterator[AnyArray]:
        rows, columns = self._shape
        height = rows if self._holds else min(max(1, GPU_BLOCK_ELEMENTS // max(columns, 1)), rows)
        buffer: AnyArray = None
        filled = 0
        for block in self._blocks():
            if buffer is None:
                height = max(height, len(block))
                buffer = self._gpu.empty(height, columns, dtype=block.dtype.name)
            if filled + len(block) > height:
                yield buffer[:filled]
                filled = 0
            buffer[filled : filled + len(block)] = self._gpu.matrix(block)
            filled += len(block)
        if buffer is not None:
            self._held = buffer if self._holds else None
            yield buffer[:filled]


def gpu_bytes(shape: tuple[int, int], itemsize: int, work_bytes: int, *, holds: bool) -> int:
    """Return the bytes of a GPU's memory for a decomposition whose matrices next to the blocks take ``work_bytes``."""
    rows, columns = shape
    elements = rows * columns if holds else min(max(GPU_BLOCK_ELEMENTS, columns), rows * columns)
    return elements * (itemsize + np.dtype(np.float64).itemsize) + work_bytes
