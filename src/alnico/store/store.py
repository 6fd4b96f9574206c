"""Store: task vectors that one keeps, finds, shares and equips, in a folder and on remotes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alnico.checkpoint.task_vectors.manifest import read_manifest
from alnico.checkpoint.task_vectors.store_folder import PREFIX, vector_folder
from alnico.errors import ModelError
from alnico.events import Watcher
from alnico.notebook import name_text, result_line
from alnico.store.check_files import copy_vector
from alnico.store.details import VectorDetails, describe_vector
from alnico.store.entry import Entry, entry_of
from alnico.store.index import Query
from alnico.store.listing import FoundVectors
from alnico.store.local_store import UNFINISHED, LocalStore
from alnico.store.searching import ALL, LIMIT, make_query, search_index, words_of
from alnico.store.verify_vectors import StoreVerification, all_folders, verify_folders

if TYPE_CHECKING:
    from alnico.store.stored_task_vector import StoredTaskVector


def is_address(text: str) -> bool:
    """Is a text the address of a remote, not a folder?

    >>> [is_address(t) for t in ("https://host/vectors", "s3://bucket/vectors", "hf:owner/name", "stores/team")]
    [True, True, True, False]
    """
    return "://" in text or text.startswith("hf:")


class Store:
    """A store of task vectors: a folder, or a remote together with the user's own folder.

    ``Store()`` is the user's store, ``Store(folder)`` another one. ``Store(address)`` reads and writes the remote
    (``https://``, ``s3://``, ``file://``, ``hf:owner/name``, ...); what is pulled from it comes into the user's store, or into
    ``folder``.

    Names are ``NAME`` for the latest version, or ``NAME@VERSION``.
    """

    def __init__(
        self,
        place: str | os.PathLike[str] | None = None,
        *,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        text = None if place is None else os.fspath(place)
        self.address: str | None = text if text is not None and is_address(text) else None
        if self.address is None and place is not None and folder is not None:
            raise ModelError(
                f"place is {text!r}, a folder, and folder is {os.fspath(folder)!r}; expected one of them. Give a folder only with "
                "the address of a remote."
            )
        self.local = LocalStore(folder if self.address is not None or place is None else place)

    @property
    def folder(self) -> Path:
        """The folder of the store on this machine."""
        return self.local.folder

    def __repr__(self) -> str:
        where = f"{self.address}, by way of {self.folder}" if self.address else str(self.folder)
        return result_line(f"store {name_text(where)}")

    @property
    def place(self) -> str:
        """The address of the remote, or else the folder."""
        return self.address or os.fspath(self.folder)

    def path(self, name: str) -> Path:
        """Return the folder of a task vector, ``NAME`` or ``NAME@VERSION``. Errors: ModelError for what the store does not have."""
        self.local.check()
        return vector_folder(name, self.folder)

    def __getitem__(self, name: str) -> StoredTaskVector:
        """Return a task vector as a value. Errors: ModelError for one that the store does not have."""
        from alnico.store.stored_task_vector import StoredTaskVector

        folder = self.path(name)
        return StoredTaskVector(folder, f"{PREFIX}{folder.parent.name}@{folder.name}")

    @contextmanager
    def new_folder(self) -> Iterator[Path]:
        """Lend a path for a new task vector, which :meth:`add` makes one of the store's; otherwise it is removed at the end of the
        block. Errors: OutputError, ModelError, RunError."""
        self.local.begin()
        with self.local.private_folder() as folder:
            yield folder

    def add(self, folder: str | os.PathLike[str], *, version: int | None = None) -> Entry:
        """Add a finished task vector as the next version of its name, and return its entry.

        A folder of :meth:`new_folder` is renamed; any other is copied, and its hashes are checked. Nothing is ever replaced:
        of two writers each gets a version. If a version has the same content already, that one is the result. ``version`` is
        the wanted number, for a pull; if it is taken, the next free one is used.

        Errors: ModelError for a folder that is not a task vector, VerificationError for files that are not what the manifest says,
        OutputError, RunError.
        """
        path = Path(folder).expanduser().absolute()
        if path.is_relative_to(self.folder / UNFINISHED):
            return self.local.publish(path, version)
        manifest = read_manifest(path)
        with self.new_folder() as copy:
            copy_vector(path, copy, manifest)
            return self.local.publish(copy, version)

    def create(self, finetuned: Any, base: Any, name: str | None = None, **options: Any) -> StoredTaskVector:
        """Make a task vector of a fine-tune and its base, and add it: ``store.create("sql-7b", "base-7b", "sql", error=0.01)``.

        ``options`` are those of ``alnico store create``. Errors: as there.
        """
        from alnico.store.create_options import create_task_vector

        with self.new_folder() as folder:
            create_task_vector(finetuned, base, folder, name, **options)
            entry = self.add(folder)
        return self[f"{entry.name}@{entry.version}"]

    def list(self, *, all_versions: bool = False) -> FoundVectors:
        """List the task vectors of the store, by name: the latest version of each, or all.

        Errors: ModelError, OutputError for a folder that is not a store, RunError.
        """
        query = Query(source=self.address or "", all_versions=all_versions, limit=ALL)
        return search_index(self.local, query, self.place, "")

    def search(
        self,
        text: str = "",
        *,
        base: str | os.PathLike[str] | None = None,
        task: str | None = None,
        language: str | None = None,
        licence: str | None = None,
        hub: bool = False,
        like: str | None = None,
        limit: int = LIMIT,
        offline: bool = False,
    ) -> FoundVectors:
        """Search the store, and what its remotes had when they were last asked, for task vectors.

        ``text`` are words, each of which must begin a word of the name, description, tasks, languages or base. ``base`` is a model
        that they must have been made of: a hub id, or a path whose weights are hashed. With ``hub`` the hub is asked, too,
        which then needs ``base``: also every PEFT adapter of it is a task vector. ``like`` is a task vector; those of its base are
        sorted by their estimated cosine with it.

        Errors: ModelError, HubError, AlnicoError for a limit that is not a whole number above 0.
        """
        query = make_query(text, base=base, task=task, language=language, licence=licence, limit=limit)
        if self.address is not None:
            query = replace(query, source=self.address)
        return search_index(self.local, query, self.place, words_of(query, base))

    def show(self, name: str) -> VectorDetails:
        """Return all that is known of a task vector: its manifest, its versions, licences, and where it came from.

        Errors: ModelError for one that the store does not have.
        """
        return describe_vector(self.local, self.path(name))

    def verify(
        self,
        name: str | None = None,
        *,
        base: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        offline: bool = False,
    ) -> StoreVerification:
        """Check every file of a task vector, or of all versions of all, against the hashes in its manifest.

        With ``base``, also every tensor of the base that the vector touches; with ``key``, a public key, the signature.

        Errors: VerificationError with a line for each difference; MismatchError for another base; UncheckedError for a vector
        without a signature, or a key that cannot be used; ModelError, HubError.
        """
        folders = [self.path(name)] if name is not None else all_folders(self.local)
        return verify_folders(folders, base=base, key=key, offline=offline)

    def remove(self, name: str) -> tuple[Entry, ...]:
        """Remove a version (``NAME@VERSION``), or all versions of a task vector (``NAME``); returns what was removed.

        Its number is not used again, so that no recipe ever means another vector. Errors: ModelError, RunError.
        """
        self.local.check()
        return tuple(self.local.remove(name))

    def push(
        self,
        name: str,
        to: str | None = None,
        *,
        private: bool = False,
        message: str | None = None,
        watch: Watcher | None = None,
    ) -> str:
        """Push a task vector to a remote, and return its address there.

        Errors: ModelError for one that the store does not have; HubError, RunError for a remote that cannot be written.
        """
        from alnico.store.push import push_vector  # type: ignore[import-not-found, unused-ignore]

        folder = self.path(name)
        place = to or self._remote("push")
        entry = entry_of(folder, int(folder.name))
        address: str = push_vector(folder, entry, place, private=private, message=message, watch=watch)
        self.local.remember_remote(place)
        return address

    def pull(
        self,
        reference: str,
        *,
        source: str | None = None,
        offline: bool = False,
        watch: Watcher | None = None,
    ) -> Entry:
        """Pull a task vector from a remote into the store, and return its entry.

        ``reference`` is a name in the remote ``source``, with ``@VERSION`` or the latest, or a task vector or PEFT adapter on the hub,
        ``owner/name``. Without a source, the remote whose list has the name.

        Errors: ModelError, VerificationError, HubError, RunError.
        """
        from alnico.store.pull import pull_vector  # type: ignore[import-not-found, unused-ignore]

        with self.new_folder() as folder:
            pulled = pull_vector(
                reference, folder, source=source or self.address, offline=offline, watch=watch
            )
            return self.add(pulled)

    def _remote(self, what: str) -> str:
        if self.address is None:
            raise ModelError(
                f"{what}: no remote is given; expected an address such as s3://bucket/vectors, a folder, or hf:owner/name. Give it, or "
                "use alnico.Store(address)."
            )
        return self.address
