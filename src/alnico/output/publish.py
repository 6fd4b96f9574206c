"""Checks and completes an output before it gets its name, and finishes interrupted publications."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from alnico.checkpoint.durable import sync_directory, sync_tree, write_file
from alnico.checkpoint.file_model import FileModel, describe_change, open_written
from alnico.checkpoint.lineage import CARD, LOCK
from alnico.checkpoint.remote.remote_weights import remote_models
from alnico.checkpoint.shards import indices_of
from alnico.checkpoint.sidecars import copy_side_files, side_files, write_config
from alnico.checkpoint.source import Shard
from alnico.checkpoint.writer import OutputFiles
from alnico.errors import (
    ModelError,
    VerificationError,
)
from alnico.folders import Folder, remove
from alnico.numerics.digest import PIECE, PieceHasher, TensorDigest
from alnico.output.card import format_card
from alnico.output.file_metadata import write_hashes
from alnico.output.journal import Record, read_journal
from alnico.output.lock import describe_files, format_lock
from alnico.output.publish_remote import UploadDirectory
from alnico.output.recipe_file import RECIPE, format_recipe
from alnico.output.staging import PartDirectory
from alnico.plan.job import Job, Plan


def finish_publishing(
    plan: Plan, out: Path, fingerprint: dict[str, Any], restart: bool
) -> dict[str, str] | None:
    """Finish a publication that a crash interrupted. Returns the digests of the output if it is that of this
    plan, else None."""
    unfinished = PartDirectory(out)
    if not unfinished.path.exists() and (os.path.lexists(out) or not os.path.lexists(unfinished.old)):
        return None
    with PartDirectory(out) as part:
        part.restore_old()
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


def input_files(plan: Plan, single: str | None) -> list[Path]:
    """List all files that an output is made from."""
    files = [path for source in plan.sources for path in source.paths()]
    donor = plan.sources[plan.donor].directory
    if single is None and donor is not None:
        files += [
            donor / "config.json",
            *(donor / p for p in side_files(donor)[0] if p.as_posix() not in plan.left),
        ]
    return files


def refuse_changed_inputs(
    plan: Plan, before: dict[Path, tuple[int, int]], records: dict[str, Record]
) -> None:
    """Refuse to publish a merge of files that changed while they were read. Errors: ModelError."""
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


def refuse_changed_at_urls(plan: Plan) -> None:
    """Refuse to publish a merge of files at URLs that changed since their headers were read. Errors: ModelError, HubError."""
    for model in remote_models(plan.sources):
        assert isinstance(model, FileModel)
        model.refuse_changed()


def is_tensor_intact(record: Record, job: Job, files: OutputFiles) -> bool:
    """Does the file hold the bytes of a finished tensor, by the hash in its record? Blocks of GGUF are not those that were hashed."""
    if not files.can_be_compared(job.name):
        return False
    digest = TensorDigest(job.dtype, job.shape, job.byte_size)
    buffer = memoryview(bytearray(min(PIECE, job.byte_size)))
    hasher = PieceHasher(digest, 0)
    for offset in range(0, job.byte_size, PIECE):
        part = buffer[: min(PIECE, job.byte_size - offset)]
        files.read_into(job.name, offset, part)
        hasher.update(part)
    hasher.finish()
    return digest.result() == record.digest


def complete_output(
    plan: Plan,
    part: PartDirectory | UploadDirectory,
    files: OutputFiles,
    records: dict[str, Record],
    single: str | None,
) -> None:
    """Compare the weights with the plan, write the other files next to them, and flush everything to the
    disk."""
    shards: list[Shard] = []
    for shard in plan.shards:
        written = open_written(files.path(shard.name), shard.start, shard.header, shard.prefix)
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
        if isinstance(part, PartDirectory):
            write_hashes(files.path(single), plan, records, part.folder)
        return
    _remove_others(part.model, {files.path(shard.name) for shard in plan.shards}, part.folder)
    donor = plan.sources[plan.donor]
    if donor.directory is not None:
        copy_side_files(donor.directory, part.model, plan.left | set(plan.files), part.folder)
        write_config(donor.directory, plan.config, plan.dtype, part.model, part.folder)
    for name, data in plan.files.items():
        write_file(part.model / name, data, part.folder)
    texts = {RECIPE: format_recipe(plan.recipe), CARD: format_card(plan)}
    texts |= indices_of(plan.shards)
    for name, text in texts.items():
        write_file(part.model / name, text, part.folder)
    unfinished = {files.path(shard.name).relative_to(part.model).as_posix() for shard in plan.shards}
    lock = format_lock(plan, records, describe_files(part.model, shards, unfinished))
    write_file(part.model / LOCK, lock, part.folder)
    sync_tree(part.model, part.folder)


def _remove_others(folder: Path, own: set[Path], inside: Folder) -> None:
    """Remove the files that an earlier run wrote next to its weights; this run writes them again."""
    for path in folder.iterdir():
        if path in own:
            continue
        if any(path in place.parents for place in own):
            _remove_others(path, own, inside)
        else:
            remove(path, inside)
