"""Runs a plan: threads that each read, measure, mix and write; kept up to date in the journal; published at the end."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from alnico.checkpoint.durable import sync_directory, sync_tree, write_file
from alnico.checkpoint.file_model import describe_change, file_states, open_shard
from alnico.checkpoint.lineage import CARD, LOCK
from alnico.checkpoint.output_path import Replace, check_twins
from alnico.checkpoint.shards import indices_of
from alnico.checkpoint.sidecars import copy_side_files, side_files, write_config
from alnico.checkpoint.source import Shard, Source
from alnico.checkpoint.writer import OutputFiles
from alnico.engine import measure, row_ranks
from alnico.engine.arena import Arena
from alnico.engine.blocks import Block, Span, blocks, chunks
from alnico.engine.fact_cache import CachedFacts, FactCache
from alnico.engine.kernel_arguments import KernelContext
from alnico.engine.matrix import WholeMatrices, rounding_kernel
from alnico.engine.mix import NOTHING, Mixer, mix_kernel, refuse_inputs
from alnico.engine.norm_weights import measure_norm_weights
from alnico.engine.relatedness import IN_A_RECIPE, Caller, check_relatedness
from alnico.errors import (
    AlnicoError,
    MismatchError,
    ModelError,
    NonFiniteError,
    RunError,
    VerificationError,
    visible,
)
from alnico.events import Advanced, Compiling, Finished, Measuring, Started, TensorDone, Watcher
from alnico.folders import Folder, make_folder, remove
from alnico.kernels.build import compile_kernel
from alnico.kernels.facts import MeasuredFact
from alnico.numerics.blas import one_blas_thread
from alnico.numerics.digest import PIECE, PieceHasher, TensorDigest, Unhashed
from alnico.output.card import RECIPE, card_of, lock_of, recipe_text
from alnico.output.disk_space import check_disk, check_target, needed
from alnico.output.journal import Journal, JournalState, Record, read_journal
from alnico.output.lock import files_of
from alnico.output.staging import PartDirectory
from alnico.plan.job import Input, Job, Plan
from alnico.threads import Abandoned, Crew, Stopped, WorkItem

SHARED_CHUNKS = 8
"""Chunks from which on a tensor that is measured is worked on by all threads together; the others are a thread's each."""


@dataclass(frozen=True)
class MergeResult:
    """A finished merge. ``resumed`` tensors were kept from an interrupted run; ``digests`` maps tensors to their hash.

    ``compile_seconds`` of ``seconds`` went to compiling kernels, or to loading those of an earlier run.
    """

    path: Path
    plan: Plan
    seconds: float
    compile_seconds: float
    resumed: int
    digests: dict[str, str]

    @property
    def bytes_per_second(self) -> float:
        """Bytes read and written a second, compiling left out."""
        return (self.plan.bytes_to_read + self.plan.bytes_to_write) / max(
            self.seconds - self.compile_seconds, 1e-9
        )


