"""Has the system read what a merge reads next from the disk, file by file in long runs, while threads compute.

What was read is in the system's page cache, not in the merge's memory: a tensor that is measured first is found there when it is
merged. Where the system or the disk knows no such requests, everything is read when it is needed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.page_cache import cache_bytes
from alnico.checkpoint.renamed_model import RenamedModel
from alnico.checkpoint.source import Source, unwrap
from alnico.checkpoint.untied_model import UntiedModel
from alnico.errors import AlnicoError
from alnico.plan.job import Input, Job

RUN_BYTES = 8 << 20
"""Bytes of one file that are asked for in a row, before those of the next file."""

MOST_BYTES = 512 << 20
"""The most bytes that are asked for before they are used."""

WRITING_BYTES = 64 << 20
"""The bytes of outputs that the disk may still be writing."""

NEGLIGIBLE_SHARE = 1 / 16
"""The share of a model that is read when it is needed, if the rest is in the page cache."""

Read = tuple[Path, int, int, FileModel, str]
"""A file, the first byte of it and the one after the last, and the model and the tensor that they belong to."""


class DiskAhead:
    """A thread that asks for the bytes of local models in the order of the jobs that read them. Close it at the end.

    Models that are in the page cache already are left out. It waits while so many bytes were asked for and not read yet. Where the page cache cannot hold all ``byte_size`` bytes that the
    merge reads and writes, it lets go of the inputs and, by ``forget``, of the outputs of jobs that are done, so that they do not push
    out what is still needed; otherwise they stay for whoever reads them next.
    """

    def __init__(
        self, sources: Sequence[Source], byte_size: int, forget: Callable[[str], None] = lambda _: None
    ) -> None:
        self._sources = sources
        found = [unwrap(source) for source in sources]
        self._models = [m for m in found if isinstance(m, FileModel) and not m.is_read_by_ranges]
        cache = cache_bytes() if self._models else byte_size
        self._most = min(MOST_BYTES, cache // 4)
        self._forgets = byte_size > cache
        self._forget = forget
        self._changed = threading.Condition()
        self._queue: Iterator[list[Read]] | None = None
        self._ahead = 0
        self._unread: dict[tuple[FileModel, str], int] = {}
        """Bytes of each tensor that were asked for and not read; below 0 for those that were read before."""
        self._used: list[Read] = []
        """What the jobs that are done have read."""
        self._written: deque[Job] = deque()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @contextmanager
    def over(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Ask for what jobs read, in their order, while the block runs."""
        models = [model for model in self._models if not _is_cached(model)] if jobs else []
        with self._changed:
            self._queue = _in_runs(jobs, self._sources, models)
            self._unread, self._ahead = {}, 0
            self._changed.notify()
        for model in models:
            model.disk_reads = self
        if jobs and (models or self._forgets) and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="alnico-disk", daemon=True)
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
        if self._queue is None:
            return
        with self._changed:
            was_full = self._ahead >= self._most
            self._count(model, name, -size)
            if was_full and self._ahead < self._most:
                self._changed.notify()

    def done(self, *jobs: Job) -> None:
        """Take note that jobs are done: nothing of them is read again. Safe for threads."""
        if self._forgets:
            with self._changed:
                for job in jobs:
                    self._used += _reads(job, self._sources)
                self._written += jobs
                self._changed.notify()

    def _count(self, model: FileModel, name: str, size: int) -> None:
        """Add bytes of a tensor that are asked for, or subtract those that were read. The caller has the lock."""
        before = self._unread.get((model, name), 0)
        after = self._unread[model, name] = before + size
        self._ahead += max(after, 0) - max(before, 0)

    def _work(self) -> None:
        while (following := self._following()) is not None:
            used, written, reads = following
            with suppress(AlnicoError, OSError):  # it is raised where the tensor is read
                for model, path, begin, end in joined(used):
                    model.let_go(path, begin, end)
                for job in written:
                    self._forget(job.name)
                for model, path, begin, end in joined(reads):
                    model.ask_to_read(path, begin, end)

    def _following(self) -> tuple[list[Read], list[Job], list[Read]] | None:
        """Wait for what can be let go of, of inputs and of outputs, and for what may be asked for; None at the end."""
        with self._changed:
            while not self._is_closed:
                reads = None
                if self._queue is not None and self._ahead < self._most:
                    reads = next(self._queue, None)
                    if reads is None:
                        self._queue = None
                    for _, begin, end, model, name in reads or ():
                        self._count(model, name, end - begin)
                used, self._used = self._used, []
                written = self._no_longer_written()
                if reads or used or written:
                    return used, written, reads or []
                self._changed.wait()
        return None

    def _no_longer_written(self) -> list[Job]:
        """Jobs whose outputs should be on the disk by now: pages that are not stay."""
        found = []
        after = sum(job.byte_size for job in self._written)
        while self._written and (after := after - self._written[0].byte_size) >= WRITING_BYTES:
            found.append(self._written.popleft())
        return found

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()


