"""The place of an output: beside its name until it is complete, checked before it begins, renamed at the end."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from alnico.checkpoint.lasting import exchange, rename_new, replace_file, sync_directory
from alnico.checkpoint.lineage import LOCK
from alnico.checkpoint.model import Source
from alnico.checkpoint.shards import format_size
from alnico.errors import OutputError, ResourceError, RunError
from alnico.plan.job import Plan

DISK_MARGIN_BYTES = 16 << 20
MARK = "published.json"


def check_target(out: Path, plan: Plan, overwrite: bool) -> None:
    """Refuse a target that holds something, or that is one of the inputs. Errors: OutputError."""
    check_place(out, plan.sources, overwrite)


def check_place(out: Path, sources: Sequence[Source], overwrite: bool) -> None:
    """Refuse a place for what is made of ``sources``, as :func:`check_target` does. Errors: OutputError."""
    if out.exists():
        target = out.resolve()
        places = [p.resolve() for source in sources for p in source.paths()]
        if any(target == place or target in place.parents for place in places):
            raise OutputError(f"{out}: is one of the inputs or holds it; expected a place of its own. Choose another output.")
    folder = existing_folder(out)
    if not folder.is_dir():
        raise OutputError(f"{out}: {folder} is not a directory. Choose another output.")
    occupied = (any(out.iterdir()) if out.is_dir() else True) if out.exists() or out.is_symlink() else False
    if occupied and not overwrite:
        raise OutputError(
            f"{out}: exists and is not empty; expected a new or empty directory. Choose another output, or say --overwrite."
        )


def existing_folder(out: Path) -> Path:
    """The nearest thing above ``out`` that is there: the disk the output will be on."""
    return next(p for p in out.absolute().parents if p.exists())


def check_disk(plan: Plan, out: Path) -> None:
    """Refuse an output that does not fit its disk; what an interrupted merge holds there counts. Errors: ResourceError."""
    check_room(out, plan.bytes_to_write - PartDirectory(out).used_bytes())


def check_room(out: Path, byte_size: int) -> None:
    """Refuse a place whose disk has not as many bytes, and a margin, free. Errors: ResourceError."""
    folder = existing_folder(out)
    needed = byte_size + DISK_MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{folder}: the output needs {format_size(needed)}, {format_size(free)} are free. "
            "Make room, choose another disk, or a smaller dtype."
        )


class Hold:
    """A directory that one process works in: made if it is not there, and held by a lock in it. Use it in ``with``.

    Errors: OutputError if another process holds it, or if it cannot be made; ``out`` is its name for the user.
    """

    def __init__(self, path: Path, out: Path) -> None:
        self.path = path
        self.out = out
        self._lock = -1

    def __enter__(self) -> Hold:
        while self._lock < 0:
            self._take()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._lock)
        self._lock = -1

    def _take(self) -> None:
        descriptor = -1
        try:
            made = [p for p in (self.path, *self.path.parents) if not p.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            for path in made:
                sync_directory(path.parent)
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except FileNotFoundError:  # a process that ends has removed it between the two
            return
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be made ({error.strerror}). Choose another output.") from None
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A process that ended meanwhile has taken the file away: then this lock holds nothing.
            if os.fstat(descriptor).st_ino == (self.path / "lock").stat().st_ino:
                self._lock = descriptor
                return
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            raise OutputError(f"{self.out}: another process is writing it. Wait for it, or choose another output.") from None
        os.close(descriptor)

    def remove(self) -> None:
        """Remove the directory; the lock is freed when ``with`` ends. Killed halfway, it has lost its name already."""
        gone = self.path.with_name(self.path.name + "-gone")
        shutil.rmtree(gone, ignore_errors=True)
        try:
            os.rename(self.path, gone)
        except OSError:
            gone = self.path
        shutil.rmtree(gone, ignore_errors=True)


class PartDirectory(Hold):
    """``.NAME.alnico-part`` beside the target, held by one process: use it in ``with``.

    Errors: OutputError if another process holds it.
    """

    def __init__(self, out: Path) -> None:
        super().__init__(out.parent / f".{out.name}.alnico-part", out)
        self.model = self.path / "model"
        self.old = out.parent / f".{out.name}.alnico-old"

    def __enter__(self) -> PartDirectory:
        super().__enter__()
        return self

    def used_bytes(self) -> int:
        """Bytes on the disk that an interrupted merge holds."""
        return sum(p.stat().st_blocks * 512 for p in self.model.rglob("*")) if self.model.exists() else 0

    def clear(self) -> None:
        """Forget an unfinished merge."""
        for path in (*self.path.glob("journal*"), *self.path.glob(f"{MARK}*")):
            path.unlink()
        shutil.rmtree(self.model, ignore_errors=True)

    def remove_contents(self) -> None:
        """Remove all but the lock: for what is never taken up."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "lock":
                path.unlink()

    def mend(self) -> None:
        """Give the old model its name back, if a crash between two renames took it."""
        if os.path.lexists(self.old) and not os.path.lexists(self.out):
            os.rename(self.old, self.out)
            sync_directory(self.out.parent)

    def is_published(self, fingerprint: Mapping[str, Any]) -> bool:
        """Did a run of this fingerprint, that was killed then, give the output its name?"""
        return is_published(self.out, self.path / MARK, fingerprint)

    def publish(
        self, single_file: str | None, overwrite: bool, fingerprint: Mapping[str, Any] | None = None, mark: Path | None = None
    ) -> None:
        """Give the finished model its name, all at once; what stood there goes. ``mark`` is the file that says so to a later run.

        Errors: OutputError if something came to stand there meanwhile; RunError. What stood there before stands there after them.
        """
        finished = self.model / single_file if single_file else self.model
        try:
            replace_file(mark or self.path / MARK, json.dumps({"fingerprint": fingerprint, "witness": _witness(finished)}))
            if self.out.is_dir() and not self.out.is_symlink() and not any(self.out.iterdir()):
                self.out.rmdir()
            if os.path.lexists(self.out) and overwrite:
                self._replace(finished)
            else:
                rename_new(finished, self.out)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise OutputError(
                    f"{self.out}: came to be while merging. The finished model is in {finished}; move it yourself."
                ) from None
            raise RunError(
                f"{self.out}: the finished model could not be renamed ({error.strerror}). It is in {finished}."
            ) from None
        try:
            sync_directory(self.out.parent)
        except RunError as error:
            raise RunError(f"{error} The finished model stands under {self.out}, as long as the machine runs.") from None
        with suppress(OSError):  # the next run here removes it
            _remove(self.old)
        self.remove()

    def _replace(self, finished: Path) -> None:
        """Put the finished model in the place of the old one, which goes into this directory, or beside it and is then removed."""
        if exchange(finished, self.out):
            return
        _remove(self.old)
        os.rename(self.out, self.old)
        try:
            os.rename(finished, self.out)
        except OSError:
            os.rename(self.old, self.out)
            raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_published(out: Path, mark: Path, fingerprint: Mapping[str, Any] | None = None) -> bool:
    """Is what stands under ``out`` the model that a run (of this fingerprint) noted in ``mark`` when it published it?"""
    try:
        noted = json.loads(mark.read_text("utf-8"))
        is_it = noted["witness"] == _witness(out)
        return is_it and (fingerprint is None or bool(noted["fingerprint"] == json.loads(json.dumps(fingerprint))))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _witness(out: Path) -> list[int]:
    """What tells an output from every other under its name: the inode, size and time of its lock, or of the one file."""
    status = (out / LOCK if out.is_dir() else out).stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]
