"""Makes the tensors of a plan: threads that each read, measure, mix and write."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from alnico.checkpoint.resident_model import resident_bytes
from alnico.checkpoint.source import Source
from alnico.checkpoint.writer import OutputFiles
from alnico.devices import CPU, Device
from alnico.engine import measure, row_ranks
from alnico.engine.arena import Arena
from alnico.engine.batches import Batch, LoadedTensors, cut_into_batches, read_batch
from alnico.engine.blocks import Block, Span, blocks, chunks, whole
from alnico.engine.differences import as_differences, source_of
from alnico.engine.disk_ahead import DiskAhead
from alnico.engine.fact_cache import CachedFacts, FactCache
from alnico.engine.factor_cache import FactorFiles
from alnico.engine.job_devices import devices_of
from alnico.engine.kernel_arguments import Draws, KernelContext, needs_ranks
from alnico.engine.matrix import JobMatrices, rounding_kernel
from alnico.engine.matrix_gpu import MatrixRoom, is_of_gpu
from alnico.engine.matrix_store import MatrixNote, MatrixStore
from alnico.engine.mix import Mixer, mix_kernel, refuse_inputs
from alnico.engine.reading_ahead import ReadingAhead, in_one_pass, reads_of
from alnico.engine.workspace import BlockOutput, Workspace, block_of
from alnico.errors import (
    AlnicoError,
    MismatchError,
    NonFiniteError,
    ResourceError,
    RunError,
    first_line,
    visible,
)
from alnico.events import Advanced, Compiling, Measuring, Noted, Started, TensorDone, Watcher
from alnico.kernels.choice import kernel_for
from alnico.kernels.facts import Bernoulli, MeasuredFact
from alnico.methods import digests_of_foreign
from alnico.numerics.blas import one_blas_thread
from alnico.numerics.digest import PieceHasher, TensorDigest, Unhashed, digest_of
from alnico.output.journal import JournalState, Record
from alnico.plan.job import Input, Job, Plan
from alnico.plan.memory import gpu_matrix_bytes
from alnico.threads import Abandoned, Crew, Stopped, WorkItem

if TYPE_CHECKING:
    from alnico.kernels.cuda.memory import GpuMemory

MOST_AT_ONCE = 1 << 28
"""Most elements of a tensor that a GPU computes at once where its inputs and its output are in its memory; a multiple of LEAF."""


SHARED_CHUNKS = 8
"""A tensor of at least so many chunks that is measured first is shared by all threads; a smaller one is made
by one thread."""


class _RunningJob:
    """The state that the chunks of one job share while it runs."""

    def __init__(self, job: Job, spans: int, sources: Sequence[Source]) -> None:
        self.job = job
        self.output = TensorDigest(job.dtype, job.shape, job.byte_size)
        self.inputs = [
            TensorDigest(i.dtype, source_of(i, sources).tensors[i.name].shape, i.byte_size) for i in job.read
        ]
        if job.kind == "copy":
            self.inputs = [self.output]
        self.remaining = spans
        self.facts: dict[MeasuredFact, Any] = {}
        self.draws: dict[Bernoulli, Draws] = {}
        self.mixer: Mixer | None = None


class Output(Protocol):
    """Where the bytes of output tensors go."""

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Put ``data`` at byte ``offset`` of a tensor. Safe for threads."""
        ...

    def place(self, tensor: str, offset: int, size: int, gpu: GpuMemory | None = None) -> Any:
        """Return memory of the processor, or of a GPU, in which these bytes of a tensor can be computed; None if
        there is none. The processor's are written after that."""
        ...

    def computed(self, tensor: str, offset: int, size: int) -> None:
        """Take note that bytes were computed in the memory of a GPU that :meth:`place` returned."""
        ...

    def copy(self, tensor: str, offset: int, size: int, source: Source, name: str) -> bool:
        """Copy bytes of a source's tensor without reading them; return False if that is not possible."""
        ...

    def read_into(self, tensor: str, offset: int, buffer: memoryview) -> None:
        """Read back bytes that were written."""
        ...

    def let_go(self, tensor: str) -> None:
        """Take note that this run does not read back a tensor that is done."""
        ...


