"""Says what a store elsewhere does: list its entries, download a version, take a version."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from alnico.events import Watcher
from alnico.store.entry import Entry


class Remote(Protocol):
    """A store elsewhere. ``address`` is as the caller wrote it, ``is_writable`` says whether :meth:`push` can work,
    ``may_be_linked`` whether the files of a download are the cache's, which never change."""

    address: str
    is_writable: bool
    may_be_linked: bool

    def entries(self) -> list[Entry]:
        """Return the versions that it has. Errors: HubError; ModelError for an index that is damaged."""

    def find(self, name: str | None, version: int | None) -> Entry:
        """Return one version, the latest without ``version``; ``name`` is None where there is only one vector.
        Errors: HubError, naming what there is; ModelError."""

    def download(self, entry: Entry, watch: Watcher | None) -> Mapping[str, Path]:
        """Download the files of a version into the cache, each checked by its size and SHA-256; return where they are.

        Nothing is downloaded where sizes differ from what is declared, or the disk has no room.
        Errors: HubError, ModelError, ResourceError."""

    def push(
        self, folder: Path, entry: Entry, *, private: bool, message: str | None, watch: Watcher | None
    ) -> str:
        """Add a finished task vector, and return its address there. A push that was killed is finished by the same
        call again. Errors: HubError; ModelError for a folder whose files are not those of its manifest."""

    def close(self) -> None:
        """Close connections."""
