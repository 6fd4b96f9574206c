"""Carries out a plan: merges into an unfinished output, checks it, and gives it its name."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alnico.checkpoint.durable import sync_directory
from alnico.checkpoint.file_model import FileModel, file_states
from alnico.checkpoint.output_path import Replace, check_twins, is_single_file
from alnico.checkpoint.remote.remote_weights import remote_models
from alnico.checkpoint.source import unwrap
from alnico.checkpoint.writer import OutputFiles
from alnico.engine.merge_run import MergeRun
from alnico.engine.method_notes import sum_up
from alnico.engine.norm_weights import measure_norm_weights
from alnico.engine.relatedness import IN_A_RECIPE, Caller, check_relatedness
from alnico.engine.workspace import open_gpus
from alnico.errors import (
    AlnicoError,
    HubError,
    RunError,
)
from alnico.events import Fetched, Fetching, Finished, Watcher
from alnico.folders import make_folder, remove
from alnico.kernels.clock import counts_compiling
from alnico.notebook import ResultTable, never_fails, result_html, result_line
from alnico.numerics.sizes import count_of, format_size
from alnico.output.disk_space import check_disk, check_target, needed_paths
from alnico.output.journal import Journal, JournalState, Record, read_journal
from alnico.output.publish import (
    complete_output,
    finish_publishing,
    input_files,
    is_tensor_intact,
    refuse_changed_at_urls,
    refuse_changed_inputs,
)
from alnico.output.remote_target import RemoteTarget
from alnico.output.shard_uploads import LEAVE_SECONDS, ShardUploads
from alnico.output.staging import PASS, Hold, PartDirectory
from alnico.plan.job import Plan
from alnico.recipe.requantise import is_requantising
from alnico.threads import Abandoned

if TYPE_CHECKING:
    from alnico.engine.cluster_merge import ClusterMerge, ClusterRun
    from alnico.engine.node_merge import StartMerge
    from alnico.vocabulary.rebuilt_rows import RebuiltRows


@dataclass(frozen=True)
class MergeResult:
    """A finished merge. ``resumed`` tensors come from an interrupted run; ``digests`` maps tensors to their
    hash.

    ``compile_seconds`` of ``seconds`` went to compiling kernels, which the next run loads. ``notes`` are what the
    method said about tensors of this run, one line for each text.
    """

    path: Path | str
    """Where the output is: a path, or a URL as text."""
    plan: Plan
    seconds: float
    resumed: int
    digests: dict[str, str] = field(repr=False)
    compile_seconds: float = field(default=0.0, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    kept: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)
    """Of an output that is requantised: by tensor, the share of the energy of its change that survived rounding."""
    rebuilt: tuple[RebuiltRows, ...] = field(default=(), compare=False, repr=False)
    """Of an output whose recipe has ``approximate``: how well the rows of tokens that a model knows would have been made."""

    def __repr__(self) -> str:
        plan = self.plan
        return result_line(
            f"merge in {self.path}",
            ", ".join(plan.recipe.methods_used),
            count_of(len(plan.jobs), "tensor"),
            format_size(plan.bytes_to_write),
            f"{self.seconds:.1f} s",
            f"{self.resumed:,} tensors from an interrupted run" if self.resumed else "",
        )

    @never_fails
    def _repr_html_(self) -> str:
        plan = self.plan
        return result_html(
            f"Merge in {self.path}",
            ResultTable(("model",), [[s.label] for s in plan.models]),
            *self.notes,
            facts=[
                ("method", ", ".join(plan.recipe.methods_used)),
                ("tensors", len(plan.jobs)),
                ("parameters", plan.elements),
                ("size", format_size(plan.bytes_to_write)),
                ("files", len(plan.shards)),
                ("seconds", round(self.seconds, 2)),
                *([("resumed tensors", self.resumed)] if self.resumed else []),
            ],
        )

    @property
    def bytes_per_second(self) -> float:
        """Bytes read and written per second, without the time to compile."""
        return (self.plan.bytes_to_read + self.plan.bytes_to_write) / max(
            self.seconds - self.compile_seconds, 1e-9
        )


@counts_compiling
def run_plan(
    plan: Plan,
    out: Path,
    *,
    overwrite: Replace = False,
    restart: bool = False,
    watch: Watcher | None = None,
    mark: Path | None = None,
    caller: Caller = IN_A_RECIPE,
    factor_cache: Path | None = None,
    nodes: ClusterMerge | None = None,
) -> MergeResult:
    """Carry out a plan. When this returns, ``out`` is the complete and checked output.

    An interrupted merge of the same plan is resumed; ``restart`` discards it. ``watch`` gets events from any
    thread, one at a time. ``mark`` is a file that records which output was made
    (:func:`alnico.output.staging.is_published`). ``caller`` has the words in which unrelated models are
    refused. ``nodes`` make the tensors, in place of this machine. ``factor_cache`` is the folder of :class:`alnico.engine.factor_cache.FactorFiles`. Errors: see ``errors``. A wrong input removes the unfinished output, everything else keeps it.
    """
    begin = time.perf_counter()
    open_gpus(plan)
    out = Path(out)
    single = plan.shards[0].name if is_single_file(out) else None
    fingerprint = plan.fingerprint()
    try:
        check_twins(out, needed_paths(plan), (".alnico-old",))  # an old output gets its name back
        if (digests := finish_publishing(plan, out, fingerprint, restart)) is not None:
            return MergeResult(out, plan, time.perf_counter() - begin, len(digests), digests)
        check_target(out, plan, overwrite)
        check_disk(plan, out)
        if nodes is not None:
            nodes.check(plan)
        with PartDirectory(out) as part:
            state = earlier_state(plan, part, fingerprint, restart)
            remove(part.path / PASS, part.folder)  # nodes of an earlier run may not write any more
            if not state:
                part.clear()
            try:
                make_folder(part.model, part.folder)
                sync_directory(part.path, part.folder)
            except OSError as error:
                raise RunError(
                    f"{part.model}: cannot be made ({error.strerror}). Choose another output."
                ) from None
            start = None if nodes is None else begin_nodes(nodes, part, part, fingerprint, state)
            try:
                before = file_states(input_files(plan, single))
                checked = plan if state else check_relatedness(plan, caller)
                files = OutputFiles(part.model, plan.shards, part.folder)
                run = make_tensors(
                    checked, part, files, fingerprint, state, watch, factor_cache, nodes, start
                )
                settled = run.plan
                refuse_changed_inputs(settled, before, run.records)
                complete_output(settled, part, files, run.records, single)
                refuse_changed_inputs(settled, before, run.records)
                refuse_changed_at_urls(settled)
                files.finish()
                sync_directory(part.model, part.folder)
            except (RunError, HubError):  # a server that failed: the same command resumes the merge
                raise
            except AlnicoError as error:
                part.check_still_there()
                # A file that the system could not open is not a wrong input.
                if not isinstance(error.__context__, OSError):
                    part.remove()
                raise
            part.publish(single, overwrite, fingerprint, mark)
    except HubError as error:
        raise HubError(f"{error} What was made is kept: the same command resumes the merge.") from None
    except OSError as error:
        raise RunError(
            f"{error.filename or out}: {error.strerror or error}. Make room or check the disk; the same command resumes the merge."
        ) from None
    return finished_merge(run, settled, out, begin, watch)


def finished_merge(
    run: MergeRun | ClusterRun, plan: Plan, out: Path | str, begin: float, watch: Watcher | None
) -> MergeResult:
    """Report a merge that is published, and return its result. ``plan`` is settled; ``begin`` is when the merge began."""
    seconds = time.perf_counter() - begin
    if watch:
        watch(Finished(str(out), seconds))
    digests = {name: record.digest for name, record in run.records.items()}
    notes = sum_up(run.notes, {job.name: i for i, job in enumerate(plan.jobs)})
    notes += (run.factor_fault,) if run.factor_fault is not None else ()
    kept: dict[str, float] = {}
    if is_requantising(plan.recipe):
        from alnico.checkpoint.quantised.requantised_model import RequantisedModel, kept_note

        for source in plan.sources:
            if isinstance(source := unwrap(source), RequantisedModel):
                kept = source.kept
                notes += (kept_note(source.base.label, kept),)
    rebuilt: tuple[RebuiltRows, ...] = ()
    if plan.recipe.tokenizer is not None and plan.recipe.tokenizer.approximate:
        from alnico.vocabulary.rebuilt_rows import measure_rebuilding

        rebuilt = measure_rebuilding(plan.sources)
        notes += tuple(rows.note for rows in rebuilt)
    return MergeResult(out, plan, seconds, run.resumed, digests, notes=notes, kept=kept, rebuilt=rebuilt)


def earlier_state(
    plan: Plan, part: Hold, fingerprint: dict[str, Any], restart: bool, what: str = "merge"
) -> JournalState:
    """Return what an earlier run finished and is used again: nothing with ``restart``, or if a server states no tags of models, which
    may be other ones now.

    Errors: those of :func:`alnico.output.journal.read_journal`.
    """
    models = [model for model in remote_models(plan.sources) if isinstance(model, FileModel)]
    if restart or not all(model.remote is None or model.remote.has_tags for model in models):
        return JournalState()
    return read_journal(part.path, fingerprint, what)


def begin_nodes(
    nodes: ClusterMerge,
    output: PartDirectory | RemoteTarget,
    part: Hold,
    fingerprint: dict[str, Any],
    state: JournalState,
) -> StartMerge:
    """Start the nodes. If that fails, what an earlier run finished is kept. Errors: those of nodes."""
    try:
        return nodes.begin(output, fingerprint)
    except AlnicoError:
        if not state:
            part.remove()
        raise


class SendingJournal:
    """The journal of a merge whose shards are sent to a URL while others are made."""

    wants_digests = True

    def __init__(self, journal: Journal, uploads: ShardUploads) -> None:
        self._journal = journal
        self._uploads = uploads

    @property
    def failure(self) -> BaseException | None:
        return self._journal.failure or self._uploads.failure

    def finished(self, *records: Record) -> None:
        self._journal.finished(*records)
        for record in records:
            self._uploads.finished(record.tensor)

    def measured(self, fact: int, value: tuple[float, ...]) -> None:
        self._journal.measured(fact, value)

    def measured_norms(self, norms: Mapping[int, tuple[float, ...]]) -> None:
        self._journal.measured_norms(norms)


def make_tensors(
    plan: Plan,
    part: Hold,
    files: OutputFiles,
    fingerprint: dict[str, Any],
    state: JournalState,
    watch: Watcher | None,
    factor_cache: Path | None,
    nodes: ClusterMerge | None = None,
    start: StartMerge | None = None,
    send: Callable[[Journal, Collection[str]], ShardUploads] | None = None,
    sent: Collection[str] = (),
) -> MergeRun | ClusterRun:
    """Make all tensors that an earlier run has not finished. ``send`` makes the uploads of shards from the journal and the names of
    the finished tensors; those in ``sent`` are on the server."""
    is_abandoned = False
    uploads: ShardUploads | None = None
    try:
        jobs = {job.name: job for job in plan.jobs}
        intact = [
            record
            for record in state.records
            if record.tensor in jobs
            and (record.tensor in sent or is_tensor_intact(record, jobs[record.tensor], files))
        ]
        if send is not None and nodes is not None:  # nodes make whole shards
            names = {record.tensor for record in intact}
            left = [s for s in plan.shards if not all(t.name in names for t in s.header.tensors)]
            unmade = {t.name for shard in left for t in shard.header.tensors}
            intact = [record for record in intact if record.tensor not in unmade]
        state = JournalState(intact, state.facts, state.norms, state.uploads)
        journal = Journal(part.path, fingerprint, files.sync, state, part.folder)
        try:
            if send is not None:
                uploads = send(journal, {record.tensor for record in intact})
                uploads.start()
            recorder = journal if uploads is None else SendingJournal(journal, uploads)
            run: MergeRun | ClusterRun
            if nodes is None or start is None:
                settled = measure_norm_weights(plan, state.norms, watch, journal.measured_norms)
                groups = None if uploads is None else uploads.groups()
                run = MergeRun(
                    settled, files, recorder, state, watch, factor_cache=factor_cache, groups=groups
                )
            else:
                from alnico.engine.cluster_merge import ClusterRun  # with what nodes need

                run = ClusterRun(plan, nodes.cluster, start, recorder, state, watch, uploads)
            run.all()
            if uploads is not None:
                _wait_for_uploads(uploads, watch)
        except BaseException as error:
            has_ended = uploads is None or uploads.stop(LEAVE_SECONDS)
            with suppress(RunError):  # the first error is the one to report
                has_ended = journal.close(is_interrupted=isinstance(error, KeyboardInterrupt)) and has_ended
            is_abandoned = isinstance(error, Abandoned) or not has_ended
            raise
        journal.close()
        files.seal()
        return run
    finally:
        if not is_abandoned:  # an abandoned thread may still write its block
            files.close()


def _wait_for_uploads(uploads: ShardUploads, watch: Watcher | None) -> None:
    """Wait until all shards are sent. Errors: those of sending."""
    files, left = uploads.unsent()
    if watch and left:
        watch(Fetching((uploads.folder.address,), files, left, is_upload=True))
    uploads.wait(lambda size: watch(Fetched(size)) if watch else None)
    uploads.stop()
