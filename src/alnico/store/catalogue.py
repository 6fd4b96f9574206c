"""Opens the index of a store, after it has read what changed in the store's files since the last time."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from alnico.checkpoint.files import read_small
from alnico.checkpoint.task_vectors.manifest import is_name
from alnico.checkpoint.task_vectors.store_folder import INDEX, VECTORS, versions_of
from alnico.errors import AlnicoError, ModelError
from alnico.store.entry import Entry, entry_of, parse_entry
from alnico.store.index import Index, Stamp
from alnico.store.local_store import REMOTES, UNFINISHED, LocalStore

SETTLED_NS = 3_000_000_000
"""Age from which on a time of change is trusted: file systems count it in steps of up to two seconds."""

UNKNOWN = -1
"""In place of a stamp: what is read again every time."""

MASK = (1 << 63) - 1
"""SQLite's largest integer."""

MAX_LIST_BYTES = 1 << 30
"""Largest list of a remote's entries that is read."""


class Catalogue:
    """The index of a store with the notes about what could not be read. Use it in ``with``."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self.notes: tuple[str, ...] = ()
        store.check()
        self.index = Index(store.folder / INDEX if store.exists else None, self._fill)

    def __enter__(self) -> Catalogue:
        self._fill(self.index)
        return self

    def __exit__(self, *_: object) -> None:
        self.index.close()

    def _fill(self, index: Index) -> None:
        """Read what changed since the index was made."""
        if self._store.exists:
            notes = [*_read_vectors(index, self._store.folder), *_read_remotes(index, self._store.folder)]
            self.notes = tuple(notes)


def _read_vectors(index: Index, store: Path) -> Iterator[str]:
    """Bring the local entries up to date: the folders of names that changed are read. Yields notes."""
    seen = index.stamps("")
    found = _stamps(store / VECTORS)
    if found == seen:  # of 10,000 names, comparing one by one takes longer than the search
        return
    different = [name for name, stamp in found.items() if seen.get(name) != stamp and is_name(name)]
    now = _now(store) if different else 0
    changed: list[tuple[str, list[Entry], Stamp]] = []
    for name in sorted(different):
        entries, problems = _versions(store, name)
        yield from problems
        # A folder with damaged versions is read, and reported, every time.
        stamp = UNKNOWN if problems else _settled(store / VECTORS / name, found[name], now)
        if stamp != UNKNOWN or name not in seen or index.versions("", name) != entries:
            changed.append((name, entries, (name, stamp)))
    if changed:
        index.replace_names(changed)
    if gone := [name for name in seen if name not in found]:
        index.replace_names([(name, (), None) for name in gone])
        index.forget_stamps("", gone)


def _versions(store: Path, name: str) -> tuple[list[Entry], list[str]]:
    entries, problems = [], []
    for version in versions_of(store, name):
        place = store / VECTORS / name / str(version)
        try:
            entry = entry_of(place, version)
            if entry.name != name:
                raise ModelError(
                    f"{place}: its manifest says that it is {entry.name!r}; it is not listed. Remove it."
                )
        except AlnicoError as error:
            problems.append(str(error))
        else:
            entries.append(entry)
    return entries, problems


def _read_remotes(index: Index, store: Path) -> Iterator[str]:
    """Bring the entries of remotes up to date, from what they had when they were last asked. Yields notes."""
    known = index.remote_stamps()
    for name, stamp in _stamps(store / REMOTES).items():
        try:
            if known.get(name, ("", UNKNOWN))[1] != stamp:
                now = _now(store)
                address, entries = read_remote(store / REMOTES / name)
                index.replace(address, entries, (name, _settled(store / REMOTES / name, stamp, now)))
            known.pop(name, None)
        except AlnicoError as error:  # what it had is removed below
            yield str(error)
    for name, (address, _) in known.items():
        index.remove(address)
        index.forget_stamps(address, [name])


def read_remote(path: Path) -> tuple[str, list[Entry]]:
    """Return the address of a remote and what it had when it was last asked. Errors: ModelError."""
    text = read_small(path, MAX_LIST_BYTES, "the list of a remote's task vectors").decode("utf-8", "replace")
    first, *rest = text.splitlines() or [""]
    try:
        address = json.loads(first)["address"]
        if not isinstance(address, str) or not address:
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModelError(
            f"{path}: does not begin with the address of a remote; expected what `alnico store update` writes. Remove the file, and "
            "pull from the remote again."
        ) from None
    return address, [parse_entry(line, f"{path}:{i}") for i, line in enumerate(rest, 2)]


def remote_addresses(store: LocalStore) -> list[str]:
    """Return the addresses of the remotes that vectors were pulled from or pushed to, sorted. Errors: ModelError."""
    return sorted(read_remote(store.folder / REMOTES / name)[0] for name in _stamps(store.folder / REMOTES))


def _stamps(folder: Path) -> dict[str, int]:
    """Return of each name in a folder a number that changes when the file or folder does."""
    try:
        with os.scandir(folder) as entries:
            return {e.name: _stamp(e.stat(follow_symlinks=False)) for e in entries}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error.strerror}). Check its permissions.") from None


def _stamp(status: os.stat_result) -> int:
    return (status.st_mtime_ns ^ status.st_ino << 8) & MASK


def _settled(path: Path, stamp: int, now_ns: int) -> int:
    """Return a stamp, or UNKNOWN if another change would leave it the same."""
    try:
        status = os.lstat(path)
    except OSError:
        return UNKNOWN
    return stamp if _stamp(status) == stamp and now_ns - status.st_mtime_ns > SETTLED_NS else UNKNOWN


def _now(store: Path) -> int:
    """Return the time by the clock of the store's file system, which its times of change are from; 0 if it cannot be written."""
    try:
        with tempfile.TemporaryFile(dir=store / UNFINISHED) as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0
