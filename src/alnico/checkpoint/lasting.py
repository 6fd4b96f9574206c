"""Small files and names that outlast a power cut: written whole, brought to the disk, and only then called by their name.

A file's bytes and its name in the directory are two things to a disk: each is brought there by itself (``fsync`` of the file,
``fsync`` of the directory), and what was not may be gone after a power cut, in any order.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path

from alnico.errors import RunError

COPIED_BYTES = 1 << 20
"""How much of a side file is copied at a time."""

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""What a system, or a file system, answers that has no such rename."""


def write_file(path: Path, data: bytes | str) -> None:
    """Write a whole file and bring its bytes to the disk; its name is for :func:`sync_directory`. Errors: RunError."""
    raw = data.encode("utf-8") if isinstance(data, str) else data
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            write_on(descriptor, raw)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise cannot_be_written(path, error) from None


def write_on(descriptor: int, data: bytes) -> None:
    """Write all of ``data`` where a file stands. Errors: OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def replace_file(path: Path, data: bytes | str) -> None:
    """Give a file new contents, all at once: after a crash it has the old ones or the new ones. Errors: RunError."""
    temporary = path.with_name(path.name + ".tmp")
    write_file(temporary, data)
    try:
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_be_written(path, error) from None
    sync_directory(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy the contents of a file, not its times or permissions. Errors: OSError."""
    given = os.open(source, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        made = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            while part := os.read(given, COPIED_BYTES):
                write_on(made, part)
        finally:
            os.close(made)
    finally:
        os.close(given)


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk. Errors: RunError."""
    _sync(directory)


def sync_tree(directory: Path) -> None:
    """Bring a directory to the disk: the bytes of all files in it, then all names. Errors: RunError."""

    def refuse(error: OSError) -> None:
        raise error

    try:
        found = list(os.walk(directory, topdown=False, onerror=refuse))
    except OSError as error:
        raise cannot_be_written(directory, error) from None
    for folder, _, files in found:
        for name in files:
            _sync(Path(folder, name))
    for folder, _, _ in found:
        _sync(Path(folder))


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RunError(
            f"{path}: could not be brought to the disk ({error.strerror}). Check the disk; the same command takes the merge up again."
        ) from None


def cannot_be_written(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: cannot be written ({error.strerror}). Make room or check the disk; the same command takes the merge up again."
    )


def rename_new(old: Path, new: Path) -> None:
    """Rename where nothing stands. Errors: FileExistsError if something does, also if it came there a moment ago; OSError."""
    if not _renamed(old, new, _NOREPLACE):
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
        os.rename(old, new)


def exchange(one: Path, other: Path) -> bool:
    """Give two things each other's names in one step, so that nobody sees either name without a thing.

    Returns False where the system cannot, before anything is changed. Errors: OSError.
    """
    return _renamed(one, other, _EXCHANGE)


def _renamed(old: Path, new: Path, how: int) -> bool:
    call = _renameat2()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), how) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_HERE:
        return False
    raise OSError(code, os.strerror(code), str(new))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not on this system
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    result: Callable[..., int] = call
    return result
