"""Merges a sample of a finished output again from its inputs, and compares the bits.

The run is that of a merge (:class:`alnico.engine.merge_run.MergeRun`): tensors outside the sample count as
done, and the output compares instead of writing. The sample consists of chunks of tensors; tensors that are
measured first, and matrices, are taken whole.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.shards import split_into_shards
from alnico.checkpoint.source import Source
from alnico.checkpoint.writer import OutputFiles
from alnico.engine.blocks import Span, chunks, units
from alnico.engine.differences import as_differences, source_of
from alnico.engine.fetch import absent_files, fetch_files
from alnico.engine.measure import of_model
from alnico.engine.merge_run import MergeRun
from alnico.engine.norm_weights import measure_norm_weights
from alnico.errors import (
    MismatchError,
    NonFiniteError,
    ResourceError,
    RunError,
    UncheckedError,
    VerificationError,
)
from alnico.events import Event, Reading, Started, Watcher
from alnico.numerics.dtypes import DTYPES, MERGEABLE, decode
from alnico.numerics.sizes import format_size
from alnico.output.disk_space import DISK_MARGIN_BYTES
from alnico.output.hashes import hash_tensors
from alnico.output.journal import JournalState, Record
from alnico.output.lock import Lock
from alnico.plan.job import Job, Plan
from alnico.plan.planned_model import PlannedModel
from alnico.threads import Abandoned, Crew
from alnico.verification.devices import TOLERANCE, units_apart
from alnico.verification.replan import ReplanOptions, check_places, replan, stage_locks

ChosenChunks = Mapping[str, list[Span]]
"""The chunks that are merged again, by the name of their tensor."""


@dataclass(frozen=True)
class Recomputed:
    """The sample that was merged again and is the same: ``blocks`` of ``tensors``, ``byte_size`` bytes of
    ``total_bytes``.

    ``device`` made it again. If that is of another kind than the one that merged, numbers may differ by ``tolerance`` units in
    the last place, and ``elements_differ`` do.
    """

    blocks: int
    tensors: int
    byte_size: int
    total_bytes: int
    device: str = "cpu"
    tolerance: int = 0
    elements_differ: int = 0


def choose_chunks(plan: Plan, share: float, seed: int, first: Iterable[str] = ()) -> ChosenChunks:
    """Choose chunks with ``share`` of the output's bytes, and at least one; the same for the same seed.

    A tensor that is measured first, or a matrix, counts as one chunk. The tensors named ``first`` are
    included.
    """
    required = set(first)
    groups = [(job, group) for job in plan.jobs for group in _groups(job)]

    def place(entry: tuple[Job, list[Span]]) -> tuple[bool, int]:
        job, group = entry
        return job.name not in required, xxhash.xxh3_64_intdigest(f"{seed}|{group[0][0]}|{job.name}".encode())

    left = share * sum(job.byte_size for job in plan.jobs)
    chosen: dict[str, list[Span]] = {}
    for job, group in sorted(groups, key=place):
        if left <= 0 and chosen and job.name not in required:
            break
        chosen.setdefault(job.name, []).extend(group)
        left -= bytes_of_spans(job, group)
    return {job.name: sorted(chosen[job.name]) for job in plan.jobs if job.name in chosen}


def _groups(job: Job) -> list[list[Span]]:
    spans = chunks(job)
    is_measured = job.kind == "mix" and job.merge is not None and bool(job.merge.levels())
    return [spans] if is_measured or job.kind == "matrix" else [[span] for span in spans]


def bytes_of_spans(job: Job, spans: Iterable[Span]) -> int:
    """Return the bytes of the output in some chunks."""
    width = job.byte_size // max(units(job), 1)
    return sum(stop - start for start, stop in spans) * width


@dataclass(frozen=True)
class Differing:
    """The first byte of a tensor that differs from the new merge, with the element's bytes in both."""

    offset: int
    stored: bytes
    computed: bytes


