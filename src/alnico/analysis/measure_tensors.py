"""Measures tensors of models with threads, each on its own: what a node of a cluster does, too."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from alnico.analysis.common_tensors import CommonTensor
from alnico.analysis.journal import MeasuredTensor
from alnico.analysis.results import LEVELS, Subspace
from alnico.analysis.subspace import decomposing_bytes, subspaces
from alnico.analysis.tensor_measurement import SORTED, TensorMeasurement, ThreadBuffers, kernels_of
from alnico.checkpoint.source import Source
from alnico.engine.arena import ALIGNMENT, Arena
from alnico.engine.blocks import Block, Span, blocks, chunks
from alnico.engine.matrix_gpu import GpuTurns, MatrixGpu, MatrixRoom
from alnico.engine.mix import refuse_inputs
from alnico.errors import NonFiniteError, ResourceError
from alnico.events import Advanced, Compiling, Reading, Watcher
from alnico.kernels.analysis_kernels import MOMENTS, TABLES, DescribingKernel, OrderKernel, lanes_of
from alnico.kernels.choice import kernel_for
from alnico.kernels.constants import LANES, LEAF, TILE
from alnico.numerics.blas import one_blas_thread
from alnico.numerics.sizes import format_size
from alnico.plan.job import Job
from alnico.plan.memory import BASELINE_BYTES, BYTES_A_TENSOR, GPU_LIBRARY_BYTES
from alnico.run_options import RunOptions
from alnico.threads import Crew

TABLE_BYTES = 65_536 * 4
"""Memory of one histogram of a thread."""

BLOCK_ELEMENTS = 4 * LEAF
"""Elements that are read and measured at a time; the blocks of all models fit the cache."""

MOST_SLOTS = 2 * (len(LEVELS) - 2)
"""Most bins of one model that contain the quantiles of a tensor."""

HISTOGRAM_BYTES = 128 << 10
"""Memory of the histogram of a group or layer; measured 20 to 80 KiB."""

RESULT_BYTES = 1_200
"""Memory of the results for one model, or pair of models, in one tensor."""

SHARED_CHUNKS = 8
"""From this many chunks on, all threads work on one tensor."""

HELD_BYTES = 64 << 20
"""Up to this many bytes over all models, a worker holds a tensor between its two readings, if the budget
allows."""


@dataclass(frozen=True)
class AnalysisMemory:
    """How an analysis uses its budget: a tensor of ``held_bytes`` or less in all models is read once."""

    threads: int
    block_elements: int
    held_bytes: int


def fit_memory(
    subjects: Sequence[CommonTensor],
    sources: Sequence[Source],
    run: RunOptions,
    side: int,
    block: int | None,
) -> AnalysisMemory:
    """Choose threads and blocks that fit the budget. Errors: ResourceError with the smallest budget."""
    models = len(sources) - 1
    pairs = models * (models - 1) // 2
    scopes = 1 + len({s.group for s in subjects}) + len({s.layer for s in subjects})
    largest = max((s.job.elements for s in subjects), default=0)
    fixed = (
        BASELINE_BYTES
        + sum(s.held_bytes for s in sources)
        + BYTES_A_TENSOR * sum(len(s.job.read) for s in subjects)
        + RESULT_BYTES * (models + pairs) * (len(subjects) + scopes)
        + HISTOGRAM_BYTES * models * scopes
        + (largest // LEAF + 1) * 8 * ((MOMENTS + 1) * models + 3 + 2 * pairs)
        + models * MOST_SLOTS * 2 * TABLE_BYTES
    )
    widths = max((sum(i.width for i in s.job.read) for s in subjects), default=0)
    matrices = [s.job.elements for s in subjects if models > 1 and s.has_subspace(side)]
    worker = (
        models * (TABLES + MOST_SLOTS) * TABLE_BYTES
        + models * 65_536
        + max((s.reading_bytes for s in sources), default=0)
    )
    worker += 8 * LANES * lanes_of(models) + 16 * TILE * models
    worker += 24 * max(matrices, default=0) + 16 * models * min(SORTED, largest)
    least = fixed + worker + widths * LEAF
    sizes = [(BLOCK_ELEMENTS, HELD_BYTES), (BLOCK_ELEMENTS, 0), (LEAF, 0)] if block is None else [(block, 0)]
    for count in range(run.threads, 0, -1):
        for size, held in sizes:
            held = max(held, widths * size)
            if fixed + count * (worker + held) <= run.memory_bytes:
                return AnalysisMemory(count, size, held)
    raise ResourceError(
        f"the analysis needs at least {format_size(least)} of memory, the budget is "
        f"{format_size(run.memory_bytes)}. "
        f"Raise --memory to {-(-least // (1 << 20))}MiB."
    )


class MeasuringRun:
    """Measures some of the ``subjects`` with threads, once.

    ``finished`` gets the number and the measurements of each, in any order and any thread.
    """

    def __init__(
        self,
        subjects: Sequence[CommonTensor],
        sources: Sequence[Source],
        memory: AnalysisMemory,
        top_share: float,
        subspace_side: int,
        finished: Callable[[int, MeasuredTensor], None],
        watch: Watcher | None = None,
        gpus: Sequence[MatrixGpu] = (),
    ) -> None:
        self.subjects = subjects
        self.sources = sources
        self.memory = memory
        self.top_share = top_share
        self.subspace_side = subspace_side
        self._finished = finished
        self._crew = Crew(memory.threads, watch)
        self._gpus = GpuTurns(gpus)
        self._on_gpus = MatrixRoom()
        self._own = threading.local()
        self._arena = Arena(memory.held_bytes + ALIGNMENT * len(sources))

    def measure(self, numbers: Sequence[int]) -> None:
        chosen = [self.subjects[number] for number in numbers]
        self._compile(chosen)
        self._crew.report(Reading(len(chosen), input_bytes(chosen)))
        with self._single_blas_thread(chosen), self._crew:
            shared: list[tuple[int, list[Span]]] = []
            alone: list[tuple[int, list[Span]]] = []
            for number in numbers:
                spans = chunks(self.subjects[number].job)
                (shared if self.memory.threads > 1 and len(spans) >= SHARED_CHUNKS else alone).append(
                    (number, spans)
                )
            for number, spans in shared:
                self._measure_shared(number, spans)
            # The largest first, so that no thread ends alone on a large tensor.
            alone.sort(key=lambda item: -self.subjects[item[0]].job.elements)
            self._crew.run([(self._measure_alone, (number, spans)) for number, spans in alone])

    def _single_blas_thread(self, subjects: Sequence[CommonTensor]) -> AbstractContextManager[None]:
        has_matrices = any(s.has_subspace(self.subspace_side) for s in subjects)
        return one_blas_thread() if has_matrices else nullcontext()

    def _compile(self, subjects: Sequence[CommonTensor]) -> None:
        values: Counter[DescribingKernel | OrderKernel] = Counter()
        for subject in subjects:
            for kernel in kernels_of(subject.job):
                values[kernel] += subject.job.elements * len(subject.job.inputs)
        self._crew.report(Compiling(len(values)))
        for kernel, count in values.items():
            kernel_for(kernel, count)

    def _measure_shared(self, number: int, spans: Sequence[Span]) -> None:
        """Measure a large tensor, with all threads in each reading of it."""
        state = TensorMeasurement(self.subjects[number].job, self.top_share)
        for reading in (self._first_reading, self._second_reading):
            rest = iter(spans)  # each thread takes the next span when it is free
            self._crew.run([(reading, (state, rest))] * self.memory.threads)
        self._finish(number, state)

    def _measure_alone(self, number: int, spans: Sequence[Span]) -> None:
        """Measure a tensor in one worker, with one reading if it fits."""
        job = self.subjects[number].job
        state = TensorMeasurement(job, self.top_share)
        held = (
            self._arena.read(job, self.sources, (0, job.elements))
            if sum(i.byte_size for i in job.read) <= self.memory.held_bytes
            else None
        )
        self._first_reading(state, iter(spans), held)
        if held is not None and job.elements <= SORTED:
            state.sort(held)
        self._second_reading(state, iter(spans), held, is_alone=True)
        self._finish(number, state)

    def _first_reading(
        self, state: TensorMeasurement, spans: Iterator[Span], held: list[np.ndarray] | None = None
    ) -> None:
        tables = self._table("tables", len(state.job.inputs) * TABLES)
        for block, views in self._blocks(state.job, spans, held):
            if state.describe(block, views, tables, self._work()):
                self._refuse(state.job, block[0], views)
        state.take(tables)

    def _second_reading(
        self,
        state: TensorMeasurement,
        spans: Iterator[Span],
        held: list[np.ndarray] | None = None,
        is_alone: bool = False,
    ) -> None:
        state.start_second()
        fine = self._table("fine", state.places)
        for _, views in self._blocks(state.job, spans, held):
            state.order(views, fine, self._work())
            self._crew.report(Advanced(state.job.name, sum(view.nbytes for view in views)))
        state.take_fine(fine, is_alone)
        fine[:] = 0

    def _blocks(
        self, job: Job, spans: Iterator[Span], held: list[np.ndarray] | None
    ) -> Iterator[tuple[Span, list[np.ndarray]]]:
        """Yield the blocks of spans with their data: from memory if the tensor is held, else read now."""
        widths = [i.width for i in job.read]
        for span in spans:
            for start, stop in blocks(span, self.memory.block_elements):
                self._crew.check()
                if held is None:
                    yield (start, stop), self._arena.read(job, self.sources, (start, stop))
                else:
                    yield (
                        (start, stop),
                        [view[start * w : stop * w] for view, w in zip(held, widths, strict=True)],
                    )

    def _table(self, name: str, rows: int) -> np.ndarray:
        """Return this thread's histograms, all 0; the caller sets them back to 0."""
        table: np.ndarray | None = getattr(self._own, name, None)
        if table is None or len(table) < rows:
            table = np.zeros((rows, 65_536), np.uint32)
            setattr(self._own, name, table)
        return table[:rows]

    def _work(self) -> ThreadBuffers:
        work: ThreadBuffers | None = getattr(self._own, "work", None)
        if work is None:
            work = self._own.work = ThreadBuffers(len(self.sources) - 1)
        return work

    def _refuse(self, job: Job, start: int, views: list[np.ndarray]) -> None:
        refuse_inputs(job, self.sources, start, Block(views[:-1], views[-1]))
        raise NonFiniteError(
            f"{job.name}: a difference from {self.sources[-1].label} is too large for float32; expected "
            "fine-tunes of one base. Repair or exclude that model."
        )

    def _finish(self, number: int, state: TensorMeasurement) -> None:
        subject = self.subjects[number]
        alignments: list[Subspace | None] = [None] * len(state.pairs)
        if alignments and subject.has_subspace(self.subspace_side):
            alignments = self._subspaces(subject.job)
        self._finished(number, MeasuredTensor(state.result(subject.models, alignments), state.histograms))

    def _subspaces(self, job: Job) -> list[Subspace | None]:
        """Compare the singular vectors of a matrix, on the GPU of this thread if it has one."""
        gpu = self._gpus.mine()
        if gpu is None:
            return subspaces(self.sources, job)
        needed = GPU_LIBRARY_BYTES + decomposing_bytes(job)
        with self._on_gpus.taken(gpu.device, job.name, needed, self._crew.check):
            return subspaces(self.sources, job, gpu.matrix)


def input_bytes(subjects: Sequence[CommonTensor]) -> int:
    """Return how many bytes the tensors have in all models."""
    return sum(i.byte_size for s in subjects for i in s.job.read)
