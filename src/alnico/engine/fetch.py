"""Downloads what a plan reads from the hub, before the first tensor is read."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from alnico.checkpoint.lora_model import repositories
from alnico.checkpoint.output_path import Replace, existing_folder, is_single_file
from alnico.checkpoint.source import Source
from alnico.events import Fetched, Fetching, Watcher
from alnico.output.disk_space import (
    DISK_MARGIN_BYTES,
    bytes_on_disk,
    bytes_on_disk_at,
    check_disk,
    check_free,
    check_place_at,
    check_target,
)
from alnico.output.remote_target import RemoteTarget
from alnico.plan.job import Plan


def absent_files(plan: Plan, *, side_files: bool) -> list[Mapping[str, int]]:
    """List, for each source, the files that must be downloaded for the plan, with their sizes."""
    read: list[dict[str, None]] = [{} for _ in plan.sources]
    for job in (*plan.jobs, *plan.to_measure):
        for tensor in job.read:
            read[tensor.model][tensor.name] = None
    return [source.absent(read[i], side_files and i == plan.donor) for i, source in enumerate(plan.sources)]


def fetch_inputs(
    plan: Plan,
    out: Path | RemoteTarget,
    *,
    overwrite: Replace,
    watch: Watcher | None,
    on_nodes: bool = False,
) -> None:
    """Download the files that the plan reads and the hub's cache lacks: weights, and the donor's side files.

    A target or a disk that would refuse the output is refused first; ``on_nodes`` as for
    :func:`alnico.output.disk_space.check_place_at`. Errors: OutputError, ResourceError,
    HubError.
    """
    is_single = out.single_file is not None if isinstance(out, RemoteTarget) else is_single_file(out)
    absent = absent_files(plan, side_files=not is_single)
    total = sum(sum(files.values()) for files in absent)
    if not any(absent):
        return
    if isinstance(out, RemoteTarget):
        check_place_at(plan, out, overwrite, on_nodes=on_nodes)
    else:
        check_target(out, plan, overwrite)
        check_disk(plan, out)
    folders = [repository.folder for source in plan.sources for repository in repositories(source)]
    if folders:
        _check_cache_disk(folders[0], total, plan, out)
    else:  # side files of a model at a URL
        temporary = Path(tempfile.gettempdir())
        check_free(
            temporary, total + DISK_MARGIN_BYTES, "the side files need", "or set TMPDIR to another disk"
        )
    fetch_files(plan.sources, absent, watch)


def fetch_files(
    sources: Sequence[Source], absent: Sequence[Mapping[str, int]], watch: Watcher | None
) -> None:
    """Download files of models, with their bytes, as :meth:`Source.absent` lists them. Errors: HubError."""
    if not any(absent):
        return
    lock = threading.Lock()

    def report(bytes_done: int) -> None:
        if watch:
            with lock:
                watch(Fetched(bytes_done))

    if watch:
        models = tuple(source.label for source, files in zip(sources, absent, strict=True) if files)
        watch(
            Fetching(
                models, sum(len(files) for files in absent), sum(sum(files.values()) for files in absent)
            )
        )
    for source, files in zip(sources, absent, strict=True):
        source.fetch(files, report)


def fetch_weights(plan: Plan) -> None:
    """Download the weights that the plan reads, for a result that goes to no disk. Errors: HubError."""
    for source, files in zip(plan.sources, absent_files(plan, side_files=False), strict=True):
        source.fetch(files)


def _check_cache_disk(cache: Path, total: int, plan: Plan, out: Path | RemoteTarget) -> None:
    """Downloads and output together, where both are on one disk."""
    is_remote = isinstance(out, RemoteTarget)
    place = out.unfinished if isinstance(out, RemoteTarget) else out
    disk, target = existing_folder(cache), existing_folder(place)
    shares = disk.stat().st_dev == target.stat().st_dev
    needed = (
        total
        + DISK_MARGIN_BYTES
        + ((bytes_on_disk_at if is_remote else bytes_on_disk)(plan, place) if shares else 0)
    )
    check_free(
        disk,
        needed,
        f"the downloads{' and the output' if shares else ''} need",
        "or set HF_HOME to another disk",
    )
