"""Holds an unfinished output next to its name, and gives it the name when it is complete."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from alnico.checkpoint.durable import exchange, rename_new, replace_file, sync_directory
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.lineage import LOCK
from alnico.checkpoint.output_path import Replace, check_replaceable
from alnico.errors import ModelError, OutputError, RunError
from alnico.folders import (
    HAS_DESCRIPTORS,
    WRITABLE,
    Folder,
    fault_in,
    open_to_write,
    owner_fault_at,
    reach,
    remove,
    user_id,
    user_name,
)
from alnico.output.journal import with_device

MARK = "published.json"

PASS = "nodes.pass"
"""The file in the unfinished output that has the pass of the run whose nodes write into it."""

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
"""Errors of disks without locks."""


class Hold:
    """A directory that one process works in, created if missing and held by a lock in it. Use it in ``with``.

    It is private to this user. An existing one is reused only if everything in it is ours and no other user
    can write it. It is held by its descriptor, ``folder``, and all work in it is relative to that. Errors:
    OutputError if another process holds it, if it is not private, or if it cannot be made; ``out`` is its
    name for the user.
    """

    def __init__(self, path: Path, out: object) -> None:
        self.path = path
        self.shown = out
        self._folder: Folder | None = None
        self._lock = -1

    @property
    def folder(self) -> Folder:
        """The directory, opened by ``with``."""
        assert self._folder is not None
        return self._folder

    def __enter__(self) -> Hold:
        while self._lock < 0:
            self._take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)
        self._lock = -1
        self.folder.close()

    def check(self) -> None:
        """Refuse an existing directory that is not private to this user. Errors: OutputError."""
        if not os.path.lexists(self.path):
            return
        try:
            folder = self._opened()
            try:
                self._check(folder)
            finally:
                folder.close()
        except FileNotFoundError:  # another process ended and removed it
            return
        except OSError as error:
            raise self._cannot_be_made(error) from None

    def _opened(self) -> Folder:
        if self.path.is_symlink():
            raise self._not_ours(f"{self.path} is a link")
        try:
            return Folder(self.path)
        except PermissionError:
            if (fault := owner_fault_at(self.path)) is not None:
                raise self._not_ours(f"{self.path} {fault}") from None
            raise

    def _check(self, folder: Folder) -> None:
        if (fault := fault_in(folder)) is not None:
            raise self._not_ours(fault)

    def _not_ours(self, fault: str) -> OutputError:
        # Versions before this check made folders with the mode of the umask.
        advice = f"run `chmod -R go-w {self.path}` or " if WRITABLE in fault else ""
        return OutputError(
            f"{self.shown}: the unfinished work next to it cannot be resumed: {fault}; expected files and folders of yours that nobody "
            f"else can write. Choose another output, or, if you know what it is, {advice}remove {self.path}."
        )

    def _cannot_be_made(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path}: cannot be made ({error.strerror}). Choose another output.")

    def _take(self) -> None:
        folder: Folder | None = None
        descriptor = -1
        try:
            try:
                missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
                self.path.mkdir(0o700, parents=True, exist_ok=True)
                for path in missing:
                    sync_directory(path.parent)
                folder = self._opened()
                self._check(folder)
                descriptor = open_to_write(
                    self.path / "lock", folder, flags=os.O_RDWR | os.O_CREAT, mode=0o600
                )
            except FileNotFoundError:  # another process ended and removed it in between
                return
            except OSError as error:
                raise self._cannot_be_made(error) from None
            try:
                import fcntl

                _lock(descriptor, fcntl)
                # If a process that ended meanwhile removed the file, this lock holds nothing.
                if (
                    os.path.samestat(os.fstat(descriptor), (self.path / "lock").lstat())
                    and folder.is_in_place()
                ):
                    self._lock, self._folder = descriptor, folder
                    folder, descriptor = None, -1
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                    raise self._cannot_be_made(error) from None
                raise OutputError(
                    f"{self.shown}: another process is writing it. Wait for it, or choose another output."
                ) from None
        finally:
            if descriptor >= 0:
                os.close(descriptor)
            if folder is not None:
                folder.close()

    def check_still_there(self) -> None:
        """Refuse to continue if another user has replaced the directory. Errors: OutputError."""
        if not self.folder.is_in_place():
            raise OutputError(
                f"{self.path}: was renamed or replaced by another process while it was written; expected it to stay. Choose an output in a "
                "folder that only you can write."
            )

    def remove(self) -> None:
        """Remove the directory; the lock is freed when ``with`` ends. A kill halfway leaves it without its
        name."""
        if not self.folder.is_in_place():  # it is another user's now
            return
        gone = self.path.with_name(self.path.name + "-gone")
        with suppress(OSError):
            remove(gone)
        try:
            os.rename(self.path, gone)
        except OSError:
            gone = self.path
        with suppress(OSError):
            if not HAS_DESCRIPTORS:
                remove(gone)
                return
            self.folder.remove_contents()
            os.rmdir(gone)


def _lock(descriptor: int, fcntl: Any) -> None:
    """Lock an open file for this process. On disks without flock (Lustre, some network disks), use POSIX
    locks, which end when the process closes any descriptor of the file; on disks without either, lock
    nothing. Errors: BlockingIOError if another process holds it."""
    for lock in (fcntl.flock, fcntl.lockf):
        try:
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise


class PartDirectory(Hold):
    """``.NAME.alnico-part`` next to the target, held by one process. Use it in ``with``.

    Errors: OutputError if another process holds it, if it is not private to this user, or if the existing
    output cannot be replaced.
    """

    def __init__(self, out: Path) -> None:
        super().__init__(out.parent / f".{out.name}.alnico-part", out)
        self.out = out
        self.model = self.path / "model"
        self.old = out.parent / f".{out.name}.alnico-old"

    def __enter__(self) -> PartDirectory:
        super().__enter__()
        return self

    def check(self) -> None:
        super().check()
        self._check_old()
        check_renamable(self.out)

    def _check(self, folder: Folder) -> None:
        # Once the output is published, "model" is the one that it replaced, which may be anybody's, and is only removed.
        fault = fault_in(folder, ignored=self.model.name)
        if fault is None and not is_published(self.out, self.path / MARK):
            fault = fault_in(folder)
        if fault is not None:
            raise self._not_ours(fault)

    def _check_old(self) -> None:
        """Refuse an old model that an interrupted run set aside, if it belongs to another user. Errors:
        OutputError."""
        try:
            fault = owner_fault_at(self.old)
        except OSError:
            return
        if fault is not None:
            raise OutputError(
                f"{self.out}: {self.old} exists, where --overwrite moves the old model, and {fault}; expected nothing, or "
                "what a run of yours left. Choose another output, or remove it."
            )

    def used_bytes(self) -> int:
        """Return the bytes on the disk that an interrupted merge uses."""
        return sum(p.lstat().st_blocks * 512 for p in self.model.rglob("*")) if self.model.exists() else 0

    def clear(self) -> None:
        """Discard an unfinished merge. Errors: RunError."""
        self._empty(lambda name: not name.startswith(("journal", MARK)) and name != self.model.name)

    def remove_contents(self) -> None:
        """Remove everything except the lock, for work that is never resumed. Errors: RunError."""
        self._empty(lambda name: name == "lock")

    def _empty(self, keep: Callable[[str], bool]) -> None:
        try:
            self.folder.remove_contents(keep)
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be emptied ({error.strerror}). Check the disk, or choose another output."
            ) from None

    def restore_old(self) -> None:
        """Rename the old model back, if a crash came between two renames."""
        if os.path.lexists(self.old) and not os.path.lexists(self.out):
            self._check_old()
            os.rename(self.old, self.out)
            sync_directory(self.out.parent)

    def is_published(self, fingerprint: Mapping[str, Any]) -> bool:
        """Did a run of this fingerprint give the output its name before it was killed?"""
        return is_published(self.out, self.path / MARK, fingerprint)

    def publish(
        self,
        single_file: str | None,
        overwrite: Replace,
        fingerprint: Mapping[str, Any] | None = None,
        mark: Path | None = None,
    ) -> None:
        """Give the finished model its name in one step, and remove the model that it replaces. ``mark`` is
        the file that records this.

        Errors: OutputError if something else got the name meanwhile; RunError. After an error, the old model
        is still in place.
        """
        finished = self.model / single_file if single_file else self.model
        self.check_still_there()
        try:
            check_replaceable(self.out, overwrite)  # again: it may have been created meanwhile
            text = json.dumps({"fingerprint": fingerprint, "witness": _witness(finished)})
            replace_file(*((mark, text) if mark else (self.path / MARK, text, self.folder)))
            if self.out.is_dir() and not self.out.is_symlink() and not any(self.out.iterdir()):
                self.out.rmdir()
            if os.path.lexists(self.out) and overwrite:
                self._replace(finished)
            else:
                rename_new(finished, self.out, self.folder)
        except (OSError, OutputError) as error:
            if isinstance(error, OutputError) or error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise OutputError(
                    f"{self.out}: was created while merging. The finished model is in {finished}; move it yourself."
                ) from None
            raise RunError(
                f"{self.out}: the finished model could not be renamed ({error.strerror}). It is in {finished}."
            ) from None
        try:
            sync_directory(self.out.parent)
        except RunError as error:
            raise RunError(
                f"{error} The finished model stands under {self.out}, as long as the machine runs."
            ) from None
        with suppress(OSError):  # the next run here removes it
            remove(self.old)
        self.remove()

    def _replace(self, finished: Path) -> None:
        """Replace the old model by the finished one. The old one moves into this directory, or next to it and
        is then removed."""
        if exchange(finished, self.out, self.folder):
            return
        remove(self.old)
        os.rename(self.out, self.old)
        try:
            name, directory = reach(finished, self.folder)
            os.rename(name, self.out, src_dir_fd=directory)
        except OSError:
            os.rename(self.old, self.out)
            raise


def check_renamable(out: Path) -> None:
    """Refuse an existing output that the system does not let us rename: another user's in a folder with the
    sticky bit, such as ``/tmp``, or a folder that we cannot write. Errors: OutputError.
    """
    user = user_id()
    if not user:  # the administrator, or a system without users
        return
    try:
        status, above = os.lstat(out), os.stat(out.parent)
        is_sticky = bool(above.st_mode & stat.S_ISVTX) and above.st_uid != user
        is_ours = status.st_uid == user or owner_fault_at(out) in (None, "is a link")
    except OSError:
        return
    if is_sticky and not is_ours:
        raise OutputError(
            f"{out}: exists and belongs to {user_name(status.st_uid)}; in {out.parent}, which has the sticky bit, only they can rename "
            "it. Choose another output."
        )
    if (
        stat.S_ISDIR(status.st_mode)
        and any(out.iterdir())
        and not os.access(out, os.W_OK, effective_ids=HAS_DESCRIPTORS)
    ):
        raise OutputError(
            f"{out}: exists, and you cannot write into it (its mode is {stat.S_IMODE(status.st_mode):04o}), so it cannot be replaced. "
            f"Choose another output, or remove it."
        )


def is_published(out: Path, mark: Path, fingerprint: Mapping[str, Any] | None = None) -> bool:
    """Is ``out`` the model that a run (of this fingerprint) recorded in ``mark`` when it published it?"""
    try:
        recorded = read_json(mark)
        is_same = recorded["witness"] == _witness(out)
        return is_same and (
            fingerprint is None
            or bool(with_device(recorded["fingerprint"]) == with_device(json.loads(json.dumps(fingerprint))))
        )
    except (ModelError, RunError, OSError, ValueError, KeyError, TypeError):
        return False


def _witness(out: Path) -> list[int]:
    """Return what identifies an output: the inode, size and time of its lock, or of the one file."""
    status = (out / LOCK if out.is_dir() else out).stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]
