"""Small files and names that outlast a power cut: written whole, brought to the disk, and only then called by their name.

A file's bytes and its name in the directory are two things to a disk: each is brought there by itself (``fsync`` of the file,
``fsync`` of the directory), and what was not may be gone after a power cut, in any order.

No file is written through a link. ``inside`` is a folder that is held open, in which the file is reached whatever its path leads to by now.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from alnico.checkpoint.files import open_regular
from alnico.errors import RunError
from alnico.folders import NO_LINK, Folder, open_to_write, reach, remove

COPIED_BYTES = 1 << 20
"""How much of a side file is copied at a time."""

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""What a system, or a file system, answers that has no such rename."""


def write_file(path: Path, data: bytes | str, inside: Folder | None = None, *, is_new: bool = False) -> None:
    """Write a whole file and bring its bytes to the disk; its name is for :func:`sync_directory`.

    With ``is_new`` what stood under the name goes first, whatever and whosever it was: nothing is written into it. Errors: RunError.
    """
    # Names of files may be no UTF-8: JSON has an escape for what Python makes of them.
    raw = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    try:
        if is_new:
            remove(path, inside)
        descriptor = open_to_write(path, inside, flags=os.O_CREAT | (os.O_EXCL if is_new else os.O_TRUNC))
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


def replace_file(path: Path, data: bytes | str, inside: Folder | None = None) -> None:
    """Give a file new contents, all at once: after a crash it has the old ones or the new ones. Errors: RunError."""
    temporary = path.with_name(path.name + ".tmp")
    write_file(temporary, data, inside, is_new=True)
    try:
        (old, directory), (new, _) = reach(temporary, inside), reach(path, inside)
        os.replace(old, new, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError as error:
        raise cannot_be_written(path, error) from None
    sync_directory(path.parent, inside)


def copy_file(source: Path, target: Path, inside: Folder | None = None) -> None:
    """Copy the contents of a regular file, not its times or permissions; ``inside`` is where the target is.

    What is written to its end meanwhile is no part of it. Errors: OSError, also for a file that was cut short.
    """
    given = open_regular(source)
    try:
        rest = os.fstat(given).st_size
        made = open_to_write(target, inside)
        try:
            while rest and (part := os.read(given, min(rest, COPIED_BYTES))):
                write_on(made, part)
                rest -= len(part)
            if rest:
                raise OSError(errno.EIO, "it was cut short while it was copied", str(source))
        finally:
            os.close(made)
    finally:
        os.close(given)


def sync_directory(directory: Path, inside: Folder | None = None) -> None:
    """Bring the names in a directory to the disk. Errors: RunError."""
    _sync(directory, inside)


def sync_tree(directory: Path, inside: Folder | None = None) -> None:
    """Bring a directory to the disk: the bytes of all files in it, then all names. Errors: RunError."""

    def refuse(error: OSError) -> None:
        raise error

    try:
        found = list(_walk(directory, inside, refuse))
    except OSError as error:
        raise cannot_be_written(directory, error) from None
    for folder, _, files in found:
        for name in files:
            _sync(Path(folder, name), inside)
    for folder, _, _ in found:
        _sync(Path(folder), inside)


def _walk(
    directory: Path, inside: Folder | None, refuse: Callable[[OSError], None]
) -> Iterator[tuple[str, list[str], list[str]]]:
    name, at = reach(directory, inside)
    if at is None:
        yield from os.walk(directory, topdown=False, onerror=refuse)
        return
    for folder, folders, files, _ in os.fwalk(name, topdown=False, onerror=refuse, dir_fd=at):
        yield os.path.join(inside.path if inside else "", folder), folders, files


def _sync(path: Path, inside: Folder | None = None) -> None:
    name, directory = reach(path, inside)
    try:
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = (
            os.open(name, flags) if directory is None else os.open(name, flags | NO_LINK, dir_fd=directory)
        )
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except (
        PermissionError
    ):  # a folder that may be written and not read: all that is written is brought to the disk
        os.sync()
    except OSError as error:
        raise RunError(
            f"{path}: could not be brought to the disk ({error.strerror}). Check the disk; the same command takes the merge up again."
        ) from None


def cannot_be_written(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: cannot be written ({error.strerror}). Make room or check the disk; the same command takes the merge up again."
    )


def rename_new(old: Path, new: Path, inside: Folder | None = None) -> None:
    """Rename where nothing stands; ``inside`` is where the old name is.

    Errors: FileExistsError if something stands there, also if it came there a moment ago; OSError.
    """
    if not _renamed(old, new, _NOREPLACE, inside):
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
        name, directory = reach(old, inside)
        os.rename(name, new, src_dir_fd=directory)


def exchange(one: Path, other: Path, inside: Folder | None = None) -> bool:
    """Give two things each other's names in one step, so that nobody sees either name without a thing. ``inside`` is where the first is.

    Returns False where the system cannot, before anything is changed. Errors: OSError.
    """
    return _renamed(one, other, _EXCHANGE, inside)


def _renamed(old: Path, new: Path, how: int, inside: Folder | None) -> bool:
    call = _renameat2()
    if call is None:
        return False
    name, directory = reach(old, inside)
    if (
        call(
            _AT_FDCWD if directory is None else directory, os.fsencode(name), _AT_FDCWD, os.fsencode(new), how
        )
        == 0
    ):
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
