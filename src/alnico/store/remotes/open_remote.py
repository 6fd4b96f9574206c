"""Opens a store elsewhere by its address: a folder, a web server, a file system, or a repository of the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from alnico.checkpoint.hub import is_repository_id
from alnico.checkpoint.remote.open_folder import checked_url, open_remote_folder
from alnico.checkpoint.task_vectors.store_folder import MARK
from alnico.errors import HubError, ModelError
from alnico.store.cache import DownloadCache
from alnico.store.remotes.file_remote import FileRemote
from alnico.store.remotes.folder import FolderFiles
from alnico.store.remotes.hub import HubRemote
from alnico.store.remotes.remote import Remote
from alnico.store.remotes.remote_folder_files import RemoteFolderFiles
from alnico.store.remotes.store_folder_remote import StoreFolderRemote
from alnico.store.remotes.web import WebFiles

HUB_PREFIX = "hf:"
"""How an address says that it is a repository of the hub: ``hf:owner/name``."""
SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


def open_remote(address: str, *, cache: DownloadCache | None = None, offline: bool = False) -> Remote:
    """Open a store elsewhere; nothing is requested yet. Close it after use.

    ``address`` is a folder (a path, or ``file://``), ``https://`` or ``http://`` (to read only), ``s3://`` or another
    file system of fsspec, or a repository of the hub (``hf:owner/name``, or ``owner/name`` where no such folder exists).
    ``cache`` keeps what is downloaded. Errors: HubError for an address that is none of these.
    """
    kept = cache if cache is not None else DownloadCache()
    scheme = SCHEME.match(address)
    if scheme is None:
        folder = Path(os.path.expanduser(address))
        label = address.removeprefix(HUB_PREFIX)
        if address.startswith(HUB_PREFIX) or (not folder.exists() and is_repository_id(label)):
            return HubRemote(address, label, kept, offline=offline)
        return _of_folder(folder.absolute(), address, kept, offline=offline)
    kind = scheme[1].lower()
    if kind == "file":
        parts = _split(address)
        if parts.netloc not in ("", "localhost"):
            raise HubError(
                f"{address}: names the machine {parts.netloc!r}; expected a folder of this one, as in file:///srv/store. "
                "Check the slashes."
            )
        return _of_folder(Path(unquote(parts.path)), address, kept, offline=offline)
    try:
        url = checked_url(address)
    except ModelError as error:
        raise HubError(*error.args) from None
    if kind in ("http", "https"):
        return FileRemote(WebFiles(url), kept, offline=offline)
    return FileRemote(RemoteFolderFiles(open_remote_folder(url)), kept, offline=offline)


def _of_folder(folder: Path, address: str, cache: DownloadCache, *, offline: bool) -> Remote:
    """Open a folder: another local store, or a store that was pushed to."""
    if (folder / MARK).is_file():
        return StoreFolderRemote(folder, address)
    return FileRemote(FolderFiles(folder, address), cache, offline=offline)


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:
        raise HubError(f"{address}: is not an address. Check the brackets and slashes.") from None
