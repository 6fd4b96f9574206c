"""Carries out a plan into arrays instead of files, with the same threads, kernels and bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from alnico.checkpoint.source import Source
from alnico.engine.fetch import fetch_weights
from alnico.engine.merge_run import MergeRun
from alnico.engine.norm_weights import measure_norm_weights
from alnico.engine.relatedness import IN_PYTHON, Caller, check_relatedness
from alnico.numerics.dtypes import DTYPES, decode_into
from alnico.output.journal import JournalState, Record
from alnico.plan.job import Plan


@dataclass(frozen=True)
class Follower:
    """A flat float32 array that gets the values of an output tensor of ``dtype``, block by block as they are
    computed."""

    values: np.ndarray
    dtype: str

    def take(self, offset: int, raw: np.ndarray) -> None:
        """Decode ``raw`` bytes of the tensor from byte ``offset`` on."""
        start, width = offset // DTYPES[self.dtype].bytes, raw.nbytes // DTYPES[self.dtype].bytes
        decode_into(raw, self.dtype, self.values[start : start + width])


class Arrays:
    """Output tensors as bytes, by name, and the arrays that follow them."""

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray],
        followers: Mapping[str, Sequence[Follower]] = MappingProxyType({}),
    ) -> None:
        self.tensors = tensors
        self.followers = followers

    def place(self, tensor: str, offset: int, size: int) -> np.ndarray:
        return self.tensors[tensor][offset : offset + size]

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        raw, place = np.frombuffer(data, np.uint8), self.place(tensor, offset, data.nbytes)
        if raw.ctypes.data != place.ctypes.data:
            place[:] = raw
        for follower in self.followers.get(tensor, ()):
            follower.take(offset, place)

    def copy(self, tensor: str, offset: int, size: int, source: Source, name: str) -> bool:
        return False

    def read_into(self, tensor: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = memoryview(self.tensors[tensor])[offset : offset + len(buffer)]


class NullRecorder:
    """Records nothing, as a merge in memory cannot be resumed. Tensors are hashed only to compare them with
    the hashes of the models that statistics were measured on."""

    failure: BaseException | None = None

    def __init__(self, plan: Plan) -> None:
        self.wants_digests = any(tensor.digest for job in plan.jobs for tensor in job.read)

    def finished(self, record: Record) -> None:
        """Records nothing."""

    def measured(self, fact: int, value: tuple[float, ...]) -> None:
        """Records nothing."""


def run_in_memory(plan: Plan, caller: Caller = IN_PYTHON) -> dict[str, np.ndarray]:
    """Return the bytes of every output tensor, by name, in the order of the plan.

    Models that were not tuned from one base are refused as on disk, in the words of the ``caller``. The
    memory budget of the plan does not include inputs and result, which are the caller's. Errors: as for
    :func:`alnico.engine.run.run_plan`.
    """
    fetch_weights(plan)
    if plan.recipe.unrelated == "error":
        check_relatedness(plan, caller)
    tensors = {job.name: np.empty(job.byte_size, np.uint8) for job in plan.jobs}
    MergeRun(measure_norm_weights(plan, {}), Arrays(tensors), NullRecorder(plan), JournalState(), None).all()
    return tensors
