"""Makes small tensors in batches: neighbours in a file are read, mixed, written and recorded together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.source import Source
from alnico.engine.arena import Arena
from alnico.engine.blocks import Block
from alnico.engine.differences import source_of
from alnico.engine.kernel_arguments import is_of_values
from alnico.engine.workspace import block_of
from alnico.plan.job import Job

MOST_TENSORS = 256
"""Most tensors of a batch."""

LEAST_BATCHES = 16
"""A batch has at most this part of the tensors of a run: threads share them, and a killed run loses little."""


@dataclass(frozen=True)
class Batch:
    """Small tensors that one thread makes together."""

    jobs: tuple[Job, ...]

    @property
    def byte_size(self) -> int:
        return sum(job.byte_size for job in self.jobs)


def cut_into_batches(jobs: Sequence[Job], most_elements: int) -> Iterator[Batch]:
    """Cut jobs, in their order, into batches of at most ``most_elements``: as many as a block has, so that a batch needs the memory
    of a block."""
    most = min(MOST_TENSORS, -(-len(jobs) // LEAST_BATCHES))
    batch: list[Job] = []
    elements = 0
    for job in jobs:
        if batch and (len(batch) == most or elements + job.elements > most_elements):
            yield Batch(tuple(batch))
            batch, elements = [], 0
        batch.append(job)
        elements += job.elements
    if batch:
        yield Batch(tuple(batch))


@dataclass(frozen=True)
class LoadedTensors:
    """Jobs with the same kinds of inputs, which are in memory side by side: the bytes of each input of each job, memory for their
    outputs, and the memory that all of them share."""

    jobs: tuple[Job, ...]
    inputs: list[list[np.ndarray]]
    outputs: list[np.ndarray]
    all_inputs: list[np.ndarray]
    all_outputs: np.ndarray

    def block(self, number: int) -> Block:
        """The inputs of one job."""
        return block_of(self.jobs[number], self.inputs[number])

    @property
    def are_one(self) -> bool:
        """Can a kernel mix all of them in one call? Then they have one merge, of which nothing depends on the tensor, and on the
        place of an element in it."""
        first = self.jobs[0]
        return first.merge is not None and is_of_values(first.merge) and len(self.jobs) > 1

    @property
    def whole(self) -> Block:
        """The inputs of all jobs, as if they were one tensor."""
        return block_of(self.jobs[0], self.all_inputs)


def read_batch(batch: Batch, sources: Sequence[Source], arena: Arena) -> list[LoadedTensors]:
    """Read the inputs of a batch into the buffer of this thread, and provide memory for its outputs. Neighbours in a file are read by
    one call."""
    groups = list(_alike(batch.jobs))
    sizes = []
    for jobs in groups:
        elements = sum(job.elements for job in jobs)
        sizes += [*(tensor.width * elements for tensor in jobs[0].read), jobs[0].width * elements]
    memory = iter(arena.views(sizes))
    loaded = []
    wanted: dict[Source, list[tuple[str, memoryview]]] = {}
    for jobs in groups:
        all_inputs = [next(memory) for _ in jobs[0].read]
        all_outputs = next(memory)
        inputs, outputs, begin = [], [], 0
        for job in jobs:
            end = begin + job.elements
            parts = []
            for tensor, view in zip(job.read, all_inputs, strict=True):
                part = view[begin * tensor.width : end * tensor.width]
                wanted.setdefault(source_of(tensor, sources), []).append((tensor.name, memoryview(part)))
                parts.append(part)
            inputs.append(parts)
            outputs.append(all_outputs[begin * job.width : end * job.width])
            begin = end
        loaded.append(LoadedTensors(jobs, inputs, outputs, all_inputs, all_outputs))
    for source, tensors in wanted.items():
        if isinstance(source, FileModel):
            source.read_whole(tensors)
        else:
            for name, buffer in tensors:
                source.read_into(name, 0, buffer)
    return loaded


def _alike(jobs: Iterable[Job]) -> Iterator[tuple[Job, ...]]:
    """Divide jobs into runs that have the same merge, dtypes and width of the output."""
    run: list[Job] = []
    kind: object = None
    for job in jobs:
        own = (
            id(job.merge),
            job.dtype,
            job.is_wide,
            job.base is None,
            *(tensor.dtype for tensor in job.read),
        )
        if run and own != kind:
            yield tuple(run)
            run = []
        run.append(job)
        kind = own
    if run:
        yield tuple(run)
