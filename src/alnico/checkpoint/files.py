"""Reads, writes and copies parts of files completely or raises; keeps few input files open.

``preadv`` reads straight into the caller's buffer: no page faults on a fresh mapping, no copy.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import stat
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from alnico.checkpoint.near_paths import suggestion
from alnico.errors import ModelError, RunError

MAX_OPEN_FILES = 8
"""Files of one model open at once; the least recently used is closed first. Reopening takes microseconds."""

MOST_OPEN_FILES = 512
"""Files of all models open at once, or half of what the system allows the process, if that is less. The usual limit is 1,024, or 256
on macOS; a merge of hundreds of checkpoints stays below it."""


MOST_BUFFERS = 512
"""Most buffers that one call fills; Linux allows 1,024."""


MAX_ENTRIES = 100_000
"""Most files and folders in the folder of a model, and in the folder of each of its modules."""
MAX_DEPTH = 100
"""Deepest nesting in the folder of a model.

Python walks and removes folders by recursion, limited to 1,000 calls.
"""

SHELL_PIPE = re.compile(r"/dev/stdin|/dev/fd/\d+|/proc/self/fd/\d+")
"""Paths of the pipes that a shell passes to a command."""


class _OpenFile:
    """A descriptor, how many read from it now, when it was last lent, and whether its file was closed meanwhile."""

    __slots__ = ("descriptor", "is_closed", "last_lent", "path", "readers")

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.readers = 0
        self.last_lent = 0
        self.is_closed = False


class _Lent:
    """Lends a descriptor for a block. A class, since each block of each tensor is read in one."""

    __slots__ = ("_file", "_files", "_path")

    def __init__(self, files: OpenFiles, path: Path) -> None:
        self._files = files
        self._path = path

    def __enter__(self) -> int:
        self._file = self._files.lend(self._path)
        return self._file.descriptor

    def __exit__(self, *_: object) -> None:
        self._files.give_back(self._file)


class OpenFiles:
    """Descriptors of input files, opened when first read and closed when too many are open. Safe for threads.

    ``on_open`` is called with each file that is opened, and may refuse it.
    """

    def __init__(
        self, limit: int = MAX_OPEN_FILES, on_open: Callable[[Path, int], None] | None = None
    ) -> None:
        self._limit = limit
        self._on_open = on_open
        self._lock = threading.Lock()
        self._open: dict[Path, _OpenFile] = {}
        self._lent = 0

    def descriptor(self, path: Path) -> _Lent:
        """Lend the file's descriptor; it stays open at least until the block ends."""
        return _Lent(self, path)

    def lend(self, path: Path) -> _OpenFile:
        with self._lock:
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = _OpenFile(path, self._new(path))
                file.readers = 1
                self._close_surplus()
                _ALL_OPEN.add(file, self)
            else:
                file.readers += 1
            self._lent += 1
            file.last_lent = self._lent
        return file

    def give_back(self, file: _OpenFile) -> None:
        with self._lock:
            file.readers -= 1
            if file.readers == 0 and file.is_closed:
                self._close(file)  # close() was called during the read

    def _new(self, path: Path) -> int:
        descriptor = open_to_read(path)
        try:
            if self._on_open is not None:
                self._on_open(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _close_surplus(self) -> None:
        """Close files that nobody reads, those lent longest ago first."""
        surplus = len(self._open) - self._limit
        if surplus <= 0:
            return
        unread = [path for path, file in self._open.items() if file.readers == 0]
        for path in sorted(unread, key=lambda path: self._open[path].last_lent)[:surplus]:
            self._close(self._open.pop(path))

    def close_unread(self, file: _OpenFile) -> None:
        """Close a file that nobody reads, unless another thread is at work on these files."""
        if self._lock.acquire(blocking=False):
            try:
                if file.readers == 0 and self._open.get(file.path) is file:
                    self._close(self._open.pop(file.path))
            finally:
                self._lock.release()

    def _close(self, file: _OpenFile) -> None:
        _ALL_OPEN.remove(file)
        os.close(file.descriptor)

    def close(self) -> None:
        """Close all files.

        A file that is being read is closed afterwards, so that its number is not reused too early.
        """
        with self._lock:
            for file in self._open.values():
                file.is_closed = True
                if file.readers == 0:
                    self._close(file)
            self._open.clear()


class _AllOpenFiles:
    """The files that all models of the process have open: when they are too many, those opened first are closed, if nobody reads them.

    The system counts descriptors by process, so there is one of these.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[_OpenFile, weakref.ref[OpenFiles]] = {}

    def add(self, file: _OpenFile, owner: OpenFiles) -> None:
        """Count a file that was opened, and close others while they are too many. The lock of ``owner`` is held."""
        allowed = os.sysconf("SC_OPEN_MAX")
        limit = min(MOST_OPEN_FILES, allowed // 2) if allowed > 0 else MOST_OPEN_FILES
        with self._lock:
            self._owners[file] = weakref.ref(owner)
            surplus = list(itertools.islice(self._owners.items(), max(len(self._owners) - limit, 0)))
        for other, its_owner in surplus:  # without the lock, which closing takes
            files = its_owner()
            if files is None and self.remove(other):  # a model that was dropped without being closed
                os.close(other.descriptor)
            elif files is not None and files is not owner:
                files.close_unread(other)

    def remove(self, file: _OpenFile) -> bool:
        """Forget a file that is about to be closed. Returns False if another thread did."""
        with self._lock:
            return self._owners.pop(file, None) is not None


_ALL_OPEN = _AllOpenFiles()


class NotAFileError(OSError):
    """A path that leads to a folder, a pipe, a socket or a device."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file without blocking; returns its descriptor.

    Every file that may come from a stranger is opened by this function.
    Errors: OSError; NotAFileError for anything but a regular file.
    """
    # Checked before opening, since opening a device can have an effect, and after, in case it was replaced.
    kind = os.stat(path).st_mode
    if stat.S_ISREG(kind):
        # O_NONBLOCK: opening a pipe that nobody writes would block. It has no effect on a file.
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


def open_binary(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file to read bytes; use it in ``with``. Errors: OSError, as :func:`open_regular`."""
    return os.fdopen(open_regular(path), "rb")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits. Errors: OSError, as :func:`open_regular`."""
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_named(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file that the user names, or a shell's ``<(command)`` or ``/dev/stdin``; use it in ``with``.

    Errors: OSError, as :func:`open_regular`.
    """
    if SHELL_PIPE.fullmatch(os.fsdecode(path)):
        return open(path, "rb")
    return open_binary(path)


NEEDED = ("preadv", "pwrite", "statvfs")
"""Functions of :mod:`os` without which no file is read or written. Windows has none of them."""


def _check_system(path: Path) -> None:
    """Refuse to read on a system that lacks what reading needs. Errors: RunError."""
    if missing := [f"os.{name}" for name in NEEDED if not hasattr(os, name)]:
        raise RunError(
            f"{path}: cannot be read: Python has no {', '.join(missing)} on this system ({sys.platform}); "
            "alnico needs Linux or macOS. On Windows run it in WSL or in a container."
        )


def open_to_read(path: Path) -> int:
    """Open a regular file; returns its descriptor.

    Errors: ModelError with the system's reason; RunError on a system that cannot run alnico.
    """
    _check_system(path)
    try:
        return open_regular(path)
    except NotAFileError:
        raise ModelError(
            f"{path}: is a folder, a pipe or a device; expected a regular file. Check the path."
        ) from None
    except OSError as error:
        advice = "Check the path and its permissions."
        if error.errno == errno.ENOENT:
            advice = suggestion(path, advice, accepts=Path.is_file, only_misspellings=True)
        raise ModelError(f"{path}: cannot be opened ({error.strerror}). {advice}") from None


def read_small(path: Path, max_bytes: int, expected: str) -> bytes:
    """Read a whole file of at most ``max_bytes``. Errors: ModelError, which states what was ``expected``."""
    descriptor = open_to_read(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise ModelError(
                f"{path}: is larger than {max_bytes} bytes; expected {expected}. Check the model."
            )
        data = bytearray(size)
        read_fully(descriptor, memoryview(data), 0, path)
        return bytes(data)
    finally:
        os.close(descriptor)


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file of a model that is a link to outside the model's folder.

    Reading it, or copying it to the output, would disclose a file that is not part of the model. The links of
    the hub's cache from ``snapshots/COMMIT/`` to ``blobs/`` are allowed. Errors: ModelError.
    """
    target, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if target.is_relative_to(root):
        return
    for part in (root, *root.parents):
        if part.parent.name == "snapshots" and target.is_relative_to(part.parent.parent / "blobs"):
            return
    raise ModelError(
        f"{path}: is a link to {target}, outside the model's directory; expected a file inside it. "
        "If you trust the model, replace the link by the file itself; otherwise do not use the model."
    )


def is_text(name: str) -> bool:
    """Can a name be written to a text file? Not if it has a lone surrogate, as for bytes that are not UTF-8.

    >>> is_text("modèle.json"), is_text("mod\\udce8le.json")
    (True, False)
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def entries_below(folder: Path, max_entries: int | None = None) -> Iterator[tuple[Path, bool]]:
    """Yield every entry of a folder and its subfolders, and whether it is a folder. Links are not followed.

    Errors: OSError; ModelError for folders nested deeper than ``MAX_DEPTH``, and for more than
    ``max_entries``.
    """
    queue, count = [(folder, 0)], 0
    while queue:
        current, depth = queue.pop()
        if depth > MAX_DEPTH:
            raise ModelError(
                f"{folder}: holds folders nested deeper than {MAX_DEPTH}; expected only the files of a "
                "model. Remove everything that is not part of the model."
            )
        with os.scandir(current) as entries:
            for entry in entries:
                count += 1
                if max_entries is not None and count > max_entries:
                    raise ModelError(
                        f"{folder}: holds more than {max_entries} files and folders; expected those of one "
                        "model. Put the model into its own folder."
                    )
                is_folder = entry.is_dir(follow_symlinks=False)
                yield Path(entry.path), is_folder
                if is_folder:
                    queue.append((Path(entry.path), depth + 1))


def files_below(folder: Path, max_entries: int | None = None) -> list[Path]:
    """Return everything but folders in a folder and its subfolders, sorted; see :func:`entries_below`."""
    return sorted(path for path, is_folder in entries_below(folder, max_entries) if not is_folder)


def read_fully(descriptor: int, buffer: memoryview, offset: int, *where: object) -> None:
    """Fill ``buffer`` from byte ``offset``. Errors: RunError if the system fails or the file ends early."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise RunError(
                f"{_place(where)}: reading {len(buffer)} bytes at {offset} failed ({error.strerror}). "
                "Check the disk; the same command resumes the merge."
            ) from None
        if count == 0:
            raise RunError(
                f"{_place(where)}: the file ended at byte {offset + done}, expected {len(buffer)} bytes at "
                f"{offset}. It was changed while it was read; merge again from a complete file."
            )
        done += count


def read_spans(
    read: Callable[[int, memoryview], None], spans: Iterable[tuple[int, int]], buffer: memoryview
) -> None:
    """Fill ``buffer`` with spans of bytes, one after the other: ``read`` fills a part of it from a byte on."""
    place = 0
    for start, stop in spans:
        end = place + stop - start
        read(start, buffer[place:end])
        place = end


def read_side_by_side(descriptor: int, buffers: Sequence[memoryview], offset: int, *where: object) -> None:
    """Fill buffers one after the other from byte ``offset``, with few calls. Errors: as for :func:`read_fully`."""
    for i in range(0, len(buffers), MOST_BUFFERS):
        group = [buffer for buffer in buffers[i : i + MOST_BUFFERS] if len(buffer)]
        try:
            count = os.preadv(descriptor, group, offset) if group else 0
        except OSError:
            count = 0  # the reading below says why
        for buffer in group:
            if count < len(buffer):
                read_fully(descriptor, buffer[max(count, 0) :], offset + max(count, 0), *where)
            count -= len(buffer)
            offset += len(buffer)


def _place(where: tuple[object, ...]) -> str:
    """Join the file and the tensor for a message; done only when a message is needed."""
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
                "Make room or check the disk; the same command resumes the merge."
            ) from None


def copy_fully(source: int, begin: int, target: int, offset: int, size: int, *where: object) -> bool:
    """Copy bytes between files inside the system. Returns False where it cannot, before anything is copied.

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
                "Make room or check the disk; the same command resumes the merge."
            ) from None
        if count == 0:
            if done == 0:
                return False  # some file systems return 0; reading shows whether the file has ended
            raise RunError(
                f"{_place(where)}: the file ended at byte {begin + done}, expected {size} bytes at {begin}. "
                "It was changed while it was read; merge again from a complete file."
            )
        done += count
    return call is not None