def run_plan(
    plan: Plan,
    out: Path,
    *,
    overwrite: Replace = False,
    restart: bool = False,
    watch: Watcher | None = None,
    mark: Path | None = None,
    caller: Caller = IN_A_RECIPE,
) -> MergeResult:
    """Carry out a plan; the output stands under ``out`` when this returns, complete and checked.

    An interrupted merge of the same plan is taken up; ``restart`` forgets it. ``watch`` gets events, from any thread but
    one at a time. ``mark`` is a file that says afterwards which output was made (:func:`alnico.output.staging.is_published`).
    ``caller`` says in whose words unrelated models are refused.
    Errors: see ``errors``; a wrong input removes what was begun, all else keeps it.
    """
    begin = time.perf_counter()
    out = Path(out)
    single = plan.shards[0].name if out.suffix == ".safetensors" else None
    fingerprint = plan.fingerprint()
    try:
        check_twins(out, needed(plan), (".alnico-old",))  # which is given its name back
        if (finished := _mended(plan, out, fingerprint, restart)) is not None:
            return MergeResult(out, plan, time.perf_counter() - begin, 0.0, len(finished), finished)
        check_target(out, plan, overwrite)
        check_disk(plan, out)
        with PartDirectory(out) as part:
            found = JournalState() if restart else read_journal(part.path, fingerprint)
            if not found:
                part.clear()
            try:
                make_folder(part.model, part.folder)
                sync_directory(part.path, part.folder)
            except OSError as error:
                raise RunError(
                    f"{part.model}: cannot be made ({error.strerror}). Choose another output."
                ) from None
            try:
                before = file_states(_read_from(plan, single))
                plan = plan if found else check_relatedness(plan, caller)
                files = OutputFiles(part.model, plan.shards, part.folder)
                run = _merge(plan, part, files, fingerprint, found, watch)
                plan = run.plan
                _refuse_changed(plan, before, run.records)
                _complete(plan, part, files, run.records, single)
                _refuse_changed(plan, before, run.records)
                files.finish()
                sync_directory(part.model, part.folder)
            except RunError:
                raise
            except AlnicoError as error:
                part.check_still_there()
                if not isinstance(
                    error.__context__, OSError
                ):  # a file that the system could not open is no wrong input
                    part.remove()
                raise
            part.publish(single, overwrite, fingerprint, mark)
    except OSError as error:
        raise RunError(
            f"{error.filename or out}: {error.strerror or error}. Make room or check the disk; the same command takes the merge up again."
        ) from None
    seconds = time.perf_counter() - begin
    if watch:
        watch(Finished(str(out), seconds))
    return MergeResult(
        out, plan, seconds, run.compile_seconds, run.kept, {name: r.digest for name, r in run.records.items()}
    )


def _mended(plan: Plan, out: Path, fingerprint: dict[str, Any], restart: bool) -> dict[str, str] | None:
    """Mend what a crash while publishing left. Returns the digests of the output if this plan's was published then."""
    beside = PartDirectory(out)
    if not beside.path.exists() and (os.path.lexists(out) or not os.path.lexists(beside.old)):
        return None
    with PartDirectory(out) as part:
        part.mend()
        if restart or not part.is_published(fingerprint):
            return None
        digests = {r.tensor: r.digest for r in read_journal(part.path, fingerprint).records}
        sync_directory(out.parent)
        part.remove()
        return (
            {job.name: digests[job.name] for job in plan.jobs}
            if digests.keys() >= {j.name for j in plan.jobs}
            else None
        )


def _read_from(plan: Plan, single: str | None) -> list[Path]:
    """All files that go into an output."""
    files = [path for source in plan.sources for path in source.paths()]
    donor = plan.sources[plan.donor].directory
    if single is None and donor is not None:
        files += [
            donor / "config.json",
            *(donor / p for p in side_files(donor)[0] if p.as_posix() not in plan.left),
        ]
    return files


def _refuse_changed(plan: Plan, before: dict[Path, tuple[int, int]], records: dict[str, Record]) -> None:
    """Refuse to publish what was made of files that changed meanwhile. Errors: ModelError."""
    if changed := describe_change(before):
        raise ModelError(
            f"{changed}: was changed while it was merged; expected the file that was planned with. "
            "Run the command again when nobody writes the file."
        )
    digests: dict[tuple[int, str], str] = {}
    for record in records.values():
        for model, name, digest in record.inputs:
            if digests.setdefault((model, name), digest) != digest:
                raise ModelError(
                    f"{plan.sources[model].label}: {name}: was read twice, with the hashes {digests[model, name]} and {digest}; expected "
                    "one. Its file was changed while it was merged: run the command again when nobody writes it."
                )


def _merge(
    plan: Plan,
    part: PartDirectory,
    files: OutputFiles,
    fingerprint: dict[str, Any],
    found: JournalState,
    watch: Watcher | None,
) -> MergeRun:
    """Make all tensors that are not there yet."""
    is_left = False
    try:
        jobs = {job.name: job for job in plan.jobs}
        kept = [r for r in found.records if r.tensor in jobs and _still_there(r, jobs[r.tensor], files)]
        found = JournalState(kept, found.facts, found.norms)
        journal = Journal(part.path, fingerprint, files.sync, found, part.folder)
        try:
            run = MergeRun(
                measure_norm_weights(plan, found.norms, watch, journal.weighed), files, journal, found, watch
            )
            run.all()
        except BaseException as error:
            has_ended = True
            with suppress(RunError):  # this error came first
                has_ended = journal.close(is_interrupted=isinstance(error, KeyboardInterrupt))
            is_left = isinstance(error, Abandoned) or not has_ended
            raise
        journal.close()
        files.seal()
        return run
    finally:
        if not is_left:  # a thread that is left behind may still write what it has in hand
            files.close()


