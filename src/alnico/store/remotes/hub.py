"""A repository of the hub as a store of one task vector, or of one PEFT adapter, which is taken in as it is."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from alnico.checkpoint.files import read_small
from alnico.checkpoint.hub import Repository, find_repository, upload
from alnico.checkpoint.json_files import MAX_JSON_BYTES, parse_json
from alnico.checkpoint.lineage import CARD, LICENCE_FILE
from alnico.checkpoint.lora_adapter import CONFIG, SAFE_WEIGHTS
from alnico.checkpoint.sidecars import SIGNATURE
from alnico.checkpoint.task_vectors.manifest import (
    MANIFEST,
    Manifest,
    StoredFile,
    format_manifest,
    is_name,
    parse_manifest,
    read_manifest,
)
from alnico.errors import HubError, ModelError, ResourceError
from alnico.events import Fetched, Fetching, Watcher
from alnico.folders import temporary_files
from alnico.numerics.sizes import format_size
from alnico.store.adapter_manifest import adapter_manifest
from alnico.store.cache import DISK_MARGIN_BYTES, DownloadCache
from alnico.store.entry import Entry, describe
from alnico.store.file_hash import stored_file
from alnico.store.signed_names import MAX_BESIDE_BYTES, files_beside, is_beside, signed_names
from alnico.store.vector_card import format_vector_card

INDEX_OF_SHARDS = "taskvector.safetensors.index.json"
REPLACED = (INDEX_OF_SHARDS, CONFIG, "chat_template.jinja", SIGNATURE)
"""Files of a task vector besides its tensors: those of an older version are removed by a push."""


class HubRemote:
    """``owner/name`` or ``owner/name@revision``. Downloads are in huggingface_hub's cache, which other tools share."""

    is_writable = may_be_linked = True

    def __init__(self, address: str, label: str, cache: DownloadCache, *, offline: bool = False) -> None:
        self.address, self.label = address, label
        self._cache, self._offline = cache, offline
        self._found: tuple[Repository, Entry, dict[str, Path]] | None = None

    def entries(self) -> list[Entry]:
        return [self._find(None)[1]]

    def find(self, name: str | None, version: int | None) -> Entry:
        entry = self._find(None)[1]
        if name is not None and name != entry.name:
            raise HubError(
                f"{self.label}: has the task vector {entry.name!r}, not {name!r}. Pull {self.address} without a name."
            )
        if version is not None:
            raise HubError(
                f"{self.label}: a repository of the hub has commits, no numbers of versions; found version {version}. Write "
                "owner/name@REVISION for another commit."
            )
        return entry

    def download(self, entry: Entry, watch: Watcher | None) -> Mapping[str, Path]:
        repository, _, paths = self._find(watch)
        missing = {name: file for name, file in {**entry.files, **entry.beside}.items() if name not in paths}
        self._fetch(repository, missing, watch)
        return {**paths, **{name: repository.folder / name for name in missing}}

    def push(
        self, folder: Path, entry: Entry, *, private: bool, message: str | None, watch: Watcher | None
    ) -> str:
        if self._offline:
            raise HubError(
                f"{self.label}: a push needs the network, and alnico is offline. Leave --offline out."
            )
        name, _, branch = self.label.partition("@")
        manifest = read_manifest(folder)
        for file, stated in entry.files.items():
            if stored_file(folder / file) != stated:
                raise ModelError(
                    f"{folder / file}: is not the file that the manifest names; expected SHA-256 {stated.sha256}. It was "
                    "damaged: `alnico store verify` checks the store. Nothing was published."
                )
        beside = files_beside(folder, entry.files)
        beside += [p.name for p in folder.iterdir() if LICENCE_FILE.fullmatch(p.name)]
        with temporary_files(), tempfile.TemporaryDirectory(prefix="alnico-push-") as made:
            stage = Path(made)
            if CARD not in beside:
                (stage / CARD).write_text(format_vector_card(manifest, name), "utf-8")
            for file in dict.fromkeys([MANIFEST, *entry.files, *beside]):
                (stage / file).symlink_to((folder / file).absolute())
            return upload(
                stage,
                name,
                private=private,
                branch=branch or None,
                message=message or f"Task vector {entry.name}, version {entry.version}",
                quiet=True,
                replaced=REPLACED,
            )

    def close(self) -> None:
        pass

    def _find(self, watch: Watcher | None) -> tuple[Repository, Entry, dict[str, Path]]:
        """Find the repository, and describe what it has; returns also the paths of files that were read for that."""
        if self._found is None:
            repository = find_repository(self.label, offline=self._offline)
            if MANIFEST in repository.sizes:
                entry, paths = self._described_vector(repository)
            elif CONFIG in repository.sizes:
                entry, paths = self._described_adapter(repository, watch)
            else:
                raise ModelError(
                    f"{self.label}: has neither {MANIFEST} nor {CONFIG}; expected a task vector or a PEFT adapter. "
                    f"`alnico store create {self.label} --base BASE` makes a task vector of a fine-tuned model."
                )
            self._found = (repository, entry, paths)
        return self._found

    def _described_vector(self, repository: Repository) -> tuple[Entry, dict[str, Path]]:
        """Read the manifest and compare it with the hub's list of files, before anything else is downloaded."""
        if (size := repository.sizes[MANIFEST]) > MAX_JSON_BYTES:
            raise ModelError(
                f"{self.label}: {MANIFEST} has {format_size(size)}; at most {format_size(MAX_JSON_BYTES)} are read. Nothing "
                "was downloaded. Do not use it."
            )
        repository.fetch([MANIFEST])
        path = repository.folder / MANIFEST
        text = read_small(path, MAX_JSON_BYTES, "the manifest of a task vector")
        where = f"{self.label}: {MANIFEST}"
        manifest = parse_manifest(parse_json(text, Path(where), is_ours=True), where)
        for file, stated in manifest.files.items():
            found = repository.sizes.get(file)
            if found is None or found != stated.size:
                raise ModelError(
                    f"{where}: {file} has {stated.size} bytes; the repository has {'no such file' if found is None else found}. "
                    "Nothing was downloaded. The task vector is damaged: tell its author."
                )
            if repository.hashes.get(file, stated.sha256) != stated.sha256:
                raise ModelError(
                    f"{where}: {file} has SHA-256 {stated.sha256}; the repository has {repository.hashes[file]}. Nothing was "
                    "downloaded. The task vector is damaged: tell its author."
                )
        entry = describe(manifest, 1, str(stored_file(path).sha256), len(text))
        return self._with_files_beside(repository, entry), {MANIFEST: path}

    def _with_files_beside(self, repository: Repository, entry: Entry) -> Entry:
        """Add the signature, and what it covers besides the files of the manifest. A card that it does not cover is the hub's, made
        again at each push."""
        if repository.sizes.get(SIGNATURE, MAX_BESIDE_BYTES + 1) > MAX_BESIDE_BYTES:
            return entry
        repository.fetch([SIGNATURE])
        names = [SIGNATURE, *(n for n in signed_names(repository.folder) if n in repository.sizes)]
        beside = [n for n in dict.fromkeys(names) if is_beside(n, entry.files)]
        self._fetch(repository, {n: StoredFile(repository.sizes[n]) for n in beside}, None)
        return replace(entry, beside={n: stored_file(repository.folder / n) for n in beside})

    def _described_adapter(
        self, repository: Repository, watch: Watcher | None
    ) -> tuple[Entry, dict[str, Path]]:
        """Download an adapter, which is small, and make a manifest for it."""
        if SAFE_WEIGHTS not in repository.sizes:
            raise ModelError(
                f"{self.label}: has {CONFIG} and no {SAFE_WEIGHTS}; expected an adapter with its tensors in safetensors, "
                "since alnico downloads no pickles. Ask its author to save it again."
            )
        wanted = [n for n in (CONFIG, SAFE_WEIGHTS, CARD) if n in repository.sizes]
        sizes = {n: StoredFile(repository.sizes[n]) for n in wanted}
        self._fetch(repository, sizes, watch)
        manifest = adapter_manifest(repository.folder, name=vector_name(repository.name))
        return self._kept(repository, manifest)

    def _kept(self, repository: Repository, manifest: Manifest) -> tuple[Entry, dict[str, Path]]:
        text = format_manifest(manifest).encode()
        path = self._cache.keep(text)
        paths = {MANIFEST: path, **{name: repository.folder / name for name in manifest.files}}
        return describe(manifest, 1, str(stored_file(path).sha256), len(text)), paths

    def _fetch(self, repository: Repository, files: Mapping[str, StoredFile], watch: Watcher | None) -> None:
        """Download files into huggingface_hub's cache, and check their hashes. Errors: HubError, ResourceError."""
        absent = repository.absent(files)
        check_cache_room(repository, sum(absent.values()))
        if watch is not None and absent:
            watch(Fetching((self.label,), len(absent), sum(absent.values())))
        repository.fetch(files, None if watch is None else lambda count: watch(Fetched(count)))
        for name, stated in files.items():
            arrived = stored_file(repository.folder / name)
            if arrived.size != stated.size or stated.sha256 not in (None, arrived.sha256):
                with suppress(OSError):
                    (repository.folder / name).unlink()
                raise HubError(
                    f"{self.label}: {name} has SHA-256 {arrived.sha256}; its manifest says {stated.sha256}. It was removed from "
                    "the cache. Try again; if it happens again, do not use this task vector."
                )


def check_cache_room(repository: Repository, size: int) -> None:
    """Refuse downloads that do not fit the disk of huggingface_hub's cache. Errors: ResourceError."""
    place = next((p for p in (repository.folder, *repository.folder.parents) if p.is_dir()), None)
    free = shutil.disk_usage(place).free if place is not None else None
    if free is not None and size and size + DISK_MARGIN_BYTES > free:
        raise ResourceError(
            f"{repository.label}: its files have {format_size(size)}, and the cache of the hub at {place} has "
            f"{format_size(free)} left; expected room for all of them. Make room, or set HF_HOME to another disk. Nothing was "
            "downloaded."
        )


def vector_name(repository: str) -> str:
    """Return a name for the adapter of a repository: its own, as far as it can be one.

    >>> vector_name("org/sql-lora"), vector_name("org/_x")
    ('sql-lora', 'x')
    """
    own = re.sub(r"\.{2,}", ".", repository.rpartition("/")[2]).lstrip("._-")
    return own if is_name(own) else "adapter"
