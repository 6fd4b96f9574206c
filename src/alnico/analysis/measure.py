"""Measures task vectors: all statistics of all tensors, in at most two readings of base and models.

The first reading of a tensor gives sums, counts and a coarse histogram; the second gives the exact quantiles
and what the largest entries of the models have in common. A tensor that fits into a block is read once. Sums
are stored per leaf and added exactly (``math.fsum``), and counts are integers, so neither block sizes nor
threads change the result.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico._version import __version__
from alnico.analysis.common_tensors import CommonTensor, model_of, names_of, pair_tensors
from alnico.analysis.histogram import Histogram, neighbours, place_in, value_of
from alnico.analysis.journal import AnalysisJournal, MeasuredTensor, decode_measurement
from alnico.analysis.results import GROUPS, LEVELS, AnalysedModel, Analysis, Skipped, Subspace
from alnico.analysis.subspace import decomposing_bytes, subspaces
from alnico.analysis.tally import PooledTallies, Tally
from alnico.checkpoint.file_model import describe_change, file_states
from alnico.checkpoint.renamed_model import with_names_of
from alnico.checkpoint.source import Source
from alnico.engine.arena import ALIGNMENT, Arena
from alnico.engine.blocks import Block, Span, blocks, chunks
from alnico.engine.fetch import fetch_files
from alnico.engine.kernel_arguments import codes_of
from alnico.engine.matrix_gpu import GpuTurns, MatrixGpu, MatrixRoom, kind_of, matrix_gpus
from alnico.engine.mix import refuse_inputs
from alnico.errors import AlnicoError, MismatchError, ModelError, NonFiniteError, ResourceError
from alnico.events import Advanced, Compiling, Reading, Watcher
from alnico.kernels.analysis_kernels import MOMENTS, TABLES, DescribingKernel, OrderKernel, lanes_of
from alnico.kernels.choice import kernel_for
from alnico.kernels.clock import CLOCK
from alnico.kernels.constants import LANES, LEAF, TILE
from alnico.kernels.template import Real
from alnico.numerics.blas import one_blas_thread
from alnico.numerics.dtypes import decode
from alnico.numerics.numbers import finite_number, quote_value, whole_number
from alnico.numerics.sizes import format_size
from alnico.plan.job import Job
from alnico.plan.memory import BASELINE_BYTES, BLOCK_ELEMENTS, BYTES_A_TENSOR, GPU_LIBRARY_BYTES
from alnico.run_options import DEFAULT_RUN, RunOptions
from alnico.threads import Crew

SORTED = 65_536
"""Up to this many elements, quantiles come from the sorted entries themselves."""

TABLE_BYTES = 65_536 * 4
"""Memory of one histogram of a thread."""

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

SUBSPACE_SIDE = 512
"""Default: subspaces are compared for matrices whose smaller side is at most this."""


@dataclass(frozen=True)
class AnalysisMemory:
    """How an analysis uses its budget: a tensor of ``held_bytes`` or less in all models is read once."""

    threads: int
    block_elements: int
    held_bytes: int


def analyze_sources(
    base: Source,
    models: Sequence[Source],
    *,
    top_share: float = 0.2,
    subspace_side: int = SUBSPACE_SIDE,
    run: RunOptions = DEFAULT_RUN,
    block_elements: int | None = None,
    unfinished: AnalysisJournal | None = None,
    names: Sequence[str] = (),
) -> Analysis:
    """Measure the task vectors of ``models``, relative to ``base``.

    ``names`` are those of the models in the result, by default short forms of their labels.
    ``top_share`` in (0, 1] is the share of each model's entries that count as its top parameters.
    ``subspace_side`` is the largest smaller side of matrices whose singular vectors are compared, 0 for none.
    Sources stay open. Tensors that ``unfinished`` has from an interrupted analysis are not measured again;
    others are added to it.
    Errors: AlnicoError for a wrong share, MismatchError for a model that shares no tensor with the base,
    ModelError for a file that changes meanwhile, NonFiniteError, ResourceError, HubError, RunError.
    """
    begin, compiled_before = time.perf_counter(), CLOCK.seconds
    if not models:
        raise AlnicoError("an analysis needs a base and at least one model.")
    subspace_side = whole_number(subspace_side, "subspace_side", 0)
    top_share = finite_number(
        top_share, "the share of top parameters", "a number in (0, 1]. The default is 0.2"
    )
    if not 0 < top_share <= 1:
        raise AlnicoError(
            f"the share of top parameters is {quote_value(top_share)}; expected a number in (0, 1]. The "
            "default is 0.2."
        )
    gpus = matrix_gpus(run.device)
    models = [with_names_of(model, base) for model in models]
    subjects, skipped = pair_tensors(base, models)
    for position, model in enumerate(models):
        if not any(position in subject.models for subject in subjects):
            raise MismatchError(
                f"{base.label} and {model.label} share no float tensor (name and shape); expected models of "
                "one architecture. `alnico inspect` lists their tensors."
            )
    sources = (*models, base)
    read = [
        [i.name for s in subjects for i in s.job.read if i.model == position]
        for position in range(len(sources))
    ]
    fetch_files(
        sources, [source.absent(names, False) for source, names in zip(sources, read, strict=True)], run.watch
    )
    memory = _fit_memory(subjects, sources, run, subspace_side, block_elements)
    before = file_states(path for source in sources for path in source.paths())
    recorded: dict[str, Mapping[str, Any]] = {}
    if unfinished is not None:
        options = {"top_share": top_share, "subspace_side": subspace_side, "device": kind_of(gpus)}
        recorded = unfinished.begin(base, models, subjects, run.threads, **options)
    measurements = _AnalysisRun(
        subjects, sources, memory, top_share, subspace_side, run.watch, recorded, unfinished, gpus
    ).measure()
    if changed := describe_change(before):
        raise ModelError(
            f"{changed}: changed during the analysis; expected a file that stays the same. Run the command "
            "again when nothing writes to the file."
        )
    seconds, compiling = time.perf_counter() - begin, CLOCK.seconds - compiled_before
    named = [model_of(m, name) for m, name in zip(models, names_of(models, names), strict=True)]
    return _analysis(base, named, top_share, subjects, measurements, skipped, seconds, compiling)


def _analysis(
    base: Source,
    models: Sequence[AnalysedModel],
    top_share: float,
    subjects: Sequence[CommonTensor],
    measurements: Measurements,
    skipped: Sequence[Skipped],
    seconds: float,
    compile_seconds: float,
) -> Analysis:
    count, tallies = len(models), measurements.tallies
    groups = [group for group in GROUPS if any(s.group == group for s in subjects)]
    layers = sorted({s.layer for s in subjects if s.layer is not None})

    def over(name: str, chosen: Sequence[int], key: Any) -> PooledTallies:
        return PooledTallies(name, [tallies[i] for i in chosen], count, measurements.histograms[key])

    return Analysis(
        version=__version__,
        base=model_of(base, names_of([base])[0]),
        models=tuple(models),
        top_share=top_share,
        whole=over("whole", range(len(subjects)), "whole").scope(),
        groups={g: over(g, [i for i, s in enumerate(subjects) if s.group == g], g).scope() for g in groups},
        layers={
            n: over(str(n), [i for i, s in enumerate(subjects) if s.layer == n], n).scope() for n in layers
        },
        tensors=tuple(
            PooledTallies(s.job.name, [t], count).of_tensor(s) for s, t in zip(subjects, tallies, strict=True)
        ),
        skipped=tuple(skipped),
        seconds=seconds,
        compile_seconds=compile_seconds,
    )


def _fit_memory(
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


@dataclass(frozen=True)
class Measurements:
    """A tally per tensor, and histograms per model for each group, each layer number and "whole"."""

    tallies: list[Tally]
    histograms: dict[Any, list[Histogram]]


class _AnalysisRun:
    """Measures all tensors with threads."""

    def __init__(
        self,
        subjects: Sequence[CommonTensor],
        sources: Sequence[Source],
        memory: AnalysisMemory,
        top_share: float,
        subspace_side: int,
        watch: Watcher | None,
        recorded: Mapping[str, Mapping[str, Any]],
        unfinished: AnalysisJournal | None,
        gpus: Sequence[MatrixGpu] = (),
    ) -> None:
        self.subjects = subjects
        self.sources = sources
        self.memory = memory
        self.top_share = top_share
        self.subspace_side = subspace_side
        self.tallies: list[Tally | None] = [None] * len(subjects)
        models = len(sources) - 1
        keys: list[Any] = ["whole", *{s.group for s in subjects}, *{s.layer for s in subjects}]
        self.histograms: dict[Any, list[Histogram]] = {
            key: [Histogram() for _ in range(models)] for key in keys
        }
        self._unfinished = unfinished
        self._crew = Crew(memory.threads, watch)
        self._gpus = GpuTurns(gpus)
        self._on_gpus = MatrixRoom()
        self._own = threading.local()
        self._arena = Arena(memory.held_bytes + ALIGNMENT * len(sources))
        self._missing = [
            number for number, subject in enumerate(subjects) if subject.job.name not in recorded
        ]
        for number, subject in enumerate(subjects):
            if subject.job.name in recorded:
                self._take(number, decode_measurement(recorded[subject.job.name]))

    def measure(self) -> Measurements:
        missing = [self.subjects[number] for number in self._missing]
        self._compile(missing)
        self._crew.report(Reading(len(missing), sum(i.byte_size for s in missing for i in s.job.read)))
        with self._single_blas_thread(), self._crew:
            shared: list[tuple[int, list[Span]]] = []
            alone: list[tuple[int, list[Span]]] = []
            for number in self._missing:
                spans = chunks(self.subjects[number].job)
                (shared if self.memory.threads > 1 and len(spans) >= SHARED_CHUNKS else alone).append(
                    (number, spans)
                )
            for number, spans in shared:
                self._measure_shared(number, spans)
            # The largest first, so that no thread ends alone on a large tensor.
            alone.sort(key=lambda item: -self.subjects[item[0]].job.elements)
            self._crew.run([(self._measure_alone, (number, spans)) for number, spans in alone])
        return Measurements([tally for tally in self.tallies if tally is not None], self.histograms)

    def _single_blas_thread(self) -> AbstractContextManager[None]:
        has_matrices = any(s.has_subspace(self.subspace_side) for s in self.subjects)
        return one_blas_thread() if has_matrices else nullcontext()

    def _compile(self, subjects: Sequence[CommonTensor]) -> None:
        values: Counter[DescribingKernel | OrderKernel] = Counter()
        for subject in subjects:
            for kernel in _kernels(subject.job):
                values[kernel] += subject.job.elements * len(subject.job.inputs)
        self._crew.report(Compiling(len(values)))
        for kernel, count in values.items():
            kernel_for(kernel, count)

    def _measure_shared(self, number: int, spans: Sequence[Span]) -> None:
        """Measure a large tensor, with all threads in each reading of it."""
        state = _TensorMeasurement(self.subjects[number].job, self.top_share)
        for reading in (self._first_reading, self._second_reading):
            rest = iter(spans)  # each thread takes the next span when it is free
            self._crew.run([(reading, (state, rest))] * self.memory.threads)
        self._finish(number, state)

    def _measure_alone(self, number: int, spans: Sequence[Span]) -> None:
        """Measure a tensor in one worker, with one reading if it fits."""
        job = self.subjects[number].job
        state = _TensorMeasurement(job, self.top_share)
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
        self, state: _TensorMeasurement, spans: Iterator[Span], held: list[np.ndarray] | None = None
    ) -> None:
        tables = self._table("tables", len(state.job.inputs) * TABLES)
        for block, views in self._blocks(state.job, spans, held):
            if state.describe(block, views, tables, self._work()):
                self._refuse(state.job, block[0], views)
        state.take(tables)

    def _second_reading(
        self,
        state: _TensorMeasurement,
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

    def _finish(self, number: int, state: _TensorMeasurement) -> None:
        subject = self.subjects[number]
        alignments: list[Subspace | None] = [None] * len(state.pairs)
        if alignments and subject.has_subspace(self.subspace_side):
            alignments = self._subspaces(subject.job)
        measurement = MeasuredTensor(state.result(subject.models, alignments), state.histograms)
        self._take(number, measurement)
        if self._unfinished is not None:
            self._unfinished.add(subject.job.name, measurement)

    def _subspaces(self, job: Job) -> list[Subspace | None]:
        """Compare the singular vectors of a matrix, on the GPU of this thread if it has one."""
        gpu = self._gpus.mine()
        if gpu is None:
            return subspaces(self.sources, job)
        needed = GPU_LIBRARY_BYTES + decomposing_bytes(job)
        with self._on_gpus.taken(gpu.device, job.name, needed, self._crew.check):
            return subspaces(self.sources, job, gpu.matrix)

    def _take(self, number: int, measurement: MeasuredTensor) -> None:
        subject = self.subjects[number]
        self.tallies[number] = measurement.tally
        with self._crew.lock:
            for key in ("whole", subject.group, subject.layer):
                for model, histogram in zip(subject.models, measurement.histograms, strict=True):
                    self.histograms[key][model].add(histogram)


class ThreadBuffers:
    """Buffers of one thread for the kernels; each method returns those of the first k models."""

    def __init__(self, models: int) -> None:
        self._values = np.empty(models * TILE, np.float64)
        self._narrow = np.empty((models, TILE), np.float32)
        self._flags = np.empty((models, TILE), np.uint32)
        self._lanes = np.empty((lanes_of(models), LANES), np.float64)

    def values(self, real: Real, models: int) -> np.ndarray:
        return self._values.view(real)[: models * TILE].reshape(models, TILE)

    def narrow(self, models: int) -> np.ndarray:
        return self._narrow[:models]

    def flags(self, models: int) -> np.ndarray:
        return self._flags[:models]

    def lanes(self, models: int) -> np.ndarray:
        return self._lanes[: lanes_of(models)]


class _TensorMeasurement:
    """The measurement of one tensor: ``describe`` blocks, ``start_second``, ``order`` blocks, ``result``."""

    def __init__(self, job: Job, top_share: float) -> None:
        self.job = job
        self.top_share = top_share
        self.codes, self.base_code = codes_of(job)
        self.real = job.real
        k, leaves = len(job.inputs), -(-job.elements // LEAF)
        self.pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
        describing, ordering = _kernels(job)
        self.describing, self.ordering = kernel_for(describing), kernel_for(ordering)
        self.moments = np.zeros((leaves, k * (MOMENTS + 1)))
        self.of_base = np.zeros((leaves, 2))
        self.of_pairs = np.zeros((leaves, 2 * len(self.pairs)))
        self.of_sum = np.zeros((leaves, 1))
        self.unchanged = np.zeros(k, np.int64)
        self.both = np.zeros((len(self.pairs), 2), np.int64)
        self.together = np.zeros(2, np.int64)
        self.ends = _no_ends(k)
        self.histograms = [Histogram() for _ in range(k)]
        self.fine: np.ndarray | None = None
        self.quantiles: list[tuple[float, ...]] = []
        self.has_second = False
        self.lock = threading.Lock()

    def describe(self, span: Span, views: list[np.ndarray], tables: np.ndarray, work: ThreadBuffers) -> int:
        """Add a block of the first reading; return 0 unless a value in it is not finite."""
        first, last = span[0] // LEAF, -(-span[1] // LEAF)
        k = len(self.codes)
        counts = np.zeros(k, np.int64), np.zeros_like(self.both), np.zeros(2, np.int64), _no_ends(k)
        of_leaf = (
            self.moments[first:last],
            self.of_base[first:last],
            self.of_pairs[first:last],
            self.of_sum[first:last],
        )
        values, narrow = work.values(self.real, k), work.narrow(k)
        status = self.describing(
            *self._kernel_arguments(views), *of_leaf, *counts, tables, values, narrow, work.lanes(k)
        )
        with self.lock:
            self.unchanged += counts[0]
            self.both += counts[1]
            self.together += counts[2]
            self.ends[:, 0] = np.minimum(self.ends[:, 0], counts[3][:, 0])
            self.ends[:, 1] = np.maximum(self.ends[:, 1], counts[3][:, 1])
        return status

    def _kernel_arguments(
        self, views: list[np.ndarray]
    ) -> tuple[np.ndarray, int, np.ndarray, np.ndarray, int]:
        addresses = np.array([view.ctypes.data for view in views[:-1]], np.int64)
        return (
            addresses,
            views[-1].size // self.job.read[-1].width,
            self.codes,
            views[-1],
            self.base_code,
        )

    def take(self, tables: np.ndarray) -> None:
        """Add what a thread counted in the first reading."""
        with self.lock:
            for i, histogram in enumerate(self.histograms):
                histogram.take(tables[TABLES * i : TABLES * (i + 1)])

    def start_second(self) -> None:
        """End the first reading: choose the bins that the second counts finely."""
        with self.lock:
            if not self.has_second:
                self._choose_bins()
                self.has_second = True

    def _choose_bins(self) -> None:
        n, k = self.job.elements, len(self.codes)
        self.slots = np.zeros((k, 65_536), np.uint8)
        self.fine_bins: list[list[int]] = [[] for _ in range(k)]
        self.tops = np.zeros(k, np.int64)
        self.shared = np.zeros((len(self.pairs), 2), np.int64)
        top_count = max(1, int(self.top_share * n))
        least = [max(h.kth_largest_magnitude(top_count), 1) if n else 1 for h in self.histograms]
        self.least = np.array(least, np.uint32)
        if n > SORTED:
            below, above, _ = neighbours(n, LEVELS[1:-1])
            for i, histogram in enumerate(self.histograms):
                bins, _, counts = histogram.places(np.concatenate([below, above]))
                # The bin of zeros hardly ever has other entries. If it has none, it needs no second count.
                settled = {0x8000} if self.unchanged[i] == counts[bins == 0x8000][:1].sum() else set()
                self.fine_bins[i] = sorted(set(bins.tolist()) - settled)
                self.slots[i, self.fine_bins[i]] = np.arange(1, len(self.fine_bins[i]) + 1)
        self.places = k * max(map(len, self.fine_bins))

    def order(self, views: list[np.ndarray], fine: np.ndarray, work: ThreadBuffers) -> None:
        """Add a block of the second reading, and its fine histograms to ``fine``."""
        tops, shared = np.zeros_like(self.tops), np.zeros_like(self.shared)
        k = len(self.codes)
        outputs = self.slots, fine, self.least, tops, shared
        self.ordering(
            *self._kernel_arguments(views), *outputs, work.values(self.real, k), work.narrow(k), work.flags(k)
        )
        with self.lock:
            self.tops += tops
            self.shared += shared

    def take_fine(self, fine: np.ndarray, is_alone: bool) -> None:
        """Add what a thread counted in the second reading; it is everything if the thread ``is_alone``."""
        if is_alone:
            # Not a copy: fresh memory for each tensor took a third of the time on a virtual machine.
            self.quantiles = self.quantiles or [self._quantiles(i, fine) for i in range(len(self.codes))]
        elif self.places:
            with self.lock:
                self.fine = fine.copy() if self.fine is None else self.fine + fine

    def sort(self, views: list[np.ndarray]) -> None:
        """Compute the quantiles of a small tensor in memory from its sorted entries."""
        base = decode(views[-1], self.job.read[-1].dtype)
        below, above, share = neighbours(self.job.elements, LEVELS)
        for view, tensor in zip(views[:-1], self.job.inputs, strict=True):
            entries = np.sort((decode(view, tensor.dtype) - base).astype(np.float64))
            if entries.size:
                self.quantiles.append(
                    tuple((entries[below] + (entries[above] - entries[below]) * share).tolist())
                )
            else:
                self.quantiles.append((0.0,) * len(LEVELS))

    def result(self, models: tuple[int, ...], subspaces: list[Subspace | None]) -> Tally:
        return Tally.of_leaves(
            models=models,
            elements=self.job.elements,
            moments=self.moments,
            of_base=self.of_base,
            of_pairs=self.of_pairs,
            of_sum=self.of_sum,
            unchanged=self.unchanged,
            both=self.both,
            together=self.together,
            ends=value_of(self.ends) if self.job.elements else np.zeros(self.ends.shape),
            tops=self.tops,
            shared=self.shared,
            quantiles=self.quantiles or [self._quantiles(i, self.fine) for i in range(len(self.codes))],
            subspaces=subspaces,
        )

    def _quantiles(self, model: int, fine: np.ndarray | None) -> tuple[float, ...]:
        below, above, share = neighbours(self.job.elements, LEVELS)
        low, high = self._entries(model, below, fine), self._entries(model, above, fine)
        return tuple((low + (high - low) * share).tolist())

    def _entries(self, model: int, ranks: np.ndarray, fine: np.ndarray | None) -> np.ndarray:
        """Return the exact entries of a model with these ranks."""
        bins, inside, _ = self.histograms[model].places(ranks)
        ends = value_of(self.ends[model])
        each = self.places // len(self.codes)
        entries = np.zeros(len(ranks))
        for n, (rank, at, place) in enumerate(
            zip(ranks.tolist(), bins.tolist(), inside.tolist(), strict=True)
        ):
            if rank in (0, self.job.elements - 1):
                entries[n] = ends[0] if rank == 0 else ends[1]
            elif at in self.fine_bins[model]:
                assert fine is not None
                lower = place_in(fine[model * each + self.fine_bins[model].index(at)], place)
                entries[n] = value_of(np.array(at << 16 | lower))
        return entries


def _no_ends(models: int) -> np.ndarray:
    return np.tile(np.array([0xFFFFFFFF, 0], np.uint32), (models, 1))


def _kernels(job: Job) -> tuple[DescribingKernel, OrderKernel]:
    real = job.real
    return DescribingKernel(real), OrderKernel(real)
