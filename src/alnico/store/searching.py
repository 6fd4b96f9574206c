"""Searches a store and what its remotes had: by words, base, task, language, licence, or likeness."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alnico.checkpoint.reference import is_path
from alnico.checkpoint.task_vectors.manifest import Manifest, read_manifest
from alnico.checkpoint.task_vectors.store_folder import VECTORS
from alnico.errors import ModelError
from alnico.numerics.numbers import whole_number
from alnico.store.catalogue import Catalogue
from alnico.store.entry import entry_of
from alnico.store.index import ALL, Query
from alnico.store.listing import FoundVector, FoundVectors
from alnico.store.local_store import LocalStore

LIMIT = 50
"""Most task vectors that a search returns, unless asked for others."""

HUB = "the hub"
"""The source of what a search of the hub found."""

MOST_COMPARED = 2000
"""Most task vectors that a search compares with another: their manifests are read."""


def make_query(
    text: str = "",
    *,
    base: str | os.PathLike[str] | None = None,
    task: str | None = None,
    language: str | None = None,
    licence: str | None = None,
    limit: int = LIMIT,
) -> Query:
    """Return the query for the index. A base that is a path is read, for the root hash of its weights.

    Errors: ModelError for a base that cannot be read, AlnicoError for a limit that is not a whole number above 0.
    """
    query = Query(text, task=task, language=language, licence=licence, limit=whole_number(limit, "limit", 1))
    if base is None:
        return query
    if is_path(os.fspath(base)):
        from alnico.store.base_root import root_of_model

        path = Path(os.path.expanduser(base))
        return replace(query, roots=(root_of_model(path),), rootless=(os.fspath(base), path.resolve().name))
    return replace(query, bases=(os.fspath(base).partition("@")[0],))


def search_index(store: LocalStore, query: Query, place: str, asked: str) -> FoundVectors:
    """Search a store by its index. Errors: ModelError, RunError."""
    with Catalogue(store) as catalogue:
        found, total = catalogue.index.search(query)
        notes = catalogue.notes
    vectors = tuple(FoundVector(f"{f.entry.name}@{f.entry.version}", f.entry, f.source) for f in found)
    return FoundVectors(place, vectors, total, asked, notes)


def with_hub(found: FoundVectors, query: Query, base: str | None) -> FoundVectors:
    """Add what the hub has, after what is here. Errors: HubError; ModelError for a base that is not an id of the hub."""
    from alnico.store.search_hub import search_hub

    there = search_hub(
        base,
        query.text.strip(),
        task=query.task,
        language=query.language,
        licence=query.licence,
        limit=query.limit,
    )
    more = tuple(FoundVector(f.reference, f.entry, HUB, note=f.note) for f in there)
    listed = (*found.vectors, *more)[: query.limit]
    return replace(found, vectors=listed, total=found.total + len(more))


def sort_by_likeness(store: LocalStore, query: Query, folder: Path, place: str, asked: str) -> FoundVectors:
    """Search for the task vectors of the store that have the base of the one in ``folder``, most similar first.

    Their cosine with it, and the share of signs that differ, are estimated from the sketches in their manifests. Those
    of remotes are not compared, as their manifests are not here. Errors: ModelError, RunError.
    """
    from alnico.store.sketch import interference

    like, itself = read_manifest(folder), entry_of(folder, 1).sha256
    wanted = replace(query, source="", limit=ALL)
    if like.base.root is not None:
        wanted = replace(wanted, roots=(like.base.root,), rootless=(like.base.id,) if like.base.id else ())
    elif like.base.id is not None:
        wanted = replace(wanted, bases=(like.base.id,))
    found = search_index(store, wanted, place, asked)
    compared, notes = [], list(found.notes)
    for vector in found.vectors[:MOST_COMPARED]:
        entry = vector.entry
        if entry.sha256 == itself:
            continue
        try:
            other = read_manifest(store.folder / VECTORS / entry.name / str(entry.version))
        except ModelError as error:
            notes.append(str(error))
            continue
        if not have_one_base(like, other):
            continue
        met = interference(like, other)
        if met.unknown and not met.tensors:
            notes.append(f"{vector.reference}: has no sketches in its manifest, so its cosine is not known.")
            compared.append(vector)
            continue
        compared.append(
            replace(vector, cosine=met.cosine, cosine_error=met.cosine_error, sign_conflict=met.sign_conflict)
        )
    if len(found) > MOST_COMPARED:
        notes.append(f"{len(found) - MOST_COMPARED} more task vectors of this base were not compared.")
    ordered = sorted(compared, key=lambda v: (v.cosine is None, -(v.cosine or 0.0), v.reference))
    return replace(found, vectors=tuple(ordered[: query.limit]), total=len(ordered), notes=tuple(notes))


def have_one_base(a: Manifest, b: Manifest) -> bool:
    """Were two task vectors made of one base, by the hashes of its tensors that both have? Without such, nothing speaks against it."""
    shared = [(t.base, b.tensors[name].base) for name, t in a.tensors.items() if name in b.tensors]
    known = [(mine, theirs) for mine, theirs in shared if mine is not None and theirs is not None]
    return not known or any(mine == theirs for mine, theirs in known)


def words_of(query: Query, base: object, others: Sequence[str] = ()) -> str:
    """Say what was searched, for people."""
    named = {
        "base": base,
        "task": query.task,
        "language": query.language,
        "licence": query.licence,
    }
    words = [query.text.strip(), *(f"{k} {v}" for k, v in named.items() if v is not None), *others]
    return ", ".join(filter(None, words))
