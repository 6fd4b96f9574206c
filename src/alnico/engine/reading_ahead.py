"""Reads tensors of models at URLs before they are needed: several pieces at a time, within a budget.

A job whose bytes are read once lets go of each piece when all of it was read. A job that reads its tensors several times (it
measures them first, or works on whole matrices) has all of its pieces held until it is done, if they fit into the budget; a larger
one requests what it reads, each time that it reads it. Either way it is known in advance how many bytes are requested.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.remote.remote_weights import PIECE_BYTES, pieces_of, remote_models
from alnico.checkpoint.resident_model import ResidentModel
from alnico.checkpoint.source import Source
from alnico.plan.job import Job
from alnico.plan.remote_reads import RemoteReads, remote_reads

CONNECTIONS = 8
"""Pieces that are requested at the same time."""

POLL_SECONDS = 0.2

WAITING, LOADING, READY, DIRECT = "waiting", "loading", "ready", "direct"
"""States of a piece: to be requested; requested; in memory, or failed; requested in parts where it is read."""


@dataclass(eq=False)
class _RequestedPiece:
    """Bytes ``start`` to ``stop`` of a tensor. ``unread`` of them were not read yet."""

    entry: _JobPieces
    model: FileModel
    tensor: str
    start: int
    stop: int
    state: str = WAITING
    data: np.ndarray | None = None
    unread: int = 0
    error: BaseException | None = None

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(eq=False)
class _JobPieces:
    """The pieces of the tensors of a job, in the order in which they are requested. ``is_held``: until the job is done."""

    name: str
    is_held: bool
    byte_size: int
    pieces: list[_RequestedPiece] = field(default_factory=list)
    of_tensor: dict[tuple[Source, str], list[_RequestedPiece]] = field(default_factory=dict)
    has_room: bool = False
    is_done: bool = False


class ReadingAhead:
    """Threads that request pieces before they are read. Close it at the end.

    ``budget_bytes`` is the most memory of all pieces. ``check`` raises where the run must stop.
    """

    def __init__(self, budget_bytes: int, check: Callable[[], None]) -> None:
        self._budget = budget_bytes
        self._check = check
        self._changed = threading.Condition()
        self._used = 0
        self._jobs: dict[str, _JobPieces] = {}
        self._queue: list[_RequestedPiece] = []
        self._next = 0
        self._is_closed = False
        self._free: list[np.ndarray] = []
        self._here = threading.local()
        self._threads: list[threading.Thread] = []

    @contextmanager
    def over(self, jobs: Sequence[tuple[str, RemoteReads]]) -> Iterator[None]:
        """Read ahead for jobs in their order, while the block runs. Jobs that must request what they read are left out."""
        entries = [_cut(name, reads) for name, reads in jobs if self._fits(reads)]
        with self._changed:
            self._jobs = {entry.name: entry for entry in entries}
            self._queue = [piece for entry in entries for piece in entry.pieces]
            self._next = 0
            self._changed.notify_all()
        models = {piece.model for entry in entries for piece in entry.pieces}
        for model in models:
            assert model.remote is not None
            model.remote.ahead = self
        self._start()
        try:
            yield
        finally:
            for model in models:
                assert model.remote is not None
                model.remote.ahead = None
            for entry in entries:
                self.done(entry.name)
            with self._changed:
                self._jobs, self._queue, self._next = {}, [], 0

    def _fits(self, reads: RemoteReads) -> bool:
        return is_read_ahead(reads, self._budget)

    def _start(self) -> None:
        if self._threads or not self._queue:
            return
        # Daemon threads: at exit the interpreter would wait for them, and so for a slow server.
        self._threads = [
            threading.Thread(target=self._load_all, name="alnico-ahead", daemon=True)
            for _ in range(CONNECTIONS)
        ]
        for thread in self._threads:
            thread.start()

    @contextmanager
    def of(self, job: str) -> Iterator[None]:
        """What the thread reads in the block is for a job."""
        before = getattr(self._here, "job", None)
        self._here.job = job
        try:
            yield
        finally:
            self._here.job = before

    def done(self, job: str) -> None:
        """Let go of the pieces of a job."""
        with self._changed:
            entry = self._jobs.get(job)
            if entry is None or entry.is_done:
                return
            entry.is_done = True
            for piece in entry.pieces:
                self._drop(piece)
            if entry.is_held and entry.has_room:
                self._used -= entry.byte_size
            self._changed.notify_all()

    def read_into(self, model: Source, name: str, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` with bytes of a tensor for the job of this thread. Errors: those of the request."""
        entry = self._jobs.get(getattr(self._here, "job", ""))
        pieces = entry.of_tensor.get((model, name)) if entry is not None else None
        if pieces is None:
            return False
        position, end = offset, offset + len(buffer)
        while position < end:
            piece = pieces[position // PIECE_BYTES]
            stop = min(end, piece.stop)
            self._take(piece, position, buffer[position - offset : stop - offset])
            position = stop
        return True

    def _take(self, piece: _RequestedPiece, begin: int, buffer: memoryview) -> None:
        """Fill a buffer with bytes of a piece, from byte ``begin`` of the tensor on."""
        with self._changed:
            while True:
                if piece.error is not None:
                    raise piece.error
                if piece.state == READY:
                    data = piece.data
                    break
                if piece.state == DIRECT:
                    data = None
                    break
                if piece.state == WAITING and self._make_room(piece):
                    piece.state = LOADING
                    self._changed.release()
                    try:
                        self._load(piece)
                    finally:
                        self._changed.acquire()
                    continue
                if piece.state == WAITING and not piece.entry.is_held:
                    piece.state = DIRECT  # there is no room for all of it
                    continue
                self._changed.wait(POLL_SECONDS)
                self._check()
        if data is None:
            _request(piece, begin, buffer)
            return
        source = data[begin - piece.start : begin - piece.start + len(buffer)]
        np.frombuffer(buffer, np.uint8)[:] = source
        if piece.entry.is_held:
            return
        with self._changed:
            piece.unread -= len(buffer)
            if piece.unread <= 0:
                self._drop(piece)
                piece.state = DIRECT  # read again: requested again
                self._changed.notify_all()

    def _make_room(self, piece: _RequestedPiece) -> bool:
        """Take room for a piece, or for all pieces of a job that holds them. The caller has the lock."""
        entry = piece.entry
        if entry.is_held:
            if not entry.has_room and self._used + entry.byte_size <= self._budget:
                entry.has_room = True
                self._used += entry.byte_size
                self._trim()
            return entry.has_room
        if self._used + piece.size > self._budget:
            return False
        self._used += piece.size
        self._trim()
        return True

    def _trim(self) -> None:
        """Give memory of earlier pieces back where that of new ones needs it. The caller has the lock."""
        while self._free and self._used + len(self._free) * PIECE_BYTES > self._budget:
            self._free.pop()

    def _drop(self, piece: _RequestedPiece) -> None:
        """Forget the bytes of a piece. The caller has the lock."""
        if piece.data is None:
            return
        if piece.size == PIECE_BYTES:
            self._free.append(piece.data)
        piece.data = None
        if not piece.entry.is_held:
            self._used -= piece.size

    def _load_all(self) -> None:
        while (piece := self._following()) is not None:
            self._load(piece)

    def _following(self) -> _RequestedPiece | None:
        """Wait for the next piece that there is room for; None at the end."""
        with self._changed:
            while not self._is_closed:
                while self._next < len(self._queue):
                    piece = self._queue[self._next]
                    if not piece.entry.is_done and piece.state == WAITING:
                        break
                    self._next += 1
                if self._next < len(self._queue) and self._make_room(piece):
                    self._next += 1
                    piece.state = LOADING
                    return piece
                self._changed.wait()
        return None

    def _load(self, piece: _RequestedPiece) -> None:
        """Request a piece that is marked as loading."""
        error: BaseException | None = None
        data = self._buffer(piece.size)
        try:
            _request(piece, piece.start, memoryview(data))
        except BaseException as caught:  # it is raised where the piece is read
            error = caught
        with self._changed:
            piece.data, piece.error, piece.state, piece.unread = data, error, READY, piece.size
            if piece.entry.is_done or error is not None:
                self._drop(piece)
            self._changed.notify_all()

    def _buffer(self, size: int) -> np.ndarray:
        """Memory for a piece: that of an earlier one if it is as large, as fresh pages are slow."""
        if size == PIECE_BYTES:
            with self._changed:
                if self._free:
                    return self._free.pop()
        return np.empty(size, np.uint8)

    def close(self) -> None:
        """End the threads; one that waits for a server is left to itself."""
        with self._changed:
            self._is_closed = True
            self._free.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(POLL_SECONDS)


def _request(piece: _RequestedPiece, begin: int, buffer: memoryview) -> None:
    remote, file, tensor = piece.model.request(piece.tensor)
    if (begin, len(buffer)) == (piece.start, piece.size):
        remote.piece(file, tensor.begin + begin, buffer)
    else:
        remote.read_into(file, tensor, begin, buffer)


def _cut(name: str, reads: RemoteReads) -> _JobPieces:
    """Cut the tensors of a job into pieces, in the order in which blocks read them."""
    entry = _JobPieces(name, not reads.flows, reads.byte_size)
    for model, tensor in reads.tensors:
        size = model.tensors[tensor].byte_size
        entry.of_tensor[model, tensor] = [
            _RequestedPiece(entry, model, tensor, *span) for span in pieces_of(size)
        ]
    most = max(map(len, entry.of_tensor.values()), default=0)
    for place in range(most):
        entry.pieces += [pieces[place] for pieces in entry.of_tensor.values() if place < len(pieces)]
    return entry


def is_read_ahead(reads: RemoteReads, budget_bytes: int) -> bool:
    """Are the tensors of a job read before they are needed? Others are requested when they are read."""
    if not reads.tensors or reads.are_parts:
        return False
    return reads.flows or reads.byte_size <= budget_bytes


def reads_of(jobs: Iterable[Job], sources: Sequence[Source]) -> dict[str, RemoteReads]:
    """What each of some jobs reads of models at URLs, by the job's name; jobs that read nothing of them are left out.

    Models that stay in memory are left out, too: they are read once.
    """
    if any(isinstance(source, ResidentModel) for source in sources) or not remote_models(sources):
        return {}
    found = {job.name: remote_reads(job, sources) for job in jobs}
    return {name: reads for name, reads in found.items() if reads.tensors}


def in_one_pass(reads: RemoteReads) -> RemoteReads:
    """What a job reads of models at URLs to be measured once. What it computes from tensors it requests when it is read."""
    return dataclasses.replace(reads, is_single=True, are_parts=reads.are_parts or not reads.is_plain)
