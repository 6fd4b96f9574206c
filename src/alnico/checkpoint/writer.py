"""Writes output files: full size first, blocks in any order from any thread, headers last.

Until the output is complete its files are called ``NAME.unfinished`` and begin with zeros, so that no program
can load them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from alnico.checkpoint.durable import sync_directory
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.files import read_fully, write_fully
from alnico.checkpoint.header import TensorInfo
from alnico.checkpoint.page_cache import let_go, start_writeback
from alnico.checkpoint.shards import OutputShard
from alnico.checkpoint.source import Source
from alnico.errors import RunError
from alnico.folders import Folder, make_folders, open_to_write, reach

UNFINISHED = ".unfinished"
NO_HEADER = bytes(8)
"""The length field of a missing header."""
WRITEBACK_BYTES = 4 << 20
"""Bytes of a file that are collected before the disk is asked to write them."""


class OutputFiles:
    """The open output files of one merge. ``write`` is safe for threads.

    ``inside`` is a folder that is held open and contains ``directory``. ``are_made``: another process made the files, so they are
    opened as they are, and none is made. ``are_sent``: they are read back to be sent to a URL.
    """

    def __init__(
        self,
        directory: Path,
        shards: Sequence[OutputShard],
        inside: Folder | None = None,
        *,
        are_made: bool = False,
        are_sent: bool = False,
    ) -> None:
        self._are_sent = are_sent
        self.directory = directory
        self._inside = inside
        self._shards = shards
        self._descriptors: dict[str, int] = {}
        # shard -> first byte, end, and bytes written between them
        self._waiting: dict[str, tuple[int, int, int]] = {}
        self._lock = threading.Lock()
        self._is_sealed = False
        self._paths = {shard.name: self.path(shard.name) for shard in shards}
        self._starts = {shard.name: shard.start for shard in shards}
        self._place: dict[str, tuple[str, TensorInfo]] = {
            t.name: (s.name, t) for s in shards for t in s.header.tensors
        }
        self._layouts = {name: layout for shard in shards for name, layout in shard.layouts.items()}
        try:
            if are_made:
                for shard in shards:
                    self._descriptors[shard.name] = _open_made(self.path(shard.name), inside)
                return
            for folder in {self.path(shard.name).parent for shard in shards} - {directory}:
                make_folders(folder, directory, inside)
            for shard in shards:
                self._reopen(shard.name)
                self._descriptors[shard.name] = _open_sized(self.path(shard.name), shard, inside)
            # The journal's lines about a file are useless if the file's name is lost in a power cut.
            for folder in {directory, *(self.path(shard.name).parent for shard in shards)}:
                sync_directory(folder, inside)
        except BaseException:
            self.close()
            raise

    def path(self, shard: str) -> Path:
        """Return the path of a shard while it is unfinished."""
        return self.directory / (shard + UNFINISHED)

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write ``data`` at byte ``offset`` of a tensor. Errors: RunError; NonFiniteError for what the file's type cannot hold."""
        shard, info = self._place[tensor]
        layout = self._layouts.get(tensor)
        for place, part in [(offset, data)] if layout is None else layout.stored(tensor, offset, data):
            write_fully(self._descriptors[shard], part, info.begin + place, self._paths[shard], tensor)
            self._start_writeback(shard, info.begin + place, len(part))

    def write_several(
        self, tensors: Sequence[str], parts: Sequence[memoryview], together: memoryview
    ) -> None:
        """Write whole tensors, whose bytes follow one another in ``together``. Neighbours in a file are written by one call.

        Errors: RunError.
        """
        if self._layouts:
            for tensor, part in zip(tensors, parts, strict=True):
                self.write(tensor, 0, part)
            return
        places = [self._place[tensor] for tensor in tensors]
        begin, done = 0, 0
        for i, part in enumerate(parts):
            done += len(part)
            shard, info = places[i]
            if i + 1 < len(parts) and places[i + 1][0] == shard and places[i + 1][1].begin == info.end:
                continue
            self.write(tensors[i], len(part) - (done - begin), together[begin:done])
            begin = done

    def place(self, tensor: str, offset: int, size: int, gpu: object = None) -> None:
        """Do nothing: a file has no memory to compute in."""

    def computed(self, tensor: str, offset: int, size: int) -> None:
        """Nothing is computed in place."""

    def copy(self, tensor: str, offset: int, size: int, source: Source, name: str) -> bool:
        """Copy ``size`` bytes of a source's tensor without reading them; returns False if impossible.

        Errors: RunError.
        """
        if not isinstance(source, FileModel) or tensor in self._layouts:
            return False
        shard, info = self._place[tensor]
        if not source.copy_to(name, offset, size, self._descriptors[shard], info.begin + offset):
            return False
        self._start_writeback(shard, info.begin + offset, size)
        return True

    def _start_writeback(self, shard: str, offset: int, size: int) -> None:
        """Ask the disk to start writing, for some megabytes at a time: each call takes time."""
        with self._lock:
            begin, end, waiting = self._waiting.get(shard, (offset, offset, 0))
            begin, end, waiting = min(begin, offset), max(end, offset + size), waiting + size
            self._waiting[shard] = (begin, end, waiting)
            if waiting < WRITEBACK_BYTES:
                return
            del self._waiting[shard]
        start_writeback(self._descriptors[shard], begin, end - begin)

    def let_go(self, tensor: str) -> None:
        """Tell the system that a tensor is not read back, unless it is sent."""
        if self._are_sent:
            return
        shard, info = self._place[tensor]
        let_go(self._descriptors[shard], info.begin, info.byte_size)

    def read_into(self, tensor: str, offset: int, buffer: memoryview) -> None:
        """Read back bytes of a tensor that were written. Errors: RunError."""
        shard, info = self._place[tensor]
        layout = self._layouts.get(tensor)
        for place, begin, end in (
            [(offset, 0, len(buffer))] if layout is None else layout.places(offset, len(buffer))
        ):
            read_fully(
                self._descriptors[shard], buffer[begin:end], info.begin + place, self._paths[shard], tensor
            )

    def can_be_compared(self, tensor: str) -> bool:
        """Can the bytes that were written be read back? Not where the file has blocks of another type."""
        return tensor not in self._layouts or not self._layouts[tensor].is_encoded

    def read_file(self, shard: str, offset: int, buffer: memoryview) -> None:
        """Read bytes of a file as it will be when it is complete, its header included. Errors: RunError."""
        start = self._starts[shard][offset : offset + len(buffer)]
        buffer[: len(start)] = start
        read_fully(self._descriptors[shard], buffer[len(start) :], offset + len(start), self._paths[shard])

    def free(self, shard: str) -> None:
        """Give the disk back what a file holds, which keeps its size. Errors: OSError."""
        descriptor = self._descriptors[shard]
        size = os.fstat(descriptor).st_size
        os.ftruncate(descriptor, 0)
        os.ftruncate(descriptor, size)

    def sync(self) -> None:
        """Wait until everything that was written is on disk. Errors: RunError."""
        for shard, descriptor in self._descriptors.items():
            try:
                getattr(os, "fdatasync", os.fsync)(descriptor)
            except OSError as error:
                raise RunError(
                    f"{self.path(shard)}: could not be flushed to disk ({error.strerror}). "
                    "Check the disk; the same command resumes the merge."
                ) from None

    def seal(self) -> None:
        """Flush the data to disk, then the headers, which make the files readable. Errors: RunError."""
        self.sync()
        for shard in self._shards:
            write_fully(self._descriptors[shard.name], memoryview(shard.start), 0, self._paths[shard.name])
        self.sync()
        self._is_sealed = True

    def finish(self) -> None:
        """Give the files their final names, with their headers. Errors: RunError."""
        if not self._is_sealed:
            self.seal()
        for shard in self._shards:
            _rename(self.path(shard.name), self.directory / shard.name, self._inside)

    def _reopen(self, shard: str) -> None:
        """Make a file that was finished before an interrupt unfinished again, until it is checked."""
        if os.path.lexists(self.directory / shard):
            _rename(self.directory / shard, self.path(shard), self._inside)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _open_made(path: Path, inside: Folder | None) -> int:
    try:
        return open_to_write(path, inside, flags=os.O_RDWR)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be opened ({error.strerror}); expected the file that the merge made. The same command resumes it."
        ) from None


def _open_sized(path: Path, shard: OutputShard, inside: Folder | None) -> int:
    try:
        descriptor = open_to_write(path, inside, flags=os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be created ({error.strerror}). Choose another output directory."
        ) from None
    try:
        if os.fstat(descriptor).st_size != shard.byte_size:
            os.ftruncate(descriptor, shard.byte_size)  # the plan has checked the free space
        write_fully(descriptor, memoryview(NO_HEADER), 0, str(path))
    except OSError as error:
        os.close(descriptor)
        raise RunError(
            f"{path}: {shard.byte_size} bytes could not be written ({error.strerror}). "
            "Make room; the same command resumes the merge."
        ) from None
    except RunError:
        os.close(descriptor)
        raise
    return descriptor


def _rename(old: Path, new: Path, inside: Folder | None) -> None:
    try:
        (name, directory), (other, _) = reach(old, inside), reach(new, inside)
        os.replace(name, other, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError as error:
        raise RunError(
            f"{old}: could not be renamed to {new.name} ({error.strerror}). "
            "Check the disk; the same command resumes the merge."
        ) from None
