"""Folders of our own: who owns them, who may write into them, and work in them that no link leads elsewhere.

A folder is opened once, without following a link, and checked by its descriptor. What is done in it afterwards is done relative to that
descriptor: in the folder that was checked, whatever stands under its name by then.
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
"""Whether the system opens folders and works relative to them. Windows does not: there names are all there is."""

NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
"""Flags of each file that is opened for writing: a link that stands under its name is an error."""

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH

WRITABLE = "can be written by others"

DEEPEST = 32
"""Folders in one another, in what alnico makes and takes up again."""


class Folder:
    """A folder that is held open. Functions take it as ``inside``, beside the whole path of a file in it, and reach the file by it."""

    def __init__(self, path: Path) -> None:
        """Open a folder. Errors: OSError, for a link and for what is no folder too."""
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | NO_LINK) if HAS_DESCRIPTORS else -1

    def status(self) -> os.stat_result:
        return os.fstat(self.descriptor) if HAS_DESCRIPTORS else os.lstat(self.path)

    def is_there(self) -> bool:
        """Does the folder still stand under its name?"""
        try:
            return os.path.samestat(self.status(), os.lstat(self.path))
        except OSError:
            return False

    def remove_contents(self, keep: Callable[[str], bool] | None = None) -> None:
        """Remove what is in the folder, but the names to ``keep``. Errors: OSError."""
        for name in os.listdir(self.descriptor if HAS_DESCRIPTORS else self.path):
            if keep is None or not keep(name):
                remove(self.path / name, self)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def reach(path: Path, inside: Folder | None = None) -> tuple[Path, int | None]:
    """A path, and the descriptor that it is relative to: those that functions of ``os`` take."""
    if inside is None or inside.descriptor < 0:
        return path, None
    return path.relative_to(inside.path), inside.descriptor


def open_to_write(
    path: Path, inside: Folder | None = None, *, flags: int = os.O_CREAT | os.O_TRUNC, mode: int = 0o666
) -> int:
    """Open a file for writing, for reading too with ``os.O_RDWR``; returns its descriptor. Errors: OSError, for a link too."""
    name, directory = reach(path, inside)
    # A pipe that nobody reads would be waited for; for a file it says nothing.
    flags |= NO_LINK | getattr(os, "O_NONBLOCK", 0) | (0 if flags & os.O_RDWR else os.O_WRONLY)
    return os.open(name, flags, mode) if directory is None else os.open(name, flags, mode, dir_fd=directory)


def open_new(path: Path) -> TextIO:
    """Open a text file of a report to write it anew. What stood under its name goes first: if that was a link, it is not followed.

    Errors: OSError.
    """
    path.unlink(missing_ok=True)
    return path.open("x", encoding="utf-8", newline="")


def write_new(path: Path, text: str) -> None:
    """Write a text file of a report anew, as :func:`open_new` does. Errors: OSError."""
    with open_new(path) as file:
        file.write(text)


def make_folders(path: Path, above: Path, inside: Folder | None = None) -> None:
    """Make a folder, unless it is there, and those between it and the one ``above`` it. Errors: OSError."""
    if inside is None:
        path.mkdir(parents=True, exist_ok=True)
        return
    for place in reversed([p for p in (path, *path.parents) if p.is_relative_to(above) and p != above]):
        make_folder(place, inside)


def make_folder(path: Path, inside: Folder | None = None) -> None:
    """Make a folder, unless it is there. Errors: OSError, for a link too."""
    name, directory = reach(path, inside)
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=directory)
    if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def remove(path: Path, inside: Folder | None = None) -> None:
    """Remove a file, a link or a folder with all that is in it; nothing if it is not there. No link is followed. Errors: OSError."""
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
    """Around making a temporary folder, and writing into it. Errors: RunError for those of the system."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"the system's temporary folder: nothing can be written there ({error.strerror}); expected some room for small files. Make room, or set "
            "TMPDIR to a folder that can be written."
        ) from None


def user_id() -> int | None:
    """The user whose files this process makes; None where there are no such numbers."""
    return os.geteuid() if hasattr(os, "geteuid") else None


def fault_of(status: os.stat_result, owner: int | None, forbidden: int = OTHERS_WRITE) -> str | None:
    """What is wrong with a file or folder that only ``owner`` should be able to write, in words; None if nothing is."""
    if owner is None:
        return None
    if status.st_uid != owner:
        return f"belongs to {name_of(status.st_uid)}"
    if status.st_mode & forbidden:
        return f"{WRITABLE} (its mode is {stat.S_IMODE(status.st_mode):04o})"
    return None


def name_of(user: int) -> str:
    try:
        import pwd

        return f"the user {pwd.getpwuid(user).pw_name} ({user})"
    except (ImportError, KeyError):
        return f"the user {user}"


def fault_in(folder: Folder, but: str = "") -> str | None:
    """Why a folder is not to be trusted: it, or something in it, belongs to another user, can be written by others, or is no file or
    folder; in words, with the name. None where all of it is ours. What is called ``but`` in it is not looked at. Errors: OSError.

    Modes of files matter where others may enter the folder: files get the modes of the umask, folders that we made are closed.
    """
    status = folder.status()
    owner, forbidden = _expected(folder.path, status)
    if owner is None:
        return None
    if (fault := fault_of(status, owner, forbidden)) is not None:
        return f"{folder.path} {fault}"
    is_open = bool(status.st_mode & OTHERS_ENTER)
    return _fault_below(folder.path, folder.descriptor, owner, forbidden if is_open else 0, DEEPEST, but)


def owner_fault_at(path: Path) -> str | None:
    """Why what stands under a path is not taken for ours: it is a link, or another user's; in words. Errors: OSError."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    return fault_of(status, _expected(path, status)[0], 0)


def _expected(path: Path, status: os.stat_result) -> tuple[int | None, int]:
    """The owner of what we make where a path is, and the bits of a mode that are forbidden there."""
    owner = user_id()
    if fault_of(status, owner) is None or (made := _made_beside(path, status.st_dev)) is None:
        return owner, OTHERS_WRITE
    # A file system may give all files one owner, or one mode: what we make there is no different.
    return made.st_uid, OTHERS_WRITE & ~made.st_mode


def _fault_below(
    path: Path, descriptor: int, owner: int, forbidden: int, deeper: int, but: str = ""
) -> str | None:
    with os.scandir(descriptor if HAS_DESCRIPTORS else path) as entries:
        names = sorted(entry.name for entry in entries if entry.name != but)
    for name in names:
        place = path / name
        try:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        except FileNotFoundError:  # another process of ours is at work, and the lock will say so
            continue
        if stat.S_ISLNK(status.st_mode):
            return f"{place} is a link"
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            return f"{place} is a pipe or a device"
        if (fault := fault_of(status, owner, forbidden)) is not None:
            return f"{place} {fault}"
        if stat.S_ISDIR(status.st_mode):
            if deeper == 0:
                return f"{place} is a folder in {DEEPEST} others"
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | NO_LINK, dir_fd=descriptor)
            try:
                found = _fault_below(place, below, owner, forbidden, deeper - 1)
            finally:
                os.close(below)
            if found is not None:
                return found
    return None


def _made_beside(path: Path, device: int) -> os.stat_result | None:
    """How a file looks that we make, closed to others, beside a folder; None if that tells nothing about the folder."""
    place = path.with_name(f".alnico-{secrets.token_hex(8)}")
    try:
        descriptor = os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY | NO_LINK, 0o600)
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
            os.unlink(place)
    except OSError:
        return None
    return status if status.st_dev == device else None
