"""Downloads a task vector into a new folder: checked by its hashes, complete or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from alnico.checkpoint.durable import copy_file, rename_new, sync_directory, sync_tree
from alnico.checkpoint.hub import is_repository_id
from alnico.checkpoint.task_vectors.manifest import MANIFEST, is_file_name
from alnico.checkpoint.task_vectors.store_folder import MARK, split_version
from alnico.checkpoint.task_vectors.stored_vector import open_vector
from alnico.errors import ModelError, OutputError, RunError
from alnico.events import Watcher
from alnico.folders import remove
from alnico.store.cache import DownloadCache
from alnico.store.remotes.layout import INDEX_FILE
from alnico.store.remotes.open_remote import HUB_PREFIX, SCHEME, open_remote


def pull_vector(
    reference: str,
    into: Path,
    *,
    source: str | None = None,
    cache: DownloadCache | None = None,
    offline: bool = False,
    watch: Watcher | None = None,
) -> Path:
    """Download a task vector into the new folder ``into``, and return it.

    ``reference`` is NAME or NAME@VERSION of the store ``source``, or has its address before it (``s3://bucket/store/sql@2``,
    ``/srv/store/sql``), or is ``owner/name@revision`` on the hub: a task vector, or a PEFT adapter. Files come from the cache where it has them, are resumed, and are checked by size and SHA-256.
    ``into`` gets its name when it is complete. Errors: HubError, ModelError, ResourceError, RunError; OutputError for a
    folder that exists and is not empty.
    """
    kept = cache if cache is not None else DownloadCache()
    address, text = (source, reference) if source is not None else split_reference(reference)
    name, version = split_version(text) if text else (None, None)
    remote = open_remote(address, cache=kept, offline=offline)
    try:
        with kept.in_use():
            entry = remote.find(name, version)
            files = remote.download(entry, watch)
            assemble(files, into, f"{address}: {entry.name}", links=remote.may_be_linked)
    finally:
        remote.close()
    kept.trim()
    return into


def split_reference(reference: str) -> tuple[str, str]:
    """Return the address of a store and the NAME@VERSION in it, which is empty for a repository of the hub. Errors: ModelError
    for a name without an address.

    >>> split_reference("s3://bucket/store/sql@2"), split_reference("hf:owner/name@v1")
    (('s3://bucket/store', 'sql@2'), ('hf:owner/name@v1', ''))
    """
    if reference.startswith(HUB_PREFIX):
        return reference, ""
    address, slash, text = reference.rpartition("/")
    is_address = SCHEME.match(reference) is not None and not address.endswith("/")
    is_path = bool(slash) and any(
        (Path(os.path.expanduser(address or "/")) / mark).is_file() for mark in (INDEX_FILE, MARK)
    )
    if not is_address and not is_path and is_repository_id(reference):
        return reference, ""
    if not is_address and not is_path:
        raise ModelError(
            f"{reference}: does not say where it is; expected the address of a store. Write `alnico store pull NAME --from "
            "ADDRESS`, or the address and the name, as in https://example.org/vectors/sql@2."
        )
    return address, text


def assemble(files: Mapping[str, Path], into: Path, label: str = "", *, links: bool = True) -> None:
    """Make a folder of finished files by links to them, or copies, and give it its name at the end.

    Errors: RunError; OutputError if the name is taken; ModelError for a manifest that is damaged.
    """
    stage = into.with_name(f".{into.name}.alnico-part")
    try:
        remove(stage)
        stage.mkdir(parents=True)
        for name, path in files.items():
            if name != MANIFEST and not is_file_name(name):
                raise ModelError(
                    f"{into}: a file is called {name!r:.80}; expected a plain name. Do not use it."
                )
            (_link_or_copy if links else copy_file)(path, stage / name)
        check_stored(stage, label or str(into))
        sync_tree(stage)
        if into.is_dir() and not into.is_symlink() and not any(into.iterdir()):
            into.rmdir()
        rename_new(stage, into)
        sync_directory(into.parent)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise OutputError(f"{into}: exists; expected the name of a new folder. Choose another.") from None
        raise RunError(
            f"{into}: cannot be written ({error.strerror}). Make room or check the disk; the same command resumes."
        ) from None
    finally:
        with suppress(OSError):
            remove(stage)


def check_stored(folder: Path, label: str) -> None:
    """Check that the headers of a folder are what its manifest says. Errors: ModelError, which calls it by its label."""
    try:
        open_vector(folder).close()
    except ModelError as error:
        lines = [line.replace(str(folder), label) for line in error.args]
        raise ModelError(*lines) from None


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(os.path.realpath(source), target)  # the hub's cache has links to its blobs
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        copy_file(source, target)