def _still_there(record: Record, job: Job, files: OutputFiles) -> bool:
    """Are the bytes of a finished tensor what the journal says?"""
    digest = TensorDigest(job.dtype, job.shape, job.byte_size)
    buffer = memoryview(bytearray(min(PIECE, job.byte_size)))
    hasher = PieceHasher(digest, 0)
    for offset in range(0, job.byte_size, PIECE):
        part = buffer[: min(PIECE, job.byte_size - offset)]
        files.read_into(job.name, offset, part)
        hasher.update(part)
    hasher.finish()
    return digest.result() == record.digest


class _RunningJob:
    """One job being worked on: what its chunks have in common."""

    def __init__(self, job: Job, spans: int, sources: Sequence[Source]) -> None:
        self.job = job
        self.output = TensorDigest(job.dtype, job.shape, job.byte_size)
        self.inputs = [
            TensorDigest(i.dtype, sources[i.model].tensors[i.name].shape, i.byte_size) for i in job.read
        ]
        if job.kind == "copy":
            self.inputs = [self.output]
        self.remaining = spans
        self.known: dict[MeasuredFact, Any] = {}
        self.mixer: Mixer | None = None


class Output(Protocol):
    """Where the bytes of output tensors go."""

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Put ``data`` at byte ``offset`` of a tensor. Safe for threads."""
        ...

    def place(self, tensor: str, offset: int, size: int) -> np.ndarray | None:
        """Where these bytes of a tensor may be computed before they are written from there; None where they cannot."""
        ...

    def copy(self, tensor: str, offset: int, size: int, source: Source, name: str) -> bool:
        """Take bytes of a source's tensor without reading them; False where that cannot be."""
        ...

    def read_into(self, tensor: str, offset: int, buffer: memoryview) -> None:
        """Read back what is there."""
        ...


class Notes(Protocol):
    """What is told of a finished tensor and of a fact over the model; ``failure`` is why it cannot be told any more.

    Where it ``wants_digests``, all bytes are hashed in passing; else records are not made.
    """

    wants_digests: bool

    @property
    def failure(self) -> BaseException | None: ...

    def finished(self, record: Record) -> None: ...

    def measured(self, fact: int, value: tuple[float, ...]) -> None: ...


