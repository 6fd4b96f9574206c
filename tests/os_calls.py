"""The calls of the system by which alnico reads, writes, syncs and renames, each watched: to fail the nth, to die at it, to note it.

Nothing of alnico is replaced but its way to ``renameat2``: what is watched are the functions of ``os`` and ``open`` itself.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from alnico.checkpoint import durable

BY_DESCRIPTOR = ("preadv", "read", "pwrite", "write", "copy_file_range", "fsync", "fdatasync", "ftruncate")
BY_PATH = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "scandir")
READS = ("preadv", "read", "copy_file_range")
WRITES = ("pwrite", "write", "ftruncate", "mkdir")


@dataclass(frozen=True)
class Call:
    """One call about a file under the root: its name, the file, and what it was given."""

    name: str
    path: Path
    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)


Watch = Callable[[Call, Callable[[], Any]], Any]
"""Is given a call and how to make it; what it returns is what the caller gets."""


def path_of(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))


def path_under(argument: Any, directory: int | None) -> Path:
    if isinstance(argument, int):
        return path_of(argument)
    path = Path(os.fsdecode(argument))
    return path_of(directory) / path if directory is not None else Path(os.path.abspath(path))


def made(_call: Call, make: Callable[[], Any]) -> Any:
    return make()


@contextmanager
def watched(root: Path, watch: Watch = made) -> Iterator[None]:
    """Have ``watch`` make all calls about files under ``root``. A sync is told, but no disk is waited for."""
    root = root.resolve()

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            about = arguments[1] if name == "copy_file_range" else arguments[0]
            directory = keywords.get("src_dir_fd" if name in ("rename", "replace") else "dir_fd")
            try:
                path = path_under(about, directory)
            except (OSError, TypeError):
                return real(*arguments, **keywords)
            if not path.is_relative_to(root):
                return real(*arguments, **keywords)
            is_sync = name in ("fsync", "fdatasync")
            return watch(
                Call(name, path, arguments, keywords),
                lambda: None if is_sync else real(*arguments, **keywords),
            )

        return call

    def renameat2() -> Callable[..., int] | None:
        real = found()
        if real is None:
            return None

        def call(_old: int, old: bytes, _new: int, new: bytes, how: int) -> int:
            paths = [
                os.path.abspath(path_under(p, None if at == durable._AT_FDCWD else at))
                for at, p in ((_old, old), (_new, new))
            ]
            try:
                return watch(
                    Call("renameat2", Path(paths[0]), (*paths, how)), lambda: real(_old, old, _new, new, how)
                )
            except OSError as error:
                import ctypes

                ctypes.set_errno(error.errno or 0)
                return -1

        return call

    found = durable._renameat2
    with pytest.MonkeyPatch.context() as patch:
        for name in (*BY_DESCRIPTOR, *BY_PATH):
            if hasattr(os, name):
                patch.setattr(os, name, wrapped(name, getattr(os, name)))
        opened = wrapped("open", io.open)
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        patch.setattr(durable, "_renameat2", renameat2)
        yield


@dataclass
class Counting:
    """Counts calls, and does ``at`` instead of the one with number ``wanted``."""

    wanted: int
    at: Callable[[Call, Callable[[], Any]], Any]
    calls: int = 0
    hit: Call | None = None

    def __call__(self, call: Call, make: Callable[[], Any]) -> Any:
        self.calls += 1
        if self.calls - 1 != self.wanted:
            return make()
        self.hit = call
        return self.at(call, make)
