"""Decides where candidates are merged: in the memory of the GPU that scores them, or on the processor."""

from __future__ import annotations

from collections.abc import Iterable

from alnico.checkpoint.source import Source
from alnico.devices import Device, free_bytes
from alnico.errors import AlnicoError
from alnico.evaluation.placement import ModulePlacement

COPIES = 4
"""How often a model must fit into the free memory of a GPU that it is merged on: the result, its module while it is made,
the work of the merge, and what the module computes."""


def merging_gpu(placement: ModulePlacement, sources: Iterable[Source]) -> Device | None:
    """Return the GPU on which merges of some models are made and scored, without a copy between them; None for the processor.

    It is the first one of the ``placement``, if kernels run on it and it has room. The values of a merge are those of the
    processor, up to the last bit of the output dtype.
    """
    gpu = placement.device
    if not gpu.is_gpu:
        return None
    largest = max((sum(t.byte_size for t in s.tensors.values()) for s in sources), default=0)
    if COPIES * largest > free_bytes(gpu):
        return None
    from alnico.kernels.cuda.memory import gpu_memory  # with numba-cuda, if it is installed

    try:
        gpu_memory(gpu)
    except AlnicoError:
        return None
    return gpu
