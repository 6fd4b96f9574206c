"""Says which tensors of models at URLs a job reads, and whether it reads them once or several times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.remote.remote_weights import remote_models, remote_tensors
from alnico.checkpoint.renamed_model import RenamedModel
from alnico.checkpoint.source import Source
from alnico.checkpoint.untied_model import UntiedModel
from alnico.plan.job import Job


@dataclass(frozen=True)
class RemoteReads:
    """The tensors of models at URLs that a job reads, each once: ``byte_size`` in total.

    ``is_plain``: each is one input or a part of one, as it is stored, and no byte is in two inputs. ``is_single``: the job reads
    its inputs once. ``are_parts``: some of these tensors are much larger than what the job reads of them.
    """

    tensors: tuple[tuple[FileModel, str], ...] = ()
    byte_size: int = 0
    is_plain: bool = True
    is_single: bool = True
    are_parts: bool = False

    @property
    def flows(self) -> bool:
        """Can the job drop each byte as soon as it has read it?"""
        return self.is_plain and self.is_single


NOTHING = RemoteReads()


def remote_reads(job: Job, sources: Sequence[Source]) -> RemoteReads:
    """Return what a job reads of models at URLs."""
    found: dict[tuple[FileModel, str], None] = {}
    is_plain, are_parts, count = True, False, 0
    for tensor in job.read:
        source = sources[tensor.model]
        if tensor.is_difference:
            continue
        here = [(m, n) for m, n in remote_tensors(source, [tensor.name]) if isinstance(m, FileModel)]
        if not here:
            continue
        stored = sum(model.tensors[name].byte_size for model, name in here)
        is_as_stored = _is_plain(source) and stored == tensor.byte_size
        is_plain = is_plain and is_as_stored
        are_parts = are_parts or (_is_plain(source) and stored > tensor.byte_size)
        count += len(here)
        found |= dict.fromkeys(here)
    if not found:
        return NOTHING
    size = sum(model.tensors[name].byte_size for model, name in found)
    return RemoteReads(tuple(found), size, is_plain and count == len(found), _reads_once(job), are_parts)


def _is_plain(source: Source) -> bool:
    """Does a source read the bytes of its tensors out of files as they are?"""
    while isinstance(source, (RenamedModel, UntiedModel)):
        if isinstance(source, RenamedModel) and source.is_turned:
            return False
        source = source.wrapped
    return isinstance(source, FileModel)


def _reads_once(job: Job) -> bool:
    if job.kind in ("copy", "equal"):
        return True
    if job.kind != "mix" or job.merge is None:
        return job.kind == "mix"
    return not any(job.merge.levels()) and not job.merge.uses_ranks


def largest_held(jobs: Iterable[Job], sources: Sequence[Source]) -> tuple[int, int, int]:
    """Return, in bytes of models at URLs: all that jobs read, the most that one matrix reads, and the most that a job reads that
    cannot drop what it has read."""
    total = matrix = held = 0
    if not remote_models(sources):
        return 0, 0, 0
    for job in jobs:
        reads = remote_reads(job, sources)
        total += reads.byte_size
        if job.kind == "matrix":
            matrix = max(matrix, reads.byte_size)
        if not reads.flows and not reads.are_parts:
            held = max(held, reads.byte_size)
    return total, matrix, held
