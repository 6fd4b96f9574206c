"""Store: task vectors that one keeps, finds, shares and equips, in a folder and on remotes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alnico.checkpoint.file_arguments import model_path
from alnico.checkpoint.reference import is_hub_reference
from alnico.checkpoint.task_vectors.manifest import MANIFEST, read_manifest
from alnico.checkpoint.task_vectors.store_folder import (
    CACHE,
    EMPTY,
    MARK,
    PREFIX,
    VECTORS,
    is_address,
    split_version,
    vector_folder,
    vector_names,
)
from alnico.errors import AlnicoError, HubError, ModelError
from alnico.events import Watcher
from alnico.notebook import name_text, result_line
from alnico.store.catalogue import Catalogue, remote_addresses
from alnico.store.entry import Entry, entry_of
from alnico.store.index import ALL, Query
from alnico.store.listing import FoundVectors
from alnico.store.local_store import UNFINISHED, LocalStore
from alnico.store.remotes.layout import INDEX_FILE
from alnico.store.searching import LIMIT, make_query, search_index, sort_by_likeness, with_hub, words_of

if TYPE_CHECKING:
    from alnico.store.cache import DownloadCache
    from alnico.store.details import VectorDetails
    from alnico.store.stored_task_vector import StoredTaskVector
    from alnico.store.updating import StoreUpdate
    from alnico.store.verify_vectors import StoreVerification


def is_published(place: str) -> bool:
    """Is a folder what :meth:`Store.push` writes, a remote that others may read, and not a store of one's own?"""
    folder = Path(os.path.expanduser(place))
    return (folder / INDEX_FILE).is_file() and not (folder / MARK).is_file()


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
        if text == "":
            raise ModelError(EMPTY.format("the place of the store"))
        is_remote = text is not None and (is_address(text) or is_published(text))
        self.address: str | None = full_address(text) if text is not None and is_remote else None
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

    def __contains__(self, name: object) -> bool:
        """Does the store on this machine have a task vector, ``NAME`` or ``NAME@VERSION``?"""
        self.local.check()
        try:
            return isinstance(name, str) and vector_folder(name, self.folder).is_dir()
        except ModelError:
            return False

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the task vectors on this machine."""
        self.local.check()
        return iter(vector_names(self.folder))

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
        path = Path(os.path.expanduser(folder)).absolute()
        if path.is_relative_to(self.folder / UNFINISHED):
            return self.local.publish(path, version)
        from alnico.store.check_files import copy_vector

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

    def list(self, *, all_versions: bool = False, offline: bool = False) -> FoundVectors:
        """List the task vectors of the store, by name: the latest version of each, or all.

        Errors: ModelError, OutputError for a folder that is not a store, RunError; HubError for a remote that does not answer.
        """
        query = Query(source=self.address or "", all_versions=all_versions, limit=ALL)
        self._ask(offline)
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
        that they must have been made of: a hub id, or a path whose weights are hashed. What a remote has and the store has, too, is
        listed once. With ``hub`` the hub is asked, too: for task vectors, and, with the id of a base, for every PEFT adapter of it,
        which is a task vector as well; ``text`` is then part of a repository's name. ``like`` is a task vector, by name or path; those
        in the store that are of its base are sorted by their estimated cosine with it.

        Errors: ModelError, HubError, AlnicoError for a limit that is not a whole number above 0.
        """
        query = make_query(text, base=base, task=task, language=language, licence=licence, limit=limit)
        if like is not None:
            if hub:
                raise AlnicoError(
                    "like and hub are both given; expected one: what is on the hub has no sketches here. Leave one out."
                )
            asked = words_of(query, base, [f"like {like}"])
            return sort_by_likeness(self.local, query, self._folder_of(like), self.place, asked)
        if self.address is not None:
            query = replace(query, source=self.address)
        if hub and offline:
            raise AlnicoError(
                "hub and offline are both given; expected one: the hub is asked by the network. Leave one out."
            )
        self._ask(offline)
        found = search_index(
            self.local, query, self.place, words_of(query, base, ["the hub, too"] if hub else [])
        )
        return with_hub(found, query, None if base is None else os.fspath(base)) if hub else found

    def _folder_of(self, name: str) -> Path:
        """Return the folder of a task vector: a path, or a name in the store."""
        path = Path(os.path.expanduser(name))
        return path if (path / MANIFEST).is_file() else self.path(name)

    def show(self, name: str) -> VectorDetails:
        """Return all that is known of a task vector: its manifest, its versions, licences, and where it came from.

        Errors: ModelError for one that the store does not have.
        """
        from alnico.store.details import describe_vector

        return describe_vector(self.local, self.path(name))

    def verify(
        self,
        name: str | None = None,
        *,
        base: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        offline: bool = False,
    ) -> StoreVerification:
        """Check every file of a task vector (by name, or the path of a folder), or of all, against the hashes in its manifest.

        With ``base``, also every tensor of the base that the vector touches; with ``key``, a public key, the signature.

        Errors: VerificationError with a line for each difference; MismatchError for another base; UncheckedError for a vector
        without a signature, or a key that cannot be used; ModelError, HubError.
        """
        from alnico.store.verify_vectors import all_folders, verify_folders

        folders = [self._folder_of(name)] if name is not None else all_folders(self.local)
        checked = None if base is None else model_path(base, "base")
        return verify_folders(folders, self.folder / VECTORS, base=checked, key=key, offline=offline)

    def remove(self, name: str) -> tuple[Entry, ...]:
        """Remove a version (``NAME@VERSION``), or all versions of a task vector (``NAME``); returns what was removed.

        Its number is not used again, so that no recipe ever means another vector. Errors: ModelError, also for a store that was
        opened with the address of a remote; RunError.
        """
        if self.address is not None:
            raise ModelError(
                f"{self.address}: is a remote, of which nothing is removed from here; expected a store on this machine. Open its "
                "folder; who hosts the remote removes the version's folder and its line of the index."
            )
        self.local.check()
        return tuple(self.local.remove(name))

    def update(
        self,
        name: str | None = None,
        *,
        description: str | None = None,
        tasks: Sequence[str] | None = None,
        languages: Sequence[str] | None = None,
        licence: str | None = None,
        training: str | None = None,
        scale: float | None = None,
        least: float | None = None,
        most: float | None = None,
        offline: bool = False,
    ) -> StoreUpdate:
        """Ask the remotes what they have now; or make a new version of a task vector with other statements.

        Without a name: the lists of all known remotes are read again, for later searches; new versions of what was pulled are
        told, and bases on the hub that have another revision by now. With a name: a new version shares the files of the latest
        (or of ``NAME@VERSION``), with what is given in its manifest. ``scale`` is the suggested coefficient, ``least`` and ``most``
        the range that is known to work.

        Errors: ModelError for a name that the store does not have; AlnicoError for a name without changes, changes without a name,
        or a value that a manifest cannot hold; HubError if there are remotes and none of them answers; OutputError, RunError.
        """
        from alnico.store.new_version import Changes, write_changed
        from alnico.store.updating import StoreUpdate

        changes = Changes(description, tasks, languages, licence, training, scale, least, most)
        if name is None:
            if not changes.are_none:
                given = ", ".join(key for key, value in vars(changes).items() if value is not None)
                raise AlnicoError(
                    f"{given}: no task vector is named; expected the one that it is about. Give its name."
                )
            return self._refresh(offline)
        folder = self.path(name)
        if changes.are_none:
            raise AlnicoError(
                f"{name}: nothing to change is given; expected a description, tasks, a licence or the like. Give one, or leave the name "
                "out to ask the remotes what they have now."
            )
        with self.new_folder() as new:
            write_changed(folder, new, changes)
            return StoreUpdate(self.place, made=self.local.publish(new))

    def _ask(self, offline: bool) -> None:
        """Ask the remote that the store was opened with what it has. Errors: HubError if it does not answer."""
        from alnico.store.updating import refresh

        if self.address is not None and not offline:
            self.local.remember_remote(self.address)
            (state,) = refresh(self.local, [self.address], cache=self._cache())
            if state.problem:
                raise HubError(state.problem)

    def _refresh(self, offline: bool) -> StoreUpdate:
        from alnico.store.updating import StoreUpdate, moved_bases, newer_versions, refresh

        self.local.check()
        addresses = [self.address] if self.address is not None else remote_addresses(self.local)
        if addresses:
            self.local.begin()  # before the cache is in its folder, which would then not be a store's
        states = refresh(self.local, addresses, cache=self._cache(), offline=offline)
        if states and all(s.problem for s in states):
            raise HubError(*(s.problem for s in states))
        moved = [] if offline else moved_bases(self.local)
        return StoreUpdate(self.place, tuple(states), tuple(newer_versions(self.local)), tuple(moved))

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

        ``to`` is a folder, ``s3://bucket/folder`` or another file system, or ``hf:owner/name``; the default is the remote that the
        store was opened with. A new folder becomes a remote; a store gets the task vector as its next version. What is there
        already is not sent again, so the same call finishes a push that was killed. ``private`` and ``message`` are for the
        hub. Errors: ModelError for one that the store does not have; HubError for a remote that
        cannot be written.
        """
        from alnico.store.push import push_vector
        from alnico.store.updating import refresh

        place = to or self.address
        if place is None:
            raise AlnicoError(
                f"{name}: no remote is given; expected a folder, an address such as s3://bucket/vectors, or hf:owner/name. Give it as "
                "`to`, or use alnico.Store(address)."
            )
        folder = self.path(name)
        entry = entry_of(folder, int(folder.name))
        address = full_address(place)
        if (Path(address) / MARK).is_file():  # a store, whose vectors have their files in their own folders
            added = Store(address).add(folder)
            return f"{address}/{added.name}@{added.version}"
        there = push_vector(
            folder, entry, address, private=private, message=message, cache=self._cache(), watch=watch
        )
        self.local.remember_remote(address)
        refresh(self.local, [address], cache=self._cache())
        return there

    def pull(
        self,
        reference: str,
        *,
        source: str | None = None,
        offline: bool = False,
        watch: Watcher | None = None,
    ) -> Entry:
        """Pull a task vector from a remote into the store, and return its entry.

        ``reference`` is a name in the remote ``source``, with ``@VERSION`` or the latest; or the name with the address before it; or a
        task vector or PEFT adapter on the hub, ``owner/name``. A name without a source is pulled from the remote that had it when it was
        last asked. The version keeps its number where that is free. Hashes are checked, and nothing appears in the store until
        everything is there.

        Errors: ModelError, VerificationError, HubError, RunError.
        """
        from alnico.store.pull import pull_vector
        from alnico.store.updating import refresh

        address, text = self._find(reference, source)
        with self.new_folder() as folder:
            pulled = pull_vector(
                text, folder, source=address, cache=self._cache(), offline=offline, watch=watch
            )
            found = entry_of(pulled, 1)
            home, there, wanted = address, None, None
            if is_on_hub(
                address
            ):  # one vector, at the commit that was asked for; an update asks for the latest
                home, there = address.partition("@")[0], found
                self.local.note_entries(home, [found])
            else:
                self.local.remember_remote(address)
                refresh(self.local, [address], cache=self._cache(), offline=offline)
                there = self._entry_there(address, found.sha256)
                wanted = there.version if there is not None else None
            entry = self.local.publish(pulled, wanted)
        origin: dict[str, Any] = {"source": home, "reference": text or reference}
        if there is not None:
            origin |= {"name": there.name, "version": there.version}
        if not self.local.origin(entry.name, entry.version):
            self.local.note_origin(entry, origin)
        return entry

    def _find(self, reference: str, source: str | None) -> tuple[str, str]:
        """Return the address of the remote that a reference means, and the name there."""
        from alnico.store.pull import split_reference

        place = source or self.address
        if place is not None:
            return full_address(place), reference
        if "/" in reference or ":" in reference:
            address, text = split_reference(reference)
            return full_address(address), text
        name, _ = split_version(reference)
        with Catalogue(self.local) as catalogue:
            remotes = [s for s in catalogue.index.sources() if s and catalogue.index.versions(s, name)]
        if len(remotes) == 1:
            return remotes[0], reference
        if remotes:
            raise ModelError(
                f"{reference}: {len(remotes)} remotes have it: {', '.join(remotes)}; expected one. Name it by --from, or as `source`."
            )
        raise ModelError(
            f"{reference}: no remote of this store had it when they were last asked; expected a name that one of them has. Name the remote "
            "by --from, or as `source`; `alnico store update` asks them again."
        )

    def _entry_there(self, address: str, sha256: str) -> Entry | None:
        with Catalogue(self.local) as catalogue:
            found, _ = catalogue.index.search(Query(source=address, all_versions=True, limit=ALL))
        return next((f.entry for f in reversed(found) if f.entry.sha256 == sha256), None)

    def _cache(self) -> DownloadCache:
        from alnico.store.cache import DownloadCache

        return DownloadCache(self.folder / CACHE)


def is_on_hub(address: str) -> bool:
    """Is a full address a repository of the hub?

    >>> is_on_hub("hf:owner/name@v1"), is_on_hub("owner/name"), is_on_hub("/srv/vectors"), is_on_hub("s3://a/b")
    (True, True, False, False)
    """
    return address.startswith("hf:") or not (is_address(address) or os.path.isabs(address))


def full_address(place: str) -> str:
    """Return a place of a remote as it can be found again from any folder, and as it is known however it is written.

    >>> full_address("s3://bucket/vectors/"), full_address("/srv//vectors/"), full_address("https://example.org/")
    ('s3://bucket/vectors', '/srv/vectors', 'https://example.org')
    """
    is_folder = not is_address(place) and (
        os.path.exists(os.path.expanduser(place)) or not is_hub_reference(place)
    )
    if is_folder:
        return os.path.abspath(os.path.expanduser(place))
    scheme, separator, rest = place.partition("://")
    return f"{scheme}{separator}{rest.rstrip('/') or rest[:1]}"
