"""The functions behind ``alnico store``: each opens a store and calls its method of the same name."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.errors import ModelError
from alnico.events import Watcher
from alnico.folders import temporary_files
from alnico.run_options import DEFAULT_BUDGET_BYTES, Size
from alnico.store.entry import Entry
from alnico.store.listing import FoundVectors
from alnico.store.searching import LIMIT
from alnico.store.store import Store

if TYPE_CHECKING:
    from alnico.store.create import Created
    from alnico.store.details import VectorDetails
    from alnico.store.updating import StoreUpdate
    from alnico.store.verify_vectors import StoreVerification


def _store_here(store: str | None) -> Store:
    """Open a store on this machine. Errors: ModelError for a remote, whose task vectors would be mistaken for one's own."""
    opened = Store(store)
    if opened.address is not None:
        raise ModelError(
            f"store is a remote, {opened.address}; expected the folder of a store on this machine. `alnico store pull NAME --from "
            "ADDRESS` gets a task vector of a remote, `alnico store push` gives it one."
        )
    return opened


def create_in_store(
    finetuned: str,
    *,
    base: str | None = None,
    name: str | None = None,
    exact: bool = False,
    error: float | None = None,
    size: Size | None = None,
    tsv: float | None = None,
    encoding: str | None = None,
    description: str = "",
    tasks: Sequence[str] = (),
    languages: Sequence[str] = (),
    licence: str | None = None,
    training: str = "",
    evaluations: str | None = None,
    scale: float = 1.0,
    scale_range: Sequence[float] | None = None,
    base_id: str | None = None,
    dry_run: bool = False,
    store: str | None = None,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    watch: Watcher | None = None,
) -> Created:
    """Make the task vector of a fine-tune and its base, and keep it in a store.

    It measures first, and prints what each encoding would cost and lose. Without a target it stores every bit where the vector is
    sparse or small, or where nothing else is smaller; otherwise within a relative error of 0.01 in each tensor.

    Options:
        finetuned: The fine-tune: a path or a hub id. A LoRA adapter is taken in as it is.
        base: The model that it was tuned from; only an adapter does not need it.
        name: The name of the task vector; default: that of the fine-tune.
        exact: Store every bit of the fine-tune.
        error: The largest relative error of each tensor's difference, such as 0.01.
        size: The most bytes of all files, such as 200MB; the error is the least that fits.
        tsv: The share of the singular directions of each matrix that is kept (TSV-C), such as 0.1; the rest is stored whole.
        encoding: One encoding for all matrices: difference (also difference:f16, difference:bf16), top_k:0.1, low_rank:0.125,
            low_rank:16, sign, int4, exact, whole or sparse.
        description: What the task vector does, in a sentence or two.
        tasks: A task that it is for, such as math; may be repeated.
        languages: A language that it is for, such as ja; may be repeated.
        licence: Its licence; default: that of the fine-tune's card.
        training: How the fine-tune was trained.
        evaluations: A JSON file with scores: {"evaluations": [{"task": ..., "metric": ..., "value": ...}]}; base, scale and
            examples may be given.
        scale: The suggested coefficient.
        scale_range: The coefficients that were tried and work, as 0.3,1.2.
        base_id: The base's id for others, where its files are a copy.
        dry_run: Measure and print what each encoding would cost and lose; write nothing.
        store: The folder of the store; default: yours ($ALNICO_STORE).
    Errors: RecipeError for options that do not go together; MismatchError for models that do not fit; those of reading and writing.
    """
    from alnico.store.create_options import (
        create_task_vector,
    )  # with all that measures, only where it is used

    options: dict[str, Any] = {
        "exact": exact, "error": error, "size": size, "tsv": tsv, "encoding": encoding, "description": description,
        "tasks": tasks, "languages": languages, "licence": licence, "training": training, "evaluations": evaluations or (),
        "scale": scale, "scale_range": scale_range, "base_id": base_id, "max_shard_size": max_shard_size, "memory": memory,
        "threads": threads, "offline": offline, "watch": watch,
    }  # fmt: skip
    if dry_run:
        with temporary_files(), tempfile.TemporaryDirectory() as folder:
            return create_task_vector(finetuned, base, Path(folder, "vector"), name, dry_run=True, **options)
    opened = _store_here(store)
    with opened.new_folder() as new:
        created = create_task_vector(finetuned, base, new, name, **options)
        entry = opened.add(new)
    return replace(created, path=opened.path(f"{entry.name}@{entry.version}"), version=entry.version)


