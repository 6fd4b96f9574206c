"""Remembers hashes of tensors and files on disk, so that a file that has not changed is hashed once.

The record of some files is one file in alnico's cache, named by their paths, devices, inodes, sizes and times: files that
differ in any of these have another record. Its lines are ``HASH KEY``. The folder must be ours alone, as everything in the
cache; without one, nothing is remembered.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from alnico.folders import (
    HAS_DESCRIPTORS,
    Folder,
    cache_path,
    open_to_write,
    private_cache,
    reach,
    read_private,
)

KIND = "hashes"
"""The folder in the cache."""

SUFFIX = ".hashes"

SETTLED_NS = 2_000_000_000
"""What is found of files that changed within this time, by the clock of the cache's disk, is not remembered: times of files
are coarse, and a change right after hashing could go unseen."""

MOST_BYTES = 64 << 20
"""Largest record that is read."""

MOST_RECORDS = 2000
"""Records that are kept; those written least recently are removed."""

LINE = re.compile(r"([0-9a-f]{32}|[0-9a-f]{64}) (.+)")


class KnownHashes:
    """The hashes of some files, by keys. Safe for threads: each is computed once, by the first thread that needs it."""

    def __init__(self, record: str = "") -> None:
        self._record = record
        self._known = _read(record) if record else {}
        self._lock = threading.Lock()
        self._busy: dict[str, threading.Lock] = {}

    def get(self, key: str, compute: Callable[[], str], expected: str | None = None) -> str:
        """Return the hash of a key; what is not known is computed and remembered, and so is what is not the ``expected`` hash:
        nothing is refused because of a record."""
        with self._lock:
            known = self._known.get(key)
            if known is not None and expected in (None, known):
                return known
            busy = self._busy.setdefault(key, threading.Lock())
        with busy:
            known = self._known.get(key)
            if known is not None and expected in (None, known):
                return known
            result = compute()
            with self._lock:
                self._known[key] = result
                self._busy.pop(key, None)
            if self._record and result != known:
                _append(self._record, f"{result} {json.dumps(key)}\n")
            return result


def known_hashes(paths: Iterable[Path]) -> KnownHashes:
    """Return what is known of tensors in these files, in their present state. Without files, nothing is known."""
    states = []
    newest = 0
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            return KnownHashes()
        newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
        states.append(
            f"{os.path.realpath(path)}|{status.st_dev}|{status.st_ino}|{status.st_size}"
            f"|{status.st_mtime_ns}|{status.st_ctime_ns}"
        )
    if not states or _moment() - newest <= SETTLED_NS:
        return KnownHashes()
    text = "\n".join(states)
    return _of_record(hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest(), str(_place()))


@functools.lru_cache(maxsize=256)
def _of_record(record: str, _place: str) -> KnownHashes:
    """All models that are read from the same files share what is known of them."""
    return KnownHashes(record)


def _place() -> Path | None:
    try:
        return cache_path(KIND)
    except RuntimeError:  # no home directory
        return None


def _moment() -> int:
    """Return the time that a new file gets in the cache, in nanoseconds; 0 where none can be made."""
    with private_cache(KIND) as folder:
        if folder is None:
            return 0
        sample = folder.path / f"{secrets.token_hex(8)}.tmp"
        name, directory = reach(sample, folder)
        try:
            descriptor = open_to_write(sample, folder, flags=os.O_CREAT | os.O_EXCL, mode=0o600)
            try:
                return os.fstat(descriptor).st_mtime_ns
            finally:
                os.close(descriptor)
                os.unlink(name, dir_fd=directory)
        except OSError:
            return 0


def _read(record: str) -> dict[str, str]:
    """Return the hashes of a record; lines that are incomplete or damaged count as absent."""
    with private_cache(KIND) as folder:
        data = None if folder is None else read_private(record + SUFFIX, folder, MOST_BYTES)
    known: dict[str, str] = {}
    for line in (data or b"").decode("utf-8", "replace").split("\n")[:-1]:
        if (match := LINE.fullmatch(line)) is not None:
            with suppress(ValueError):
                key = json.loads(match[2])
                if isinstance(key, str):
                    known[key] = match[1]
    return known


def _append(record: str, line: str) -> None:
    """Add a line to a record. A full or read-only disk costs time later, nothing else."""
    with private_cache(KIND) as folder:
        if folder is None:
            return
        path = folder.path / (record + SUFFIX)
        with suppress(OSError):
            is_new = not path.exists()
            if is_new:
                _remove_oldest(folder)
            descriptor = open_to_write(path, folder, flags=os.O_CREAT | os.O_APPEND, mode=0o600)
            try:
                os.write(descriptor, line.encode("utf-8"))
            finally:
                os.close(descriptor)


def _remove_oldest(folder: Folder) -> None:
    """Remove the records written least recently, where there are too many. Errors: OSError."""
    place = folder.descriptor if HAS_DESCRIPTORS else folder.path
    with os.scandir(place) as entries:
        records = [e.name for e in entries if e.name.endswith(SUFFIX)]
    if len(records) < MOST_RECORDS:
        return
    directory = folder.descriptor if HAS_DESCRIPTORS else None
    times = []
    for name in records:
        with suppress(OSError):
            at = name if directory is not None else str(folder.path / name)
            times.append((os.stat(at, dir_fd=directory, follow_symlinks=False).st_mtime_ns, name))
    for _, name in sorted(times)[: len(times) - MOST_RECORDS // 2]:
        with suppress(OSError):
            os.unlink(name if directory is not None else str(folder.path / name), dir_fd=directory)
