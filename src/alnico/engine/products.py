"""Inner products of the task vectors of a plan, over all its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from alnico.engine.blocks import Block, blocks
from alnico.engine.fetch import fetch_weights
from alnico.engine.kernel_arguments import KernelContext
from alnico.engine.measure import LevelMeasurement
from alnico.engine.mix import refuse_inputs
from alnico.errors import NonFiniteError
from alnico.kernels.facts import Gram
from alnico.numerics.arithmetic import ieee_threads
from alnico.plan.job import Job, Plan


def inner_products(plan: Plan) -> np.ndarray:
    """Return the k x k inner products of a plan's k task vectors, float64 sums over every tensor that is merged.

    For a plan of differences from one base: its sources are the base and k models. One pass; nothing is mixed.
    Errors: NonFiniteError naming tensor and index of a NaN or an infinity, or a tensor whose products are beyond float64.
    """
    fetch_weights(plan)
    jobs = [job for job in plan.jobs if job.kind == "mix"]
    with ieee_threads(plan.memory.threads) as pool:
        found = np.array(list(pool.map(lambda job: _of_tensor(plan, job), jobs)))
    found = found.reshape(-1, len(plan.sources) - 1, len(plan.sources) - 1)
    return np.array([[math.fsum(column) for column in row] for row in found.transpose(1, 2, 0)])


def _of_tensor(plan: Plan, job: Job) -> tuple[tuple[float, ...], ...]:
    gram = Gram()
    facts = LevelMeasurement([gram], KernelContext(job, plan.recipe.seed, {}))
    for start, stop, block in _blocks(plan, job):
        facts.fold(start, stop, block)
    facts.turn()
    products: tuple[tuple[float, ...], ...] = facts.results()[gram]
    if not np.isfinite(products).all():
        for start, _, block in _blocks(plan, job):
            refuse_inputs(job, plan.sources, start, block)
        raise NonFiniteError(
            f"{job.name}: the length of a task vector is beyond float64; expected a finite number. Leave out the model it is of."
        )
    return products


def _blocks(plan: Plan, job: Job) -> Iterator[tuple[int, int, Block]]:
    """The elements of a tensor in all models, from start to stop, in memory that the next block takes."""
    widths = [tensor.byte_size // max(job.elements, 1) for tensor in job.read]
    buffers = [np.empty(min(plan.memory.block_elements, job.elements) * width, np.uint8) for width in widths]
    for start, stop in blocks((0, job.elements), plan.memory.block_elements):
        views = [buffer[: (stop - start) * width] for buffer, width in zip(buffers, widths, strict=True)]
        for tensor, view, width in zip(job.read, views, widths, strict=True):
            plan.sources[tensor.model].read_into(tensor.name, start * width, memoryview(view))
        yield start, stop, Block(views[:-1], views[-1])
