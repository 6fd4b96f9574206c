"""Has the system read what a merge reads next from the disk, file by file in long runs, while threads compute.

What was read is in the system's page cache, not in the merge's memory: a tensor that is measured first is found there when it is
merged. Where the system or the disk knows no such requests, everything is read when it is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.page_cache import cache_bytes
from alnico.checkpoint.renamed_model import RenamedModel
from alnico.checkpoint.source import Source, unwrap
from alnico.checkpoint.untied_model import UntiedModel
from alnico.errors import AlnicoError
from alnico.plan.job import Job

RUN_BYTES = 8 << 20
"""Bytes of one file that are asked for in a row, before those of the next file."""

MOST_BYTES = 512 << 20
"""The most bytes that are asked for before they are used."""

Read = tuple[Path, int, int, FileModel, str]
"""A file, the first byte of it and the one after the last, and the model and the tensor that they belong to."""


class DiskAhead:
    """A thread that asks for the bytes of local models in the order of the jobs that read them. Close it at the end.

    It waits while so many bytes were asked for and not read yet.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._most = min(MOST_BYTES, cache_bytes() // 4)
        self._changed = threading.Condition()
        self._queue: Iterator[list[Read]] | None = None
        models = dict.fromkeys(map(unwrap, sources))
        self._models = [m for m in models if isinstance(m, FileModel) and not m.is_read_by_ranges]
        self._ahead = 0
        self._unread: dict[tuple[FileModel, str], int] = {}
        """Bytes of each tensor that were asked for and not read; below 0 for those that were read before."""
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @contextmanager
    def over(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Ask for what jobs read, in their order, while the block runs."""
        models = self._models if jobs else []
        with self._changed:
            self._queue = _in_runs(jobs, self._sources)
            self._unread, self._ahead = {}, 0
            self._changed.notify()
        for model in models:
            model.disk_reads = self
        if models and self._thread is None:
            self._thread = threading.Thread(target=self._ask_all, name="alnico-disk", daemon=True)
            self._thread.start()
        try:
            yield
        finally:
            for model in models:
                model.disk_reads = None
            with self._changed:
                self._queue = None

    def was_read(self, model: FileModel, name: str, size: int) -> None:
        """Take note that bytes of a tensor were read. Safe for threads."""
        with self._changed:
            was_full = self._ahead >= self._most
            self._count(model, name, -size)
            if was_full and self._ahead < self._most:
                self._changed.notify()

    def _count(self, model: FileModel, name: str, size: int) -> None:
        """Add bytes of a tensor that are asked for, or subtract those that were read. The caller has the lock."""
        before = self._unread.get((model, name), 0)
        after = self._unread[model, name] = before + size
        self._ahead += max(after, 0) - max(before, 0)

    def _ask_all(self) -> None:
        while (reads := self._following()) is not None:
            try:
                for model, path, begin, end in joined(reads):
                    model.ask_to_read(path, begin, end)
            except (AlnicoError, OSError):
                pass  # it is raised where the tensor is read

    def _following(self) -> list[Read] | None:
        """Wait until more may be asked for; None at the end."""
        with self._changed:
            while not self._is_closed:
                if self._queue is not None and self._ahead < self._most:
                    reads = next(self._queue, None)
                    if reads is None:
                        self._queue = None
                        continue
                    for _, begin, end, model, name in reads:
                        self._count(model, name, end - begin)
                    return reads
                self._changed.wait()
        return None

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()


def joined(reads: Sequence[Read]) -> Iterator[tuple[FileModel, Path, int, int]]:
    """Sort bytes by file and place, and join those that follow one another."""
    waiting: tuple[FileModel, Path, int, int] | None = None
    for path, begin, end, model, _ in sorted(reads, key=lambda read: read[:3]):
        if waiting is not None and waiting[1] == path and waiting[3] >= begin:
            waiting = (model, path, waiting[2], max(end, waiting[3]))
            continue
        if waiting is not None:
            yield waiting
        waiting = (model, path, begin, end)
    if waiting is not None:
        yield waiting


def _in_runs(jobs: Sequence[Job], sources: Sequence[Source]) -> Iterator[list[Read]]:
    """What jobs read, in their order, cut and collected into runs of about :data:`RUN_BYTES` of each file."""
    reads: list[Read] = []
    size = 0
    for job in jobs:
        places = []
        for model, name in _stored(job, sources):
            if (place := model.place_of(name)) is not None:
                places.append((*place, model.tensors[name].byte_size, model, name))
        largest = max((place[2] for place in places), default=0)
        for first in range(0, largest, RUN_BYTES):
            for path, begin, length, model, name in places:
                if first < length:
                    stop = min(first + RUN_BYTES, length)
                    reads.append((path, begin + first, begin + stop, model, name))
                    size += stop - first
            if size >= RUN_BYTES * len(places):
                yield reads
                reads, size = [], 0
    if reads:
        yield reads


def _stored(job: Job, sources: Sequence[Source]) -> Iterator[tuple[FileModel, str]]:
    """The tensors of files on this machine that a job reads as they are stored."""
    for tensor in job.read:
        if tensor.is_difference:
            continue
        source, names = sources[tensor.model], [tensor.name]
        while isinstance(source, (RenamedModel, UntiedModel)):
            if isinstance(source, RenamedModel):
                names = [n for name in names for n in source.stored_names(name)]
            else:
                names = [source.stored_name(name) for name in names]
            source = source.wrapped
        if isinstance(source, FileModel) and not source.is_read_by_ranges:
            stored = sum(source.tensors[name].byte_size for name in names)
            if stored == tensor.byte_size:  # else it reads a part of them
                yield from ((source, name) for name in names)