class ComparingOutput:
    """An output that compares with a finished model instead of writing. ``differing`` has the first
    difference of each tensor. Numbers of the tensors in ``tolerant`` may differ by one unit in the last place; ``near``
    counts those that do."""

    def __init__(self, model: Source, tolerant: Collection[str] = ()) -> None:
        self.model = model
        self.near = 0
        self._tolerant = tolerant
        self.differing: dict[str, Differing] = {}
        self._lock = threading.Lock()

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        computed = np.frombuffer(data, np.uint8)
        stored = np.empty_like(computed)
        self.model.read_into(tensor, offset, memoryview(stored))
        if np.array_equal(computed, stored):
            return
        dtype = self.model.tensors[tensor].dtype
        width = max(DTYPES[dtype].bytes, 1)
        if tensor in self._tolerant:
            steps = units_apart(stored, computed, dtype)
            far = np.flatnonzero(steps > TOLERANCE)
            with self._lock:
                self.near += int(np.count_nonzero(steps)) - far.size
            if not far.size:
                return
            byte = int(far[0]) * width
        else:
            byte = int(np.flatnonzero(computed != stored)[0])
        begin = byte - (offset + byte) % width
        difference = Differing(
            offset + byte, stored[begin : begin + width].tobytes(), computed[begin : begin + width].tobytes()
        )
        with self._lock:
            if tensor not in self.differing or difference.offset < self.differing[tensor].offset:
                self.differing[tensor] = difference

    def place(self, tensor: str, offset: int, size: int, gpu: object = None) -> None:
        """A finished model has no memory to compute in."""

    def computed(self, tensor: str, offset: int, size: int) -> None:
        """Nothing is computed in place."""

    def let_go(self, tensor: str) -> None:
        """Nothing was written."""

    def copy(self, tensor: str, offset: int, size: int, source: Source, name: str) -> bool:
        return False

    def read_into(self, tensor: str, offset: int, buffer: memoryview) -> None:
        self.model.read_into(tensor, offset, buffer)


class MemoryRecorder:
    """Keeps the records of finished tensors in memory."""

    failure: BaseException | None = None

    def __init__(self, wants_digests: bool) -> None:
        self.wants_digests = wants_digests
        self.records: dict[str, Record] = {}

    def finished(self, *records: Record) -> None:
        self.records |= {record.tensor: record for record in records}

    def measured(self, fact: int, value: tuple[float, ...]) -> None:
        """Facts are not kept."""


