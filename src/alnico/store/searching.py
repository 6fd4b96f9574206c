"""Searches a store and what its remotes had: by words, base, task, language, licence, or likeness."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alnico.checkpoint.reference import is_path
from alnico.numerics.numbers import whole_number
from alnico.store.base_root import root_of
from alnico.store.catalogue import Catalogue
from alnico.store.index import IndexedEntry, Query
from alnico.store.listing import FoundVector, FoundVectors
from alnico.store.local_store import LocalStore

LIMIT = 50
"""Most task vectors that a search returns, unless asked for others."""


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
        path = Path(os.path.expanduser(base))
        return replace(query, roots=(root_of(path),), rootless=(os.fspath(base), path.resolve().name))
    return replace(query, bases=(os.fspath(base).partition("@")[0],))


def search_index(store: LocalStore, query: Query, place: str, asked: str) -> FoundVectors:
    """Search a store by its index. Errors: ModelError, RunError."""
    with Catalogue(store) as catalogue:
        found, count = catalogue.index.search(query)
        notes = catalogue.notes
    return FoundVectors(place, tuple(map(_found, found)), count, asked, notes)


def _found(found: IndexedEntry) -> FoundVector:
    entry = found.entry
    return FoundVector(f"{entry.name}@{entry.version}", entry, found.source)


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
