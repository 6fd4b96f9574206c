"""Makes the tensors of a plan on nodes: hands out units, and keeps the journal of what they have made."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from alnico.checkpoint.durable import replace_file
from alnico.checkpoint.source import Source
from alnico.cluster.nodes import check_numerics
from alnico.cluster.work import Cluster
from alnico.engine import measure
from alnico.engine.merge_run import RunRecorder
from alnico.engine.node_merge import (
    CountUnit,
    MadeTensors,
    NormUnit,
    RecipePlanner,
    StartMerge,
    TensorUnit,
)
from alnico.engine.norm_weights import measure_norm_weights
from alnico.errors import AlnicoError, MethodError
from alnico.events import Advanced, Event, Measuring, Noted, Started, TensorDone, Watcher
from alnico.methods import find, registry
from alnico.methods.base import MADE_HERE
from alnico.output.journal import JournalState
from alnico.output.remote_target import RemoteTarget
from alnico.output.shard_uploads import ShardUploads
from alnico.output.staging import PASS, PartDirectory
from alnico.plan.job import Job, Norms, Plan
from alnico.recipe.schema import Recipe

UNITS_A_NODE = 8
"""Units that a node gets in the mean: a slow one then takes fewer, and little is lost with a node."""

LEAST_UNIT_BYTES = 16 << 20
"""Fewest bytes that a unit reads and writes, unless there are fewer: opening and syncing files takes time."""

MOST_UNIT_BYTES = 2 << 30
"""Most bytes that a unit reads and writes, except for one large tensor: what a lost node costs, and how often progress shows."""


@dataclass(frozen=True)
class ClusterMerge:
    """How one recipe is merged on the nodes of ``cluster``: they plan it by ``planner``, as the driver did."""

    cluster: Cluster
    planner: RecipePlanner
    factor_cache: Path | None
    recipe: Recipe
    stages: Mapping[str, str | Source]
    """The paths of the stages that the recipe takes, by name."""
    single_file: str | None

    def check(self, plan: Plan) -> None:
        """Refuse what nodes cannot compute, or not with the same bits. Errors: AlnicoError, MethodError, MismatchError."""
        if plan.gpus:
            raise AlnicoError(
                f"the device is {plan.gpus[0]}, and nodes of a cluster merge on their processors. Leave out --device, or --ray."
            )
        only_here = [
            name for name in plan.recipe.methods_used if name in MADE_HERE and name not in registry()
        ]
        if only_here:
            raise MethodError(
                f"the merge method {only_here[0]} was made in this process, and nodes are other processes; expected a method that "
                "they can import. Put the method into a package with the entry point alnico.methods, or merge without --ray."
            )
        if any(job.kind == "matrix" for job in plan.jobs):
            check_numerics(self.cluster.nodes, _matrix_methods(plan))

    def begin(self, output: PartDirectory | RemoteTarget, fingerprint: Mapping[str, Any]) -> StartMerge:
        """Let all nodes plan the merge, so that one that cannot is named before anything is read. They write into a folder that they
        see, or send shards to a URL.

        Errors: those of nodes.
        """
        unfinished = model = entry = ""
        if isinstance(output, PartDirectory):
            entry = secrets.token_hex(16)
            replace_file(output.path / PASS, entry, output.folder)
            unfinished, model = os.path.abspath(output.path), os.path.abspath(output.model)
        start = StartMerge(
            self.planner,
            self.recipe,
            tuple((name, str(path)) for name, path in self.stages.items()),
            self.single_file,
            os.getcwd(),
            unfinished,
            model,
            entry,
            fingerprint,
            None if self.factor_cache is None else Path(os.path.abspath(self.factor_cache)),
            output if isinstance(output, RemoteTarget) else None,
        )
        self.cluster.begin(start)
        return start


class NodeJournal(RunRecorder, Protocol):
    """Records what nodes finished and measured."""

    def measured_norms(self, norms: Mapping[int, tuple[float, ...]]) -> None: ...


class ClusterRun:
    """A merge on nodes, with what is known of it afterwards; the counterpart of :class:`alnico.engine.merge_run.MergeRun`.

    ``state`` is what earlier runs finished, on this machine or on nodes. With ``uploads``, nodes make and send whole shards, and
    ``state`` has all tensors of a shard or none.
    """

    def __init__(
        self,
        plan: Plan,
        cluster: Cluster,
        start: StartMerge,
        journal: NodeJournal,
        state: JournalState,
        watch: Watcher | None,
        uploads: ShardUploads | None = None,
    ) -> None:
        self.plan = plan
        self._uploads = uploads
        self.records = {record.tensor: record for record in state.records}
        self.resumed = len(self.records)
        self.notes: list[Noted] = []
        self.factor_fault: str | None = None
        self._cluster = cluster
        self._start = start
        self._journal = journal
        self._facts = dict(state.facts)
        self._norms: dict[int, Norms] = dict(state.norms)
        self._watch = watch
        self._shard_of = {t.name: s.name for s in plan.shards for t in s.header.tensors}

    def all(self) -> None:
        """Make all tensors. Errors: those of nodes; see :meth:`alnico.cluster.work.Cluster.run`."""
        self.plan = measure_norm_weights(
            self.plan, self._norms, self._watch, self._measured_norms, self._measure_norms
        )
        done = sum(job.byte_size for job in self.plan.jobs if job.name in self.records)
        self._report(Started(self.plan, len(self.records), done))
        self._measure_model()
        missing = [job for job in self.plan.jobs if job.name not in self.records]
        units = self._units(missing)
        jobs = {job.name: job for job in missing}

        def take(number: int, made: MadeTensors) -> None:
            self._check_journal()
            if self._uploads is not None:
                self._uploads.sent(self._shard_of[units[number].tensors[0]], made.tags)
            self._journal.finished(*made.records)
            for record in made.records:
                self.records[record.tensor] = record
                self._report(Advanced(record.tensor, jobs[record.tensor].byte_size))
                self._report(TensorDone(record.tensor, record.digest))
            for noted in made.notes:
                self.notes.append(noted)
                self._report(noted)
            self.factor_fault = self.factor_fault or made.factor_fault

        self._cluster.run(self._start, units, take)

    def _units(self, jobs: Sequence[Job]) -> list[TensorUnit]:
        """Return the units that make tensors. Errors: HubError if an upload cannot begin."""
        groups = self._grouped(jobs, by_shard=True)
        units = [TensorUnit(tuple(j.name for j in group), self._facts, self._norms) for group in groups]
        if self._uploads is None:
            return units
        shards = [self._shard_of[unit.tensors[0]] for unit in units]
        uploads = self._uploads.begin(shards)
        return [replace(unit, upload=uploads[shard]) for unit, shard in zip(units, shards, strict=True)]

    def _measured_norms(self, norms: Mapping[int, Norms]) -> None:
        self._norms.update(norms)
        self._journal.measured_norms(norms)

    def _measure_norms(self, groups: Iterable[int]) -> dict[str, Any]:
        """Measure the squared norms of the task vectors of some groups of the plan, by tensor."""
        tensors = [
            (i, pending.delta) for i in groups for pending in self.plan.norm_weight_groups[i].tensors.values()
        ]
        number = {job.name: i for i, job in tensors}
        units = [
            NormUnit(tuple((number[job.name], job.name) for job in group))
            for group in self._grouped([job for _, job in tensors])
        ]
        squares: dict[str, Any] = {}
        self._cluster.run(self._start, units, lambda _, found: squares.update(found))
        return squares

    def _measure_model(self) -> None:
        """Measure the facts of the whole model that unfinished tensors need: nodes count, and the sums of their counts decide."""
        missing = {job.name for job in self.plan.jobs} - self.records.keys()
        for number, (fact, jobs) in enumerate(measure.over_model(self.plan.jobs).items()):
            if number in self._facts or all(job.name not in missing for job in jobs):
                continue
            self._report(Measuring(len(jobs)))
            measurement = measure.ModelMeasurement(fact, jobs, {})
            groups = [tuple(job.name for job in group) for group in self._grouped(jobs)]
            while measurement.result is None:
                so_far = measurement.digits_so_far
                units = [CountUnit(names, number, so_far) for names in groups]
                self._cluster.run(self._start, units, lambda _, counts, into=measurement: into.add(counts))  # type: ignore[misc]
                measurement.turn()
            self._facts[number] = measurement.result
            self._journal.measured(number, measurement.result)

    def _grouped(self, jobs: Sequence[Job], *, by_shard: bool = False) -> list[list[Job]]:
        """Cut jobs into units: neighbours, the most expensive units first, so that none is left for the end. ``by_shard``: each is of
        one shard, and is a whole one if nodes send them."""
        if not jobs:
            return []
        total = sum(map(_cost, jobs))
        share = total // (UNITS_A_NODE * max(len(self._cluster.nodes), 1))
        limit = min(max(share, LEAST_UNIT_BYTES), MOST_UNIT_BYTES)
        shard_of = self._shard_of if by_shard else {}
        is_whole = by_shard and self._uploads is not None
        groups: list[list[Job]] = []
        size = 0
        for job in jobs:
            is_other = not groups or shard_of.get(job.name) != shard_of.get(groups[-1][-1].name)
            if is_other or (size + _cost(job) > limit and not is_whole):
                groups.append([])
                size = 0
            groups[-1].append(job)
            size += _cost(job)
        return sorted(groups, key=lambda group: -sum(map(_cost, group)))

    def _check_journal(self) -> None:
        if self._journal.failure is not None:
            raise self._journal.failure

    def _report(self, event: Event) -> None:
        if self._watch is not None:
            self._watch(event)


def _matrix_methods(plan: Plan) -> list[str]:
    """The methods of a plan that compute on whole matrices."""
    places = {getattr(job.matrix.make, "__module__", "") for job in plan.jobs if job.matrix is not None}
    used = plan.recipe.methods_used
    return [name for name in used if find(name).factory.__module__ in places] or list(used)


def _cost(job: Job) -> int:
    """The bytes that a tensor reads and writes; a matrix takes many times as long."""
    size = job.byte_size + sum(tensor.byte_size for tensor in job.read)
    return size * 16 if job.kind == "matrix" else size
