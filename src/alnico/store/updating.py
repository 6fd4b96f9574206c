"""Asks the remotes of a store what they have now, and tells of new versions and of bases with a new revision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from alnico.checkpoint.hub import is_repository_id
from alnico.errors import AlnicoError
from alnico.notebook import ResultTable, names_text, never_fails, result_html, result_line
from alnico.numerics.sizes import count_of
from alnico.store.cache import DownloadCache
from alnico.store.catalogue import Catalogue
from alnico.store.entry import Entry
from alnico.store.index import ALL, Query
from alnico.store.local_store import LocalStore
from alnico.store.remotes.open_remote import HUB_PREFIX, open_remote
from alnico.store.search_hub import base_news


@dataclass(frozen=True)
class RemoteState:
    """What a remote answered: how many task vectors it has, the versions that were not there before, or why it did not answer."""

    address: str
    vectors: int
    new: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class StoreUpdate:
    """What an update found, or the version that it made.

    ``newer`` are sentences about pulled task vectors whose remote has a later version, ``moved`` about bases that have another
    revision on the hub by now, or about which it did not answer. ``made`` is the new version of a task vector whose description
    was changed.
    """

    store: str
    remotes: tuple[RemoteState, ...] = ()
    newer: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    made: Entry | None = None

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for ``--json``."""
        return {
            "store": self.store,
            "remotes": [{**asdict(r), "new": list(r.new)} for r in self.remotes],
            "newer": list(self.newer),
            "moved": list(self.moved),
            "made": None if self.made is None else self.made.data(),
        }

    def __repr__(self) -> str:
        return result_line(
            f"update of {self.store}",
            f"made {self.made.name}@{self.made.version}" if self.made else "",
            count_of(len(self.remotes), "remote") if self.remotes or not self.made else "",
            *self.newer,
            *self.moved,
        )

    @never_fails
    def _repr_html_(self) -> str:
        rows = [[r.address, r.vectors, ", ".join(r.new), r.problem] for r in self.remotes]
        return result_html(
            f"Update of {self.store}",
            *([ResultTable(("remote", "task vectors", "new", "problem"), rows)] if rows else []),
            *self.newer,
            *self.moved,
            facts=[("made", f"{self.made.name}@{self.made.version}")] if self.made else [],
        )


def refresh(
    store: LocalStore, addresses: Iterable[str], *, cache: DownloadCache, offline: bool = False
) -> list[RemoteState]:
    """Ask remotes what they have, and note it in the store.

    A remote that does not answer keeps what it had; its state says why. Errors: OutputError, RunError for a store that
    cannot be written.
    """
    states = []
    for address in addresses:
        with Catalogue(store) as catalogue:
            before = {
                (f.entry.name, f.entry.version)
                for f in catalogue.index.search(Query(source=address, all_versions=True, limit=ALL))[0]
            }
        try:
            remote = open_remote(address, cache=cache, offline=offline)
            try:
                entries = remote.entries()
            finally:
                remote.close()
        except AlnicoError as error:
            states.append(RemoteState(address, len({name for name, _ in before}), (), " ".join(error.args)))
            continue
        store.note_entries(address, entries)
        new = sorted(f"{e.name}@{e.version}" for e in entries if (e.name, e.version) not in before)
        states.append(RemoteState(address, len({e.name for e in entries}), tuple(new)))
    return states


def newer_versions(store: LocalStore) -> list[str]:
    """Return a sentence for each pulled task vector of which its remote had a later version when it was last asked."""
    lines = []
    with Catalogue(store) as catalogue:
        here, _ = catalogue.index.search(Query(source="", limit=ALL))
        for found in here:
            entry = found.entry
            origin = store.origin(entry.name, entry.version)
            source, name, version = (origin.get(k) for k in ("source", "name", "version"))
            if not (isinstance(source, str) and isinstance(name, str) and isinstance(version, int)):
                continue
            there = catalogue.index.versions(source, name)
            if there and there[-1].version >= version and there[-1].sha256 != entry.sha256:
                is_later = there[-1].version > version
                last = f"{name}@{there[-1].version}" if is_later else "other content under this name"
                lines.append(
                    f"{entry.name}@{entry.version} was pulled as {name}@{version} from {source}, which has {last} now: "
                    f"`alnico store pull {pull_words(source, there[-1])}`."
                )
    return lines


def pull_words(source: str, entry: Entry) -> str:
    """Return what pulls a version from a remote, for the command line."""
    if source.startswith(HUB_PREFIX) or is_repository_id(source):
        return source
    return f"{entry.name}@{entry.version} --from {source}"


def moved_bases(store: LocalStore) -> list[str]:
    """Return a sentence for each base on the hub that has another revision than the one of a task vector of the store, and for
    each about which the hub did not answer."""
    with Catalogue(store) as catalogue:
        here, _ = catalogue.index.search(Query(source="", limit=ALL))
    made_of: dict[tuple[str, str], list[str]] = {}
    for found in here:
        e = found.entry
        if e.base is not None and e.base_revision is not None:
            made_of.setdefault((e.base, e.base_revision), []).append(f"{e.name}@{e.version}")
    news = {names_text(names): base_news(*base) for base, names in sorted(made_of.items())}
    return [f"{names}: {sentence}" for names, sentence in news.items() if sentence is not None]
