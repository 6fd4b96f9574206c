"""Opens a stored task vector, checks its manifest against its files, and reads the parts of its tensors."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.file_model import FileModel, open_shard
from alnico.checkpoint.files import check_inside, file_sha256, open_to_read, read_small
from alnico.checkpoint.json_files import MAX_JSON_BYTES, parse_json
from alnico.checkpoint.lora_adapter import CONFIG, SAFE_WEIGHTS
from alnico.checkpoint.reference import is_hub_reference, is_store_reference
from alnico.checkpoint.source import Origin, Shard
from alnico.checkpoint.task_vectors.decoders import (
    CHUNK,
    as_factors,
    decode_tensor,
    numbers,
    part_problem,
    storage,
)
from alnico.checkpoint.task_vectors.index_places import READ_BYTES, IndexPlaces, find_places, stream_tensor
from alnico.checkpoint.task_vectors.known_hashes import KnownHashes, known_hashes
from alnico.checkpoint.task_vectors.manifest import MANIFEST, Manifest, TensorEntry, read_manifest
from alnico.checkpoint.task_vectors.saved_difference import is_saved_difference, manifest_of, open_saved
from alnico.checkpoint.task_vectors.store_folder import PREFIX, vector_folder
from alnico.checkpoint.virtual_read import CHUNK as BLOCK
from alnico.errors import ModelError, ResourceError
from alnico.run_options import ONLINE, Access

MOST_HELD = 4
"""Tensors whose factors stay in memory: those that threads are reading."""

INDEX = "taskvector.safetensors.index.json"


def open_vector(path_or_reference: str | os.PathLike[str], *, access: Access = ONLINE) -> StoredVector:
    """Open a stored task vector by its folder, ``store:NAME`` or ``store:NAME@VERSION``, or a repository of the hub. What
    ``TaskVector.save`` wrote is opened, too.

    Reads the manifest and headers, and checks that they agree: which files there are and how large they are, that all are in
    the folder, and the dtypes and shapes of all parts. No tensor is read. Errors: ModelError; HubError.
    """
    label = os.fspath(path_or_reference)
    path = Path(os.path.expanduser(label))
    if path.exists() or not is_hub_reference(label):
        try:
            return _open_local(label, path)
        except OSError as error:
            raise ModelError(
                f"{label}: cannot be read ({error.strerror}). Check the path and its permissions."
            ) from None
    from alnico.checkpoint.hub import open_from_hub  # with huggingface_hub, only where it is used

    files = open_from_hub(label, access=access, choose=files_on_hub)
    try:
        return StoredVector(label, files, read_manifest(files.location))
    except BaseException:
        files.close()
        raise


def _open_local(label: str, path: Path) -> StoredVector:
    folder = vector_folder(label) if label.startswith(PREFIX) and not path.exists() else path
    if not os.path.lexists(folder / MANIFEST) and is_saved_difference(folder):
        files = open_saved(label, folder)
        return StoredVector(label, files, manifest_of(files))
    _find_manifest(label, folder, os.path.lexists(folder / MANIFEST))
    manifest = read_manifest(folder)
    return StoredVector(label, FileModel(label, folder, _open_files(manifest, folder)), manifest)


def _find_manifest(label: str, folder: Path, is_there: bool) -> None:
    """Errors: ModelError where there is no manifest."""
    if not is_there:
        raise ModelError(
            f"{label}: has no {MANIFEST}; expected the folder of a task vector. `alnico store create` makes one, "
            f"`alnico store list` shows those of the store.{'' if folder.exists() else ' Check the path.'}"
        )


def files_on_hub(
    label: str, names: Collection[str], folder: Path, _exists: Callable[[str], bool]
) -> list[str]:
    """Return the names of the files with tensors, from the manifest in a snapshot. Errors: ModelError."""
    _find_manifest(label, folder, MANIFEST in names)
    manifest = read_manifest(folder)
    missing = next((name for name in manifest.files if name not in names), None)
    if missing is not None:
        raise ModelError(
            f"{label}: has no {missing}, which {MANIFEST} names; expected all files of the task vector. "
            "Ask its author to push it again."
        )
    return [name for name in manifest.files if name.endswith(".safetensors")]


class StoredVector:
    """An open task vector: ``manifest``, and the parts of its tensors. Made by :func:`open_vector`; close it, or use it in
    ``with``.

    Before the first element of a part is used, the whole part must have the hash that the manifest says.
    """

    def __init__(self, label: str, files: FileModel, manifest: Manifest) -> None:
        self.label = label
        self.files = files
        self.folder = files.location
        self.manifest = manifest
        where = str(self.folder / MANIFEST)
        _check_sizes(manifest, files, where)
        _check_entries(manifest, files, where)
        _check_index(manifest, files)
        self._hashes: dict[Path, KnownHashes] = {}
        self._lock = threading.Lock()
        self._places: dict[str, IndexPlaces] = {}
        self._good: set[tuple[str, str]] = set()
        self._busy: dict[str, threading.Lock] = {}
        self._held: OrderedDict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._scratch = threading.local()

    def read(self, name: str, base: np.ndarray | None = None) -> np.ndarray:
        """Decode a whole tensor, as :func:`decode_tensor` does: the new values for exact encodings, the difference in float64
        for others. Errors: ModelError for a name that it does not have, and parts that differ from their hashes."""
        entry = self.entry(name)
        self.check(name)
        parts = {part: self._array(entry, part) for part in entry.stored}
        try:
            return decode_tensor(entry, parts, base)
        except MemoryError:
            raise ResourceError(
                f"{self.label}: {name}: has {entry.elements} elements; expected a tensor that fits the memory. "
                "Put the task vector on its base, which reads it by blocks."
            ) from None

    def entry(self, name: str) -> TensorEntry:
        """Return what the manifest says of a tensor. Errors: ModelError."""
        if name not in self.manifest.tensors:
            raise ModelError(f"{self.label}: has no tensor {name!r}. `alnico store show` lists its tensors.")
        return self.manifest.tensors[name]

    def _array(self, entry: TensorEntry, part: str) -> np.ndarray:
        stored = self.files.tensors[entry.stored[part]]
        values = np.empty(stored.elements, storage(stored.dtype))
        self.files.read_into(entry.stored[part], 0, memoryview(values.view(np.uint8)))
        return values.reshape(stored.shape)

    def parts(self, name: str) -> StoredParts:
        """Return the parts of a tensor, to be read by blocks."""
        return StoredParts(self, name, self.entry(name))

    def check(self, name: str) -> None:
        """Compare the parts of a tensor with their hashes, and check its indices, where that was not done yet.

        Errors: ModelError.
        """
        entry = self.manifest.tensors[name]
        for part in entry.stored:
            if (name, part) in self._good and (part != "indices" or name in self._places):
                continue
            with self._lock:
                busy = self._busy.setdefault(f"{name} {part}", threading.Lock())
            with busy:
                if (name, part) not in self._good or (part == "indices" and name not in self._places):
                    self._check_part(name, entry, part)
                    self._good.add((name, part))

    def _check_part(self, name: str, entry: TensorEntry, part: str) -> None:
        stored, expected = entry.stored[part], entry.digests.get(part)
        if (
            part == "indices"
        ):  # read anyway: they must ascend, and each block needs the place where its own begin
            found = self._read_indices(name, entry)
        elif expected is None:
            return
        else:
            found = self._known(stored).get(
                f"xxh3 {stored}",
                lambda: stream_tensor(self.files, stored, self._buffer("hash", READ_BYTES)),
                expected,
            )
        if expected is not None and found != expected:
            place = self.files.place_of(stored)
            raise ModelError(
                f"{place[0] if place else self.label}: {stored} has the hash {found}, {MANIFEST} says {expected}: the file "
                "was damaged or changed. Get the task vector again."
            )

    def _known(self, stored: str) -> KnownHashes:
        """Return the known hashes of the file of a stored tensor."""
        place = self.files.place_of(stored)
        path = place[0] if place else self.folder
        with self._lock:
            if path not in self._hashes:
                self._hashes[path] = known_hashes([path])
            return self._hashes[path]

    def _read_indices(self, name: str, entry: TensorEntry) -> str:
        """Check the indices of a tensor and note where those of each block begin; returns their hash."""
        buffer = self._buffer("hash", READ_BYTES)
        places, digest = find_places(self.files, entry.stored["indices"], entry.elements, buffer, self.label)
        self._places[name] = places
        return digest

    def _buffer(self, name: str, size: int) -> memoryview:
        """Return this thread's buffer of a name, which is reused: fresh pages are slow."""
        buffers: dict[str, memoryview] = self._scratch.__dict__
        if name not in buffers or len(buffers[name]) < size:
            buffers[name] = memoryview(bytearray(size))
        return buffers[name][:size]

    def read_part(self, name: str, entry: TensorEntry, part: str, first: int, count: int) -> np.ndarray:
        """Return elements of a part in this thread's buffer."""
        dtype = storage(self.files.tensors[entry.stored[part]].dtype)
        raw = self._buffer(part, count * dtype.itemsize)
        self.files.read_into(entry.stored[part], first * dtype.itemsize, raw)
        return np.frombuffer(raw, dtype)

    def places(self, name: str) -> IndexPlaces:
        """Return where the indices of each block of a tensor begin."""
        return self._places[name]

    def factors(self, name: str, real: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return ``left`` (stack, rows, r) and ``right`` (stack, r, columns) of a tensor."""
        key = (name, real.str)
        entry = self.manifest.tensors[name]
        with self._lock:
            if key not in self._held:
                arrays = {part: self._array(entry, part) for part in ("left", "right")}
                left, right = (
                    numbers(a, self.files.tensors[entry.stored[part]].dtype).astype(real)
                    for part, a in arrays.items()
                )
                self._held[key] = as_factors(left, right, arrays["left"].shape)
            self._held.move_to_end(key)
            while len(self._held) > MOST_HELD:
                self._held.popitem(last=False)
            return self._held[key]

    @property
    def origin(self) -> Origin | None:
        return self.files.origin

    @property
    def shards(self) -> list[Shard]:
        return self.files.shards

    @property
    def held_bytes(self) -> int:
        """Factors in memory, and the places of indices."""
        factors = [
            8 * sum(self.files.tensors[stored].elements for stored in entry.stored.values())
            for entry in self.manifest.tensors.values()
            if entry.encoding == "low_rank"
        ]
        indexed = [e for e in self.manifest.tensors.values() if "indices" in e.stored]
        return sum(sorted(factors)[-MOST_HELD:]) + sum(8 * (e.elements // CHUNK + 2) for e in indexed)

    @property
    def reading_bytes(self) -> int:
        """The buffers of a thread: one for hashing, and one for each part of a block."""
        factors = max(
            (
                12 * sum(self.files.tensors[stored].elements for stored in entry.stored.values())
                for entry in self.manifest.tensors.values()
                if entry.encoding == "low_rank"
            ),
            default=0,
        )
        return READ_BYTES + 4 * 8 * BLOCK + factors

    def identity(self) -> list[dict[str, Any]]:
        """What identifies this version: the files, and the manifest by its content."""
        if not self.manifest.files:
            return self.files.identity()
        text = read_small(self.folder / MANIFEST, MAX_JSON_BYTES, "the manifest of a task vector")
        return [*self.files.identity(), {"file": MANIFEST, "sha256": hashlib.sha256(text).hexdigest()}]

    def paths(self) -> list[Path]:
        return [*self.files.paths(), *([self.folder / MANIFEST] if self.manifest.files else [])]

    @cached_property
    def pinned(self) -> str:
        """The label, with the version of a task vector of the store."""
        is_named = is_store_reference(self.label) and "@" not in self.label and self.label != str(self.folder)
        return f"{self.label}@{self.folder.name}" if is_named else self.label

    def check_files(self) -> None:
        """Compare every file with the SHA-256 of the manifest, where that was not done yet. Errors: ModelError."""
        for name, declared in self.manifest.files.items():
            path = self.folder / name
            with self._lock:
                known = self._hashes.setdefault(path, known_hashes([path]))
            found = known.get(f"sha256 {name}", partial(file_sha256, path), declared.sha256)
            if found != declared.sha256:
                raise ModelError(
                    f"{path}: has the SHA-256 {found}, {MANIFEST} says {declared.sha256}: the file was damaged or changed. "
                    "Get the task vector again."
                )

    def close(self) -> None:
        self._held.clear()
        self.files.close()

    def __enter__(self) -> StoredVector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<task vector {self.label}: {len(self.manifest.tensors)} tensors>"


class StoredParts:
    """The parts of one tensor in files, as :class:`~alnico.checkpoint.task_vectors.decoders.Parts`. They are checked first."""

    def __init__(self, vector: StoredVector, name: str, entry: TensorEntry) -> None:
        vector.check(name)
        self._vector = vector
        self._name = name
        self._entry = entry

    def read(self, part: str, first: int, count: int) -> np.ndarray:
        return self._vector.read_part(self._name, self._entry, part, first, count)

    def within(self, first: int, last: int) -> tuple[int, int]:
        return self._vector.places(self._name).within(first, last, partial(self.read, "indices"))

    def factors(self, real: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
        return self._vector.factors(self._name, real)

    def dtype(self, part: str) -> str:
        return self._vector.files.tensors[self._entry.stored[part]].dtype

    def size(self, part: str) -> int:
        return self._vector.files.tensors[self._entry.stored[part]].elements


def _open_files(manifest: Manifest, folder: Path) -> list[Shard]:
    """Open the files with tensors that a manifest declares. Errors: ModelError."""
    return [open_shard(folder / name) for name in manifest.files if name.endswith(".safetensors")]


def _check_sizes(manifest: Manifest, files: FileModel, where: str) -> None:
    """Refuse files that are absent, outside of the folder or of another size than declared. Errors: ModelError."""
    folder = files.location
    for name, declared in manifest.files.items():
        if files.origin is not None:
            size = files.origin.sizes.get(name)
        else:
            check_inside(folder / name, folder)
            descriptor = open_to_read(folder / name)
            size = os.fstat(descriptor).st_size
            os.close(descriptor)
        if size != declared.size:
            raise ModelError(
                f"{folder / name}: has {size} bytes, {where} says {declared.size}. The file is truncated or another one: get "
                "the task vector again."
            )


def _check_entries(manifest: Manifest, files: FileModel, where: str) -> None:
    """Refuse a manifest whose entries do not fit the headers. Errors: ModelError."""
    used: dict[str, str] = {}
    for name, entry in manifest.tensors.items():
        if (entry.encoding == "adapter") != (manifest.kind == "adapter"):
            raise ModelError(
                f"{where}: {name} has the encoding {entry.encoding} in a task vector of kind {manifest.kind}; expected adapter "
                "for all tensors of an adapter, and for no other. Get the task vector again."
            )
        for part, stored in entry.stored.items():
            if stored not in files.tensors:
                raise ModelError(
                    f"{where}: {name}: {part} is in {stored!r}, which no file of the task vector holds; expected a tensor of one "
                    "of its files. Get the task vector again."
                )
            if stored in used:
                raise ModelError(
                    f"{where}: {stored!r} is a part of {used[stored]} and of {name}; expected one part in each stored tensor. "
                    "Get the task vector again."
                )
            used[stored] = name
        described = {part: files.tensors[stored] for part, stored in entry.stored.items()}
        if problem := part_problem(entry, described):
            raise ModelError(
                f"{where}: {name} ({entry.encoding}, {entry.dtype} {list(entry.shape)}): {problem}. "
                "The manifest and the files do not belong together: get the task vector again."
            )
    if manifest.kind == "adapter":
        missing = [n for n in (CONFIG, SAFE_WEIGHTS) if n not in manifest.files]
        if missing:
            raise ModelError(
                f"{where}: has no {missing[0]} among its files; expected the files of an adapter. Get the task vector again."
            )
    elif unused := next((n for n in files.tensors if n not in used), None):
        raise ModelError(
            f"{where}: does not say what {unused!r} is, which its files hold; expected an entry for every stored tensor. "
            "Get the task vector again."
        )


def _check_index(manifest: Manifest, files: FileModel) -> None:
    """Refuse an index of shards that contradicts the headers: other readers go by it. Errors: ModelError."""
    if INDEX not in manifest.files:
        return
    folder = files.location
    text = read_small(folder / INDEX, MAX_JSON_BYTES, "an index of shards")
    listed = parse_json(text, folder / INDEX, is_ours=True).get("weight_map")
    held = {
        t.name: s.path.name for s in files.shards if s.path.name != SAFE_WEIGHTS for t in s.header.tensors
    }
    if listed != held:
        raise ModelError(
            f"{folder / INDEX}: does not list the tensors of the files as their headers do; expected the same. "
            "Get the task vector again."
        )