class MergeRun:
    """The threads that make all tensors of a plan that are not ``found`` done: from its sources to ``files``.

    What ``recall`` has of earlier runs over the same sources is not measured again. ``spans`` says which chunks of a tensor are
    made; where they are not all, nothing is to be hashed.
    """

    def __init__(
        self,
        plan: Plan,
        files: Output,
        journal: Notes,
        found: JournalState,
        watch: Watcher | None,
        recall: FactCache | None = None,
        spans: Callable[[Job], list[Span]] = chunks,
    ) -> None:
        self.plan = plan
        self.files = files
        self.journal = journal
        self.recall = recall
        self._spans = spans
        self._hasher = PieceHasher if journal.wants_digests else Unhashed
        self.records = {r.tensor: r for r in found.records}
        self.facts = dict(found.facts)
        self.of_model: dict[measure.OverModel, tuple[float, ...]] = {}
        self.kept = len(self.records)
        self.compile_seconds = 0.0
        self.jobs = [j for j in plan.jobs if j.name not in self.records]
        self._crew = Crew(plan.memory.threads, watch)
        self._arena = Arena(plan.memory.worker_bytes)

    def all(self) -> None:
        done = sum(job.byte_size for job in self.plan.jobs if job.name in self.records)
        self._crew.tell(Started(self.plan, len(self.records), done))
        self._compile()
        one_thread = one_blas_thread() if any(job.kind == "matrix" for job in self.jobs) else nullcontext()
        with one_thread, self._crew:
            self._measure_model()
            calls: list[WorkItem] = []
            for job in self.jobs:
                spans = self._spans(job)
                state = _RunningJob(job, len(spans), self.plan.sources)
                if job.kind == "matrix":
                    calls.append((self._whole, (state,)))
                elif job.kind != "mix":
                    calls += [(self._copy_chunk, (state, span)) for span in spans]
                elif job.merge is None or not job.merge.levels():
                    state.mixer = Mixer(self._known(state), self.plan.sources)
                    calls += [(self._mix_chunk, (state, span)) for span in spans]
                elif self._crew.threads > 1 and len(spans) >= SHARED_CHUNKS:
                    self._shared(state, spans)
                else:
                    calls.append((self._alone, (state, spans)))
            self._parallel(calls)

    def _compile(self) -> None:
        needed: dict[Any, None] = {}
        for job in self.jobs:
            if job.kind == "matrix":
                needed[rounding_kernel()] = None
            if job.kind == "mix":
                needed |= dict.fromkeys([*measure.kernels(job), *row_ranks.kernels(job), mix_kernel(job)])
        needed |= dict.fromkeys(measure.model_kernel(fact, jobs) for _, fact, jobs in self._unknown())
        if needed:
            self._crew.tell(Compiling(len(needed)))
        begin = time.perf_counter()
        for kernel in needed:
            compile_kernel(kernel)
        self.compile_seconds = time.perf_counter() - begin

    def _parallel(self, calls: Sequence[WorkItem]) -> None:
        self._crew.run([(self._guarded, (call, arguments)) for call, arguments in calls])

    def _guarded(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.journal.failure is not None:
            raise self.journal.failure
        try:
            call(*arguments)
        except (AlnicoError, Stopped):
            raise
        except OSError as error:
            raise RunError(
                f"{self._place(arguments)}: {error.strerror or error}. Check the disk; the same command takes the merge up again."
            ) from None
        except Exception as error:
            error.add_note(visible(f"alnico: while making {self._place(arguments)}"))
            raise

    def _place(self, arguments: tuple[Any, ...]) -> str:
        """The tensor that a call is about, and the files that it is read from."""
        job = next(
            a.job if isinstance(a, _RunningJob) else a for a in arguments if isinstance(a, (_RunningJob, Job))
        )
        sources = [self.plan.sources[m] for m in dict.fromkeys(tensor.model for tensor in job.read)]
        return f"{job.name} of {', '.join(source.label for source in sources)}"

    def _shared(self, state: _RunningJob, spans: list[Span]) -> None:
        """A large tensor: all threads measure it, then all mix it."""

        def one_pass(facts: measure.LevelMeasurement) -> None:
            if facts.ordered:
                self._parallel([(self._measure_chunks, (state, facts, spans))])
            else:
                self._parallel([(self._measure_chunks, (state, facts, [span])) for span in spans])

        self._measure(state, one_pass)
        self._parallel([(self._mix_chunk, (state, span)) for span in spans])

    def _alone(self, state: _RunningJob, spans: list[Span]) -> None:
        """A tensor that one worker measures and mixes, while others do other tensors. One of a single block is read once."""
        everything = (0, state.job.elements)
        if len(spans) > 1 or state.job.elements > self.plan.memory.block_elements:
            self._measure(state, lambda facts: self._measure_chunks(state, facts, spans))
            for span in spans:
                self._mix_chunk(state, span)
            return
        held = self._block(state.job, everything, state.job.elements)
        self._measure(state, lambda facts: facts.fold(*everything, held[0]), held[0])
        self._mix_chunk(state, everything, held)

    def _measure(
        self,
        state: _RunningJob,
        one_pass: Callable[[measure.LevelMeasurement], None],
        held: Block | None = None,
    ) -> None:
        """Measure all facts of a job, level by level and pass by pass, and make its mixer. ``held`` is all of it, if it is there."""
        assert state.job.merge is not None
        for level in state.job.merge.levels():
            known = self._known(state)
            recalled = self.recall.of_tensor(level, known) if self.recall is not None else CachedFacts()
            state.known |= recalled.whole
            known = dataclasses.replace(known, given=recalled.given)
            facts = measure.LevelMeasurement([fact for fact in level if fact not in recalled.whole], known)
            if facts.runs:
                facts.sample(
                    _block_of(state.job, self._arena.read(state.job, self.plan.sources, *facts.runs))
                    if held is None
                    else _picked(held, facts.runs, state.job)
                )
            while not facts.done:
                self._crew.check()
                one_pass(facts)
                facts.turn()
            found = facts.results()
            if not measure.are_finite(found):
                self._refuse_measured(state.job)
            if self.recall is not None:
                self.recall.keep(found, known)
            state.known |= found
        state.mixer = Mixer(self._known(state), self.plan.sources)

    def _refuse_measured(self, job: Job) -> None:
        """Say why what was measured of a tensor is not finite. Errors: NonFiniteError, naming the first such number if an input has one."""
        for start, stop in blocks((0, job.elements), self.plan.memory.block_elements):
            refuse_inputs(job, self.plan.sources, start, self._block(job, (start, stop), 0)[0])
        raise NonFiniteError(
            f"{job.name}: its values are so large that sums over them, as {self.plan.recipe.merge_method} takes them, are beyond "
            f"{job.real}; expected finite sums. Divide the tensor by a number in all models, or leave it out with a filter."
        )

    def _known(self, state: _RunningJob) -> KernelContext:
        before = {fact.fact: self.of_model[fact] for fact in measure.of_model(state.job)}
        return KernelContext(state.job, self.plan.recipe.seed, before | state.known)

    def _unknown(self) -> list[tuple[int, measure.OverModel, list[Job]]]:
        """The facts over the model that are still to be measured, numbered in the order of the plan."""
        facts = enumerate(measure.over_model(self.plan.jobs).items())
        missing = {job.name for job in self.jobs}
        return [
            (n, f, jobs)
            for n, (f, jobs) in facts
            if n not in self.facts and any(job.name in missing for job in jobs)
        ]

    def _measure_model(self) -> None:
        """Measure what is asked of the whole model, one fact after the other, pass by pass over all its tensors."""
        for number, fact, jobs in self._unknown():
            self._crew.tell(Measuring(len(jobs)))
            measurement = measure.ModelMeasurement(
                fact, jobs, self.recall.of_model(fact, jobs) if self.recall is not None else {}
            )
            calls = [(self._measure_across, (measurement, job, span)) for job in jobs for span in chunks(job)]
            while measurement.result is None:
                self._parallel(calls)
                measurement.turn()
            self.facts[number] = measurement.result
            if self.recall is not None:
                self.recall.keep_of_model(fact, jobs, measurement.result)
            self.journal.measured(number, measurement.result)
        every = enumerate(measure.over_model(self.plan.jobs))
        self.of_model = {fact: self.facts[n] for n, fact in every if n in self.facts}

    def _measure_across(self, measurement: measure.ModelMeasurement, job: Job, span: Span) -> None:
        for start, stop in blocks(span, self.plan.memory.block_elements):
            self._crew.check()
            measurement.fold(job, start, self._block(job, (start, stop), 0)[0])

    def _measure_chunks(
        self, state: _RunningJob, facts: measure.LevelMeasurement, spans: Sequence[Span]
    ) -> None:
        for span in spans:
            for start, stop in blocks(span, self.plan.memory.block_elements):
                self._crew.check()
                facts.fold(start, stop, self._block(state.job, (start, stop), 0)[0])

    def _mix_chunk(
        self, state: _RunningJob, span: Span, held: tuple[Block, np.ndarray] | None = None
    ) -> None:
        job, mixer = state.job, state.mixer
        assert mixer is not None
        width = job.width
        hashers = [self._hasher(d, span[0] * i.width) for d, i in zip(state.inputs, job.read, strict=True)]
        output = self._hasher(state.output, span[0] * width)
        for start, stop in blocks(span, self.plan.memory.block_elements):
            self._crew.check()
            block, out = held or self._block(job, (start, stop), stop - start)
            for hasher, raw in zip(
                hashers, [*block.raws, block.base] if job.base is not None else block.raws, strict=True
            ):
                hasher.update(memoryview(raw))
            placed = self.files.place(job.name, start * width, out.nbytes)
            out = out if placed is None else placed
            mixer(start, block, out)
            output.update(memoryview(out))
            self.files.write(job.name, start * width, memoryview(out))
            self._crew.tell(Advanced(job.name, out.nbytes))
        for hasher in (*hashers, output):
            hasher.finish()
        self._chunk_done(state)

    def _whole(self, state: _RunningJob) -> None:
        """A matrix that one worker makes, while others do other tensors."""
        job = state.job
        hasher = self._hasher(state.output, 0)

        def write(offset: int, data: memoryview) -> None:
            hasher.update(data)
            self.files.write(job.name, offset, data)
            self._crew.tell(Advanced(job.name, len(data)))

        sources, block = self.plan.sources, self.plan.memory.block_elements
        digests = state.inputs if self.journal.wants_digests else []
        WholeMatrices(job, sources, digests, self._arena, block, self._crew.check).make(write)
        hasher.finish()
        self._chunk_done(state)

    def _copy_chunk(self, state: _RunningJob, span: Span) -> None:
        job = state.job
        if job.kind == "copy":
            return self._copy_one(state, span)
        hashers = [self._hasher(d, span[0]) for d in state.inputs]
        output = self._hasher(state.output, span[0])
        for start, stop in blocks(span, self.plan.memory.block_elements):
            self._crew.check()
            first, other = self._arena.views([stop - start, stop - start])
            for i, (tensor, hasher) in enumerate(zip(job.inputs, hashers, strict=True)):
                view = other if i else first
                self.plan.sources[tensor.model].read_into(tensor.name, start, memoryview(view))
                hasher.update(memoryview(view))
                if i and not np.array_equal(first, view):
                    self._refuse_unequal(job, tensor, start, first, view)
            output.update(memoryview(first))
            self.files.write(job.name, start, memoryview(first))
            self._crew.tell(Advanced(job.name, first.nbytes))
        for hasher in (*hashers, output):
            hasher.finish()
        self._chunk_done(state)

    def _copy_one(self, state: _RunningJob, span: Span) -> None:
        """Copy bytes within the system where it can, and hash what has arrived."""
        job, (tensor,) = state.job, state.job.inputs
        source = self.plan.sources[tensor.model]
        hasher = self._hasher(state.output, span[0])
        for start, stop in blocks(span, self.plan.memory.block_elements):
            self._crew.check()
            (view,) = self._arena.views([stop - start])
            if self.files.copy(job.name, start, stop - start, source, tensor.name):
                self.files.read_into(job.name, start, memoryview(view))
            else:
                source.read_into(tensor.name, start, memoryview(view))
                self.files.write(job.name, start, memoryview(view))
            hasher.update(memoryview(view))
            self._crew.tell(Advanced(job.name, view.nbytes))
        hasher.finish()
        self._chunk_done(state)

    def _refuse_unequal(
        self, job: Job, tensor: Input, start: int, first: np.ndarray, view: np.ndarray
    ) -> None:
        width = max(job.width, 1)
        index = (start + int(np.flatnonzero(first != view)[0])) // width
        place = [int(i) for i in np.unravel_index(index, job.shape)] if job.shape else []
        one, other = self.plan.sources[job.inputs[0].model].label, self.plan.sources[tensor.model].label
        raise MismatchError(
            f"{job.name}{place or ''}: {one} and {other} differ; tensors of {job.dtype} are copied and must be equal. "
            "Use models that agree on it."
        )

    def _chunk_done(self, state: _RunningJob) -> None:
        with self._crew.lock:
            state.remaining -= 1
            if state.remaining:
                return
        job = state.job
        if not self.journal.wants_digests:
            return
        inputs = tuple((i.model, i.name, d.result()) for i, d in zip(job.read, state.inputs, strict=True))
        for tensor, (_, _, digest) in zip(job.read, inputs, strict=True):
            if tensor.digest not in ("", digest):
                raise MismatchError(
                    f"{job.name}: the tensor of {self.plan.sources[tensor.model].label} has the hash {digest}, its statistics were measured "
                    f"of one with {tensor.digest}; expected statistics of the model they stand under. Measure that model, or correct "
                    "the path."
                )
        record = Record(job.name, state.output.result(), inputs)
        with self._crew.lock:
            self.records[job.name] = record
        self.journal.finished(record)
        self._crew.tell(TensorDone(job.name, record.digest))

    def _block(self, job: Job, span: Span, out_elements: int) -> tuple[Block, np.ndarray]:
        """Read the inputs of a span, with the ranks if they are used; and where the output of ``out_elements`` goes."""
        ranked = job.merge is not None and job.merge.uses_ranks
        rows = row_ranks.whole_rows(job, span) if ranked else span
        *views, out = self._arena.read(job, self.plan.sources, rows, out_bytes=out_elements * job.width)
        block = _block_of(job, views)
        if not ranked:
            return block, out
        ranks = row_ranks.ranks(job, rows, block.raws, block.base, span)
        parts = [
            view[(span[0] - rows[0]) * tensor.width : (span[1] - rows[0]) * tensor.width]
            for view, tensor in zip(views, job.read, strict=True)
        ]
        return _block_of(job, parts, ranks), out


def _picked(block: Block, runs: list[Span], job: Job) -> Block:
    """The elements of some spans of a block that holds a whole tensor, one after the other."""

    def picked(view: np.ndarray) -> np.ndarray:
        width = view.size // job.elements
        return np.concatenate([view[start * width : stop * width] for start, stop in runs])

    return Block([picked(raw) for raw in block.raws], picked(block.base))


def _block_of(job: Job, views: list[np.ndarray], ranks: np.ndarray | None = None) -> Block:
    return Block(views[:-1], views[-1], ranks) if job.base is not None else Block(views, NOTHING, ranks)


def _complete(
    plan: Plan, part: PartDirectory, files: OutputFiles, records: dict[str, Record], single: str | None
) -> None:
    """Check what was written against the plan, put the other files beside it, and bring all to the disk."""
    shards: list[Shard] = []
    for shard in plan.shards:
        written = open_shard(files.path(shard.name), shard.prefix)
        shards.append(dataclasses.replace(written, path=part.model / shard.name))
        if written.header.tensors != shard.header.tensors or written.size != shard.byte_size:
            raise VerificationError(
                f"{files.path(shard.name)}: is not what the plan says; the disk or alnico is at fault. Merge again."
            )
    absent = [job.name for job in plan.jobs if job.name not in records]
    if absent:
        raise VerificationError(
            f"{absent[0]}: was not finished ({len(absent)} such tensors); alnico is at fault. Merge again."
        )
    if single is not None:
        return
    _remove_others(part.model, {files.path(shard.name) for shard in plan.shards}, part.folder)
    donor = plan.sources[plan.donor]
    if donor.directory is not None:
        copy_side_files(donor.directory, part.model, plan.left | set(plan.files), part.folder)
        write_config(donor.directory, plan.config, plan.dtype, part.model, part.folder)
    for name, data in plan.files.items():
        write_file(part.model / name, data, part.folder)
    texts = {RECIPE: recipe_text(plan.recipe), CARD: card_of(plan)}
    texts |= indices_of(plan.shards)
    for name, text in texts.items():
        write_file(part.model / name, text, part.folder)
    unfinished = {files.path(shard.name).relative_to(part.model).as_posix() for shard in plan.shards}
    lock = lock_of(plan, records, files_of(part.model, shards, unfinished))
    write_file(part.model / LOCK, lock, part.folder)
    sync_tree(part.model, part.folder)


def _remove_others(folder: Path, own: set[Path], inside: Folder) -> None:
    """Remove what an earlier run put beside its weights: it is put there anew."""
    for path in folder.iterdir():
        if path in own:
            continue
        if any(path in place.parents for place in own):
            _remove_others(path, own, inside)
        else:
            remove(path, inside)
