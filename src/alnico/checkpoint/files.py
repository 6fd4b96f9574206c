"""Positioned reads and writes that finish or say why, and a bounded set of open files.

Reads go with ``preadv`` into the caller's buffer: no page faults on a fresh mapping, no copy.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from alnico.errors import ModelError, RunError

MAX_OPEN_FILES = 8
"""Files of one model open at once; the least recently used is closed first. Sixty-four models then stay below the 1,024 descriptors
that a process commonly may have, and opening a file anew takes microseconds."""


MAX_ENTRIES = 100_000
"""Files and folders in the folder of a model, and in the folder of each of its modules."""
MAX_DEPTH = 100
"""Folders inside one another in the folder of a model. Python walks and removes them by recursion, which it bounds at a thousand calls."""

OF_SHELL = re.compile(r"/dev/stdin|/dev/fd/\d+|/proc/self/fd/\d+")
"""What a shell calls its pipes to a command."""


class OpenFiles:
    """Descriptors of input files, opened when first read and closed when too many are open. Safe for threads.

    ``opened`` is told of each file that is opened, and may refuse it.
    """

    def __init__(
        self, limit: int = MAX_OPEN_FILES, opened: Callable[[Path, int], None] | None = None
    ) -> None:
        self._limit = limit
        self._opened = opened
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, list[int]] = OrderedDict()  # path -> [descriptor, readers now]

    @contextmanager
    def descriptor(self, path: Path) -> Iterator[int]:
        """Lend the file's descriptor; it stays open at least until the block ends."""
        with self._lock:
            entry = self._open.get(path)
            if entry is None:
                entry = self._open[path] = [self._new(path), 0]
            self._open.move_to_end(path)
            entry[1] += 1
            self._close_surplus()
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1
                if entry[1] == 0 and self._open.get(path) is not entry:
                    os.close(entry[0])  # closed while it was read

    def _new(self, path: Path) -> int:
        descriptor = open_to_read(path)
        try:
            if self._opened is not None:
                self._opened(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _close_surplus(self) -> None:
        if len(self._open) <= self._limit:
            return
        for path in [p for p, (_, readers) in self._open.items() if readers == 0]:
            if len(self._open) <= self._limit:
                return
            os.close(self._open.pop(path)[0])

    def close(self) -> None:
        """Close all files; one that a thread reads now, when it has done so: its number must not become another file's before."""
        with self._lock:
            for descriptor, readers in self._open.values():
                if readers == 0:
                    os.close(descriptor)
            self._open.clear()


class NotAFileError(OSError):
    """A path that leads to a folder, a pipe, a socket or a device."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file; returns its descriptor. Nothing is waited for. Errors: OSError, of what is no regular file NotAFileError.

    Everything that a stranger may have put there is opened by this function.
    """
    # Looked at before it is opened, since opening a device can do something; and after, since it may be another thing by then.
    kind = os.stat(path).st_mode
    if stat.S_ISREG(kind):
        # O_NONBLOCK, since a pipe that nobody writes would be waited for; for a file it says nothing.
        flags = (
            os.O_RDONLY
            | getattr(os, "O_CLOEXEC", 0)
            | getattr(os, "O_NONBLOCK", 0)
            | getattr(os, "O_NOCTTY", 0)
        )
        descriptor = os.open(path, flags)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise NotAFileError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise NotAFileError(errno.EINVAL, "it is a pipe, a socket or a device", os.fspath(path))


def reading(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, open to be read as bytes; use it in ``with``. Errors: OSError, as of :func:`open_regular`."""
    return os.fdopen(open_regular(path), "rb")


def reading_named(path: str | os.PathLike[str]) -> BinaryIO:
    """A file that the user names in a call or on the command line, where a shell's ``<(command)`` or ``/dev/stdin`` is as good; use it in
    ``with``. Errors: OSError, as of :func:`open_regular`."""
    if OF_SHELL.fullmatch(os.fsdecode(path)):
        return open(path, "rb")
    return reading(path)


def open_to_read(path: Path) -> int:
    """Open a file; returns its descriptor. Errors: ModelError with the system's reason, and for what is no regular file."""
    try:
        return open_regular(path)
    except NotAFileError:
        raise ModelError(
            f"{path}: is a folder, a pipe or a device; expected a regular file. Check the path."
        ) from None
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be opened ({error.strerror}). Check the path and its permissions."
        ) from None


def read_small(path: Path, most: int, expected: str) -> bytes:
    """Read a whole file of at most ``most`` bytes. Errors: ModelError, saying what was ``expected``."""
    descriptor = open_to_read(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise ModelError(f"{path}: is larger than {most} bytes; expected {expected}. Check the model.")
        data = bytearray(size)
        read_fully(descriptor, memoryview(data), 0, path)
        return bytes(data)
    finally:
        os.close(descriptor)


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file of a model that a link puts outside of the model's folder: reading it, or carrying it to the output, would give
    away what is no part of the model. The hub's cache, where ``snapshots/COMMIT/`` links to ``blobs/``, is as it should be.

    Errors: ModelError.
    """
    place, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if place.is_relative_to(root):
        return
    for part in (root, *root.parents):
        if part.parent.name == "snapshots" and place.is_relative_to(part.parent.parent / "blobs"):
            return
    raise ModelError(
        f"{path}: is a link to {place}, outside the model's directory; expected a file inside it. "
        "If you trust the model, put the file itself there; else do not use it."
    )


def is_text(name: str) -> bool:
    """Can a name be written to a file of text? Not where it holds half of a character, or stands for bytes that are no UTF-8.

    >>> is_text("modèle.json"), is_text("mod\\udce8le.json")
    (True, False)
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def entries_below(folder: Path, most: int | None = None) -> Iterator[tuple[Path, bool]]:
    """Every entry in a folder and in the folders in it, and whether it is a folder. Links are entries, and are not followed.

    Errors: OSError; ModelError for folders nested deeper than ``MAX_DEPTH``, and for more than ``most`` entries.
    """
    left, count = [(folder, 0)], 0
    while left:
        place, depth = left.pop()
        if depth > MAX_DEPTH:
            raise ModelError(
                f"{folder}: holds folders nested deeper than {MAX_DEPTH}; expected those of a model. Remove what is no part of the model."
            )
        with os.scandir(place) as entries:
            for entry in entries:
                count += 1
                if most is not None and count > most:
                    raise ModelError(
                        f"{folder}: holds more than {most} files and folders; expected those of one model. Put the model into a folder "
                        "of its own."
                    )
                is_folder = entry.is_dir(follow_symlinks=False)
                yield Path(entry.path), is_folder
                if is_folder:
                    left.append((Path(entry.path), depth + 1))


def files_below(folder: Path, most: int | None = None) -> list[Path]:
    """All that is no folder in a folder and in the folders in it, sorted; see :func:`entries_below`, also for errors."""
    return sorted(path for path, is_folder in entries_below(folder, most) if not is_folder)


def read_fully(descriptor: int, buffer: memoryview, offset: int, *where: object) -> None:
    """Fill ``buffer`` from byte ``offset`` on. Errors: RunError if the system fails or the file ends early."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise RunError(
                f"{_place(where)}: reading {len(buffer)} bytes at {offset} failed ({error.strerror}). "
                "Check the disk; the same command takes the merge up again."
            ) from None
        if count == 0:
            raise RunError(
                f"{_place(where)}: the file ended at byte {offset + done}, expected {len(buffer)} bytes at {offset}. "
                "It was changed while it was read; merge again from a complete file."
            )
        done += count


@functools.cache
def _sync_file_range() -> Callable[..., int] | None:
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):  # not on this system
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    result: Callable[..., int] = call
    return result


def start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Have the system write these bytes to the disk from now on, without waiting.

    The disk then works while threads compute: bringing the whole output to the disk at the end takes milliseconds. It is
    a hint; that everything has arrived is for ``fdatasync`` to say.
    """
    call = _sync_file_range()
    if call is not None:
        call(descriptor, offset, size, 2)  # SYNC_FILE_RANGE_WRITE


def _place(where: tuple[object, ...]) -> str:
    """The file and the tensor of a message; put together only when there is one to be written."""
    return ": ".join(map(str, where))


def write_fully(descriptor: int, data: memoryview, offset: int, *where: object) -> None:
    """Write all of ``data`` at byte ``offset``. Errors: RunError with the system's reason."""
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(descriptor, data[done:], offset + done)
        except OSError as error:
            raise RunError(
                f"{_place(where)}: writing {len(data)} bytes at {offset} failed ({error.strerror}). "
                "Make room or check the disk; the same command takes the merge up again."
            ) from None


def copy_fully(source: int, begin: int, target: int, offset: int, size: int, *where: object) -> bool:
    """Copy bytes from one file to another within the system. Returns False where it cannot, before anything is copied.

    Errors: RunError with the system's reason, or if the source ends early.
    """
    call = getattr(os, "copy_file_range", None)
    done = 0
    while call is not None and done < size:
        try:
            count = call(source, target, size - done, begin + done, offset + done)
        except OSError as error:
            if done == 0 and error.errno in (
                errno.EXDEV,
                errno.ENOSYS,
                errno.EINVAL,
                errno.EOPNOTSUPP,
                errno.EBADF,
                errno.EPERM,
            ):
                return False
            raise RunError(
                f"{_place(where)}: copying {size} bytes to {offset} failed ({error.strerror}). "
                "Make room or check the disk; the same command takes the merge up again."
            ) from None
        if count == 0:
            if done == 0:
                return False  # some file systems say so; reading tells whether the file has ended
            raise RunError(
                f"{_place(where)}: the file ended at byte {begin + done}, expected {size} bytes at {begin}. "
                "It was changed while it was read; merge again from a complete file."
            )
        done += count
    return call is not None
