"""Adds finished task vectors to a local store by one rename, removes them, and cleans up after killed writers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from alnico.checkpoint.durable import exchange, rename_new, sync_directory, sync_tree, write_file
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.task_vectors.store_folder import (
    CACHE,
    MARK,
    VECTORS,
    VERSION,
    default_store,
    vector_folder,
    versions_of,
)
from alnico.errors import AlnicoError, ModelError, OutputError, RunError
from alnico.folders import remove
from alnico.output.staging import Hold
from alnico.store.entry import Entry, entry_of

UNFINISHED = "unfinished"
"""The folder of a store in which writers work, each in a private folder that it holds by a lock."""

REMOTES = "remotes"
"""The folder of a store with what its remotes had when they were last asked: a list of entries for each."""

REMOVED = "removed.json"
"""What is left in the folder of a removed version, so that its number never names anything else."""

ORIGIN = ".origin.json"
"""End of the name of the file, next to a version, that says where it was pulled from."""

TRIES = 100
"""How often a private folder is tried; see :meth:`LocalStore.private_folder`."""

FORMAT = "alnico store"
FORMAT_VERSION = 1

OWN_NAMES = {VECTORS, UNFINISHED, REMOTES}
"""What a store may have before its mark: a kill may come between."""


class LocalStore:
    """A folder of task vectors. It is made when the first one is added; until then it is empty.

    Any number of processes may read and write it at once. A version appears by one rename and never changes.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = default_store() if folder is None else Path(os.path.expanduser(folder)).absolute()

    @property
    def exists(self) -> bool:
        return (self.folder / MARK).is_file()

    def check(self) -> None:
        """Refuse a folder that holds something else. Errors: OutputError, ModelError."""
        if self.exists:
            settings = read_json(self.folder / MARK, is_ours=True)
            if settings.get("format") != FORMAT or settings.get("version") != FORMAT_VERSION:
                raise ModelError(
                    f"{self.folder / MARK}: has format {settings.get('format')!r:.40} and version {settings.get('version')!r:.40}; this "
                    f"alnico reads version {FORMAT_VERSION} of {FORMAT!r}. Update alnico, or choose another store."
                )
        elif os.path.lexists(self.folder) and not self._is_begun() and not self.exists:
            raise OutputError(
                f"{self.folder}: is not a store of task vectors, as it has no {MARK}; expected a store, or a new or empty folder. "
                "Choose another folder, by --store, alnico.Store(folder) or ALNICO_STORE."
            )

    def _is_begun(self) -> bool:
        """Is the folder empty, or as a kill left it before it was a store?"""
        return self.folder.is_dir() and set(os.listdir(self.folder)) <= {*OWN_NAMES, CACHE}

    def begin(self) -> None:
        """Make the store, if it is not there yet. Errors: OutputError, ModelError, RunError."""
        self.check()
        if self.exists:
            return
        with self._writes(self.folder):
            for name in OWN_NAMES:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        with self.private_folder() as new:
            write_file(new, json.dumps({"format": FORMAT, "version": FORMAT_VERSION}) + "\n")
            with self._writes(self.folder):
                os.replace(new, self.folder / MARK)
        sync_directory(self.folder)

    @contextmanager
    def private_folder(self) -> Iterator[Path]:
        """Lend a path in the store that nobody else uses: for a new folder or file, which is removed at the end of the block.

        What killed writers left is removed first. Errors: OutputError, RunError.
        """
        with self._writes(self.folder):
            (self.folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
        self._clean()
        with ExitStack() as stack:
            for tries_left in reversed(range(TRIES)):
                try:
                    hold = stack.enter_context(
                        Hold(self.folder / UNFINISHED / secrets.token_hex(8), self.folder)
                    )
                    break
                except OutputError:  # another writer, which cleans up, took it before it was held
                    if not tries_left:
                        raise
            stack.callback(hold.remove)
            yield hold.path / "new"

    def publish(self, folder: Path, version: int | None = None) -> Entry:
        """Make a finished task vector in a private folder of this store the next version of its name, by one rename.

        Nothing is ever replaced. If a version has the same content already, that is the result, and nothing changes.
        ``version`` is the wanted number; if it is taken, the next free one is used.

        Errors: ModelError for a folder that is not a task vector, RunError.
        """
        name = entry_of(folder, 1).name
        entry = self._same(folder, name)
        if entry is not None:
            return entry
        sync_tree(folder)
        place = self.folder / VECTORS / name
        with self._writes(place):
            place.mkdir(parents=True, exist_ok=True)
            sync_directory(place.parent)
            while True:
                taken = self._taken(name)
                wanted = max(taken, default=0) + 1 if version is None or version in taken else version
                try:
                    rename_new(folder, place / str(wanted))
                except OSError as error:  # another writer was faster
                    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                        continue
                    raise
                break
        sync_directory(place)
        return entry_of(place / str(wanted), wanted)

    def _same(self, folder: Path, name: str) -> Entry | None:
        """Return the version that has the content of a folder already."""
        sha256 = entry_of(folder, 1).sha256
        for version in reversed(versions_of(self.folder, name)):
            with suppress(AlnicoError):  # a damaged version is no reason not to add a good one
                entry = entry_of(self.folder / VECTORS / name / str(version), version)
                if entry.sha256 == sha256:
                    return entry
        return None

    def _taken(self, name: str) -> list[int]:
        """Return all numbers of versions that exist or existed."""
        return [int(v) for v in os.listdir(self.folder / VECTORS / name) if VERSION.fullmatch(v)]

    def remove(self, reference: str) -> list[Entry]:
        """Remove ``NAME@VERSION``, or all versions of ``NAME``; returns what was removed. Their numbers are not used again.

        Errors: ModelError for what the store does not have, RunError.
        """
        latest = vector_folder(reference, self.folder)
        name = latest.parent.name
        versions = [int(latest.name)] if "@" in reference else versions_of(self.folder, name)
        removed = []
        for version in versions:
            place = latest.parent / str(version)
            try:
                entry = entry_of(place, version)
            except ModelError:  # damaged: that may be why it is removed
                entry = Entry(name, version, "0" * 64, 0)
            with self.private_folder() as new, self._writes(place):
                new.mkdir()
                write_file(new / REMOVED, json.dumps({"sha256": entry.sha256}) + "\n")
                if not exchange(new, place):
                    os.rename(place, new.with_name("old"))
                    os.rename(new, place)
                with suppress(OSError):
                    os.unlink(self._origin_path(name, version))
            sync_directory(latest.parent)
            removed.append(entry)
        return removed

    def note_origin(self, entry: Entry, origin: Mapping[str, Any]) -> None:
        """Note next to a version where it came from. Errors: RunError."""
        self._write(self._origin_path(entry.name, entry.version), json.dumps(origin) + "\n")

    def origin(self, name: str, version: int) -> Mapping[str, Any]:
        """Return where a version came from: ``source``, an address, and what it is there; empty if it was made here."""
        path = self._origin_path(name, version)
        try:
            return read_json(path, is_ours=True) if path.is_file() else {}
        except ModelError:
            return {}

    def _origin_path(self, name: str, version: int) -> Path:
        return self.folder / VECTORS / name / f"{version}{ORIGIN}"

    def remember_remote(self, address: str) -> None:
        """Note the address of a remote, for later searches and updates. Errors: OutputError, ModelError, RunError."""
        self.begin()
        path = remote_file(self.folder, address)
        if not path.is_file():
            self._write(path, _remote_text(address, ()))

    def forget_remote(self, address: str) -> None:
        """Forget a remote and what it had. Errors: RunError."""
        with self._writes(self.folder):
            remove(remote_file(self.folder, address))

    def note_entries(self, address: str, entries: Sequence[Entry]) -> None:
        """Note what a remote has now. Errors: OutputError, ModelError, RunError."""
        self.begin()
        self._write(remote_file(self.folder, address), _remote_text(address, entries))

    def _write(self, path: Path, text: str) -> None:
        """Write a small file of the store in one step; of several writers at once, the last one wins."""
        with self.private_folder() as new:
            write_file(new, text)
            with self._writes(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(new, path)
        sync_directory(path.parent)

    def _clean(self) -> None:
        """Remove private folders of writers that were killed: those whose lock is free."""
        for name in os.listdir(self.folder / UNFINISHED):
            with suppress(OutputError, OSError), Hold(self.folder / UNFINISHED / name, self.folder) as left:
                left.remove()

    @contextmanager
    def _writes(self, path: Path) -> Iterator[None]:
        """Turn OSError into RunError."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{path}: cannot be written ({error.strerror}); expected a store that you may write. Check its permissions and the "
                "disk, or choose another by --store, alnico.Store(folder) or ALNICO_STORE."
            ) from None


def remote_file(store: Path, address: str) -> Path:
    """Return the file of a store with what a remote had when it was last asked."""
    return store / REMOTES / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}.jsonl"


def _remote_text(address: str, entries: Sequence[Entry]) -> str:
    """Return the address as a line of JSON, and a line for each entry."""
    return "\n".join([json.dumps({"address": address}), *(e.line() for e in entries)]) + "\n"
