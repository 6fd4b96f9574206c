"""Opens alnico's own folders safely: checks owners and permissions, and follows no link.

A folder is opened once, without following a link, and checked by its descriptor. All later work uses paths
relative to that descriptor, so it happens in the folder that was checked, even if its name has since been
given to something else.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from alnico.errors import RunError

HAS_DESCRIPTORS = {
    os.open,
    os.mkdir,
    os.stat,
    os.unlink,
    os.rename,
} <= os.supports_dir_fd and os.scandir in os.supports_fd
"""Whether the system supports paths relative to an open folder.

Windows does not: there only names are used.
"""

NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
"""Flags of each file that is opened for writing: opening a link fails."""

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH

WRITABLE = "can be written by others"

DEEPEST = 32
"""Deepest nesting of folders in what alnico writes and resumes."""


class Folder:
    """A folder that is held open. Functions take it as ``inside``, with the full path of a file in it."""

    def __init__(self, path: Path) -> None:
        """Open a folder. Errors: OSError, also for a link and for anything that is not a folder."""
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | NO_LINK) if HAS_DESCRIPTORS else -1

    def status(self) -> os.stat_result:
        return os.fstat(self.descriptor) if HAS_DESCRIPTORS else os.lstat(self.path)

    def is_in_place(self) -> bool:
        """Does the folder's path still lead to this folder?"""
        try:
            return os.path.samestat(self.status(), os.lstat(self.path))
        except OSError:
            return False

    def remove_contents(self, keep: Callable[[str], bool] | None = None) -> None:
        """Remove everything in the folder except the names for which ``keep`` is true. Errors: OSError."""
        for name in os.listdir(self.descriptor if HAS_DESCRIPTORS else self.path):
            if keep is None or not keep(name):
                remove(self.path / name, self)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def reach(path: Path, inside: Folder | None = None) -> tuple[Path, int | None]:
    """Return a path and the descriptor that it is relative to, as functions of ``os`` take them."""
    if inside is None or inside.descriptor < 0:
        return path, None
    return path.relative_to(inside.path), inside.descriptor


def cache_path(kind: str) -> Path:
    """Return where alnico caches one kind of file: ``$ALNICO_CACHE_DIR/kind``, else
    ``$XDG_CACHE_HOME/alnico/kind``, else ``~/.cache/alnico/kind``. Errors: RuntimeError without a home directory.
    """
    chosen, shared = os.environ.get("ALNICO_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME", "")
    if chosen:
        return Path(chosen, kind)
    # The specification of XDG: relative paths must be ignored.
    return Path(shared if os.path.isabs(shared) else Path.home() / ".cache", "alnico", kind)


CACHE_KINDS = ("kernels", "demo", "hashes", "uploads")
"""The folders in the cache, see :func:`cache_path`."""


def may_be_made(path: Path) -> bool:
    """Whether a folder of the cache may be created: not in the home of another user, which sudo may leave in
    the environment. Errors: OSError."""
    user = user_id()
    above = next(p for p in path.absolute().parents if p.exists()).stat()
    return user is None or above.st_uid in (user, 0)


@contextmanager
def private_cache(kind: str) -> Iterator[Folder | None]:
    """Hold the folder of one kind in the cache open, made if needed, until the block ends; None if there is none that is ours
    alone."""
    folder = None
    try:
        path = cache_path(kind)
        if not path.exists() and may_be_made(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = Folder(path)
        is_private = is_ours(folder.status())
    except (OSError, RuntimeError, ValueError):
        # RuntimeError: no home directory; ValueError: an impossible name
        is_private = False
    try:
        yield folder if is_private else None
    finally:
        if folder is not None:
            folder.close()


def is_ours(status: os.stat_result) -> bool:
    """Is a file or folder owned by the user of this process, and can nobody else write it?"""
    return not HAS_DESCRIPTORS or (fault_of(status, user_id()) is None and status.st_uid == os.getuid())


def read_private(name: str, inside: Folder, most_bytes: int) -> bytes | None:
    """Read a file of a folder, at most so many bytes of it; None if there is none that is ours alone."""
    try:
        path, directory = reach(inside.path / name, inside)
        # Never wait for a pipe.
        descriptor = os.open(path, os.O_RDONLY | NO_LINK | getattr(os, "O_NONBLOCK", 0), dir_fd=directory)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or not is_ours(status):
                return None
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(most_bytes)
        finally:
            os.close(descriptor)
    except OSError:
        return None


def open_to_write(
    path: Path, inside: Folder | None = None, *, flags: int = os.O_CREAT | os.O_TRUNC, mode: int = 0o666
) -> int:
    """Open a file for writing, with ``os.O_RDWR`` for reading too; returns its descriptor.

    Errors: OSError, also for a link.
    """
    name, directory = reach(path, inside)
    # O_NONBLOCK: opening a pipe that nobody reads would block. It has no effect on a file.
    flags |= NO_LINK | getattr(os, "O_NONBLOCK", 0) | (0 if flags & os.O_RDWR else os.O_WRONLY)
    return os.open(name, flags, mode) if directory is None else os.open(name, flags, mode, dir_fd=directory)


def open_new(path: Path) -> TextIO:
    """Create a text file of a report. An existing file or link of that name is removed, not followed.

    Errors: OSError.
    """
    path.unlink(missing_ok=True)
    return path.open("x", encoding="utf-8", newline="")


def write_new(path: Path, text: str) -> None:
    """Write a text file of a report, created as by :func:`open_new`. Errors: OSError."""
    with open_new(path) as file:
        file.write(text)


def make_folders(path: Path, above: Path, inside: Folder | None = None) -> None:
    """Make a folder and its parents below ``above``, where they do not exist. Errors: OSError."""
    if inside is None:
        path.mkdir(parents=True, exist_ok=True)
        return
    for folder in reversed([p for p in (path, *path.parents) if p.is_relative_to(above) and p != above]):
        make_folder(folder, inside)


def make_folder(path: Path, inside: Folder | None = None) -> None:
    """Make a folder if it does not exist. Errors: OSError, also for a link."""
    name, directory = reach(path, inside)
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=directory)
    if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def remove(path: Path, inside: Folder | None = None) -> None:
    """Remove a file, a link or a folder with its contents, if it exists.

    No link is followed. Errors: OSError.
    """
    name, directory = reach(path, inside)
    try:
        if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=directory)
        else:
            os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass


