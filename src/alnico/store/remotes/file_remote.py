"""A remote store of plain files in the layout of ``layout.py``: finds, downloads and takes versions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from alnico.checkpoint.files import read_small
from alnico.checkpoint.json_files import MAX_JSON_BYTES, parse_json
from alnico.checkpoint.network import Exchange, call_all
from alnico.checkpoint.task_vectors.manifest import MANIFEST, StoredFile, parse_manifest
from alnico.errors import HubError, ModelError, near_name
from alnico.events import Fetched, Fetching, Watcher
from alnico.numerics.sizes import format_size
from alnico.store.cache import DownloadCache, Wanted, not_cached
from alnico.store.entry import Entry, describe
from alnico.store.file_hash import stored_file
from alnico.store.remotes.layout import (
    ENTRY_FILE,
    INDEX_FILE,
    MAX_INDEX_BYTES,
    MAX_LINE,
    VECTORS_FOLDER,
    object_path,
    parse_index,
    read_entry,
    version_path,
    versions_among,
)
from alnico.store.remotes.remote_files import PIECE_BYTES, RemoteFiles
from alnico.store.signed_names import files_beside

T = TypeVar("T")

MAX_ROUNDS = 100
"""How often a version or the index is tried again because another push came first."""


class FileRemote:
    """A store in a place for files. It needs no program on its side."""

    may_be_linked = True

    def __init__(self, storage: RemoteFiles, cache: DownloadCache, *, offline: bool = False) -> None:
        self.address, self.is_writable = storage.address, storage.is_writable
        self._storage, self._cache, self._offline = storage, cache, offline

    def entries(self) -> list[Entry]:
        where = f"{self.address}: {INDEX_FILE}"
        if self._offline:
            data = self._cache.kept_index(self.address, MAX_INDEX_BYTES)
            if data is None:
                raise not_cached(where, self._cache)
        else:
            data = self._read(INDEX_FILE, MAX_INDEX_BYTES)
            if data is None:
                raise HubError(
                    f"{self.address}: has no {INDEX_FILE}; expected a store of task vectors. Check the address; "
                    "`alnico store push NAME ADDRESS` makes a store in an empty place."
                )
        if len(data) > MAX_INDEX_BYTES:
            raise ModelError(
                f"{where}: is larger than {format_size(MAX_INDEX_BYTES)}; expected the index of a store. Check the address."
            )
        entries = parse_index(data, where)
        if not self._offline:
            self._cache.keep_index(self.address, data)
        return entries

    def find(self, name: str | None, version: int | None) -> Entry:
        entries = self.entries()
        if name is None:
            names = sorted({entry.name for entry in entries})
            if len(names) != 1:
                raise HubError(
                    f"{self.address}: has {len(names)} task vectors{_listed(names)}; expected the name of one. Write "
                    "`alnico store pull NAME --from ADDRESS`."
                )
            name = names[0]
        versions = {entry.version: entry for entry in entries if entry.name == name}
        if not versions:
            near = near_name(name, {entry.name for entry in entries})
            raise HubError(
                f"{self.address}: has no task vector {name!r}. "
                + (f"Did you mean {near}?" if near else "`alnico store search` shows what it has.")
            )
        if version is not None and version not in versions:
            raise HubError(
                f"{self.address}: has no version {version} of {name!r}; expected "
                f"{'one of ' if len(versions) > 1 else ''}{', '.join(map(str, sorted(versions)))}. Choose one, or leave the version out for the latest."
            )
        entry = versions[version if version is not None else max(versions)]
        return self._with_signature(entry)

    def _with_signature(self, entry: Entry) -> Entry:
        """Return an entry as its own file has it, which is written before the index. Errors: HubError, ModelError."""
        if self._offline:
            return entry
        path = version_path(entry.name, entry.version, ENTRY_FILE)
        data = self._read(path, MAX_LINE)
        if data is None:
            return entry
        where = f"{self.address}: {path}"
        own = _parse_one(data, where)
        if (own.name, own.version, own.sha256) != (entry.name, entry.version, entry.sha256):
            raise ModelError(
                f"{where}: is {own.name}@{own.version} with SHA-256 {own.sha256[:12]}...; {INDEX_FILE} says "
                f"{entry.name}@{entry.version} with {entry.sha256[:12]}.... Do not use it; tell who hosts the store."
            )
        return own

    def download(self, entry: Entry, watch: Watcher | None) -> Mapping[str, Path]:
        label = f"{self.address}: {entry.name}@{entry.version}"
        manifest = StoredFile(entry.manifest_bytes, entry.sha256)
        if entry.manifest_bytes > MAX_JSON_BYTES:
            raise ModelError(
                f"{label}: its manifest has {format_size(entry.manifest_bytes)}; at most {format_size(MAX_JSON_BYTES)} are "
                "read. Nothing was downloaded; tell who hosts the store."
            )
        listed = {**entry.files, **entry.beside}
        total = sum(file.size for file in listed.values())
        if self._offline:
            paths = {name: self._cache.whole(file) for name, file in {MANIFEST: manifest, **listed}.items()}
            found = {name: path for name, path in paths.items() if path is not None}
            if len(found) < len(paths):
                raise not_cached(label, self._cache)
            return found
        self._cache.check_room(label, total)
        wanted = Wanted(version_path(entry.name, entry.version, MANIFEST), entry.manifest_bytes, entry.sha256)
        (path,) = self._cache.fetch(self._storage, label, [wanted], None)
        self._check_manifest(label, entry, path)
        objects = [Wanted(object_path(str(f.sha256)), f.size, str(f.sha256)) for f in listed.values()]
        fetched = self._cache.fetch(self._storage, label, objects, watch)
        return {MANIFEST: path, **dict(zip(listed, fetched, strict=True))}

    def _check_manifest(self, label: str, entry: Entry, path: Path) -> None:
        """Refuse a manifest that is not what the index says of it. Errors: ModelError."""
        text = read_small(path, MAX_JSON_BYTES, "the manifest of a task vector")
        where = f"{label}: {MANIFEST}"
        manifest = parse_manifest(parse_json(text, Path(where), is_ours=True), where)
        own = describe(manifest, entry.version, entry.sha256, len(text))
        for key in ("name", "files", "kind", "base", "base_root", "licence"):
            if (found := getattr(own, key)) != (stated := getattr(entry, key)):
                raise ModelError(
                    f"{where}: {key} is {_shown(found)}; {INDEX_FILE} says {_shown(stated)}. Do not use it; tell who hosts "
                    "the store."
                )

    def push(
        self, folder: Path, entry: Entry, *, private: bool, message: str | None, watch: Watcher | None
    ) -> str:
        if private:
            raise HubError(
                f"{self.address}: cannot be made private by alnico; expected the rights that you gave the place. Leave "
                "--private out."
            )
        if not self.is_writable:
            raise HubError(
                f"{self.address}: can only be read; expected a place that takes files. Push to a folder, s3:// or the hub, or "
                "copy such a folder to your web server."
            )
        if self._offline:
            raise HubError(
                f"{self.address}: a push needs the network, and alnico is offline. Leave --offline out."
            )
        files = {name: (folder / name, file) for name, file in entry.files.items()}
        beside = {name: stored_file(folder / name) for name in files_beside(folder, entry.files)}
        files |= {name: (folder / name, file) for name, file in beside.items()}
        text = read_small(folder / MANIFEST, MAX_JSON_BYTES, "the manifest of a task vector")
        if hashlib.sha256(text).hexdigest() != entry.sha256:
            raise ModelError(
                f"{folder / MANIFEST}: was changed since it was stored; expected SHA-256 {entry.sha256}. `alnico store verify` "
                "checks the store."
            )
        self._send_objects(files, watch)
        entry = replace(entry, beside=beside)
        version = self._claim(entry, text)
        entry = replace(entry, version=version)
        self._call(
            ENTRY_FILE,
            lambda: self._storage.write(
                version_path(entry.name, version, ENTRY_FILE), f"{entry.line()}\n".encode()
            ),
        )
        self._write_index(entry)
        return f"{self.address.rstrip('/')}/{entry.name}@{version}"

    def _send_objects(self, files: Mapping[str, tuple[Path, StoredFile]], watch: Watcher | None) -> None:
        """Send the files that are not there yet. Errors: HubError; ModelError for a file that is damaged."""
        absent: dict[str, tuple[Path, StoredFile]] = {}
        for path, file in files.values():
            target = object_path(str(file.sha256))
            if self._call(target, partial(self._storage.size, target)) != file.size:
                absent[target] = (path, file)
        if watch is not None and absent:
            total = sum(file.size for _, file in absent.values())
            watch(Fetching((self.address,), len(absent), total, is_upload=True))
        for target, (path, file) in absent.items():
            if stored_file(path) != file:
                raise ModelError(
                    f"{path}: is not the file that the manifest names; expected SHA-256 {file.sha256}. It was damaged: "
                    "`alnico store verify` checks the store. Nothing was published."
                )
            self._call(target, partial(self._storage.send, target, path))
            arrived = self._call(target, partial(self._storage.size, target))
            if arrived != file.size:
                raise HubError(
                    f"{self.address}: {target} has {arrived} bytes after the upload; expected {file.size}. Nothing was "
                    "published. Push again."
                )
            if watch is not None:
                watch(Fetched(file.size))

    def _claim(self, entry: Entry, text: bytes) -> int:
        """Write the manifest under a free version, or find the version that has it already. Errors: HubError."""
        for _ in range(MAX_ROUNDS):
            taken = [v for name, v in versions_among(self._files()) if name == entry.name]
            for version in taken:
                there = self._read(version_path(entry.name, version, MANIFEST), entry.manifest_bytes)
                if there == text:
                    return version
            version = entry.version if entry.version not in taken else max(taken) + 1
            path = version_path(entry.name, version, MANIFEST)
            if self._call(path, partial(self._storage.write, path, text, is_new=True)):
                return version
        raise self._busy()

    def _write_index(self, mine: Entry) -> None:
        """Write the index until it has every version that is there, also those of a push that runs at the same time.

        Whoever writes last lists again after that, and the manifest of each version was there before its index was written.
        """
        known: dict[tuple[str, int], Entry] = {}
        for _ in range(MAX_ROUNDS):
            there = versions_among(self._files())
            data = self._read(INDEX_FILE, MAX_INDEX_BYTES) or b""
            try:
                known |= {(e.name, e.version): e for e in parse_index(data, self.address)}
            except ModelError:  # damaged: it is made again from the entries
                data = b""
            known[mine.name, mine.version] = mine
            for name, version in there:
                if (name, version) not in known:
                    known[name, version] = self._entry_there(name, version)
            text = "".join(f"{known[key].line()}\n" for key in there).encode()
            if text == data:
                self._cache.keep_index(self.address, data)
                return
            self._call(INDEX_FILE, partial(self._storage.write, INDEX_FILE, text))
        raise self._busy()

    def _entry_there(self, name: str, version: int) -> Entry:
        """Return the entry of a version of a push that has not written the index, or was killed before. Errors: HubError,
        ModelError."""
        path = version_path(name, version, ENTRY_FILE)
        data = self._read(path, MAX_LINE)
        if data is not None:
            entry = _parse_one(data, f"{self.address}: {path}")
            if (entry.name, entry.version) == (name, version):
                return entry
        path = version_path(name, version, MANIFEST)
        text = self._read(path, MAX_JSON_BYTES) or b""
        where = f"{self.address}: {path}"
        manifest = parse_manifest(parse_json(text, Path(where), is_ours=True), where)
        return describe(manifest, version, hashlib.sha256(text).hexdigest(), len(text))

    def close(self) -> None:
        self._storage.close()

    def _files(self) -> list[str]:
        return self._call(VECTORS_FOLDER, partial(self._storage.files, VECTORS_FOLDER))

    def _read(self, path: str, most: int) -> bytes | None:
        """Return a small file, at most a byte more than ``most``; None if there is none. Errors: HubError."""

        def read() -> bytes | None:
            if self._storage.size(path) is None:
                return None
            return b"".join(self._storage.read(path, 0, most + 1))

        return self._call(path, read, most + 1)

    def _call(self, path: str, call: Callable[[], T], limit: int = PIECE_BYTES) -> T:
        exchange = Exchange(f"{self.address}: {path}", limit=limit, server=self.address)
        (result,) = call_all([exchange], [call])
        return result

    def _busy(self) -> HubError:
        return HubError(
            f"{self.address}: others write it all the time ({MAX_ROUNDS} tries); what was sent is kept. Push again later."
        )


def _parse_one(data: bytes, where: str) -> Entry:
    try:
        return read_entry(data.decode("utf-8").strip(), where)
    except UnicodeDecodeError:
        raise ModelError(
            f"{where}: is not UTF-8 text; expected an entry of an index. Tell who hosts the store."
        ) from None


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})" if names else ""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
