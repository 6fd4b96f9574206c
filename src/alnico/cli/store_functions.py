"""The functions behind ``alnico store``: each opens a store and calls its method of the same name."""

from __future__ import annotations

from collections.abc import Sequence

from alnico.store.details import VectorDetails
from alnico.store.entry import Entry
from alnico.store.listing import FoundVectors
from alnico.store.searching import LIMIT
from alnico.store.store import Store
from alnico.store.verify_vectors import StoreVerification


def list_vectors(*, all_versions: bool = False, store: str | None = None) -> FoundVectors:
    """List the task vectors of a store, by name: the latest version of each.

    Options:
        all_versions: List all versions.
        store: The store, a folder or the address of a remote; default: yours ($ALNICO_STORE).
    Errors: those of :meth:`alnico.Store.list`.
    """
    return Store(store).list(all_versions=all_versions)


def search_vectors(
    text: str = "",
    *,
    base: str | None = None,
    task: str | None = None,
    language: str | None = None,
    licence: str | None = None,
    hub: bool = False,
    like: str | None = None,
    limit: int = LIMIT,
    store: str | None = None,
    offline: bool = False,
) -> FoundVectors:
    """Search a store, and what its remotes had when they were last asked, for task vectors.

    Options:
        text: Words; each must begin a word of the name, description, tasks, languages or base.
        base: The model that they must have been made of: a hub id, or a path, whose weights are then hashed.
        task: A task that they state, such as math.
        language: A language that they state, such as ja.
        licence: A licence that they state, such as apache-2.0.
        hub: Ask the hub, too: task vectors, and every PEFT adapter of the base. Needs base.
        like: A task vector; those of its base are sorted by their estimated cosine with it.
        limit: Most results.
        store: The store, a folder or the address of a remote; default: yours ($ALNICO_STORE).
        offline: Use no network; the hub is not asked.
    Errors: those of :meth:`alnico.Store.search`.
    """
    return Store(store).search(
        text,
        base=base,
        task=task,
        language=language,
        licence=licence,
        hub=hub,
        like=like,
        limit=limit,
        offline=offline,
    )


def show_vector(name: str, *, store: str | None = None) -> VectorDetails:
    """Print all that is known of a task vector: its manifest, versions, licences, and where it came from.

    Options:
        name: The task vector, NAME or NAME@VERSION.
        store: The folder of the store; default: yours ($ALNICO_STORE).
    Errors: those of :meth:`alnico.Store.show`.
    """
    return Store(store).show(name)


def verify_vectors(
    name: str | None = None,
    *,
    base: str | None = None,
    key: str | None = None,
    store: str | None = None,
    offline: bool = False,
) -> StoreVerification:
    """Check every file of a task vector, or of all, against the hashes in its manifest; print what passed.

    Options:
        name: The task vector, NAME or NAME@VERSION; default: all versions of all.
        base: A model: check that every tensor of it that the vector touches is what the vector was made of.
        key: Public key (a PEM file) that must verify the signature.
        store: The folder of the store; default: yours ($ALNICO_STORE).
    Errors: those of :meth:`alnico.Store.verify`.
    """
    return Store(store).verify(name, base=base, key=key, offline=offline)


def remove_vectors(names: Sequence[str], *, store: str | None = None) -> tuple[Entry, ...]:
    """Remove versions of task vectors (NAME@VERSION), or all versions (NAME), from a store on this machine.

    Options:
        names: Task vectors, NAME or NAME@VERSION.
        store: The folder of the store; default: yours ($ALNICO_STORE).
    Errors: those of :meth:`alnico.Store.remove`.
    """
    opened = Store(store)
    for name in names:
        opened.path(name)
    return tuple(entry for name in names for entry in opened.remove(name))
