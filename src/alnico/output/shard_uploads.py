"""Sends finished shards of an output to a URL, in parts, while others are made."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from alnico.checkpoint.remote.folder import FileVersion, RemoteFolder
from alnico.checkpoint.remote.multipart import MAX_PARTS
from alnico.checkpoint.shards import OutputShard
from alnico.checkpoint.writer import OutputFiles
from alnico.errors import AlnicoError
from alnico.output.journal import Journal
from alnico.output.remote_target import CONNECTIONS
from alnico.threads import Crew

PART_BYTES = 8 << 20
"""Bytes of a part; a multiple of it in files that would have more than the most parts."""

UPLOAD_BYTES = 2 * CONNECTIONS * PART_BYTES
"""Memory that sending takes: a part in each connection, and what the network's library keeps of it."""

SHARDS_ON_DISK = 3
"""Shards that are on the disk at a time: one that is made, and those that wait to be sent."""

POLL_SECONDS = 0.2
LEAVE_SECONDS = 2.0
"""How long an interrupted run waits for requests to end."""


@dataclass
class ShardUpload:
    """The upload of one shard: its id on the server, the size of its parts, the tags of those that were sent, and whether all
    were."""

    id: str
    part_bytes: int
    tags: dict[int, str] = field(default_factory=dict)
    is_sent: bool = False


def read_uploads(lines: Sequence[Mapping[str, Any]]) -> dict[str, ShardUpload]:
    """Return the uploads that lines of a journal are about, by shard."""
    uploads: dict[str, ShardUpload] = {}
    for line in lines:
        shard, upload = str(line["shard"]), str(line["id"])
        if "part_bytes" in line:
            uploads[shard] = ShardUpload(upload, int(line["part_bytes"]))
        elif shard in uploads and uploads[shard].id == upload:
            if "part" in line:
                uploads[shard].tags[int(line["part"])] = str(line["tag"])
            uploads[shard].is_sent |= bool(line.get("sent"))
    return uploads


def format_uploads(uploads: Mapping[str, ShardUpload]) -> list[dict[str, Any]]:
    """Return the lines of a journal about uploads."""
    lines: list[dict[str, Any]] = []
    for shard, upload in uploads.items():
        lines.append(_begun(shard, upload))
        lines += [_part(shard, upload, number) for number in sorted(upload.tags)]
        lines += [_sent(shard, upload)] if upload.is_sent else []
    return [{"upload": True, **line} for line in lines]


def _begun(shard: str, upload: ShardUpload) -> dict[str, Any]:
    return {"shard": shard, "id": upload.id, "part_bytes": upload.part_bytes}


def _part(shard: str, upload: ShardUpload, number: int) -> dict[str, Any]:
    return {"shard": shard, "id": upload.id, "part": number, "tag": upload.tags[number]}


def _sent(shard: str, upload: ShardUpload) -> dict[str, Any]:
    return {"shard": shard, "id": upload.id, "sent": True}


