"""Keeps pieces of remote models in files for later runs: checked when they are read, the oldest removed first.

One file is one piece, followed by 16 bytes of its hash. Its name is a hash of URL, version, offset and length, so that a piece of
another version is another file. Files appear by one rename, so that processes can share the folder. A folder that cannot be
written to, and a full disk, cost time only.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import xxhash

from alnico.checkpoint.files import open_binary
from alnico.checkpoint.remote.folder import FileVersion
from alnico.errors import OutputError
from alnico.folders import fault_of, user_id

HASH_BYTES = 16
SUFFIX = ".piece"
SLACK = 16
"""A full folder is emptied by one part of so many at once, so that files are rarely counted."""
UNCOUNTED = 64
"""After one part of so many of the limit, the files are counted again: others write into the folder, too."""


class PieceFiles:
    """Pieces of files in a folder, up to ``limit_bytes``. Safe for threads and processes.

    Each one that writes into the folder, of another model or in another process, may exceed the limit by 1/64 of it.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Errors: OutputError for a folder that cannot be made, or that others may write to."""
        self.folder = folder
        self._limit = limit_bytes
        self._lock = threading.Lock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fault = fault_of(os.stat(folder), user_id())
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be made a folder for downloads ({error.strerror}); expected a folder that you may write to. "
                "Choose another --download-cache."
            ) from None
        if fault is not None:
            raise OutputError(
                f"{folder}: {fault}; expected a folder that only you may write to, as pieces of models are read from it. "
                "Choose another --download-cache, or change its mode."
            )
        self._size, self._uncounted = self._counted(), 0

    def get(self, file: str, version: FileVersion, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` with a piece; False if it is not kept, or damaged."""
        path = self._path(file, version, offset, len(buffer))
        digest = bytearray(HASH_BYTES + 1)
        try:
            with open_binary(path) as piece:
                filled = piece.readinto(buffer) == len(buffer) and piece.readinto(digest) == HASH_BYTES
            if filled and xxhash.xxh3_128_digest(buffer) == bytes(digest[:HASH_BYTES]):
                os.utime(path)  # used now
                return True
            path.unlink()
        except OSError:
            pass
        return False

    def put(self, file: str, version: FileVersion, offset: int, data: memoryview) -> None:
        """Keep a piece."""
        path = self._path(file, version, offset, len(data))
        part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        size = len(data) + HASH_BYTES
        try:
            if not self._make_room(size):
                return
            with open(part, "xb") as out:
                out.write(data)
                out.write(xxhash.xxh3_128_digest(data))
            os.replace(part, path)
        except OSError:  # a full disk, or a folder that was removed
            part.unlink(missing_ok=True)
            return
        with self._lock:
            self._size += size
            self._uncounted += size

    def _path(self, file: str, version: FileVersion, offset: int, length: int) -> Path:
        key = "\0".join((file, str(version.size), version.tag, str(offset), str(length)))
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}{SUFFIX}"

    def _make_room(self, size: int) -> bool:
        """Remove the pieces that were used least recently where the folder would be too large; False if it still would be."""
        with self._lock:
            if self._uncounted > self._limit // UNCOUNTED:
                self._size, self._uncounted = self._counted(), 0
            if self._size + size <= self._limit:
                return True
            self._size = self._counted(keep=max(self._limit - size - self._limit // SLACK, 0))
            return self._size + size <= self._limit

    def _counted(self, keep: int | None = None) -> int:
        """Return the bytes of all files; first remove the oldest beyond ``keep`` bytes."""
        found = []
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if entry.name.endswith((SUFFIX, ".part")):
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
        except OSError:
            return 0
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if keep is None or total <= keep:
                break
            try:
                os.unlink(path)
            except OSError:
                continue  # another process has removed it, or may not be removed
            total -= size
        return total
