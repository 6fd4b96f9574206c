"""Refuses targets that cannot take an output, and disks without room, before anything is done."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from alnico.checkpoint.output_path import Replace, check_inputs, check_place, existing_folder, is_single_file
from alnico.checkpoint.quota import quota_left
from alnico.checkpoint.remote.fsspec_folder import FsspecFolder
from alnico.checkpoint.sidecars import side_files
from alnico.checkpoint.source import Source
from alnico.errors import OutputError, ResourceError
from alnico.numerics.sizes import count_of, format_size
from alnico.output.publish_remote import UploadDirectory, check_target_at, read_publication
from alnico.output.recipe_file import format_recipe
from alnico.output.remote_target import RemoteTarget, check_inputs_elsewhere, opened_target
from alnico.output.shard_uploads import SHARDS_ON_DISK
from alnico.output.staging import PartDirectory
from alnico.plan.job import Plan

DISK_MARGIN_BYTES = 16 << 20
FILES = 64
"""Files and folders that a run makes in addition to the output: the journal, locks, files under temporary
names."""


def check_target(out: Path, plan: Plan, overwrite: Replace) -> None:
    """Refuse a target that cannot be an output, that is not empty, or that holds an input of the plan.
    Errors: OutputError."""
    check_output_place(out, needed_paths(plan), overwrite)


def check_output_place(out: Path, needed_paths: Sequence[Path], overwrite: Replace) -> None:
    """Refuse a place that cannot be an output, or that has unfinished work of another user next to it.
    Errors: OutputError."""
    check_place(out, needed_paths, overwrite)
    PartDirectory(out).check()


def needed_paths(plan: Plan) -> list[Path]:
    """List the paths that must stay until the output is complete: models, adapters, statistics, the recipe,
    analyses that it names."""
    paths = needed_files(plan.sources)
    paths += [Path(plan.recipe.folder) / Path(plan.recipe.name).name]
    for weighing in plan.norm_weight_groups:
        if weighing.setting.origin == "analysis" and weighing.setting.path:
            paths += [Path(weighing.setting.path), Path(plan.recipe.folder) / weighing.setting.path]
    return paths


def needed_files(sources: Sequence[Source]) -> list[Path]:
    """List the folders of models and all their files, side files included."""
    paths = [path for source in sources for path in source.paths()]
    for folder in {source.directory for source in sources if source.directory is not None}:
        paths += [folder, folder / "config.json", *(folder / path for path in side_files(folder)[0])]
    return paths


def check_disk(plan: Plan, out: Path) -> None:
    """Refuse an output that does not fit its disk; the files of an interrupted merge count as part of it.
    Errors: ResourceError."""
    sizes = _sizes_beside(plan, out)
    check_space(
        out,
        plan.bytes_to_write + sum(sizes) - PartDirectory(out).used_bytes(),
        max([shard.byte_size for shard in plan.shards] + sizes),
        len(plan.shards) + len(sizes) + FILES,
    )


def check_disk_at(plan: Plan, unfinished: Path, held: int = 0, shards: int = SHARDS_ON_DISK) -> None:
    """Refuse a disk without room for what a merge into a URL keeps on this machine: the ``shards`` that are made and sent at a
    time, and the other files. ``unfinished`` is the folder for it, with ``held`` bytes of an interrupted merge.

    Errors: ResourceError.
    """
    count = min(len(plan.shards), shards)
    check_free(
        existing_folder(unfinished),
        bytes_on_disk_at(plan, unfinished, shards) - held + DISK_MARGIN_BYTES,
        f"the unfinished output ({count_of(count, 'shard')} at a time) needs"
        if count
        else "the journal and small files need",
        "choose another --work-dir, or a smaller --max-shard-size"
        if count
        else "or choose another --work-dir",
    )


def shards_on_disk(on_nodes: bool) -> int:
    """Return how many shards of an output at a URL are on the disk of this machine at a time."""
    return 0 if on_nodes else SHARDS_ON_DISK


def bytes_on_disk_at(plan: Plan, unfinished: Path, shards: int = SHARDS_ON_DISK) -> int:
    """Return the bytes that a merge into a URL keeps on this machine at a time."""
    sizes = sorted((shard.byte_size for shard in plan.shards), reverse=True)
    return sum(sizes[:shards]) + sum(_sizes_beside(plan, unfinished))


def bytes_on_disk(plan: Plan, out: Path) -> int:
    """Return the bytes of weights, side files and journal. The card and the rounding of small files to blocks
    are covered by the margin."""
    return plan.bytes_to_write + sum(_sizes_beside(plan, out))


def count_files(plan: Plan, out: Path) -> int:
    """Return the number of files and folders that a merge makes."""
    return len(plan.shards) + len(_sizes_beside(plan, out)) + FILES


def largest_file(plan: Plan, out: Path) -> int:
    """Return the size of the largest file that a merge writes."""
    return max([shard.byte_size for shard in plan.shards] + _sizes_beside(plan, out))


def _sizes_beside(plan: Plan, out: Path) -> list[int]:
    """List the sizes of the files other than weights: side files, config, recipe, index, lock, and the
    journal, which grows like the lock."""
    entries = sum(len(job.name) + 200 + sum(len(i.name) + 100 for i in job.read) for job in plan.jobs)
    if is_single_file(out):
        return [entries]
    entries += 1_000 + 200 * (len(plan.shards) + sum(len(source.paths()) for source in plan.sources))
    entries += sum(len(dropped.name) + len(dropped.why) + 100 for dropped in plan.dropped)
    sizes = [entries, entries, len(format_recipe(plan.recipe).encode("utf-8", "replace"))]
    sizes += [sum(len(job.name) + 60 for job in plan.jobs)] if len(plan.shards) > 1 else []
    sizes += [len(data) for data in plan.files.values()]
    donor = plan.sources[plan.donor]
    sizes += list(donor.absent((), True).values())
    if donor.directory is not None:
        left = plan.left | set(plan.files)
        paths = [
            donor.directory / path for path in side_files(donor.directory)[0] if path.as_posix() not in left
        ]
        with suppress(OSError):
            sizes += [
                path.stat().st_size for path in (*paths, donor.directory / "config.json") if path.exists()
            ]
    return sizes


def check_space(out: Path, byte_size: int, largest: int = 0, files: int = FILES, of_all: str = "") -> None:
    """Refuse a place whose disk or quota has too few free bytes (with a margin) or inodes, and a file that is
    larger than this process may write. Errors: ResourceError."""
    folder = existing_folder(out)
    what = f"the {of_all} need" if of_all else "the output needs"
    check_free(folder, byte_size + DISK_MARGIN_BYTES, what, "choose another disk, or a smaller dtype")
    with suppress(OSError, AttributeError):
        status = os.statvfs(folder)
        if status.f_files and status.f_favail < files:  # some file systems do not count them
            raise ResourceError(
                f"{folder}: {what} {files} inodes, {status.f_favail} are free. Remove files, or choose another disk."
            )
    most = _largest_allowed()
    if most is not None and largest > most:
        raise ResourceError(
            f"{out}: a file of the output has {format_size(largest)}, this process may write {format_size(most)} into one (ulimit -f). "
            "Raise the limit, or choose a smaller --max-shard-size."
        )


def check_free(folder: Path, byte_size: int, what: str, instead: str) -> None:
    """Refuse a disk or a quota with fewer free bytes. Errors: ResourceError."""
    free, of_quota = shutil.disk_usage(folder).free, quota_left(folder)
    left, reason = (
        (free, "are free") if of_quota is None or free <= of_quota else (of_quota, "are left of the quota")
    )
    if byte_size > left:
        raise ResourceError(
            f"{folder}: {what} {format_size(byte_size)}, {format_size(left)} {reason}. Make room, {instead}."
        )


def _largest_allowed() -> int | None:
    """Bytes that this process may write into one file; None without a limit."""
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    except (ImportError, OSError, ValueError):  # not on this system
        return None
    return None if soft == resource.RLIM_INFINITY else soft


def check_place_at(plan: Plan, target: RemoteTarget, overwrite: Replace, *, on_nodes: bool = False) -> None:
    """Refuse a target at a URL that is not free and may not be replaced, or for which this machine has no room. ``on_nodes``: nodes
    make and send the shards, each on its own disk.

    Errors: OutputError, ResourceError, HubError.
    """
    check_inputs_at(plan, target)
    part = UploadDirectory(target)
    part.check()
    with opened_target(target) as folder:
        check_target_at(folder, target, overwrite, read_publication(part))
        if isinstance(folder, FsspecFolder) and on_nodes:
            raise OutputError(
                f"{target}: such a URL takes each file whole, from one machine, and nodes of a cluster send parts; expected s3:// or a folder "
                "that all nodes see. Choose another output, or leave out --ray."
            )
        if isinstance(folder, FsspecFolder):
            check_free(
                Path(tempfile.gettempdir()),
                sum(shard.byte_size for shard in plan.shards) + DISK_MARGIN_BYTES,
                "the finished shards, which such a URL takes whole, need",
                "or set TMPDIR to another disk",
            )
    check_disk_at(plan, target.unfinished, part.used_bytes(), shards_on_disk(on_nodes))


def check_inputs_at(plan: Plan, target: RemoteTarget) -> None:
    """Refuse inputs in the target, or in the folder of its unfinished work. Errors: OutputError."""
    check_inputs_elsewhere(target, [*plan.recipe.references, *(source.label for source in plan.sources)])
    check_inputs(target.unfinished, needed_paths(plan))
