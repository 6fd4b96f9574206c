"""Carries out a plan into a URL: sends shards while others are made, and publishes the model at the end."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alnico.checkpoint.durable import sync_directory
from alnico.checkpoint.file_model import file_states
from alnico.checkpoint.output_path import Replace
from alnico.checkpoint.remote.folder import FileVersion, RemoteFolder
from alnico.checkpoint.writer import OutputFiles
from alnico.engine.merge_run import MergeRun
from alnico.engine.relatedness import IN_A_RECIPE, Caller, check_relatedness
from alnico.engine.run import MergeResult, begin_nodes, earlier_state, finished_merge, make_tensors, run_plan
from alnico.engine.workspace import open_gpus
from alnico.errors import AlnicoError, HubError, RunError
from alnico.events import Watcher
from alnico.folders import make_folder
from alnico.kernels.clock import counts_compiling
from alnico.output.disk_space import check_place_at
from alnico.output.journal import Journal, JournalState, upload_lines
from alnico.output.publish import (
    complete_output,
    input_files,
    refuse_changed_at_urls,
    refuse_changed_inputs,
)
from alnico.output.publish_remote import (
    Publication,
    UploadDirectory,
    check_target_at,
    completed_shards,
    mark_published,
    publish_model,
    read_publication,
)
from alnico.output.remote_target import RemoteTarget, opened_target
from alnico.output.shard_uploads import (
    ShardUpload,
    ShardUploads,
    abort_uploads,
    format_uploads,
    read_uploads,
    usable_uploads,
)
from alnico.plan.job import Plan

if TYPE_CHECKING:
    from alnico.engine.cluster_merge import ClusterMerge, ClusterRun
    from alnico.engine.node_merge import StartMerge


RESUMES = "What was made is kept on this machine and at the URL: the same command resumes the merge."


def run_plan_to(
    plan: Plan,
    out: Path | RemoteTarget,
    *,
    overwrite: Replace = False,
    restart: bool = False,
    watch: Watcher | None = None,
    mark: Path | None = None,
    caller: Caller = IN_A_RECIPE,
    factor_cache: Path | None = None,
    nodes: ClusterMerge | None = None,
) -> MergeResult:
    """Carry out a plan into a path, by :func:`alnico.engine.run.run_plan`, or into a URL, with the same options and the same bytes.

    At a URL, nobody finds half a model: the weights appear when all of them are made and sent, and the config is the last file.
    Errors: as there; HubError for the server, after which the same command resumes the merge.
    """
    if isinstance(out, RemoteTarget):
        return _run_plan_at(plan, out, overwrite, restart, watch, mark, caller, factor_cache, nodes)
    return run_plan(
        plan,
        out,
        overwrite=overwrite,
        restart=restart,
        watch=watch,
        mark=mark,
        caller=caller,
        factor_cache=factor_cache,
        nodes=nodes,
    )


@counts_compiling
def _run_plan_at(
    plan: Plan,
    target: RemoteTarget,
    overwrite: Replace,
    restart: bool,
    watch: Watcher | None,
    mark: Path | None,
    caller: Caller,
    factor_cache: Path | None,
    nodes: ClusterMerge | None,
) -> MergeResult:
    begin = time.perf_counter()
    open_gpus(plan)
    fingerprint = plan.fingerprint()
    if nodes is not None:
        nodes.check(plan)
    check_place_at(plan, target, overwrite, on_nodes=nodes is not None)  # before this makes a folder
    try:
        with opened_target(target) as folder, UploadDirectory(target) as part:
            begun = read_publication(part)
            state = earlier_state(plan, part, fingerprint, restart, f"merge into {target}")
            before = check_target_at(folder, target, overwrite, begun)
            if not state:
                _abort_all(folder, part)
                part.clear()
            try:
                make_folder(part.model, part.folder)
                sync_directory(part.path, part.folder)
            except OSError as error:
                raise RunError(
                    f"{part.model}: cannot be made ({error.strerror}). Choose another --work-dir."
                ) from None
            start = None if nodes is None else begin_nodes(nodes, target, part, fingerprint, state)
            try:
                run, settled, uploads, completed = _make(
                    plan,
                    target,
                    folder,
                    part,
                    fingerprint,
                    state,
                    begun,
                    watch,
                    caller,
                    factor_cache,
                    nodes,
                    start,
                )
            except (RunError, HubError):  # a server that failed is no wrong input
                raise
            except AlnicoError as error:
                part.check_still_there()
                # A file that the system could not open is not a wrong input, and a half published model must be finished.
                if not isinstance(error.__context__, OSError) and begun is None:
                    _abort_all(folder, part)
                    part.remove()
                raise
            version = publish_model(target, folder, part, settled.shards, uploads, completed, before, begun)
            if mark is not None:
                mark_published(mark, fingerprint, version)
            part.remove()
    except HubError as error:
        raise HubError(f"{error} {RESUMES}") from None
    except OSError as error:
        raise RunError(
            f"{error.filename or target.unfinished}: {error.strerror or error}. Make room or check the disk; the same command resumes "
            "the merge."
        ) from None
    return finished_merge(run, settled, str(target), begin, watch)


def _make(
    plan: Plan,
    target: RemoteTarget,
    folder: RemoteFolder,
    part: UploadDirectory,
    fingerprint: dict[str, Any],
    state: JournalState,
    begun: Publication | None,
    watch: Watcher | None,
    caller: Caller,
    factor_cache: Path | None,
    nodes: ClusterMerge | None,
    start: StartMerge | None,
) -> tuple[MergeRun | ClusterRun, Plan, dict[str, ShardUpload], dict[str, FileVersion]]:
    """Make and send all that an earlier run has not, and check it. Returns the run, the settled plan, the uploads, and the shards
    that are published already."""
    before = file_states(input_files(plan, target.single_file))
    checked = plan if state else check_relatedness(plan, caller)
    recorded = {record.tensor for record in state.records}
    known = read_uploads(state.uploads)
    whole = {s.name for s in plan.shards if all(t.name in recorded for t in s.header.tensors)}
    completed = {
        name: version
        for name, version in completed_shards(folder, known, plan.shards, begun).items()
        if name in whole
    }
    uploads = {n: u for n, u in usable_uploads(folder, known, plan.shards).items() if n in whole}
    abort_uploads(folder, {n: u for n, u in known.items() if n not in uploads and n not in completed})
    done = {*completed, *(name for name, upload in uploads.items() if upload.is_sent)}
    sent = {t.name for s in plan.shards if s.name in done for t in s.header.tensors}
    files = OutputFiles(part.model, plan.shards, part.folder, are_sent=True)
    kept = uploads | {name: known[name] for name in completed}
    state = JournalState(state.records, state.facts, state.norms, format_uploads(kept))

    def send(journal: Journal, finished: Collection[str]) -> ShardUploads:
        for shard in plan.shards:
            if shard.name in uploads and not all(t.name in finished for t in shard.header.tensors):
                abort_uploads(folder, {shard.name: uploads.pop(shard.name)})
        return ShardUploads(folder, plan.shards, files, journal, uploads, completed, finished)

    run = make_tensors(
        checked, part, files, fingerprint, state, watch, factor_cache, nodes, start, send, sent
    )
    settled = run.plan
    refuse_changed_inputs(settled, before, run.records)
    complete_output(settled, part, files, run.records, target.single_file)
    refuse_changed_inputs(settled, before, run.records)
    refuse_changed_at_urls(settled)
    files.finish()
    sync_directory(part.model, part.folder)
    return run, settled, uploads, completed


def _abort_all(folder: RemoteFolder, part: UploadDirectory) -> None:
    """Discard the uploads that a journal names."""
    abort_uploads(folder, read_uploads(upload_lines(part.journal)))
