"""Knows how a local store of task vectors is laid out, and finds the folder of ``store:NAME@VERSION`` in it.

    STORE/store.json                    says that the folder is a store
    STORE/vectors/NAME/VERSION/         one finished task vector, put there by one rename; never changed afterwards
    STORE/vectors/NAME/VERSION.origin.json    where it was pulled from
    STORE/vectors/NAME/VERSION/removed.json   all that is left of a removed version: its number is not used again
    STORE/remotes/                      what each remote had when it was last asked
    STORE/unfinished/                   private folders of writers; what a killed one left is removed by the next
    STORE/index.sqlite                  the index for searching, which can be made again from the folders
    STORE/cache/                        downloads; see the store's settings

A version is a whole number from 1 on.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from alnico.checkpoint.task_vectors.manifest import MANIFEST, is_name
from alnico.errors import ModelError, near_name

PREFIX = "store:"
"""How a reference names a vector of a store."""

MARK = "store.json"
VECTORS = "vectors"
INDEX = "index.sqlite"
CACHE = "cache"
STORE_VARIABLE = "ALNICO_STORE"

EMPTY = "{} is empty; expected a folder. Leave it out for your own store."
"""What is said of a setting without text, which would be the working directory."""

VERSION = re.compile(r"[1-9][0-9]{0,8}")


def default_store() -> Path:
    """Return the folder of the user's store: ``$ALNICO_STORE``, else ``$XDG_DATA_HOME/alnico/store``, else
    ``~/.local/share/alnico/store``. Errors: ModelError without a home directory, and for the address of a remote."""
    if chosen := os.environ.get(STORE_VARIABLE):
        return store_on_this_machine(chosen, STORE_VARIABLE)
    shared = os.environ.get("XDG_DATA_HOME", "")
    if os.path.isabs(shared):
        return Path(shared) / "alnico" / "store"
    try:
        return Path.home() / ".local" / "share" / "alnico" / "store"
    except RuntimeError:
        raise ModelError(
            f"the store of task vectors: you have no home directory; expected one. Set {STORE_VARIABLE} to a folder."
        ) from None


def is_address(text: str) -> bool:
    """Is a text the address of a remote, not a folder?

    >>> [is_address(t) for t in ("https://host/vectors", "s3://bucket/vectors", "hf:owner/name", "stores/team")]
    [True, True, True, False]
    """
    return "://" in text or text.startswith("hf:")


def store_on_this_machine(place: str | os.PathLike[str], name: str) -> Path:
    """Return the folder of a store that the setting ``name`` gives. Errors: ModelError for the address of a remote."""
    text = os.fspath(place)
    if not text:
        raise ModelError(EMPTY.format(name))
    if is_address(text):
        raise ModelError(
            f"{name} is the address of a remote, {text}; expected the folder of a store on this machine. "
            "`alnico store pull NAME --from ADDRESS` gets a task vector of a remote."
        )
    return Path(os.path.expanduser(text)).absolute()


def versions_of(store: Path, name: str) -> list[int]:
    """Return the finished versions of a vector, the oldest first."""
    try:
        names = os.listdir(store / VECTORS / name)
    except OSError:
        return []
    return sorted(
        int(v) for v in names if VERSION.fullmatch(v) and (store / VECTORS / name / v / MANIFEST).is_file()
    )


def vector_names(store: Path) -> list[str]:
    """Return the names of all vectors of a store, sorted."""
    try:
        names = os.listdir(store / VECTORS)
    except OSError:
        return []
    return sorted(n for n in names if is_name(n) and versions_of(store, n))


def split_version(text: str) -> tuple[str, int | None]:
    """Return the name and the version of ``NAME`` or ``NAME@VERSION``. Errors: ModelError.

    >>> split_version("sql@2"), split_version("sql")
    (('sql', 2), ('sql', None))
    """
    name, at, version = text.partition("@") if isinstance(text, str) else (text, "", "")
    if not is_name(name):
        raise ModelError(
            f"{text!r} is not the name of a task vector; expected letters, digits, '.', '_' and '-', without '..'. "
            "`alnico store list` shows the names."
        )
    if at and not VERSION.fullmatch(version):
        raise ModelError(
            f"{text!r}: the version is {version!r}; expected a whole number from 1 on, as in {name}@2. "
            "`alnico store show` lists the versions."
        )
    return name, int(version) if at else None


def vector_folder(reference: str, store: Path | None = None) -> Path:
    """Return the folder of ``NAME`` or ``NAME@VERSION``, with or without ``store:`` before it; without a version, the latest.

    Errors: ModelError for a name or version that the store does not have.
    """
    place = store if store is not None else default_store()
    name, version = split_version(reference.removeprefix(PREFIX) if isinstance(reference, str) else reference)
    versions = versions_of(place, name)
    if not versions:
        near = near_name(name, vector_names(place))
        raise ModelError(
            f"{reference}: the store {place} has no task vector {name!r}. "
            + (
                f"Did you mean {near}?"
                if near
                else "`alnico store list` shows what it has; ALNICO_STORE names another store."
            )
        )
    if version is not None and version not in versions:
        raise ModelError(
            f"{reference}: the store {place} has no version {version} of it; expected "
            f"{'one of ' if len(versions) > 1 else ''}{', '.join(map(str, versions))}. Choose one, or leave the version out for the latest."
        )
    return place / VECTORS / name / str(version if version is not None else versions[-1])
