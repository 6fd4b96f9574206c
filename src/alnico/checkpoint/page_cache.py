"""Tells the system which bytes of files are read soon or must be written, and asks how many it can keep.

These are hints: they change only the time. A system that does not know them goes on as it does.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

PROCESSES, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
"""Where Linux tells of processes, and of control groups."""

LEAST_READ_BYTES = 128 << 10
"""What every disk reads ahead at once."""

MOST_READ_BYTES = 8 << 20

LOOKED_AT_BYTES = 4 << 20
"""Of so many bytes of a file, one is looked up in the page cache."""


class DiskReads(Protocol):
    """Counts what is read of files; see :mod:`alnico.engine.disk_ahead`."""

    def was_read(self, model: Any, name: str, size: int) -> None:
        """Take note that bytes of a tensor were read. Safe for threads."""
        ...


def ask_to_read(descriptor: int, offset: int, size: int) -> None:
    """Ask the system to read bytes of a file into its page cache. This waits only while very many requests are waiting."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:  # not on this system
        return
    # Linux reads the first bytes of each request, as many as the disk takes at once.
    step = _bytes_at_once(os.fstat(descriptor).st_dev)
    with suppress(OSError):  # a file system without a page cache
        for start in range(offset, offset + size, step):
            advise(descriptor, start, min(step, offset + size - start), os.POSIX_FADV_WILLNEED)


def missing_from_cache(descriptor: int, size: int) -> float:
    """The share of the first ``size`` bytes of a file that must be read from the disk, by one byte in each
    :data:`LOOKED_AT_BYTES`; 1 where the system does not say."""
    at_once = getattr(os, "RWF_NOWAIT", None)
    if at_once is None:
        return 1.0
    places = range(0, size, LOOKED_AT_BYTES)
    missing = 0
    byte = bytearray(1)
    for place in places:
        try:
            os.preadv(descriptor, [byte], place, at_once)
        except OSError:  # BlockingIOError; or a file system that does not say
            missing += 1
    return missing / max(len(places), 1)


def let_go(descriptor: int, offset: int, size: int) -> None:
    """Tell the system that bytes of a file are not read again. Pages that are not on the disk yet stay in its page cache."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None:
        with suppress(OSError):
            advise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


@functools.cache
def _bytes_at_once(device: int) -> int:
    """How many bytes of a disk one request reads into the page cache."""
    disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    sizes = [LEAST_READ_BYTES]
    for folder in (disk / "queue", disk / "../queue"):  # a partition has the queue of its disk
        for name in ("read_ahead_kb", "max_sectors_kb"):
            with suppress(OSError, ValueError):
                sizes.append(int((folder / name).read_text()) << 10)
    return min(max(sizes), MOST_READ_BYTES)


def start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Ask the system to start writing these bytes to disk, without waiting.

    The disk then works while threads compute, and flushing the whole output at the end takes milliseconds.
    This is only a hint: ``fdatasync`` confirms that everything was written.
    """
    call = _sync_file_range()
    if call is not None:
        call(descriptor, offset, size, 2)  # SYNC_FILE_RANGE_WRITE


@functools.cache
def _sync_file_range() -> Callable[..., int] | None:
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):  # not on this system
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    result: Callable[..., int] = call
    return result


def cache_bytes() -> int:
    """How much of files the system can keep in memory: what the machine has free, at most what a control group of this process
    may use; 1 GiB if the system does not say."""
    sizes = _group_limits()
    with suppress(OSError, ValueError, IndexError):
        lines = (PROCESSES / "meminfo").read_text().splitlines()
        sizes += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return min(sizes, default=1 << 30)


def _group_limits() -> list[int]:
    """The limits on memory of this process's control group and of those above it, in bytes."""
    limits: list[int] = []
    with suppress(OSError, ValueError):
        for line in (PROCESSES / "self/cgroup").read_text().splitlines():
            number, controllers, place = line.split(":", 2)
            if number == "0":
                root, name = GROUPS, "memory.max"
            elif "memory" in controllers.split(","):
                root, name = GROUPS / "memory", "memory.limit_in_bytes"
            else:
                continue
            group = root / place.lstrip("/")
            for folder in (group, *group.parents):
                with suppress(OSError, ValueError):  # ValueError: "max"
                    limits.append(int((folder / name).read_text()))
                if folder == root:
                    break
    return limits