class RepeatedStage:
    """The output of a stage with some tensors merged again: a :class:`Source` with the headers of all."""

    origin = None
    held_bytes = reading_bytes = 0

    def __init__(self, planned: PlannedModel) -> None:
        self.planned = planned
        self.label, self.tensors = planned.label, planned.tensors
        self.config, self.directory = planned.config, planned.directory
        self.files: OutputFiles | None = None

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {}

    def fetch(self, files: Iterable[str], report: Any = None) -> None:
        """It has no files on the hub."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        assert self.files is not None
        self.files.read_into(name, offset, buffer)

    def identity(self) -> list[dict[str, Any]]:
        return []

    def paths(self) -> list[Path]:
        return []

    def close(self) -> None:
        if self.files is not None:
            self.files.close()
        self.planned.close()


@dataclass(frozen=True)
class _RepeatedMerge:
    """A merge that is repeated, and its sample. ``stage`` is its output for later merges; None for the last."""

    lock: Lock
    plan: Plan
    stage: RepeatedStage | None
    chosen: ChosenChunks

    @property
    def jobs(self) -> list[Job]:
        return [job for job in self.plan.jobs if job.name in self.chosen]

    @property
    def read(self) -> list[Job]:
        """The jobs whose inputs are read: all of them, if a fact of the whole model is measured."""
        over_model = self.plan.to_measure or any(of_model(job) for job in self.jobs)
        return list(self.plan.jobs) if over_model else self.jobs

    @property
    def is_whole(self) -> bool:
        return all(self.chosen.get(job.name) == chunks(job) for job in self.plan.jobs)


def recompute(
    lock: Lock,
    model: FileModel,
    options: ReplanOptions,
    *,
    share: float = 1.0,
    seed: int = 0,
    first: Iterable[str] = (),
    is_tolerant: bool = False,
) -> Recomputed:
    """Merge a share of a finished output again from its inputs, and compare it with ``model``, the open
    output.

    Inputs are compared with the hashes in the lock: all of them if everything is merged again, else those of
    the tensors that differ. Stages of the merge are made next to the output, as far as they are needed. ``is_tolerant``: the
    device is of another kind than the one that merged, so numbers may differ by one unit in the last place.
    Errors: VerificationError naming tensor and element; UncheckedError for inputs that are missing, or not
    those of the merge; ResourceError, and those of reading.
    """
    watch = options.run.watch
    check_places(lock, options)
    with (
        _plan_steps(lock, options, share, seed, first) as steps,
        _stage_folder(steps, lock.path.parent.absolute()) as room,
    ):
        for step in steps:
            absent = absent_files(dataclasses.replace(step.plan, jobs=tuple(step.read)), side_files=False)
            fetch_files(step.plan.sources, absent, watch)
        for step in steps[:-1]:
            assert step.stage is not None
            folder = room / step.stage.label
            folder.mkdir()
            step.stage.files = OutputFiles(
                folder,
                split_into_shards(
                    [(j.name, j.dtype, j.shape) for j in step.jobs], 1 << 62, "stage.safetensors"
                ),
            )
            _check_stage(step, _make_chunks(step, step.stage.files, MemoryRecorder(True), watch), is_tolerant)
        last = steps[-1]
        tolerant = {job.name for job in last.jobs if job.is_computed} if is_tolerant else ()
        comparing = ComparingOutput(model, tolerant)
        noting = _make_chunks(last, comparing, MemoryRecorder(last.is_whole), watch)
        changed = _first_changed_input(last, noting.records.values())
        if changed is None and comparing.differing:
            changed = _first_changed_file(last, comparing.differing)
        if changed is not None:
            raise _other_input(last.lock, changed)
        if comparing.differing:
            raise _difference(lock, model, last.plan, comparing.differing, is_tolerant)
        size = sum(bytes_of_spans(job, last.chosen[job.name]) for job in last.jobs)
        blocks = sum(len(spans) for spans in last.chosen.values())
        return Recomputed(
            blocks,
            len(last.chosen),
            size,
            sum(job.byte_size for job in last.plan.jobs),
            last.plan.device_kind,
            TOLERANCE if is_tolerant else 0,
            comparing.near,
        )


@contextmanager
def _plan_steps(
    lock: Lock, options: ReplanOptions, share: float, seed: int, first: Iterable[str]
) -> Iterator[list[_RepeatedMerge]]:
    """Plan the merge and its stages, and choose the sample of each. The sources are open until the block
    ends."""
    with ExitStack() as opened:
        stages: dict[str, RepeatedStage] = {}
        planned: dict[str, tuple[Lock, Plan]] = {}
        for label, stage_lock in stage_locks(lock).items():
            plan = replan(stage_lock, options, stages)
            planned[label] = stage_lock, plan
            for source in plan.sources:
                opened.callback(source.close)
            if label:
                stages[label] = RepeatedStage(PlannedModel(label, plan))
                opened.callback(stages[label].close)
        needed: dict[str, set[str]] = {label: set() for label in stages}
        steps: list[_RepeatedMerge] = []
        for label, (stage_lock, plan) in reversed(planned.items()):
            chosen = (
                {j.name: chunks(j) for j in plan.jobs if j.name in needed[label]}
                if label
                else choose_chunks(plan, share, seed, first)
            )
            steps.insert(0, _RepeatedMerge(stage_lock, plan, stages.get(label), chosen))
            for i, model in enumerate(stage_lock.models):
                if model.stage_lock is not None:
                    read = {
                        t.name for job in (*steps[0].read, *plan.to_measure) for t in job.read if t.model == i
                    }
                    # Rows of another vocabulary may come from any model.
                    needed[model.label] |= (
                        read if plan.recipe.tokenizer is None else set(stages[model.label].tensors)
                    )
        try:
            yield steps
        except Abandoned:  # a thread may still write into the files of a stage
            opened.pop_all()
            raise


@contextmanager
def _stage_folder(steps: Sequence[_RepeatedMerge], out: Path) -> Iterator[Path]:
    """Make a temporary folder next to the output for the stages. Errors: ResourceError, RunError."""
    if len(steps) == 1:
        yield out
        return
    needed = sum(job.byte_size for step in steps[:-1] for job in step.jobs) + DISK_MARGIN_BYTES
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise ResourceError(
            f"{out.parent}: repeating the stages of {out.name} needs {format_size(needed)}, {format_size(free)} are free. Make room, or "
            "give a smaller --sample."
        )
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{out.name}.alnico-verify-", dir=out.parent)
    except OSError as error:
        raise RunError(
            f"{out.parent}: no folder can be made for the stages of {out.name} ({error.strerror}). Copy the output."
        ) from None
    with folder as path:
        yield Path(path)


def _make_chunks(
    step: _RepeatedMerge, files: Any, noting: MemoryRecorder, watch: Watcher | None
) -> MemoryRecorder:
    """Merge the chosen chunks. Errors: UncheckedError for inputs that cannot be merged."""
    total = sum(bytes_of_spans(job, step.chosen[job.name]) for job in step.jobs)

    def report(event: Event) -> None:  # tensors outside the sample are not "resumed"
        if watch is not None:
            watch(Reading(len(step.jobs), total) if isinstance(event, Started) else event)

    left = [
        Record(job.name, step.lock.tensors[job.name].digest, ())
        for job in step.plan.jobs
        if job.name not in step.chosen
    ]
    try:
        MergeRun(
            measure_norm_weights(step.plan, {}, report),
            files,
            noting,
            JournalState(left),
            report,
            spans=lambda job: step.chosen[job.name],
        ).all()
    except (NonFiniteError, MismatchError) as error:
        raise UncheckedError(
            f"{step.lock.path}: could not be merged again from the inputs found: {' '.join(error.args)} Say where those of the merge are with "
            "--input NAME=PATH."
        ) from None
    return noting


def _first_changed_input(step: _RepeatedMerge, records: Iterable[Record]) -> tuple[str, str] | None:
    """Return label and tensor of the first input that differs from the lock."""
    for record in records:
        for model, name, digest in record.inputs:
            if step.lock.inputs[model].tensors.get(name) != digest:
                return step.lock.inputs[model].label, name
    return None


def _first_changed_file(step: _RepeatedMerge, names: Iterable[str]) -> tuple[str, str] | None:
    """Read and hash the inputs of some tensors. Returns the first that differs; None if one of the tensors
    has all its inputs unchanged."""
    jobs = {job.name: job for job in step.plan.jobs}
    changed = None
    with Crew(step.plan.memory.threads, name="alnico-verify") as crew:
        for name in names:
            inputs = []
            for tensor in as_differences([jobs[name]], step.plan.sources)[0].read:
                source = source_of(tensor, step.plan.sources)
                digest = hash_tensors(source, [tensor.name], crew)[tensor.name]
                inputs.append((tensor.model, tensor.name, digest))
            changed = _first_changed_input(step, [Record(name, "", tuple(inputs))])
            if changed is None:
                return None
    return changed


def _check_stage(step: _RepeatedMerge, noting: MemoryRecorder, is_tolerant: bool) -> None:
    """Compare a stage's tensors and inputs with its lock. Errors: UncheckedError, VerificationError."""
    if (changed := _first_changed_input(step, noting.records.values())) is not None:
        raise _other_input(step.lock, changed)
    for name, record in noting.records.items():
        if record.digest != (locked := step.lock.tensors[name].digest):
            assert step.stage is not None
            if is_tolerant:
                raise UncheckedError(
                    f"{step.lock.path}: could not check against its inputs: {name} of the stage {step.stage.label} was merged on "
                    f"{step.lock.device_text} and differs when it is made again on {step.plan.device_kind}, and a later stage may enlarge "
                    f"the difference; expected the same bits. Check it on a machine with such a device."
                )
            raise VerificationError(
                f"{step.lock.path}: {name} of the stage {step.stage.label} has the hash {locked} in the lock and {record.digest} when it is made "
                "again from its inputs; they must be the same. Merge again."
            )