class RunRecorder(Protocol):
    """Records finished tensors and facts of the whole model. ``failure`` is why it no longer can.

    If it ``wants_digests``, all bytes are hashed on the way; otherwise there are no records of tensors.
    """

    wants_digests: bool

    @property
    def failure(self) -> BaseException | None: ...

    def finished(self, *records: Record) -> None: ...

    def measured(self, fact: int, value: tuple[float, ...]) -> None: ...


class MergeRun:
    """The threads that make the tensors of a settled plan, from its sources into ``output``.

    Tensors and facts in ``state`` are done already. Facts in ``cache`` are not measured again. ``spans``
    chooses the chunks of a tensor that are made; if they are not all, ``recorder`` must not want digests.
    ``matrices`` keeps what methods compute from whole matrices in memory, ``factor_cache`` is the folder where it is
    kept in files. ``groups`` are the names of tensors that are made one group after the other, in all the tensors of the plan;
    each is asked for when the one before is finished.
    """

    def __init__(
        self,
        plan: Plan,
        output: Output,
        recorder: RunRecorder,
        state: JournalState,
        watch: Watcher | None,
        cache: FactCache | None = None,
        spans: Callable[[Job], list[Span]] | None = None,
        matrices: MatrixStore | None = None,
        factor_cache: Path | None = None,
        groups: Iterable[Sequence[str]] | None = None,
    ) -> None:
        self.plan = plan
        self._groups = groups
        self.output = output
        self.recorder = recorder
        self.cache = cache
        self.matrices = matrices
        self.factor_fault: str | None = None
        """Why factors could not be kept in files."""
        self._factor_cache = factor_cache
        self._factors: FactorFiles | None = None
        self.notes: list[Noted] = []
        """What methods said about matrices."""
        self._given_spans = spans
        self._hasher = PieceHasher if recorder.wants_digests else Unhashed
        self.records = {r.tensor: r for r in state.records}
        self.facts = dict(state.facts)
        self.of_model: dict[measure.OverModel, tuple[float, ...]] = {}
        self.resumed = len(self.records)
        missing = [j for j in plan.jobs if j.name not in self.records]
        self.jobs = as_differences(missing, plan.sources)
        self._crew = Crew(plan.memory.threads, watch)
        self._reads = reads_of(self.jobs, plan.sources) if spans is None else {}
        self._ahead = ReadingAhead(plan.memory.ahead_bytes, self._crew.check)
        self._disk = DiskAhead(plan.sources, plan.bytes_to_read + plan.bytes_to_write, output.let_go)
        self._draws = Arena(0)
        """Memory for what is drawn in a tensor that one thread makes."""
        self._room = MatrixRoom()
        self._device_of = devices_of(plan.jobs, plan.sources, plan.devices)
        self._at_once: dict[str, bool] = {}
        self._spaces = {
            device: Workspace(
                device, plan.sources, plan.memory.worker_bytes, keeps_host=recorder.wants_digests
            )
            for device in dict.fromkeys((CPU, *(self._device(job) for job in self.jobs if job.kind == "mix")))
        }

    def _device(self, job: Job) -> Device:
        """The device that makes a tensor."""
        return self._device_of[job.name]

    def _space(self, job: Job) -> Workspace:
        """Where a tensor is computed by blocks."""
        return self._spaces[self._device(job)]

    def _is_at_once(self, job: Job) -> bool:
        """Is a tensor computed on a GPU whose memory has all its inputs and its output, so that nothing is copied by blocks?"""
        if job.kind != "mix" or self._space(job).gpu is None:
            return False
        if job.name not in self._at_once:
            self._at_once[job.name] = self._has_all(self._space(job), job)
        return self._at_once[job.name]

    def _has_all(self, space: Workspace, job: Job) -> bool:
        return (
            self._given_spans is None
            and not self.recorder.wants_digests
            and not (job.merge is not None and job.merge.uses_ranks)
            and all(space.held(job, i) is not None for i in range(len(job.read)))
            and self.output.place(job.name, 0, job.byte_size, space.gpu) is not None
        )

    def _spans(self, job: Job) -> list[Span]:
        """The spans that are made by themselves."""
        if self._given_spans is not None:
            return self._given_spans(job)
        return whole(job) if self._is_at_once(job) else chunks(job)

    def _blocks(self, job: Job, span: Span) -> Iterator[Span]:
        """Cut a span into the blocks that are in memory at once."""
        return blocks(span, MOST_AT_ONCE if self._is_at_once(job) else self.plan.memory.block_elements)

    def _mixed_blocks(self, job: Job, span: Span) -> Iterator[Span]:
        """Cut a span into the blocks that are mixed by one call: all of it, if nothing is copied by blocks."""
        space = self._space(job)
        is_in_place = (
            space.gpu is None
            and not self.recorder.wants_digests
            and not (job.merge is not None and job.merge.uses_ranks)
            and self.output.place(job.name, 0, 0) is not None
            and all(resident_bytes(source_of(i, self.plan.sources), i.name) is not None for i in job.read)
        )
        return iter([span]) if is_in_place else self._blocks(job, span)

    def all(self) -> None:
        done = sum(job.byte_size for job in self.plan.jobs if job.name in self.records)
        self._crew.report(Started(self.plan, len(self.records), done))
        self._compile()
        has_matrices = any(job.kind == "matrix" for job in self.jobs)
        if not has_matrices and not any(getattr(source, "uses_blas", False) for source in self.plan.sources):
            return self._make_all()
        with one_blas_thread():
            if self._factor_cache is None or not has_matrices:
                return self._make_all()
            self._factors = FactorFiles(
                self._factor_cache,
                depends_on=digests_of_foreign(self.plan.recipe.methods_used),
                reserve_bytes=self.plan.bytes_to_write,
            )
            try:
                self._make_all()
            except Abandoned:
                raise  # a thread may still use the folder
            except BaseException:
                self._factors.close()
                raise
            self.factor_fault = self._factors.fault
            self._factors.close()

    def _make_all(self) -> None:
        """Make all tensors that are not made yet."""
        with closing(self._ahead), closing(self._disk), self._crew:
            self._measure_model()
            if self._groups is None:
                return self._make(self.jobs)
            jobs = {job.name: job for job in self.jobs}
            for names in self._groups:
                self._make([jobs[name] for name in names if name in jobs])

    def _make(self, jobs: Sequence[Job]) -> None:
        """Make tensors: large ones that are measured first, one after the other, then all others."""
        order = sorted(jobs, key=lambda job: not self._is_shared(job, self._spans(job)))
        reads = [(job.name, self._reads[job.name]) for job in order if job.name in self._reads]
        with self._ahead.over(reads), self._disk.over(order if self._given_spans is None else []):
            self._make_in_order(jobs)

    def _is_shared(self, job: Job, spans: Sequence[Span]) -> bool:
        """Do all threads make a tensor together?"""
        return (
            job.kind == "mix"
            and job.merge is not None
            and bool(job.merge.levels())
            and self._crew.threads > 1
            and len(spans) >= SHARED_CHUNKS
        )

    def _make_in_order(self, jobs: Sequence[Job]) -> None:
        calls: list[WorkItem] = []
        small = {job.name: job for job in jobs if self._is_small(job)}
        batches = cut_into_batches(list(small.values()), self.plan.memory.block_elements)
        begun = {batch.jobs[0].name: batch for batch in batches}
        for job in jobs:
            if job.name in small:
                calls += [(self._make_batch, (begun[job.name],))] if job.name in begun else []
                continue
            spans = self._spans(job)
            state = _RunningJob(job, len(spans), self.plan.sources)
            if job.kind == "matrix":
                calls.append((self._make_matrix, (state,)))
            elif job.kind != "mix":
                calls += [(self._copy_chunk, (state, span)) for span in spans]
            elif job.merge is None or not job.merge.levels():
                state.draws = self._stored_draws(state)
                state.mixer = Mixer(self._context(state), self.plan.sources)
                calls += [(self._mix_chunk, (state, span)) for span in spans]
            elif self._is_shared(job, spans):
                self._shared(state, spans)
            else:
                calls.append((self._alone, (state, spans)))
        self._parallel(calls)

    def _is_small(self, job: Job) -> bool:
        """Is a tensor made in a batch? Then all of it is written to a file and recorded there."""
        return (
            job.kind == "mix"
            and self._given_spans is None
            and self.recorder.wants_digests
            and isinstance(self.output, OutputFiles)
            and job.elements <= self.plan.memory.block_elements
            and job.merge is not None
            and not job.merge.uses_ranks
            and job.name not in self._reads
            and self._space(job).gpu is None
        )

    def _compile(self) -> None:
        """Choose how each kernel runs, by all elements that it will run on, before any thread starts."""
        elements: Counter[tuple[Any, Device]] = Counter()
        alike: dict[tuple[Any, ...], list[Job]] = {}
        for job in self.jobs:
            for made in (job, job.protection.job) if job.protection is not None else (job,):
                if made.is_computed:
                    alike.setdefault((self._device(job), *kernel_key(made)), []).append(made)
        for (device, *_), jobs in alike.items():
            job, count = jobs[0], sum(job.elements for job in jobs)
            if job.kind == "matrix":
                elements[rounding_kernel(), CPU] += count
                continue
            for ranking in row_ranks.kernels(job):
                elements[ranking, CPU] += count
            on_gpu = self._space(job).gpu is not None
            for kernel in (*measure.kernels(job, on_gpu=on_gpu), mix_kernel(job)):
                elements[kernel, device] += count
        for _, fact, jobs in self._missing_facts():
            for job in jobs:
                elements[measure.model_kernel(fact, jobs), self._device(job)] += job.elements
        if elements:
            self._crew.report(Compiling(len(elements)))
        for (kernel, device), count in elements.items():
            kernel_for(kernel, count, gpu=self._spaces[device].gpu)

    def _parallel(self, calls: Sequence[WorkItem]) -> None:
        self._crew.run([(self._guarded, (call, arguments)) for call, arguments in calls])

    def _guarded(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.recorder.failure is not None:
            raise self.recorder.failure
        try:
            with self._ahead.of(_job_of(arguments).name):
                call(*arguments)
        except ResourceError as error:
            self._refuse_gpu(error, arguments)
            raise
        except (AlnicoError, Stopped):
            raise
        except OSError as error:
            raise RunError(
                f"{self._place(arguments)}: {error.strerror or error}. Check the disk; the same command resumes the merge."
            ) from None
        except Exception as error:
            if is_of_gpu(error):
                self._refuse_gpu(error, arguments)
            error.add_note(visible(f"alnico: while making {self._place(arguments)}"))
            raise

    def _refuse_gpu(self, error: Exception, arguments: tuple[Any, ...]) -> None:
        """Say that a GPU failed at a tensor, if it makes it. Errors: RunError, which keeps the unfinished output; ResourceError if
        nothing is kept."""
        device = self._device(_job_of(arguments))
        if not device.is_gpu:
            return
        keeps = self.recorder.wants_digests
        kind = RunError if keeps else ResourceError
        if isinstance(error, ResourceError) and not str(error).startswith(f"{device.name}: "):
            raise kind(*error.args) from error  # it has all its parts
        advice = (
            "The same command resumes the merge; if it fails again, end other programs that use the GPU, or merge with --device cpu "
            "--restart."
            if keeps
            else "End other programs that use the GPU, or choose the device cpu."
        )
        raise kind(f"{self._place(arguments)}: {device} failed ({first_line(error)}). {advice}") from error

    def _place(self, arguments: tuple[Any, ...]) -> str:
        """The tensor that a call works on, and the models that it is read from."""
        job = _job_of(arguments)
        sources = [self.plan.sources[m] for m in dict.fromkeys(tensor.model for tensor in job.read)]
        return f"{job.name} of {', '.join(source.label for source in sources)}"

    def _shared(self, state: _RunningJob, spans: list[Span]) -> None:
        """Make a large tensor: all threads measure it, then all mix it."""

        def one_pass(facts: measure.LevelMeasurement) -> None:
            if facts.ordered:
                self._parallel([(self._measure_chunks, (state, facts, spans))])
            else:
                self._parallel([(self._measure_chunks, (state, facts, [span])) for span in spans])

        self._measure(state, one_pass, threads=self._crew.threads)
        self._parallel([(self._mix_chunk, (state, span)) for span in spans])

    def _alone(self, state: _RunningJob, spans: list[Span]) -> None:
        """Make a tensor in one thread, while others make other tensors. A tensor of a single block is read
        once."""
        everything = (0, state.job.elements)
        if len(spans) > 1 or len(list(self._blocks(state.job, everything))) > 1:
            self._measure(state, lambda facts: self._measure_chunks(state, facts, spans))
            for span in spans:
                self._mix_chunk(state, span)
            return
        out_bytes = 0 if self._is_at_once(state.job) else state.job.byte_size
        held = self._space(state.job).block(state.job, everything, out_bytes)
        self._measure(state, functools.partial(_fold_whole, state.job, held[0]), held[0])
        self._mix_chunk(state, everything, held)

    def _measure(
        self,
        state: _RunningJob,
        one_pass: Callable[[measure.LevelMeasurement], None],
        held: Block | None = None,
        threads: int = 1,
    ) -> None:
        """Measure all facts of a job on so many threads, level by level and pass by pass, and make its mixer. ``held`` is the
        whole tensor, if it is in memory."""
        assert state.job.merge is not None
        if self._space(state.job).gpu is None:
            memory = self._draws if threads == 1 else Arena(0)
            state.draws = measure.kept_draws(state.job, threads, memory, self._stored_draws(state))
        for level in state.job.merge.levels():
            context = self._context(state)
            cached = self.cache.of_tensor(level, context) if self.cache is not None else CachedFacts()
            state.facts |= cached.whole
            context = dataclasses.replace(context, given=cached.given)
            facts = measure.LevelMeasurement([fact for fact in level if fact not in cached.whole], context)
            if facts.runs:
                facts.sample(
                    self._sample(state.job, facts.runs)
                    if held is None
                    else _pick(held, facts.runs, state.job)
                )
            while not facts.done:
                self._crew.check()
                one_pass(facts)
                facts.turn()
            results = facts.results()
            if not measure.are_finite(results):
                self._refuse_measured(state.job)
            if self.cache is not None:
                self.cache.keep(results, context)
            state.facts |= results
        state.draws = {drawn: draws for drawn, draws in state.draws.items() if draws.are_known or draws.stay}
        state.mixer = Mixer(self._context(state), self.plan.sources)

    def _stored_draws(self, state: _RunningJob) -> dict[Bernoulli, Draws]:
        """What was drawn in a tensor by earlier merges, and room for what later ones read."""
        job = state.job
        if self.cache is None or self._given_spans is not None or not measure.drawn(job):
            return {}
        return self.cache.draws(self._context(state)) if self._space(job).gpu is None else {}

    def _sample(self, job: Job, runs: list[Span]) -> Block:
        """Read the elements of some spans, joined, on the processor."""
        views = self._spaces[CPU].arena.read(job, self.plan.sources, *runs)
        return block_of(job, views)

    def _refuse_measured(self, job: Job) -> None:
        """Refuse a tensor whose facts are not finite. Errors: NonFiniteError, naming the first NaN or
        infinity if an input has one."""
        for start, stop in self._blocks(job, (0, job.elements)):
            refuse_inputs(job, self.plan.sources, start, self._block(job, (start, stop)))
        raise NonFiniteError(
            f"{job.name}: its values are so large that sums over them, as {self.plan.recipe.merge_method} takes them, are beyond "
            f"{job.real}; expected finite sums. Divide the tensor by a number in all models, or leave it out with a filter."
        )

    def _context(self, state: _RunningJob) -> KernelContext:
        before = {fact.fact: self.of_model[fact] for fact in measure.of_model(state.job)}
        gpu = self._space(state.job).gpu
        return KernelContext(
            state.job, self.plan.recipe.seed, before | state.facts, gpu=gpu, draws=state.draws
        )

    def _missing_facts(self) -> list[tuple[int, measure.OverModel, list[Job]]]:
        """The facts of the whole model that must still be measured, numbered in the order of the plan."""
        facts = enumerate(measure.over_model(self.plan.jobs).items())
        missing = {job.name for job in self.jobs}
        return [
            (n, f, jobs)
            for n, (f, jobs) in facts
            if n not in self.facts and any(job.name in missing for job in jobs)
        ]

    def _measure_model(self) -> None:
        """Measure the facts of the whole model, one after the other, pass by pass over all its tensors."""
        for number, fact, jobs in self._missing_facts():
            self._crew.report(Measuring(len(jobs)))
            measurement = measure.ModelMeasurement(
                fact, jobs, self.cache.of_model(fact, jobs) if self.cache is not None else {}
            )
            calls = [(self._measure_across, (measurement, job, span)) for job in jobs for span in chunks(job)]
            reads = [
                (job.name, in_one_pass(self._reads[job.name])) for job in jobs if job.name in self._reads
            ]
            while measurement.result is None:
                with self._ahead.over(reads), self._disk.over(jobs):
                    self._parallel(calls)
                measurement.turn()
            self.facts[number] = measurement.result
            if self.cache is not None:
                self.cache.keep_of_model(fact, jobs, measurement.result)
            self.recorder.measured(number, measurement.result)
        every = enumerate(measure.over_model(self.plan.jobs))
        self.of_model = {fact: self.facts[n] for n, fact in every if n in self.facts}

    def _measure_across(self, measurement: measure.ModelMeasurement, job: Job, span: Span) -> None:
        for start, stop in self._blocks(job, span):
            self._crew.check()
            measurement.fold(job, start, self._block(job, (start, stop)))

    def _measure_chunks(
        self, state: _RunningJob, facts: measure.LevelMeasurement, spans: Sequence[Span]
    ) -> None:
        for span in spans:
            for start, stop in self._blocks(state.job, span):
                self._crew.check()
                facts.fold(start, stop, self._block(state.job, (start, stop)))

    def _mix_chunk(
        self, state: _RunningJob, span: Span, held: tuple[Block, BlockOutput] | None = None
    ) -> None:
        job, mixer, space = state.job, state.mixer, self._space(state.job)
        assert mixer is not None
        width = job.width
        hashers = [self._hasher(d, span[0] * i.width) for d, i in zip(state.inputs, job.read, strict=True)]
        output = self._hasher(state.output, span[0] * width)
        for start, stop in self._mixed_blocks(job, span):
            self._crew.check()
            size = (stop - start) * width
            placed = self.output.place(job.name, start * width, size, space.gpu)
            is_there = space.gpu is not None and placed is not None
            with_ranks = needs_ranks(job, state.draws, stop)
            block, out = held or space.block(
                job, (start, stop), 0 if placed is not None else size, with_ranks=with_ranks
            )
            if self.recorder.wants_digests:
                raws = block.bytes_read(job.base is not None)
                for hasher, raw in zip(hashers, raws, strict=True):
                    hasher.update(memoryview(raw))
            if placed is not None:
                out = BlockOutput(placed, placed if space.gpu is None else out.host)
            mixer(start, block, out.device)
            if is_there:
                self.output.computed(job.name, start * width, size)
            else:
                data = memoryview(space.take(out))
                output.update(data)
                self.output.write(job.name, start * width, data)
            self._crew.report(Advanced(job.name, size))
        for hasher in (*hashers, output):
            hasher.finish()
        self._chunk_done(state)

    def _make_batch(self, batch: Batch) -> None:
        """Make small tensors in one thread, while others make other tensors."""
        self._crew.check()
        assert isinstance(self.output, OutputFiles)
        records = []
        for tensors in read_batch(batch, self.plan.sources, self._spaces[CPU].arena):
            self._mix_tensors(tensors)
            outputs = [memoryview(out) for out in tensors.outputs]
            names = [job.name for job in tensors.jobs]
            self.output.write_several(names, outputs, memoryview(tensors.all_outputs))
            for job, raws, out in zip(tensors.jobs, tensors.inputs, outputs, strict=True):
                read = [
                    digest_of(i.dtype, source_of(i, self.plan.sources).tensors[i.name].shape, memoryview(raw))
                    for i, raw in zip(job.read, raws, strict=True)
                ]
                records.append(self._record(job, digest_of(job.dtype, job.shape, out), read))
        self._disk.done(*batch.jobs)
        self._crew.report(Advanced(batch.jobs[-1].name, batch.byte_size))
        self._finish(*records)

    def _mix_tensors(self, tensors: LoadedTensors) -> None:
        if tensors.are_one:
            mixer = Mixer(
                self._context(_RunningJob(tensors.jobs[0], 1, self.plan.sources)), self.plan.sources
            )
            if mixer.is_finite(0, tensors.whole, tensors.all_outputs):
                return
        for number, job in enumerate(tensors.jobs):
            state = _RunningJob(job, 1, self.plan.sources)
            block = tensors.block(number)
            self._measure(state, functools.partial(_fold_whole, job, block), block)
            assert state.mixer is not None
            state.mixer(0, block, tensors.outputs[number])

    def _make_matrix(self, state: _RunningJob) -> None:
        """Make a matrix in one thread, while others make other tensors."""
        job = state.job
        hasher = self._hasher(state.output, 0)

        def write(offset: int, data: memoryview) -> None:
            hasher.update(data)
            self.output.write(job.name, offset, data)

        def note(said: MatrixNote) -> None:
            labels = [self.plan.sources[i.model].label for i in job.inputs]
            values = tuple(labels[v] if isinstance(v, int) else v for v in said.values)
            noted = Noted(job.name, said.text, values)
            with self._crew.lock:
                self.notes.append(noted)
            self._crew.report(noted)

        digests = state.inputs if self.recorder.wants_digests else []
        device = self._device(job)
        matrices = JobMatrices(
            job,
            self.plan.sources,
            digests,
            self._spaces[CPU].arena,
            self.plan.memory.block_elements,
            self._crew.check,
            store=self.matrices,
            factors=self._factors,
            note=note,
            advance=lambda size: self._crew.report(Advanced(job.name, size)),
            device=device,
            mix=self._mix_whole,
        )
        if matrices.is_on_gpu:
            with self._room.taken(device, job.name, gpu_matrix_bytes(job), self._crew.check, reports=False):
                matrices.make(write)
        else:
            matrices.make(write)
        hasher.finish()
        self._chunk_done(state)

    def _mix_whole(self, job: Job, values: np.ndarray) -> None:
        """Mix all elements of a tensor into the processor's memory in one thread, while others make other tensors."""
        state = _RunningJob(job, 1, self.plan.sources)
        self._measure(state, lambda facts: self._measure_chunks(state, facts, chunks(job)))
        assert state.mixer is not None
        raw = values.reshape(-1).view(np.uint8)
        for start, stop in blocks((0, job.elements), self.plan.memory.block_elements):
            self._crew.check()
            with_ranks = needs_ranks(job, state.draws, stop)
            block, _ = self._spaces[CPU].block(job, (start, stop), with_ranks=with_ranks)
            state.mixer(start, block, raw[start * job.width : stop * job.width])

    def _copy_chunk(self, state: _RunningJob, span: Span) -> None:
        job = state.job
        if job.kind == "copy":
            return self._copy_one(state, span)
        hashers = [self._hasher(d, span[0]) for d in state.inputs]
        output = self._hasher(state.output, span[0])
        for start, stop in blocks(span, self.plan.memory.block_elements):
            self._crew.check()
            first, other = self._spaces[CPU].arena.views([stop - start, stop - start])
            for i, (tensor, hasher) in enumerate(zip(job.inputs, hashers, strict=True)):
                view = other if i else first
                self.plan.sources[tensor.model].read_into(tensor.name, start, memoryview(view))
                hasher.update(memoryview(view))
                if i and not np.array_equal(first, view):
                    self._refuse_unequal(job, tensor, start, first, view)
            output.update(memoryview(first))
            self.output.write(job.name, start, memoryview(first))
            self._crew.report(Advanced(job.name, first.nbytes))
        for hasher in (*hashers, output):
            hasher.finish()
        self._chunk_done(state)

    def _copy_one(self, state: _RunningJob, span: Span) -> None:
        """Copy bytes within the system if it can, and hash the copy."""
        job, (tensor,) = state.job, state.job.inputs
        source = self.plan.sources[tensor.model]
        hasher = self._hasher(state.output, span[0])
        for start, stop in blocks(span, self.plan.memory.block_elements):
            self._crew.check()
            (view,) = self._spaces[CPU].arena.views([stop - start])
            if self.output.copy(job.name, start, stop - start, source, tensor.name):
                self.output.read_into(job.name, start, memoryview(view))
            else:
                source.read_into(tensor.name, start, memoryview(view))
                self.output.write(job.name, start, memoryview(view))
            hasher.update(memoryview(view))
            self._crew.report(Advanced(job.name, view.nbytes))
        hasher.finish()
        self._chunk_done(state)

    def _refuse_unequal(
        self, job: Job, tensor: Input, start: int, first: np.ndarray, view: np.ndarray
    ) -> None:
        width = max(job.width, 1)
        index = (start + int(np.flatnonzero(first != view)[0])) // width
        place = [int(i) for i in np.unravel_index(index, job.shape)] if job.shape else []
        first_label, label = (
            self.plan.sources[job.inputs[0].model].label,
            self.plan.sources[tensor.model].label,
        )
        raise MismatchError(
            f"{job.name}{place or ''}: {first_label} and {label} differ; tensors of {job.dtype} are copied and must be equal. "
            "Use models that agree on it."
        )

    def _chunk_done(self, state: _RunningJob) -> None:
        with self._crew.lock:
            state.remaining -= 1
            if state.remaining:
                return
        for draws in state.draws.values():
            draws.are_known |= draws.stay  # all elements were mixed
        state.mixer, state.draws = None, {}  # the memory of the draws
        job = state.job
        self._ahead.done(job.name)
        self._disk.done(job)
        if not self.recorder.wants_digests:
            return
        self._finish(self._record(job, state.output.result(), [d.result() for d in state.inputs]))

    def _record(self, job: Job, output: str, read: Sequence[str]) -> Record:
        """Record a finished tensor by the digests of its bytes and of those read for it."""
        for tensor, digest in zip(job.read, read, strict=True):
            if tensor.digest not in ("", digest):
                raise MismatchError(
                    f"{job.name}: the tensor of {self.plan.sources[tensor.model].label} has the hash {digest}, its statistics were measured "
                    f"of one with {tensor.digest}; expected statistics of the model they stand under. Measure that model, or correct "
                    "the path."
                )
        inputs = tuple((i.model, i.name, digest) for i, digest in zip(job.read, read, strict=True))
        return Record(job.name, output, inputs)

    def _finish(self, *records: Record) -> None:
        with self._crew.lock:
            self.records |= {record.tensor: record for record in records}
        self.recorder.finished(*records)
        for record in records:
            self._crew.report(TensorDone(record.tensor, record.digest))

    def _block(self, job: Job, span: Span) -> Block:
        """Read the inputs of a span to measure them."""
        return self._space(job).block(job, span)[0]


def _fold_whole(job: Job, block: Block, facts: measure.LevelMeasurement) -> None:
    facts.fold(0, job.elements, block)


def kernel_key(job: Job) -> tuple[Any, ...]:
    """What the kernels of a computed tensor depend on: tensors with one key have the same."""
    is_small = job.elements <= measure.SMALL
    has_differences = any(tensor.is_difference for tensor in job.inputs)
    return job.kind, id(job.merge), len(job.inputs), job.base is None, job.real, is_small, has_differences


def _job_of(arguments: tuple[Any, ...]) -> Job:
    """The job that a call works on; the first one of a batch."""
    found = next(a for a in arguments if isinstance(a, (_RunningJob, Job, Batch)))
    return (
        found.jobs[0] if isinstance(found, Batch) else found.job if isinstance(found, _RunningJob) else found
    )


def _pick(block: Block, runs: list[Span], job: Job) -> Block:
    """Take the elements of some spans from a block that holds a whole tensor."""

    def pick(view: np.ndarray) -> np.ndarray:
        width = view.size // job.elements
        return np.concatenate([view[start * width : stop * width] for start, stop in runs])

    return Block([pick(raw) for raw in block.raws], pick(block.base))
