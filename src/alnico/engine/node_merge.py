"""Makes tensors of a plan on a node, into the driver's unfinished output, or shards, which it sends to a URL."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from alnico.checkpoint.remote.folder import RemoteFolder
from alnico.checkpoint.shards import OutputShard
from alnico.checkpoint.source import Source
from alnico.checkpoint.writer import OutputFiles
from alnico.devices import CPU
from alnico.engine import measure
from alnico.engine.blocks import Span, blocks, chunks
from alnico.engine.fetch import fetch_weights
from alnico.engine.measure_plan import measure_tensors
from alnico.engine.merge_run import MergeRun
from alnico.engine.norm_weights import SQUARES, TOO_LARGE
from alnico.engine.workspace import Workspace
from alnico.errors import MismatchError, OutputError, RunError
from alnico.events import Noted
from alnico.folders import Folder, open_to_write, read_private
from alnico.kernels.choice import kernel_for
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.output.disk_space import DISK_MARGIN_BYTES, check_free
from alnico.output.journal import JournalState, Record, fingerprint_changes, with_device
from alnico.output.remote_target import RemoteTarget, opened_target
from alnico.output.shard_uploads import ShardUpload, send_shard
from alnico.output.staging import PASS
from alnico.plan.job import Job, Norms, Plan
from alnico.plan.norm_weights import with_norms
from alnico.recipe.schema import Recipe
from alnico.threads import Crew


class RecipePlanner(Protocol):
    """Plans recipes; see :class:`alnico.engine.planner.Planner`. It is pickled."""

    def on_node(self) -> RecipePlanner:
        """Return the planner with the threads of the node that this is called on."""
        ...

    def plan(
        self, recipe: Recipe, stages: Mapping[str, str | Source] = ..., single_file: str | None = None
    ) -> Plan: ...


@dataclass(frozen=True)
class TensorUnit:
    """Tensors of one shard to make. ``facts`` are those of the whole model, by their number in the plan; ``norms`` are those of
    the groups of the plan whose weights are made from measured norms. An output at a URL has an ``upload``, by which the shard is
    sent: the tensors are all of it."""

    tensors: tuple[str, ...]
    facts: Mapping[int, tuple[float, ...]]
    norms: Mapping[int, Norms]
    upload: ShardUpload | None = None


@dataclass(frozen=True)
class MadeTensors:
    """What a node returns for a :class:`TensorUnit`, whose bytes are on the disk, or on the server as parts with these ``tags``."""

    records: tuple[Record, ...]
    notes: tuple[Noted, ...]
    factor_fault: str | None
    tags: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CountUnit:
    """Tensors over which one pass for a fact of the whole model counts: ``number`` of the fact in the plan, and what the passes
    before have found."""

    tensors: tuple[str, ...]
    number: int
    so_far: tuple[int, np.ndarray]


@dataclass(frozen=True)
class NormUnit:
    """Task vectors whose squared norms are measured, by group of the plan and tensor."""

    tensors: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class StartMerge:
    """Starts a :class:`NodeMerge`: everything that decides what it does.

    ``place`` is the working directory, to which paths are relative. ``unfinished`` is the driver's folder, and ``entry`` the pass
    that must be in it; they are empty where the output is at a URL, ``target``. ``fingerprint`` is what the plan must have.
    """

    planner: RecipePlanner
    recipe: Recipe
    stages: tuple[tuple[str, str], ...]
    single_file: str | None
    place: str
    unfinished: str
    model: str
    entry: str
    fingerprint: Mapping[str, Any]
    factor_cache: Path | None
    target: RemoteTarget | None = None

    def __call__(self) -> NodeMerge:
        return NodeMerge(self)


class NodeMerge:
    """The worker of a merge on one node. Errors: of planning; MismatchError if the node plans another merge than the driver;
    OutputError if it does not see the unfinished output; ResourceError, HubError if it cannot make or send a shard for a URL."""

    @ieee_arithmetic()
    def __init__(self, start: StartMerge) -> None:
        with suppress(OSError):  # then paths are absolute, or the plan names what is not there
            os.chdir(start.place)
        self._start = start
        self._open = ExitStack()
        self._folder: Folder | None = None
        self._remote: RemoteFolder | None = None
        self._plan: Plan | None = None
        if start.target is None:
            self._folder = self._open_folder()
        try:
            if start.target is not None:
                self._remote = self._open.enter_context(opened_target(start.target))
            self._plan = start.planner.on_node().plan(start.recipe, dict(start.stages), start.single_file)
            self._check_fingerprint(self._plan)
            if self._remote is not None:
                self._check_sending(self._remote, self._plan)
        except BaseException:
            self.close()
            raise
        self._settled: tuple[Mapping[int, Norms], Plan] = {}, self._plan

    @ieee_arithmetic()
    def do(self, unit: TensorUnit | CountUnit | NormUnit) -> Any:
        if isinstance(unit, TensorUnit):
            return self._make(unit)
        if isinstance(unit, CountUnit):
            return self._count(unit)
        return self._norms(unit)

    def close(self) -> None:
        if self._plan is not None:
            for source in self._plan.sources:
                source.close()
        self._open.close()
        if self._folder is not None:
            self._folder.close()

    def _open_folder(self) -> Folder:
        path = Path(self._start.unfinished)
        try:
            folder = Folder(path)
        except OSError as error:
            raise OutputError(
                f"{path}: is not seen there ({error.strerror}), and the merge was begun in it; expected a file system that all nodes "
                "see. Choose an output on one, or, for stages of an output at a URL, --work-dir."
            ) from None
        try:
            descriptor = open_to_write(path / PASS, folder, flags=os.O_RDWR)
        except OSError as error:
            folder.close()
            raise OutputError(
                f"{path}: cannot be written there ({error.strerror}), and the merge was begun in it; expected a file system that all "
                "nodes see. Choose an output on one, or, for stages of an output at a URL, --work-dir."
            ) from None
        os.close(descriptor)
        return folder

    def _check_sending(self, remote: RemoteFolder, plan: Plan) -> None:
        """Refuse a disk without room for a shard, and a server that does not answer this node. Errors: ResourceError, HubError."""
        check_free(
            Path(tempfile.gettempdir()),
            max(shard.byte_size for shard in plan.shards) + DISK_MARGIN_BYTES,
            "a shard of the output, which is made there and then sent, needs",
            "start Ray there with another TMPDIR, or choose a smaller --max-shard-size",
        )
        remote.state(plan.shards[0].name)

    def _check_fingerprint(self, plan: Plan) -> None:
        expected, found = with_device(self._start.fingerprint), with_device(plan.fingerprint())
        if changed := fingerprint_changes(expected, found):
            raise MismatchError(
                f"plans another merge than the driver; what differs: {', '.join(changed)}. Give all nodes the same files, by the same "
                "paths, and the same alnico."
            )

    def _with_norms(self, norms: Mapping[int, Norms]) -> Plan:
        assert self._plan is not None
        if self._settled[0] != norms:
            self._settled = norms, with_norms(self._plan, norms)
        return self._settled[1]

    def _make(self, unit: TensorUnit) -> MadeTensors:
        settled = self._with_norms(unit.norms)
        chosen = set(unit.tensors)
        jobs = tuple(job for job in settled.jobs if job.name in chosen)
        numbers = {fact: n for n, fact in enumerate(measure.over_model(settled.jobs))}
        facts = {
            n: unit.facts[numbers[fact]]
            for n, fact in enumerate(measure.over_model(jobs))
            if numbers[fact] in unit.facts
        }
        plan = dataclasses.replace(settled, jobs=jobs, norm_weight_groups=())
        fetch_weights(plan)
        shards = [s for s in plan.shards if any(t.name in chosen for t in s.header.tensors)]
        tags: dict[int, str] = {}
        files = _private_files(shards) if unit.upload is not None else self._files(shards)
        try:
            recorder = _Collected()
            run = MergeRun(
                plan,
                files,
                recorder,
                JournalState(facts=facts),
                None,
                factor_cache=self._start.factor_cache,
            )
            run.all()
            if unit.upload is None:
                files.sync()
            else:
                assert self._remote is not None
                assert chosen == {t.name for t in shards[0].header.tensors}
                tags = send_shard(self._remote, shards[0], files, unit.upload)
        finally:
            files.close()
        return MadeTensors(tuple(recorder.records), tuple(run.notes), run.factor_fault, tags)

    def _files(self, shards: Sequence[OutputShard]) -> OutputFiles:
        """Open files of the driver. Errors: RunError, also if another run has taken its place."""
        assert self._folder is not None
        files = OutputFiles(Path(self._start.model), shards, self._folder, are_made=True)
        # After the files were opened: another run that begins now makes new ones, or the same bytes.
        if read_private(PASS, self._folder, 1000) != self._start.entry.encode():
            files.close()
            raise RunError(
                f"{self._start.unfinished}: another run has begun to write it. Wait for it, or choose another output."
            )
        return files

    def _count(self, unit: CountUnit) -> np.ndarray:
        plan = self._plan
        assert plan is not None
        fact, jobs = list(measure.over_model(plan.jobs).items())[unit.number]
        measurement = measure.ModelMeasurement(fact, jobs, {})
        measurement.follow(unit.so_far)
        chosen = set(unit.tensors)
        own = [job for job in jobs if job.name in chosen]
        fetch_weights(dataclasses.replace(plan, jobs=tuple(own), norm_weight_groups=()))
        kernel_for(measurement.kernel, sum(job.elements for job in own))
        space = Workspace(CPU, plan.sources, plan.memory.worker_bytes, keeps_host=False)
        crew = Crew(plan.memory.threads)

        def fold(job: Job, span: Span) -> None:
            for start, stop in blocks(span, plan.memory.block_elements):
                crew.check()
                measurement.fold(job, start, space.block(job, (start, stop))[0])

        with crew:
            crew.run([(fold, (job, span)) for job in own for span in chunks(job)])
        return measurement.counts

    def _norms(self, unit: NormUnit) -> dict[str, Any]:
        plan = self._plan
        assert plan is not None
        deltas = [plan.norm_weight_groups[group].tensors[name].delta for group, name in unit.tensors]
        fetch_weights(dataclasses.replace(plan, jobs=tuple(deltas), norm_weight_groups=()))
        return measure_tensors(plan, deltas, SQUARES, TOO_LARGE)


def _private_files(shards: Sequence[OutputShard]) -> OutputFiles:
    """Make files in a temporary folder of this node, which have no names any more: the system frees them, also if the node is killed.

    Errors: RunError.
    """
    with tempfile.TemporaryDirectory(prefix="alnico-", ignore_cleanup_errors=True) as folder:
        return OutputFiles(Path(folder), shards, are_sent=True)


class _Collected:
    """Collects records for the driver, which keeps the journal."""

    wants_digests = True
    failure = None

    def __init__(self) -> None:
        self.records: list[Record] = []

    def finished(self, *records: Record) -> None:
        self.records += records

    def measured(self, fact: int, value: Sequence[float]) -> None:
        """Do nothing: the driver measures over the model."""
