"""Carries out a plan without files: the same threads, kernels and bits, into arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from alnico.checkpoint.model import Source
from alnico.engine.fetch import fetch_weights
from alnico.engine.journal import Done, Record
from alnico.engine.run import Run
from alnico.engine.weigh import weigh
from alnico.plan.job import Plan


class Arrays:
    """The output tensors as bytes, by name."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors = tensors

    def place(self, tensor: str, offset: int, size: int) -> np.ndarray:
        return self.tensors[tensor][offset : offset + size]

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        self.tensors[tensor][offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def copy(self, tensor: str, offset: int, size: int, source: Source, name: str) -> bool:
        return False

    def read_into(self, tensor: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = memoryview(self.tensors[tensor])[offset : offset + len(buffer)]


class Unwritten:
    """Keeps no journal: an interrupted merge in memory leaves nothing to take up. Tensors are hashed only to check the hashes that
    statistics have of the models they were measured of."""

    failure: BaseException | None = None

    def __init__(self, plan: Plan) -> None:
        self.wants_digests = any(tensor.digest for job in plan.jobs for tensor in job.read)

    def finished(self, record: Record) -> None:
        """Nothing is kept."""

    def measured(self, fact: int, value: tuple[float, ...]) -> None:
        """Nothing is kept."""


def run_in_memory(plan: Plan) -> dict[str, np.ndarray]:
    """Return the bytes of every output tensor, by name, in the order of the plan.

    The memory budget of the plan holds for what the run works with; inputs and result are the caller's.
    Errors: as for :func:`alnico.engine.run.run_plan`.
    """
    fetch_weights(plan)
    tensors = {job.name: np.empty(job.byte_size, np.uint8) for job in plan.jobs}
    Run(weigh(plan, {}), Arrays(tensors), Unwritten(plan), Done(), None).all()
    return tensors