@contextmanager
def temporary_files() -> Iterator[None]:
    """Wrap the use of a temporary folder: turns OSError into RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"the system's temporary folder: cannot be written to ({error.strerror}); expected space for "
            "small files. Make room, or set TMPDIR to a folder that you may write to."
        ) from None


def user_id() -> int | None:
    """Return the user who owns files that this process makes; None where the system has no user numbers."""
    return os.geteuid() if hasattr(os, "geteuid") else None


def fault_of(status: os.stat_result, owner: int | None, forbidden: int = OTHERS_WRITE) -> str | None:
    """Say why a file or folder may be written by others than ``owner``; None if it may not."""
    if owner is None:
        return None
    if status.st_uid != owner:
        return f"belongs to {user_name(status.st_uid)}"
    if status.st_mode & forbidden:
        return f"{WRITABLE} (its mode is {stat.S_IMODE(status.st_mode):04o})"
    return None


def user_name(user: int) -> str:
    try:
        import pwd

        return f"the user {pwd.getpwuid(user).pw_name} ({user})"
    except (ImportError, KeyError):
        return f"the user {user}"


def fault_in(folder: Folder, ignored: str = "") -> str | None:
    """Say why a folder cannot be trusted, with the name of what is wrong; None if all of it is ours.

    A folder cannot be trusted if it, or something in it, belongs to another user, can be written by others,
    or is neither a file nor a folder. The entry called ``ignored`` is not checked. Errors: OSError.

    Modes of files matter only where others may enter the folder: alnico closes its own folders, and its files
    get the mode of the umask.
    """
    status = folder.status()
    owner, forbidden = _expected(folder.path, status)
    if owner is None:
        return None
    if (fault := fault_of(status, owner, forbidden)) is not None:
        return f"{folder.path} {fault}"
    is_open = bool(status.st_mode & OTHERS_ENTER)
    return _fault_below(folder.path, folder.descriptor, owner, forbidden if is_open else 0, DEEPEST, ignored)


def owner_fault_at(path: Path) -> str | None:
    """Say why the file at a path is not ours: it is a link, or belongs to another user. Errors: OSError."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    return fault_of(status, _expected(path, status)[0], 0)


def _expected(path: Path, status: os.stat_result) -> tuple[int | None, int]:
    """Return the owner that our files get next to a path, and the mode bits that are forbidden there."""
    owner = user_id()
    if fault_of(status, owner) is None or (sample := _sample_file(path, status.st_dev)) is None:
        return owner, OTHERS_WRITE
    # Some file systems give all files one owner or one mode, so our own files have them too.
    return sample.st_uid, OTHERS_WRITE & ~sample.st_mode


def _fault_below(
    path: Path, descriptor: int, owner: int, forbidden: int, levels_left: int, ignored: str = ""
) -> str | None:
    with os.scandir(descriptor if HAS_DESCRIPTORS else path) as entries:
        names = sorted(entry.name for entry in entries if entry.name != ignored)
    for name in names:
        entry_path = path / name
        try:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        except FileNotFoundError:  # another alnico process is at work; the lock will report it
            continue
        if stat.S_ISLNK(status.st_mode):
            return f"{entry_path} is a link"
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            return f"{entry_path} is a pipe or a device"
        if (fault := fault_of(status, owner, forbidden)) is not None:
            return f"{entry_path} {fault}"
        if stat.S_ISDIR(status.st_mode):
            if levels_left == 0:
                return f"{entry_path} is nested more than {DEEPEST} folders deep"
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | NO_LINK, dir_fd=descriptor)
            try:
                fault = _fault_below(entry_path, below, owner, forbidden, levels_left - 1)
            finally:
                os.close(below)
            if fault is not None:
                return fault
    return None


def _sample_file(path: Path, device: int) -> os.stat_result | None:
    """Make a private file next to a folder, and return its status; None if it is on another device."""
    sample = path.with_name(f".alnico-{secrets.token_hex(8)}")
    try:
        descriptor = os.open(sample, os.O_CREAT | os.O_EXCL | os.O_WRONLY | NO_LINK, 0o600)
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
            os.unlink(sample)
    except OSError:
        return None
    return status if status.st_dev == device else None
