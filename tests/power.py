"""A disk that forgets: what a program wrote, synced and renamed is noted, and a power cut leaves only what was brought to the disk.

The rules are those of POSIX, and stricter than most file systems: ``fsync`` of a file keeps its bytes, not its name; a name that was
made, moved or taken away is kept by ``fsync`` of its directory; a rename is kept as a whole. All else is lost, or, at random, part of it.
"""

from __future__ import annotations

import os
import random
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from os_calls import Call, path_under

Event = tuple[Any, ...]


class Recorder:
    """Makes calls, one at a time, and notes those that change something: for :func:`os_calls.watched`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[Event] = []
        self._lock = threading.Lock()

    def __call__(self, call: Call, make: Callable[[], Any]) -> Any:
        with self._lock:
            was_there = os.path.lexists(call.path)
            result = make()
            self.log += self._noted(call, result, was_there)
            return result

    def _noted(self, call: Call, result: Any, was_there: bool) -> list[Event]:
        name = call.path.relative_to(self.root).as_posix()
        given = call.arguments
        if call.name == "open":
            flags = given[1] if len(given) > 1 else call.keywords.get("mode", "r")
            if not isinstance(flags, int):
                assert "r" in flags, f"{call.path} is written by open(), where no sync can follow"
                return []
            if not was_there:
                return [("create", name, os.fstat(result).st_ino)]
            return [("truncate", os.fstat(result).st_ino, 0)] if flags & os.O_TRUNC else []
        if call.name == "pwrite":
            return [("write", _inode(given[0]), given[2], bytes(given[1][:result]))]
        if call.name == "write":
            return [
                (
                    "write",
                    _inode(given[0]),
                    os.lseek(given[0], 0, os.SEEK_CUR) - result,
                    bytes(given[1][:result]),
                )
            ]
        if call.name == "copy_file_range":
            return [("write", _inode(given[1]), given[4], os.pread(given[1], result, given[4]))]
        if call.name == "ftruncate":
            return [("truncate", _inode(given[0]), given[1])]
        if call.name in ("fsync", "fdatasync"):
            status = os.fstat(given[0])
            return [("sync directory", name) if stat.S_ISDIR(status.st_mode) else ("sync", status.st_ino)]
        if call.name in ("rename", "replace"):
            other = path_under(given[1], call.keywords.get("dst_dir_fd"))
            return [("rename", name, other.relative_to(self.root).as_posix())]
        if call.name == "renameat2" and result == 0:
            other = Path(given[1]).relative_to(self.root).as_posix()
            return [("exchange" if given[2] == 2 else "rename", name, other)]
        if call.name == "mkdir":
            return [("mkdir", name)]
        if call.name in ("unlink", "rmdir"):
            return [("remove", name)]
        return []


def _inode(descriptor: int) -> int:
    return os.fstat(descriptor).st_ino


@dataclass(eq=False)
class Node:
    """A file (``now`` its bytes) or a directory (``now`` its entries), with what of it is on the disk (``kept``)."""

    now: Any
    kept: Any
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def write(self, part: tuple[int, bytes | None]) -> None:
        offset, data = part
        size = len(self.kept)
        if data is None:
            del self.kept[offset:]
            self.kept.extend(bytes(max(offset - size, 0)))
        else:
            self.kept.extend(bytes(max(offset - size, 0)))
            self.kept[offset : offset + len(data)] = data


def directory() -> Node:
    return Node({}, {})


def file(data: bytes = b"") -> Node:
    return Node(None, bytearray(data))


class Disk:
    """What a log of events makes of a directory; ``before`` are files in it that were there, and safe."""

    def __init__(self, before: dict[str, bytes] | None = None) -> None:
        self.root = directory()
        self._files: dict[int, Node] = {}
        self._names: list[tuple[tuple[Node, ...], list[tuple[Node, str, Node | None]]]] = []
        for name, data in (before or {}).items():
            place = self.root
            *folders, last = name.split("/")
            for folder in folders:
                place = place.now.setdefault(folder, directory())
            place.now[last] = file(data)
        _keep_all(self.root)

    def take(self, event: Event) -> None:
        kind, *given = event
        if kind in ("create", "mkdir"):
            folder, name = self._place(given[0])
            made = folder.now[name] = file() if kind == "create" else directory()
            if kind == "create":
                self._files[given[1]] = made
            self._change((folder, name, made))
        elif kind == "remove":
            folder, name = self._place(given[0])
            del folder.now[name]
            self._change((folder, name, None))
        elif kind in ("rename", "exchange"):
            (one, old), (other, new) = self._place(given[0]), self._place(given[1])
            moved, there = one.now.pop(old), other.now.get(new)
            other.now[new] = moved
            if kind == "exchange":
                one.now[old] = there
            self._change((one, old, there if kind == "exchange" else None), (other, new, moved))
        elif kind in ("write", "truncate"):
            self._files[given[0]].pending.append((given[1], given[2] if kind == "write" else None))
        elif kind == "sync":
            node = self._files[given[0]]
            for part in node.pending:
                node.write(part)
            node.pending.clear()
        else:
            place = self._node(given[0])
            for folders, changes in self._names:
                if place in folders:
                    _apply(changes)
            self._names = [change for change in self._names if place not in change[0]]

    def cut_off(self, chance: random.Random | None = None) -> None:
        """Cut the power: what is not on the disk is lost; with ``chance``, a part of it is not."""
        if chance is None:
            return
        for _, changes in self._names[
            : chance.randint(0, len(self._names))
        ]:  # a journal of names keeps their order
            _apply(changes)
        for node in self._files.values():
            for offset, data in node.pending:
                if chance.random() < 0.5:
                    node.write((offset, data if data is None else data[: chance.randint(0, len(data))]))

    def put(self, target: Path) -> None:
        """Make a directory of what is on the disk."""
        _put(self.root, target)

    def _change(self, *changes: tuple[Node, str, Node | None]) -> None:
        self._names.append((tuple(folder for folder, _, _ in changes), list(changes)))

    def _node(self, name: str) -> Node:
        place = self.root
        for part in name.split("/") if name != "." else ():
            place = place.now[part]
        return place

    def _place(self, name: str) -> tuple[Node, str]:
        folder, _, last = name.rpartition("/")
        return self._node(folder or "."), last


def _apply(changes: list[tuple[Node, str, Node | None]]) -> None:
    for folder, name, node in changes:
        if node is None:
            folder.kept.pop(name, None)
        else:
            folder.kept[name] = node


def _keep_all(node: Node) -> None:
    if isinstance(node.now, dict):
        node.kept = dict(node.now)
        for inner in node.now.values():
            _keep_all(inner)


def _put(node: Node, target: Path) -> None:
    if isinstance(node.kept, dict):
        target.mkdir()
        for name, inner in node.kept.items():
            _put(inner, target / name)
    else:
        target.write_bytes(node.kept)
