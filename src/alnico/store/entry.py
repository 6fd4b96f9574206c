"""Describes one version of a task vector for lists, searches and indices: a line of JSON."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from alnico.checkpoint.files import read_small
from alnico.checkpoint.json_files import MAX_JSON_BYTES, parse_json
from alnico.checkpoint.task_vectors.manifest import (
    MANIFEST,
    SHA256,
    Manifest,
    StoredFile,
    is_file_name,
    is_name,
    parse_manifest,
)
from alnico.errors import ModelError


@dataclass(frozen=True)
class Entry:
    """One version of a task vector in a store.

    ``sha256`` is the hash of its ``taskvector.json``, which has the hashes of all other ``files``: it identifies the
    content. ``encodings`` counts the tensors of each encoding, ``byte_size`` is the size of the files without the manifest.
    ``beside`` are files of the folder that the manifest does not list: a signature.
    """

    name: str
    version: int
    sha256: str
    manifest_bytes: int
    kind: str = "difference"
    description: str = ""
    tasks: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    licence: str | None = None
    base: str | None = None
    base_revision: str | None = None
    base_root: str | None = None
    base_licence: str | None = None
    encodings: Mapping[str, int] = field(default_factory=dict)
    byte_size: int = 0
    error: float = 0.0
    norm: float = 0.0
    suggested_scale: float = 1.0
    files: Mapping[str, StoredFile] = field(default_factory=dict)
    beside: Mapping[str, StoredFile] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def line(self) -> str:
        """Return it as one line of an index file."""
        return json.dumps(self.data(), ensure_ascii=False, allow_nan=False, sort_keys=True)


def entry_of(folder: Path, version: int) -> Entry:
    """Read the manifest of a folder and describe it. Errors: ModelError."""
    text = read_small(folder / MANIFEST, MAX_JSON_BYTES, "the manifest of a task vector")
    manifest = parse_manifest(parse_json(text, folder / MANIFEST, is_ours=True), str(folder / MANIFEST))
    return describe(manifest, version, hashlib.sha256(text).hexdigest(), len(text))


def describe(manifest: Manifest, version: int, sha256: str, manifest_bytes: int) -> Entry:
    """Describe a manifest, whose text has this hash and size."""
    return Entry(
        name=manifest.name,
        version=version,
        sha256=sha256,
        manifest_bytes=manifest_bytes,
        kind=manifest.kind,
        description=manifest.description,
        tasks=manifest.tasks,
        languages=manifest.languages,
        licence=manifest.licence,
        base=manifest.base.id,
        base_revision=manifest.base.revision,
        base_root=manifest.base.root,
        base_licence=manifest.base.licence,
        encodings=dict(sorted(Counter(t.encoding for t in manifest.tensors.values()).items())),
        byte_size=manifest.byte_size,
        error=manifest.error,
        norm=manifest.norm,
        suggested_scale=manifest.scale.suggested,
        files=dict(manifest.files),
    )


def parse_entry(line: str, where: str) -> Entry:
    """Read a line of an index file. Errors: ModelError, which begins with ``where``, for anything but an entry."""
    try:
        data = json.loads(line)
        entry = replace(
            Entry(**data),
            tasks=tuple(data.get("tasks", ())),
            languages=tuple(data.get("languages", ())),
            files={n: StoredFile(**f) for n, f in data.get("files", {}).items()},
            beside={n: StoredFile(**f) for n, f in data.get("beside", {}).items()},
        )
        if problem := _problem(entry):
            raise ValueError(problem)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{where}: is not an entry of an index of task vectors ({str(error)[:120]}); expected a line that "
            "`alnico store push` wrote. Check the address, or tell who hosts the index."
        ) from None
    return entry


def _problem(entry: Entry) -> str:
    """Say what is wrong in an entry; empty if nothing is."""
    if not is_name(entry.name) or len(entry.name) > 96:
        return f"the name is {entry.name!r:.60}"
    for key in ("version", "manifest_bytes", "byte_size"):
        if type(value := getattr(entry, key)) is not int or not 0 <= value < 1 << 63:
            return f"{key} is {value!r:.40}"
    if not 1 <= entry.version < 10**9:
        return f"version is {entry.version}"
    if not isinstance(entry.sha256, str) or not SHA256.fullmatch(entry.sha256):
        return f"sha256 is {entry.sha256!r:.40}"
    for key in ("kind", "description"):
        if not isinstance(getattr(entry, key), str):
            return f"{key} is not text"
    for key in ("licence", "base", "base_revision", "base_root", "base_licence"):
        if not isinstance(getattr(entry, key), str | None):
            return f"{key} is not text"
    for key in ("error", "norm", "suggested_scale"):
        if type(value := getattr(entry, key)) not in (int, float) or not abs(value) <= 1.7e308:
            return f"{key} is not a finite number"
    if not all(isinstance(word, str) for word in (*entry.tasks, *entry.languages)):
        return "tasks and languages are not all text"
    if not isinstance(entry.encodings, dict) or not all(type(n) is int for n in entry.encodings.values()):
        return "encodings are not counts"
    if set(entry.files) & set(entry.beside):
        return "files and beside name the same file"
    for name, file in (*entry.files.items(), *entry.beside.items()):
        if not is_file_name(name):
            return f"a file is called {name!r:.60}"
        if type(file.size) is not int or not 0 <= file.size < 1 << 63:
            return f"the size of {name} is {file.size!r:.40}"
        if not isinstance(file.sha256, str) or not SHA256.fullmatch(file.sha256):
            return f"the sha256 of {name} is {file.sha256!r:.40}"
    return ""
