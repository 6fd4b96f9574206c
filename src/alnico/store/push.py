"""Publishes a stored task vector: to a folder, S3 and other file systems, or the hub."""

from __future__ import annotations

from pathlib import Path

from alnico.events import Watcher
from alnico.store.cache import DownloadCache
from alnico.store.entry import Entry
from alnico.store.remotes.open_remote import open_remote


def push_vector(
    folder: Path,
    entry: Entry,
    to: str,
    *,
    private: bool = False,
    message: str | None = None,
    cache: DownloadCache | None = None,
    offline: bool = False,
    watch: Watcher | None = None,
) -> str:
    """Publish the finished task vector in ``folder``, which ``entry`` describes, and return its address there.

    ``to`` is an address as :func:`open_remote` takes it. What is there already is not sent twice, so a push that was killed
    is finished by the same call. Another content under the same version gets the next free version.
    Errors: HubError; ModelError for files that are not those of the manifest.
    """
    remote = open_remote(to, cache=cache, offline=offline)
    try:
        return remote.push(folder, entry, private=private, message=message, watch=watch)
    finally:
        remote.close()
