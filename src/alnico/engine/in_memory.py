"""Carries out a plan into arrays instead of files, with the same threads, kernels and bits."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.checkpoint.memory_model import import_torch, to_torch
from alnico.checkpoint.source import Source
from alnico.devices import are_made
from alnico.engine.fetch import fetch_weights
from alnico.engine.job_devices import home
from alnico.engine.merge_run import MergeRun
from alnico.engine.norm_weights import measure_norm_weights
from alnico.engine.relatedness import IN_PYTHON, Caller, check_relatedness
from alnico.kernels.constants import WIDE_CODES
from alnico.numerics.dtypes import DTYPES, decode_into
from alnico.output.journal import JournalState, Record
from alnico.plan.job import Plan

if TYPE_CHECKING:
    from alnico.kernels.cuda.memory import GpuMemory


@dataclass(frozen=True)
class Follower:
    """A flat array that gets the values of an output tensor of ``dtype``, block by block as they are computed: a float32 array
    of numpy, or a torch tensor of any dtype on any device."""

    values: Any
    dtype: str

    @property
    def is_wide(self) -> bool:
        """Can kernels write the tensor here, as float32 with values rounded to its dtype, instead of in its own bytes?"""
        values = self.values
        return (
            self.dtype in WIDE_CODES
            and isinstance(values, np.ndarray)
            and values.dtype == np.float32
            and values.flags.c_contiguous
        )

    def narrowed(self) -> np.ndarray:
        """Return the tensor's own bytes of values that kernels wrote here. Exact."""
        values = self.values.view(np.uint32) >> np.uint32(16) if self.dtype == "BF16" else self.values
        narrow: np.ndarray = values.astype(DTYPES[self.dtype].storage).view(np.uint8)
        return narrow

    def take(self, offset: int, raw: Any) -> None:
        """Decode ``raw`` bytes of the tensor from byte ``offset`` on: an array, or a torch tensor of bytes."""
        width = DTYPES[self.dtype].bytes
        count = len(raw) // width
        start = offset // width
        place = self.values[start : start + count]
        if isinstance(place, np.ndarray):
            decode_into(raw if isinstance(raw, np.ndarray) else raw.cpu().numpy(), self.dtype, place)
        elif count:
            place.copy_(to_torch(raw, self.dtype, (count,)))


class Arrays:
    """Output tensors as bytes, by name, and the arrays that follow them. The bytes are arrays of numpy, or torch tensors on the
    GPU that makes them."""

    def __init__(
        self,
        tensors: Mapping[str, Any],
        followers: Mapping[str, Sequence[Follower]] = MappingProxyType({}),
    ) -> None:
        self.tensors = tensors
        self.followers = followers

    def place(self, tensor: str, offset: int, size: int, gpu: GpuMemory | None = None) -> Any:
        raw = self.tensors[tensor]
        if gpu is None:
            return raw[offset : offset + size] if isinstance(raw, np.ndarray) else None
        if isinstance(raw, np.ndarray) or str(raw.device) != gpu.device.torch_name or not size:
            return None
        return gpu.view(raw[offset : offset + size])

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        raw, place = np.frombuffer(data, np.uint8), self.tensors[tensor][offset : offset + data.nbytes]
        if not isinstance(place, np.ndarray):
            if raw.size:
                place.copy_(to_torch(raw, "U8", raw.shape))
        elif raw.ctypes.data != place.ctypes.data:
            place[:] = raw
        self.computed(tensor, offset, raw.size)

    def computed(self, tensor: str, offset: int, size: int) -> None:
        for follower in self.followers.get(tensor, ()):
            follower.take(offset, self.tensors[tensor][offset : offset + size])

    def let_go(self, tensor: str) -> None:
        """Tensors stay in memory."""

    def copy(self, tensor: str, offset: int, size: int, source: Source, name: str) -> bool:
        return False

    def read_into(self, tensor: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = memoryview(host_bytes(self.tensors[tensor][offset : offset + len(buffer)]))


def host_bytes(raw: Any) -> np.ndarray:
    """Return the bytes of an output tensor in the processor's memory."""
    return raw if isinstance(raw, np.ndarray) else raw.cpu().numpy()


def new_arrays(plan: Plan, *, stays: bool = False) -> dict[str, Any]:
    """Make memory for the bytes of every output tensor: on the GPU where inputs of it live, else in the processor's memory.

    ``stays``: the result is for the GPU in any case, if the plan has one and torch is installed.
    """
    gpus = [device for device in plan.devices if device.is_gpu]
    torch = import_torch("a result on a GPU") if gpus and (stays or "torch" in sys.modules) else None
    made: dict[str, Any] = {}
    for job in plan.jobs:
        place = home(job, plan.sources, gpus) or (gpus[0] if stays and gpus else None)
        made[job.name] = (
            torch.empty(job.byte_size, dtype=torch.uint8, device=place.torch_name)
            if place is not None and torch is not None
            else np.empty(job.byte_size, np.uint8)
        )
    wait_for_torch(plan)
    return made


def wait_for_torch(plan: Plan) -> None:
    """Wait until torch has computed everything that it was asked to on the GPUs of a plan: kernels do not wait for its streams."""
    torch: Any = sys.modules.get("torch")
    if torch is None or are_made():
        return
    for device in plan.devices:
        if device.is_gpu and torch.cuda.is_initialized():
            torch.cuda.synchronize(device.torch_name)


class NullRecorder:
    """Records nothing, as a merge in memory cannot be resumed. Tensors are hashed only to compare them with
    the hashes of the models that statistics were measured on."""

    failure: BaseException | None = None

    def __init__(self, plan: Plan) -> None:
        self.wants_digests = any(tensor.digest for job in plan.jobs for tensor in job.read)

    def finished(self, *records: Record) -> None:
        """Records nothing."""

    def measured(self, fact: int, value: tuple[float, ...]) -> None:
        """Records nothing."""


def run_in_memory(plan: Plan, caller: Caller = IN_PYTHON) -> dict[str, Any]:
    """Return the bytes of every output tensor, by name, in the order of the plan: arrays, or torch tensors of bytes for those
    that stay on a GPU, as one of their inputs lives there.

    Models that were not tuned from one base are refused as on disk, in the words of the ``caller``. The
    memory budget of the plan does not include inputs and result, which are the caller's. Errors: as for
    :func:`alnico.engine.run.run_plan`.
    """
    fetch_weights(plan)
    if plan.recipe.unrelated == "error":
        check_relatedness(plan, caller)
    tensors = new_arrays(plan)
    MergeRun(measure_norm_weights(plan, {}), Arrays(tensors), NullRecorder(plan), JournalState(), None).all()
    return tensors
