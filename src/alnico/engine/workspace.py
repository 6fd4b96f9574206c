"""Reads blocks into the memory of the device that computes with them, and takes results out of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.checkpoint.resident_model import bytes_on
from alnico.checkpoint.source import Source
from alnico.devices import Device, are_made
from alnico.engine import row_ranks
from alnico.engine.arena import Arena
from alnico.engine.blocks import Block, Span
from alnico.engine.differences import source_of
from alnico.engine.matrix_gpu import MatrixGpu
from alnico.engine.mix import NOTHING
from alnico.errors import ResourceError
from alnico.plan.job import Job, Plan

if TYPE_CHECKING:
    from alnico.kernels.cuda.memory import GpuMemory


@dataclass(frozen=True)
class BlockOutput:
    """Memory for the bytes of an output: where kernels write them, and the processor's memory that they are written to files
    from. On the processor both are one."""

    device: Any
    host: np.ndarray


class Workspace:
    """The memory that a merge works in on one device. Each thread has its own buffers."""

    def __init__(
        self, device: Device, sources: Sequence[Source], least_bytes: int, *, keeps_host: bool
    ) -> None:
        """``keeps_host``: are all bytes that are read also needed in the processor's memory, as hashing needs them?

        Errors: as for :func:`memory_of`.
        """
        self.device = device
        self.gpu = memory_of(device)
        self._sources = sources
        self._keeps_host = keeps_host
        self.arena = Arena(least_bytes) if self.gpu is None else Arena(least_bytes, self.gpu.pinned)
        """Buffers in the processor's memory, from which a GPU can copy."""
        self._on_device = self.arena if self.gpu is None else Arena(least_bytes, self.gpu.bytes)
        self._held: dict[tuple[int, str, bool], Any] = {}

    def block(
        self, job: Job, span: Span, out_bytes: int = 0, *, with_ranks: bool = True
    ) -> tuple[Block, BlockOutput]:
        """Read the inputs of a span, with ranks if the job uses them, and provide memory for ``out_bytes`` of output."""
        ranked = with_ranks and job.merge is not None and job.merge.uses_ranks
        rows = row_ranks.whole_rows(job, span) if ranked else span
        if self.gpu is None:
            *views, out = self.arena.read(job, self._sources, rows, out_bytes=out_bytes)
            outcome, ranks = BlockOutput(out, out), None
            if ranked:
                ranks, views = _ranked(job, rows, views, span)
            return block_of(job, views, ranks), outcome
        return self._gpu_block(self.gpu, job, rows, span, out_bytes)

    def _gpu_block(
        self, gpu: GpuMemory, job: Job, rows: Span, span: Span, out_bytes: int
    ) -> tuple[Block, BlockOutput]:
        is_ranked = job.merge is not None and job.merge.uses_ranks
        held = [self.held(job, i) for i in range(len(job.read))]
        is_read = [raw is None or self._keeps_host or is_ranked for raw in held]
        width = [tensor.width for tensor in job.read]
        elements = rows[1] - rows[0]
        *views, out = self.arena.views(
            [elements * w if read else 0 for w, read in zip(width, is_read, strict=True)] + [out_bytes]
        )
        for i, tensor in enumerate(job.read):
            if is_read[i]:
                source_of(tensor, self._sources).read_into(
                    tensor.name, rows[0] * tensor.width, memoryview(views[i])
                )
        ranks = None
        if is_ranked:
            ranks, views = _ranked(job, rows, views, span)
        count = span[1] - span[0]
        *places, device_out = self._on_device.views(
            [count * w if raw is None else 0 for w, raw in zip(width, held, strict=True)] + [out_bytes]
        )
        raws = []
        for view, place, raw, w in zip(views, places, held, width, strict=True):
            if raw is None:
                gpu.upload(view, place)
            raws.append(place if raw is None else raw[span[0] * w : span[1] * w])
        host = [view if read else None for view, read in zip(views, is_read, strict=True)]
        base = raws.pop() if job.base is not None else NOTHING
        return Block(raws, base, ranks, gpu, host), BlockOutput(device_out, out)

    def held(self, job: Job, position: int) -> Any:
        """Return the bytes of a tensor that a job reads, if this GPU's memory has them."""
        if self.gpu is None:
            return None
        tensor = job.read[position]
        key = tensor.model, tensor.name, tensor.is_difference
        if key not in self._held:
            self._held[key] = bytes_on(source_of(tensor, self._sources), tensor.name, self.gpu)
        return self._held[key]

    def take(self, outcome: BlockOutput) -> np.ndarray:
        """Return the bytes of an output in the processor's memory, when a kernel has written them."""
        if self.gpu is not None and outcome.host.size:
            self.gpu.download(outcome.device, outcome.host)
            self.gpu.finish()
        return outcome.host


def memory_of(device: Device) -> GpuMemory | None:
    """Return the memory of a GPU; None for the processor. Errors: AlnicoError if numba-cuda is not installed; ResourceError if
    the GPU cannot be used.

    A made GPU of a test has memory in the simulator only; elsewhere it is the processor under another name.
    """
    is_simulated = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
    if not device.is_gpu or (are_made() and not is_simulated):
        return None
    if is_simulated and not are_made():
        raise ResourceError(
            f"{device.name}: NUMBA_ENABLE_CUDASIM is 1, so numba-cuda would simulate the GPU; expected the GPU itself. Unset it."
        )
    from alnico.kernels.cuda.memory import gpu_memory

    return gpu_memory(device)


def open_gpus(plan: Plan) -> None:
    """Open the GPUs of a plan, before anything is made. Errors: as for :func:`memory_of`; ResourceError for a torch that cannot
    use them for whole matrices."""
    for device in plan.gpus:
        if any(job.kind == "mix" for job in plan.jobs):
            memory_of(device)
        if any(job.matrix is not None and job.matrix.runs_on_gpu for job in plan.jobs):
            MatrixGpu(device)


def _ranked(
    job: Job, rows: Span, views: Sequence[np.ndarray], span: Span
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the ranks of the elements of a span, and their bytes, from those of the whole rows."""
    block = block_of(job, views)
    ranks = row_ranks.ranks(job, rows, block.raws, block.base, span)
    parts = [
        view[(span[0] - rows[0]) * tensor.width : (span[1] - rows[0]) * tensor.width]
        for view, tensor in zip(views, job.read, strict=True)
    ]
    return ranks, parts


def block_of(job: Job, views: Sequence[np.ndarray], ranks: np.ndarray | None = None) -> Block:
    """Name the bytes of what a job reads, in the processor's memory."""
    return Block(views[:-1], views[-1], ranks) if job.base is not None else Block(views, NOTHING, ranks)