def _other_input(lock: Lock, changed: tuple[str, str]) -> UncheckedError:
    label, name = changed
    return UncheckedError(
        f"{lock.path.parent}: could not check against its inputs: {name} of {label} is not the one that was merged, by its hash in the lock; "
        f"expected the same model. Say where that is with --input {label}=PATH."
    )


def _difference(
    lock: Lock, model: Source, plan: Plan, differing: Mapping[str, Differing], is_tolerant: bool
) -> VerificationError | UncheckedError:
    out = lock.path.parent
    matrices = {job.name for job in plan.jobs if job.kind == "matrix"}
    if is_tolerant and differing.keys() <= matrices:
        return UncheckedError(
            f"{out}: could not check against its inputs: {next(iter(differing))} is made as a whole matrix. It was merged on "
            f"{lock.device_text} and differs when it is made again on {plan.device_kind} by more than one unit in the last place, which "
            "need not be a fault. Check it on a machine with such a device."
        )
    if is_tolerant:
        differing = {n: d for n, d in differing.items() if n not in matrices}
    name = next(n for n in model.tensors if n in differing)
    difference, tensor = differing[name], model.tensors[name]
    width = max(DTYPES[tensor.dtype].bytes, 1)
    place = (
        [int(i) for i in np.unravel_index(difference.offset // width, tensor.shape)] if tensor.shape else []
    )
    more = f" {len(differing) - 1} more tensors differ." if len(differing) > 1 else ""
    must = "must be the same" if not is_tolerant else "may differ by one unit in the last place"
    elsewhere = (
        " (It is made as a whole matrix, whose bits are the same on one type of machine only.)"
        if name in matrices
        else ""
    )
    return VerificationError(
        f"{out}: {name}{place or ''} is {_shown(difference.stored, tensor.dtype)} in the output and {_shown(difference.computed, tensor.dtype)} when it is made "
        f"again from the inputs, from byte {difference.offset} of the tensor on; they {must}.{more} Merge again, or get a new copy of the output.{elsewhere}"
    )


def _shown(raw: bytes, dtype: str) -> str:
    """Format an element as a number, if it is one, and as bytes."""
    number = f"{float(decode(np.frombuffer(raw, np.uint8), dtype)[0]):.9g}, " if dtype in MERGEABLE else ""
    return f"{number}0x{raw[::-1].hex()}"