def parts_of(byte_size: int, part_bytes: int) -> int:
    return max(-(-byte_size // part_bytes), 1)


def part_sizes(byte_size: int, part_bytes: int) -> dict[int, int]:
    """Return the sizes of a file's parts, by their numbers."""
    count = parts_of(byte_size, part_bytes)
    return {n: min(part_bytes, byte_size - (n - 1) * part_bytes) for n in range(1, count + 1)}


def part_bytes_of(shard: OutputShard) -> int:
    """Return the size of a shard's parts."""
    return PART_BYTES * max(-(-shard.byte_size // (PART_BYTES * MAX_PARTS)), 1)


class ShardUploads:
    """The uploads of one merge: background threads send each shard when all its tensors are finished.

    ``uploads`` are those of an earlier run that the server still has; ``completed`` are the files that an earlier run has
    published. ``finished`` are the tensors that need not be made. A shard's bytes on the disk are given back when all its parts
    are on the server and in the journal. Errors of the threads are kept in ``failure``.
    """

    def __init__(
        self,
        folder: RemoteFolder,
        shards: Sequence[OutputShard],
        files: OutputFiles,
        journal: Journal,
        uploads: dict[str, ShardUpload],
        completed: Mapping[str, FileVersion],
        finished: Collection[str],
    ) -> None:
        self.folder = folder
        self.uploads = uploads
        self.failure: BaseException | None = None
        self._shards = {shard.name: shard for shard in shards}
        self._files = files
        self._journal = journal
        self._report: Callable[[int], None] | None = None
        self._changed = threading.Condition()
        self._stop = False
        self._missing = {s.name: {t.name for t in s.header.tensors} - set(finished) for s in shards}
        self._shard_of = {t.name: s.name for s in shards for t in s.header.tensors}
        self._tasks: deque[tuple[str, int]] = deque()
        self._unsent: dict[str, set[int]] = {}
        """Shards that are finished and not sent, with the numbers of their parts that are not sent; none before the upload begins."""
        self._is_done = {name for name in self._shards if name in completed}
        self._is_done |= {name for name, upload in uploads.items() if upload.is_sent}
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin the upload of the first shard, which tells whether the folder can be written, and the threads. Errors: HubError."""
        for name in self._is_done:
            with suppress(OSError):
                self._files.free(name)
        left = [name for name in self._shards if name not in self._is_done]
        if left and left[0] not in self.uploads:
            self._begin(left[0])
        for name in left:
            if not self._missing[name]:
                self._enqueue(name)
        for number in range(CONNECTIONS):
            thread = threading.Thread(target=self._work, name=f"alnico-upload-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def finished(self, tensor: str) -> None:
        """Take note that all bytes of a tensor are written. Safe for threads."""
        with self._changed:
            shard = self._shard_of[tensor]
            self._missing[shard].discard(tensor)
            if self._missing[shard] or shard in self._unsent or shard in self._is_done:
                return
        self._enqueue(shard)

    def begin(self, shards: Sequence[str]) -> dict[str, ShardUpload]:
        """Begin the uploads of shards that other processes send, and return them. Errors: HubError."""
        names = [name for name in shards if name not in self.uploads]
        with Crew(min(CONNECTIONS, max(len(names), 1))) as crew:
            crew.run([(self._begin, (name,)) for name in names])
        return {name: self.uploads[name] for name in shards}

    def sent(self, shard: str, tags: Mapping[int, str]) -> None:
        """Take note that another process has sent all parts of a shard, before its tensors are finished here."""
        upload = self.uploads[shard]
        with self._changed:
            upload.tags, upload.is_sent = dict(tags), True
            self._is_done.add(shard)
        for number in sorted(tags):
            self._journal.uploaded(_part(shard, upload, number))
        self._journal.uploaded(_sent(shard, upload))

    def groups(self) -> Iterator[list[str]]:
        """The tensors of one shard after the other; each is given when the disk has room for it. Errors: those of the threads."""
        for shard in self._shards.values():
            self._wait_for(lambda: len(self._unsent) < SHARDS_ON_DISK)
            yield [tensor.name for tensor in shard.header.tensors]

    def unsent(self) -> tuple[int, int]:
        """The finished shards that are not sent yet, and the bytes that are left of them."""
        with self._changed:
            sizes = [sum(self._size(shard, n) for n in parts) for shard, parts in self._unsent.items()]
        return sum(size > 0 for size in sizes), sum(sizes)

    def wait(self, report: Callable[[int], None] | None = None) -> None:
        """Wait until all shards are sent; ``report`` gets the bytes of each part. Errors: those of the threads."""
        self._report = report
        self._wait_for(lambda: not self._unsent)
        self._report = None

    def stop(self, seconds: float | None = None) -> bool:
        """Let the threads end. Returns whether they have, within ``seconds``: a request may take long."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        end = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if end is None else max(end - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)

    def _wait_for(self, is_true: Callable[[], bool]) -> None:
        with self._changed:
            while True:
                if (failure := self.failure or self._journal.failure) is not None:
                    raise failure
                if is_true():
                    return
                self._changed.wait(POLL_SECONDS)

    def _enqueue(self, shard: str) -> None:
        upload = self.uploads.get(shard)
        whole = self._shards[shard]
        part_bytes = upload.part_bytes if upload is not None else part_bytes_of(whole)
        numbers = range(1, parts_of(whole.byte_size, part_bytes) + 1)
        with self._changed:
            left = [n for n in numbers if upload is None or n not in upload.tags]
            self._unsent[shard] = set(left) or {0}
            # Part 0 begins the upload, or finds that all parts were sent.
            self._tasks.extend([(shard, 0)] if upload is None or not left else [(shard, n) for n in left])
            self._changed.notify_all()

    def _begin(self, shard: str) -> None:
        """Begin an upload. Parts of one that no journal knows would stay on the server, so this waits for the journal."""
        upload = ShardUpload(self.folder.start_upload(shard), part_bytes_of(self._shards[shard]))
        is_written = threading.Event()
        self._journal.uploaded(_begun(shard, upload), then=is_written.set)
        while not is_written.wait(POLL_SECONDS):
            if self._stop or self._journal.failure is not None:
                break
        self.uploads[shard] = upload

    def _work(self) -> None:
        buffer = bytearray()
        while True:
            with self._changed:
                while not self._tasks and not self._stop and self.failure is None:
                    self._changed.wait()
                if self._stop or self.failure is not None:
                    return
                shard, number = self._tasks.popleft()
            try:
                if number == 0:
                    self._begin_or_end(shard)
                else:
                    size = self._size(shard, number)
                    if len(buffer) < size:
                        buffer = bytearray(size)
                    self._send(shard, number, memoryview(buffer)[:size])
            except BaseException as error:  # nobody waits for this thread: the next worker raises it
                with self._changed:
                    self.failure = self.failure or error
                    self._changed.notify_all()
                return

    def _begin_or_end(self, shard: str) -> None:
        if shard in self.uploads:
            return self._end(shard)
        self._begin(shard)
        with self._changed:
            self._tasks.extend((shard, number) for number in sorted(self._unsent[shard]))
            self._changed.notify_all()

    def _send(self, shard: str, number: int, data: memoryview) -> None:
        upload = self.uploads[shard]
        self._files.read_file(shard, (number - 1) * upload.part_bytes, data)
        tag = self.folder.upload_part(shard, upload.id, number, data)
        with self._changed:
            if self._stop:
                return
            upload.tags[number] = tag
            left = self._unsent[shard] = self._unsent[shard] - {number}
            # Under the lock: the line that a shard is sent comes after those of all its parts.
            self._journal.uploaded(_part(shard, upload, number))
            if self._report is not None:
                self._report(len(data))
        if not left:
            self._end(shard)

    def _end(self, shard: str) -> None:
        upload = self.uploads[shard]
        with self._changed:
            upload.is_sent = True
            self._is_done.add(shard)
        self._journal.uploaded(_sent(shard, upload), then=lambda: self._free(shard))

    def _free(self, shard: str) -> None:
        """Give back the disk's room, once the journal says that all parts are on the server."""
        with self._changed:
            if not self._stop:
                with suppress(OSError):
                    self._files.free(shard)
            self._unsent.pop(shard, None)
            self._changed.notify_all()

    def _size(self, shard: str, number: int) -> int:
        upload = self.uploads.get(shard)
        size = upload.part_bytes if upload is not None else part_bytes_of(self._shards[shard])
        return max(min(size, self._shards[shard].byte_size - (number - 1) * size), 0) if number else 0


def send_shard(
    folder: RemoteFolder, shard: OutputShard, files: OutputFiles, upload: ShardUpload
) -> dict[int, str]:
    """Send a finished shard as an upload that was begun, several parts at a time. Returns the tags of the parts. Errors: HubError."""
    tags: dict[int, str] = {}

    def send(number: int, size: int) -> None:
        data = memoryview(bytearray(size))
        files.read_file(shard.name, (number - 1) * upload.part_bytes, data)
        tags[number] = folder.upload_part(shard.name, upload.id, number, data)

    sizes = part_sizes(shard.byte_size, upload.part_bytes)
    with Crew(min(CONNECTIONS, len(sizes))) as crew:
        crew.run([(send, part) for part in sizes.items()])
    return tags


def usable_uploads(
    folder: RemoteFolder, uploads: Mapping[str, ShardUpload], shards: Sequence[OutputShard]
) -> dict[str, ShardUpload]:
    """Return the uploads that the server still has, with those of their parts that arrived as they were sent. Errors: HubError."""
    found: dict[str, ShardUpload] = {}
    for shard in shards:
        upload = uploads.get(shard.name)
        if upload is None or upload.part_bytes < 1:
            continue
        there = folder.uploaded_parts(shard.name, upload.id)
        if there is None:
            continue
        sizes = part_sizes(shard.byte_size, upload.part_bytes)
        tags = {n: t for n, t in upload.tags.items() if n in sizes and there.get(n) == (sizes[n], t)}
        is_sent = upload.is_sent and len(tags) == len(sizes)
        found[shard.name] = ShardUpload(upload.id, upload.part_bytes, tags, is_sent)
    return found


def abort_uploads(folder: RemoteFolder, uploads: Mapping[str, ShardUpload]) -> None:
    """Discard uploads, as far as the server answers: its rules for unfinished uploads remove the others."""
    for shard, upload in uploads.items():
        try:
            folder.abort_upload(shard, upload.id)
        except AlnicoError:
            return