def joined(reads: Iterable[Read]) -> Iterator[tuple[FileModel, Path, int, int]]:
    """Sort the bytes of each file, and join those that follow one another."""
    files: dict[Path, tuple[FileModel, list[tuple[int, int]]]] = {}
    for path, begin, end, model, _ in reads:
        files.setdefault(path, (model, []))[1].append((begin, end))
    for path, (model, spans) in files.items():
        spans.sort()
        begin, end = spans[0]
        for first, last in spans:
            if first > end:
                yield model, path, begin, end
                begin = first
            end = max(end, last)
        yield model, path, begin, end


def _is_cached(model: FileModel) -> bool:
    """Is so little of a model read from the disk that asking for it takes longer than it saves?"""
    with suppress(AlnicoError, OSError):  # it is raised where the model is read
        return model.missing_from_cache() <= NEGLIGIBLE_SHARE
    return False


def _in_runs(
    jobs: Sequence[Job], sources: Sequence[Source], models: Sequence[FileModel]
) -> Iterator[list[Read]]:
    """What jobs read of some models, in their order, cut and collected into runs of about :data:`RUN_BYTES` of each file."""
    reads: list[Read] = []
    size = 0
    for job in jobs:
        whole = [read for read in _reads(job, sources) if read[3] in models]
        longest = max((end - begin for _, begin, end, _, _ in whole), default=0)
        for offset in range(0, longest, RUN_BYTES):
            for path, begin, end, model, name in whole:
                first, last = begin + offset, min(begin + offset + RUN_BYTES, end)
                if first < last:
                    reads.append((path, first, last, model, name))
                    size += last - first
            if size >= RUN_BYTES * len(whole):
                yield reads
                reads, size = [], 0
    if reads:
        yield reads


def _reads(job: Job, sources: Sequence[Source]) -> Iterator[Read]:
    """All that a job reads of files on this machine as it is stored."""
    for tensor in job.read:
        source = sources[tensor.model]
        if isinstance(source, FileModel):
            names = [tensor.name]
        elif not tensor.is_difference:
            source, names = _stored(source, tensor)
        if isinstance(source, FileModel) and source.remote is None:
            for name in names:
                if (place := source.place_of(name)) is not None:
                    path, begin = place
                    yield path, begin, begin + source.tensors[name].byte_size, source, name


def _stored(source: Source, tensor: Input) -> tuple[Source, list[str]]:
    """Return the model in which a tensor is stored, and under which names; without names if only parts of them are read."""
    names = [tensor.name]
    while isinstance(source, (RenamedModel, UntiedModel)):
        if isinstance(source, RenamedModel):
            names = [n for name in names for n in source.stored_names(name)]
        else:
            names = [source.stored_name(name) for name in names]
        source = source.wrapped
    stored = source.tensors
    return source, names if sum(stored[name].byte_size for name in names) == tensor.byte_size else []
