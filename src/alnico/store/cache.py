"""Keeps downloads of task vectors by SHA-256: resumed, checked at each use, limited in size.

    CACHE/objects/AB/ABCD...    whole files
    CACHE/parts/ABCD...         downloads that are not complete
    CACHE/indices/HASH.jsonl    the last index of each remote store, for work without network

A file that a vector of the store shares (by a hard link) takes no space of its own, so it does not count for the limit.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from alnico.checkpoint.durable import replace_file
from alnico.checkpoint.files import open_binary
from alnico.checkpoint.network import Exchange, TransferStopped, call_all
from alnico.checkpoint.quota import quota_left
from alnico.checkpoint.task_vectors.manifest import StoredFile
from alnico.checkpoint.task_vectors.store_folder import CACHE, default_store
from alnico.errors import AlnicoError, HubError, ModelError, ResourceError, RunError
from alnico.events import Fetched, Fetching, Watcher
from alnico.folders import open_to_write
from alnico.numerics.sizes import format_size, parse_size
from alnico.store.file_hash import stored_file
from alnico.store.remotes.remote_files import RemoteFiles

LIMIT_VARIABLE = "ALNICO_STORE_CACHE"
DEFAULT_LIMIT_BYTES = 20 * 10**9
DISK_MARGIN_BYTES = 16 << 20
HASHED_BYTES = 4 << 20


@dataclass(frozen=True)
class Wanted:
    """A file to download: its path in a storage, its size and its hash."""

    path: str
    size: int
    sha256: str


class DownloadCache:
    """Downloads of a local store, in a folder of their own. Safe for several processes."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else default_store() / CACHE

    def whole(self, file: StoredFile) -> Path | None:
        """Return a file of the cache if it is there with its size and hash. A damaged one is removed."""
        path = self._object(str(file.sha256))
        try:
            if path.stat().st_size == file.size and stored_file(path) == file:
                os.utime(path)
                return path
            path.unlink()
        except (OSError, ModelError):
            pass
        return None

    def keep(self, data: bytes) -> Path:
        """Keep a small file under its hash; return where it is. Errors: RunError."""
        path = self._object(hashlib.sha256(data).hexdigest())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _write_error(self.folder, error) from None
        replace_file(path, data)
        return path

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the files of the cache in this block: other processes do not make room then."""
        with self._locked(fcntl.LOCK_SH):
            yield

    def fetch(
        self, storage: RemoteFiles, label: str, wanted: Sequence[Wanted], watch: Watcher | None
    ) -> list[Path]:
        """Download files that are not there, and return the paths of all; see :class:`Remote` for what is checked.

        Errors: HubError, ResourceError, RunError.
        """
        found = [self.whole(StoredFile(one.size, one.sha256)) for one in wanted]
        absent = list(dict.fromkeys(one for one, path in zip(wanted, found, strict=True) if path is None))
        if absent:
            self._check_sizes(storage, label, absent)
            self.check_room(label, sum(one.size for one in absent))
            if watch is not None:
                watch(Fetching((label,), len(absent), sum(one.size for one in absent)))
            exchanges = [
                Exchange(f"{label}: {one.path}", limit=one.size, size=one.size, server=storage.address)
                for one in absent
            ]

            def report(count: int) -> None:
                if watch is not None:
                    watch(Fetched(count))

            calls = [
                partial(self._download, storage, one, exchange, report)
                for one, exchange in zip(absent, exchanges, strict=True)
            ]
            call_all(exchanges, calls)
        return [self._object(one.sha256) for one in wanted]

    def check_room(self, label: str, size: int) -> None:
        """Refuse downloads that do not fit the disk. Errors: ResourceError, RunError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise _write_error(self.folder, error) from None
        quota = quota_left(self.folder)
        free = free if quota is None else min(free, quota)
        if size + DISK_MARGIN_BYTES > free:
            raise ResourceError(
                f"{label}: its files have {format_size(size)}, and {self.folder} has {format_size(free)} left; expected room "
                "for all of them. Make room, or name a store on another disk by ALNICO_STORE. Nothing was downloaded."
            )

    def keep_index(self, address: str, data: bytes) -> None:
        """Keep the index of a remote store; without a folder that takes it, nothing happens."""
        path = self._index(address)
        with suppress(OSError, AlnicoError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)

    def kept_index(self, address: str, max_bytes: int) -> bytes | None:
        """Return the index of a remote store as it was when it was last read; None if it never was."""
        try:
            with open_binary(self._index(address)) as file:
                return file.read(max_bytes + 1)
        except OSError:
            return None

    def trim(self) -> None:
        """Remove what was not used for longest until the cache is within its limit, unless another process uses it.

        Errors: AlnicoError for a limit that is not a size.
        """
        limit = cache_limit()
        with suppress(OSError, BlockingIOError), self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
            found = []
            for path in (*self.folder.glob("objects/*/*"), *self.folder.glob("parts/*")):
                status = path.lstat()
                if status.st_nlink == 1:
                    found.append((status.st_mtime_ns, status.st_size, path))
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total <= limit:
                    break
                path.unlink()
                total -= size

    def _object(self, sha256: str) -> Path:
        return self.folder / "objects" / sha256[:2] / sha256

    def _index(self, address: str) -> Path:
        return self.folder / "indices" / f"{hashlib.sha256(address.encode()).hexdigest()}.jsonl"

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = open_to_write(self.folder / "lock", flags=os.O_CREAT)
        except OSError as error:
            raise _write_error(self.folder, error) from None
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)

    def _check_sizes(self, storage: RemoteFiles, label: str, absent: Sequence[Wanted]) -> None:
        """Refuse files of another size than declared, before any is downloaded. Errors: HubError."""
        exchanges = [
            Exchange(f"{label}: {one.path}", size=one.size, limit=one.size, server=storage.address)
            for one in absent
        ]
        sizes = call_all(exchanges, [partial(storage.size, one.path, one.size) for one in absent])
        for one, exchange, size in zip(absent, exchanges, sizes, strict=True):
            if size is None:
                raise exchange.error(
                    "is not there, though the store lists it. Try again later, or tell who hosts the store."
                )
            if size != one.size:
                raise exchange.error(
                    f"has {size} bytes; the manifest says {one.size}. Nothing was downloaded. Try again later, or tell who "
                    "hosts the store."
                )

    def _download(
        self, storage: RemoteFiles, one: Wanted, exchange: Exchange, report: Callable[[int], None]
    ) -> None:
        try:
            with self._part(one.sha256) as (path, descriptor):
                self._fill(storage, one, exchange, report, path, descriptor)
                target = self._object(one.sha256)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.fsync(descriptor)
                os.replace(path, target)
        except OSError as error:
            raise _write_error(self.folder, error) from None

    def _fill(
        self,
        storage: RemoteFiles,
        one: Wanted,
        exchange: Exchange,
        report: Callable[[int], None],
        path: Path,
        descriptor: int,
    ) -> None:
        """Complete a file, from its last byte on. Errors: HubError, TransferStopped."""
        size = os.fstat(descriptor).st_size
        is_resumed = 0 < size <= one.size
        if size > one.size:
            os.ftruncate(descriptor, 0)
        while True:
            digest = hashlib.sha256()
            done = 0
            os.lseek(descriptor, 0, os.SEEK_SET)
            while data := os.read(descriptor, HASHED_BYTES):
                digest.update(data)
                done += len(data)
            report(done)
            if done < one.size:
                for data in storage.read(one.path, done, one.size - done):
                    if exchange.stop.is_set():
                        raise TransferStopped
                    view = memoryview(data)
                    while view:
                        view = view[os.write(descriptor, view) :]
                    digest.update(data)
                    done += len(data)
                    report(len(data))
            if done != one.size:
                raise exchange.error(
                    f"ended after {done} of {one.size} bytes. What arrived is kept: run the same command again."
                )
            if digest.hexdigest() == one.sha256:
                return
            os.ftruncate(descriptor, 0)
            report(-done)
            if not is_resumed:
                path.unlink(missing_ok=True)
                raise exchange.error(
                    f"arrived with SHA-256 {digest.hexdigest()}; the manifest says {one.sha256}. It was deleted. Try again; "
                    "if it happens again, tell who hosts the store, and do not use this task vector."
                )
            is_resumed = False

    @contextmanager
    def _part(self, sha256: str) -> Iterator[tuple[Path, int]]:
        """Lend the file of an unfinished download, or a new one if another process is at it. Errors: OSError."""
        path = self.folder / "parts" / sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_to_write(path, flags=os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except OSError:
            is_ours = False
        if not is_ours:  # another process downloads it now, or has just finished
            os.close(descriptor)
            path = path.with_name(f"{sha256}.{secrets.token_hex(8)}")
            descriptor = open_to_write(path, flags=os.O_CREAT | os.O_EXCL | os.O_RDWR)
        try:
            yield path, descriptor
        finally:
            os.close(descriptor)
            if not is_ours:
                path.unlink(missing_ok=True)


def cache_limit() -> int:
    """Return the limit of the cache in bytes, from ``ALNICO_STORE_CACHE``. Errors: AlnicoError for other text."""
    text = os.environ.get(LIMIT_VARIABLE, "").strip()
    try:
        return 0 if text == "0" else parse_size(text) if text else DEFAULT_LIMIT_BYTES
    except ValueError:
        raise AlnicoError(
            f"{LIMIT_VARIABLE} is {text[:40]!r}; expected a size such as 20GB, or 0 to keep nothing. Correct it or unset it."
        ) from None


def not_cached(label: str, cache: DownloadCache) -> HubError:
    return HubError(
        f"{label}: is not in the cache ({cache.folder}), and alnico is offline; expected one that was downloaded before. "
        "Run once without --offline."
    )


def _write_error(folder: Path, error: OSError) -> RunError:
    return RunError(
        f"{folder}: cannot be written ({error.strerror}). Make room or check the disk; the same command resumes."
    )
