"""Writes small files that survive a power cut: the bytes reach the disk before the name does.

A disk stores a file's bytes and its name separately. Each needs an ``fsync`` of its own (of the file, of the
directory); without it either may be lost in a power cut, in any order.

No file is written through a link. ``inside`` is a folder that is held open: the file is reached through it,
even if its path has since been replaced.
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
"""Bytes of a side file that are copied at a time."""

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""Errors of a system or file system that has no such rename."""


def write_file(path: Path, data: bytes | str, inside: Folder | None = None, *, is_new: bool = False) -> None:
    """Write a whole file and flush its bytes to disk. :func:`sync_directory` flushes its name.

    With ``is_new`` anything that has the name is removed first, not written into. Errors: RunError.
    """
    # File names may not be UTF-8: JSON has an escape for the surrogates that Python makes of them.
    raw = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    try:
        if is_new:
            remove(path, inside)
        descriptor = open_to_write(path, inside, flags=os.O_CREAT | (os.O_EXCL if is_new else os.O_TRUNC))
        try:
            write_all(descriptor, raw)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise write_error(path, error) from None


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data`` at the current position of a file. Errors: OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def replace_file(path: Path, data: bytes | str, inside: Folder | None = None) -> None:
    """Replace the contents of a file atomically: after a crash it has either the old or the new.

    Errors: RunError.
    """
    temporary = path.with_name(path.name + ".tmp")
    write_file(temporary, data, inside, is_new=True)
    try:
        (old, directory), (new, _) = reach(temporary, inside), reach(path, inside)
        os.replace(old, new, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError as error:
        raise write_error(path, error) from None
    sync_directory(path.parent, inside)


def copy_file(source: Path, target: Path, inside: Folder | None = None) -> None:
    """Copy the contents of a regular file, not its times or permissions; ``inside`` is where the target is.

    Bytes that are appended during the copy are not copied. Errors: OSError, also for a file that was
    truncated.
    """
    reader = open_regular(source)
    try:
        bytes_left = os.fstat(reader).st_size
        writer = open_to_write(target, inside)
        try:
            while bytes_left and (chunk := os.read(reader, min(bytes_left, COPIED_BYTES))):
                write_all(writer, chunk)
                bytes_left -= len(chunk)
            if bytes_left:
                raise OSError(errno.EIO, "it was truncated while it was copied", str(source))
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def sync_directory(directory: Path, inside: Folder | None = None) -> None:
    """Flush the names in a directory to disk. Errors: RunError."""
    _sync(directory, inside)


def sync_file(path: Path, inside: Folder | None = None) -> None:
    """Flush the bytes of a file to disk. Errors: RunError."""
    _sync(path, inside)


def sync_tree(directory: Path, inside: Folder | None = None) -> None:
    """Flush a directory to disk: the bytes of all files in it, then all names. Errors: RunError."""

    def raise_error(error: OSError) -> None:
        raise error

    try:
        tree = list(_walk(directory, inside, raise_error))
    except OSError as error:
        raise write_error(directory, error) from None
    for folder, _, files in tree:
        for name in files:
            _sync(Path(folder, name), inside)
    for folder, _, _ in tree:
        _sync(Path(folder), inside)


def _walk(
    directory: Path, inside: Folder | None, on_error: Callable[[OSError], None]
) -> Iterator[tuple[str, list[str], list[str]]]:
    name, descriptor = reach(directory, inside)
    if descriptor is None:
        yield from os.walk(directory, topdown=False, onerror=on_error)
        return
    for folder, folders, files, _ in os.fwalk(name, topdown=False, onerror=on_error, dir_fd=descriptor):
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
    except PermissionError:  # a folder that may be written but not read: flush everything instead
        os.sync()
    except OSError as error:
        raise RunError(
            f"{path}: could not be flushed to disk ({error.strerror}). "
            "Check the disk; the same command resumes the merge."
        ) from None


def write_error(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: cannot be written ({error.strerror}). "
        "Make room or check the disk; the same command resumes the merge."
    )


def rename_new(old: Path, new: Path, inside: Folder | None = None) -> None:
    """Rename to a name that must be free; ``inside`` is the folder of the old name.

    Errors: FileExistsError if the new name exists, even if it was made a moment ago; OSError.
    """
    if not _try_renameat2(old, new, _NOREPLACE, inside):
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
        name, directory = reach(old, inside)
        os.rename(name, new, src_dir_fd=directory)


def exchange(first: Path, second: Path, inside: Folder | None = None) -> bool:
    """Swap two names in one step, so that neither is ever missing. ``inside`` is the folder of the first.

    Returns False where the system cannot, before anything is changed. Errors: OSError.
    """
    return _try_renameat2(first, second, _EXCHANGE, inside)


def _try_renameat2(old: Path, new: Path, flags: int, inside: Folder | None) -> bool:
    call = _renameat2()
    if call is None:
        return False
    name, directory = reach(old, inside)
    from_directory = _AT_FDCWD if directory is None else directory
    if call(from_directory, os.fsencode(name), _AT_FDCWD, os.fsencode(new), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
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