def list_vectors(
    *, all_versions: bool = False, store: str | None = None, offline: bool = False
) -> FoundVectors:
    """List the task vectors of a store, by name: the latest version of each.

    Options:
        all_versions: List all versions.
        store: The store, a folder or the address of a remote; default: yours ($ALNICO_STORE).
        offline: Use no network: a remote has what it had.
    Errors: those of :meth:`alnico.Store.list`.
    """
    return Store(store).list(all_versions=all_versions, offline=offline)


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
        hub: Ask the hub, too: for task vectors, and for every PEFT adapter of the base, if one is given by its id.
        like: A task vector, by name or path; those of its base are sorted by their estimated cosine with it.
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
    return _store_here(store).show(name)


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
        name: The task vector, NAME or NAME@VERSION, or the path of a folder; default: all versions of all.
        base: A model: check that every tensor of it that the vector touches is what the vector was made of.
        key: Public key (a PEM file) that must verify the signature.
        store: The folder of the store; default: yours ($ALNICO_STORE).
    Errors: those of :meth:`alnico.Store.verify`.
    """
    return _store_here(store).verify(name, base=base, key=key, offline=offline)


def update_store(
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
    store: str | None = None,
    offline: bool = False,
) -> StoreUpdate:
    """Ask the remotes what they have now, and print what is new; or make a new version of a task vector with another description.

    Options:
        name: The task vector whose description, tasks or other statements change, NAME or NAME@VERSION; default: ask the remotes.
        description: What the task vector does.
        tasks: A task that it is for; may be repeated. They replace those that it states.
        languages: A language that it is for; may be repeated. They replace those that it states.
        licence: Its licence, such as apache-2.0.
        training: Notes about its training.
        scale: The suggested coefficient.
        least: The least coefficient that is known to work.
        most: The largest coefficient that is known to work.
        store: The folder of the store; without NAME also the address of a remote, to ask that one; default: yours
            ($ALNICO_STORE).
        offline: Use no network: remotes are folders, or have what they had.
    Errors: those of :meth:`alnico.Store.update`.
    """
    opened = Store(store) if name is None else _store_here(store)
    return opened.update(
        name,
        description=description,
        tasks=tasks,
        languages=languages,
        licence=licence,
        training=training,
        scale=scale,
        least=least,
        most=most,
        offline=offline,
    )


def remove_vectors(names: Sequence[str], *, store: str | None = None) -> tuple[Entry, ...]:
    """Remove versions of task vectors (NAME@VERSION), or all versions (NAME), from a store on this machine.

    Options:
        names: Task vectors, NAME or NAME@VERSION.
        store: The folder of the store; default: yours ($ALNICO_STORE).
    Errors: those of :meth:`alnico.Store.remove`.
    """
    opened = _store_here(store)
    for name in names:
        opened.path(name)
    return tuple(entry for name in names for entry in opened.remove(name))


def push_from_store(
    name: str,
    to: str,
    *,
    private: bool = False,
    message: str | None = None,
    store: str | None = None,
    watch: Watcher | None = None,
) -> str:
    """Publish a task vector of a store, and print its address: in a folder, on S3 or another file system, or on the hub.

    What is there already is not sent again, so the same command finishes a push that was killed. Any web server can host a
    folder that was pushed to.

    Options:
        name: The task vector, NAME or NAME@VERSION.
        to: A folder, s3://bucket/folder or another address of fsspec, or hf:owner/name.
        private: Create the repository on the hub as private.
        message: Message of the commit on the hub.
        store: The folder of the store; default: yours ($ALNICO_STORE).
    Errors: those of :meth:`alnico.Store.push`.
    """
    return _store_here(store).push(name, to, private=private, message=message, watch=watch)


@dataclass(frozen=True)
class PulledVector:
    """A task vector that was pulled into a store; ``notes`` is what is new about it and its base."""

    store: str
    entry: Entry
    notes: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        return f"{self.entry.name}@{self.entry.version}"

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for ``--json``."""
        return {"store": self.store, "notes": list(self.notes), **self.entry.data()}


def pull_into_store(
    name: str,
    *,
    source: str | None = None,
    store: str | None = None,
    offline: bool = False,
    watch: Watcher | None = None,
) -> PulledVector:
    """Download a task vector into a store, checked by its hashes, and print its name there.

    Options:
        name: NAME or NAME@VERSION of a remote store; its address and the name, as in https://example.org/vectors/sql@2; or
            owner/name or owner/name@REVISION on the hub, a task vector or a PEFT adapter.
        source: The remote store: a folder, https://, s3:// or another address of fsspec; default: the one that had the name
            when it was last asked.
        store: The folder of the store; default: yours ($ALNICO_STORE).
        offline: Use no network, only what was downloaded before.
    Errors: those of :meth:`alnico.Store.pull`.
    """
    from alnico.store.search_hub import base_news

    opened = _store_here(store)
    entry = opened.pull(name, source=source, offline=offline, watch=watch)
    news = None if offline else base_news(entry.base, entry.base_revision)
    return PulledVector(opened.place, entry, () if news is None else (news,))
