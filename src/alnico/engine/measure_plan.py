"""Measures one fact of many tensors of a plan, in one pass over their models, and writes nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from alnico.devices import Device
from alnico.engine.blocks import Block, Span, blocks, chunks
from alnico.engine.fetch import fetch_weights
from alnico.engine.job_devices import devices_of
from alnico.engine.kernel_arguments import KernelContext
from alnico.engine.measure import FactKernel, LevelMeasurement, kernels_of
from alnico.engine.mix import refuse_inputs
from alnico.engine.workspace import Workspace
from alnico.errors import NonFiniteError
from alnico.kernels.choice import kernel_for
from alnico.kernels.facts import Gram, MeasuredFact
from alnico.plan.job import Job, Plan
from alnico.threads import Crew, WorkItem


def measure_tensors(plan: Plan, jobs: Sequence[Job], fact: MeasuredFact, too_large: str) -> dict[str, Any]:
    """Return the value of ``fact`` for each tensor, by name. Each job has a base; the fact needs one pass, in
    any order of blocks.

    Errors: NonFiniteError naming tensor and index of a NaN or an infinity, or with the text ``too_large`` a
    tensor for which the fact is beyond float64; those of reading.
    """
    return _PlanMeasurement(plan, fact, too_large).all(jobs)


def inner_products(plan: Plan) -> np.ndarray:
    """Return the k x k inner products of a plan's k task vectors, float64 sums over every tensor that is
    merged.

    For a plan of differences from one base: its sources are the base and k models. Errors: as for
    :func:`measure_tensors`.
    """
    fetch_weights(plan)
    jobs = [job for job in plan.jobs if job.kind == "mix"]
    too_large = (
        "the length of a task vector is beyond float64; expected a finite number. Exclude the model that it "
        "belongs to."
    )
    products = measure_tensors(plan, jobs, Gram(), too_large)
    models = len(plan.sources) - 1
    stacked = np.array([products[job.name] for job in jobs]).reshape(-1, models, models)
    return np.array([[math.fsum(column) for column in row] for row in stacked.transpose(1, 2, 0)])


class _PlanMeasurement:
    """The threads that measure a fact of many tensors."""

    def __init__(self, plan: Plan, fact: MeasuredFact, too_large: str) -> None:
        self._plan = plan
        self._fact = fact
        self._too_large = too_large
        self._crew = Crew(plan.memory.threads)
        self._device_of: dict[str, Device] = {}
        self._spaces: dict[Device, Workspace] = {}
        self._open: dict[str, _TensorFact] = {}
        self._values: dict[str, Any] = {}

    def all(self, jobs: Sequence[Job]) -> dict[str, Any]:
        calls: list[WorkItem] = []
        self._device_of = devices_of(jobs, self._plan.sources, self._plan.devices)
        self._spaces = {
            device: Workspace(device, self._plan.sources, self._plan.memory.worker_bytes, keeps_host=False)
            for device in dict.fromkeys(self._device_of.values())
        }
        elements: Counter[tuple[FactKernel, Device]] = Counter()
        for job in jobs:
            device = self._device_of[job.name]
            for kernel in kernels_of([self._fact], job, on_gpu=self._spaces[device].gpu is not None):
                elements[kernel, device] += job.elements
        for (kernel, device), count in elements.items():
            kernel_for(kernel, count, gpu=self._spaces[device].gpu)
        for job in jobs:
            spans = chunks(job)
            calls += [(self._measure, (job, span, len(spans))) for span in spans]
        with self._crew:
            self._crew.run(calls)
        return self._values

    def _measure(self, job: Job, span: Span, spans: int) -> None:
        with self._crew.lock:
            state = self._open.get(job.name) or self._open.setdefault(
                job.name, _TensorFact(self._context(job), self._fact, spans)
            )
        for start, stop in blocks(span, self._plan.memory.block_elements):
            self._crew.check()
            state.facts.fold(start, stop, self._block(job, start, stop))
        with self._crew.lock:
            state.remaining -= 1
            if state.remaining:
                return
            del self._open[job.name]
        state.facts.turn()
        value = state.facts.results()[self._fact]
        if not np.isfinite(value).all():
            self._refuse(job)
        self._values[job.name] = value

    def _block(self, job: Job, start: int, stop: int) -> Block:
        return self._spaces[self._device_of[job.name]].block(job, (start, stop))[0]

    def _context(self, job: Job) -> KernelContext:
        gpu = self._spaces[self._device_of[job.name]].gpu
        return KernelContext(job, self._plan.recipe.seed, {}, gpu=gpu)

    def _refuse(self, job: Job) -> None:
        """Name the first number of a tensor that is not finite. Errors: NonFiniteError."""
        for start, stop in blocks((0, job.elements), self._plan.memory.block_elements):
            refuse_inputs(job, self._plan.sources, start, self._block(job, start, stop))
        raise NonFiniteError(f"{job.name}: {self._too_large}")


class _TensorFact:
    """A tensor being measured, and how many of its chunks are left."""

    def __init__(self, context: KernelContext, fact: MeasuredFact, chunks: int) -> None:
        self.facts = LevelMeasurement([fact], context)
        self.remaining = chunks
