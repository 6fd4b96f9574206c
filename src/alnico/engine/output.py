"""The place of an output: beside its name until it is complete, checked before it begins, renamed at the end."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from alnico.checkpoint.model import Source
from alnico.checkpoint.shards import format_size
from alnico.checkpoint.writer import sync_directory
from alnico.errors import OutputError, ResourceError, RunError
from alnico.plan.job import Plan

DISK_MARGIN_BYTES = 16 << 20


def check_target(out: Path, plan: Plan, overwrite: bool) -> None:
    """Refuse a target that holds something, or that is one of the inputs. Errors: OutputError."""
    check_place(out, plan.sources, overwrite)


def check_place(out: Path, sources: Sequence[Source], overwrite: bool) -> None:
    """Refuse a target that holds something, or that is one of ``sources``. Errors: OutputError."""
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
    check_free(out, plan.bytes_to_write - PartDirectory(out).used_bytes())


def check_free(out: Path, size: int) -> None:
    """Refuse an output of ``size`` bytes that does not fit its disk. Errors: ResourceError."""
    folder = existing_folder(out)
    needed = size + DISK_MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{folder}: the output needs {format_size(needed)}, {format_size(free)} are free. "
            "Make room, choose another disk, or a smaller dtype."
        )


class PartDirectory:
    """``.NAME.alnico-part`` beside the target, held by one process: use it in ``with``.

    Errors: OutputError if another process holds it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.parent / f".{out.name}.alnico-part"
        self.model = self.path / "model"
        self._lock = -1

    def __enter__(self) -> PartDirectory:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be made ({error.strerror}). Choose another output.") from None
        try:
            import fcntl

            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise OutputError(f"{self.out}: another process is writing it. Wait for it, or choose another output.") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._lock)

    def used_bytes(self) -> int:
        """Bytes on the disk that an interrupted merge holds."""
        return sum(p.stat().st_blocks * 512 for p in self.model.glob("*")) if self.model.exists() else 0

    def clear(self) -> None:
        """Forget an unfinished merge."""
        shutil.rmtree(self.model, ignore_errors=True)
        for path in self.path.glob("journal*"):
            path.unlink()

    def remove(self) -> None:
        """Remove the directory; the lock is freed when ``with`` ends."""
        shutil.rmtree(self.path, ignore_errors=True)

    def publish(self, single_file: str | None, overwrite: bool) -> None:
        """Give the finished model its name. Errors: OutputError if something came to stand there meanwhile."""
        finished = self.model / single_file if single_file else self.model
        old = self.out.parent / f".{self.out.name}.alnico-old"
        try:
            if self.out.is_dir() and not any(self.out.iterdir()):
                self.out.rmdir()
            if self.out.exists() and overwrite:
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.out, old)
            elif self.out.exists():
                raise OutputError(f"{self.out}: came to be while merging. The finished model is in {finished}; move it yourself.")
            os.rename(finished, self.out)
            sync_directory(self.out.parent)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise OutputError(
                    f"{self.out}: came to be while merging. The finished model is in {finished}; move it yourself."
                ) from None
            raise RunError(
                f"{self.out}: the finished model could not be renamed ({error.strerror}). It is in {finished}."
            ) from None
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)
        self.remove()
