"""Keeps what methods compute from whole matrices in files, for other merges of the same tensors.

A file is safetensors: its name is the hash of everything that its arrays depend on, and its metadata has the hash
of its content. A file that is damaged, or that something else has written, is computed again and replaced. The folder
must be the user's own, since its files become part of merges.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from alnico._version import __version__
from alnico.checkpoint.files import read_fully
from alnico.checkpoint.header import Header, build, parse, parse_length
from alnico.engine.matrix_store import KeptArrays, MatrixNote
from alnico.errors import AlnicoError, OutputError
from alnico.folders import NO_LINK, Folder, fault_of, open_to_write, reach, user_id
from alnico.kernels.constants import ARITHMETIC

FORMAT = "alnico factors 1"

SUFFIX = ".factors"

TEMPORARY = ".tmp"

NUMPY = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "I32": np.int32, "BOOL": np.bool_}
NAMES = {np.dtype(kind): name for name, kind in NUMPY.items()}

MOST_HEADER_BYTES = 1 << 20

HASHED_BYTES = 4 << 20
"""Bytes that are read and hashed at a time."""

SPARE_BYTES = 1 << 30
"""Bytes of the disk that the cache leaves free, besides those of the output."""

ABANDONED_SECONDS = 24 * 3600
"""The age of an unfinished file that no process is writing any more."""

PLACE = re.compile(r"\{(:\.\d{1,2}[efg]?)?\}")
"""What a text of a note may hold in braces."""


class FactorFiles:
    """Arrays in the files of a folder, by key. Safe for threads and for several processes. Close it, or use it in ``with``.

    The cache never fails a merge: ``fault`` says why it could not be written, for a disk that is full, for example. It
    leaves ``reserve_bytes`` and a GiB free. ``depends_on`` is what else decides the bits.
    Errors: OutputError for a folder that cannot be used.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, depends_on: Mapping[str, str], reserve_bytes: int = 0
    ) -> None:
        self.fault: str | None = None
        self._reserve = reserve_bytes + SPARE_BYTES
        self._context = json.dumps([FORMAT, _machine(), dict(depends_on)], sort_keys=True)
        self._lock = threading.Lock()
        self._folder = _open_folder(Path(folder))
        self._remove_abandoned()

    def key(self, what: str, tensors: Sequence[tuple[str, str]], shape: Sequence[int]) -> str:
        """Return the key of arrays: ``what`` they are of, the dtype and the hash of each matrix, and their ``shape``."""
        return hashlib.sha256(
            json.dumps([self._context, what, list(tensors), list(shape)]).encode()
        ).hexdigest()

    def get(self, key: str, most_bytes: int) -> KeptArrays | None:
        """Return the arrays of a key; None if there are none that can be trusted, or that take more than ``most_bytes``."""
        try:
            name, directory = reach(self._path(key), self._folder)
            descriptor = os.open(name, os.O_RDONLY | NO_LINK | getattr(os, "O_NONBLOCK", 0), dir_fd=directory)
        except OSError:
            return None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or fault_of(status, user_id()) is not None:
                return None
            if status.st_size > most_bytes + MOST_HEADER_BYTES:
                return None
            return _read(descriptor, status.st_size, key)
        except (OSError, AlnicoError, ValueError, TypeError, KeyError):
            return None
        finally:
            os.close(descriptor)

    def put(self, key: str, kept: KeptArrays) -> None:
        """Keep arrays. A file that :meth:`get` does not accept is replaced."""
        if self.fault is not None or any(array.dtype not in NAMES for array in kept.arrays):
            return
        temporary = self._folder.path / f"{secrets.token_hex(8)}{TEMPORARY}"
        (old, directory), (new, _) = reach(temporary, self._folder), reach(self._path(key), self._folder)
        try:
            if shutil.disk_usage(self._folder.path).free < self._reserve + kept.byte_size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            descriptor = open_to_write(temporary, self._folder, flags=os.O_CREAT | os.O_EXCL, mode=0o600)
            try:
                with os.fdopen(descriptor, "wb", buffering=0) as file:
                    for piece in _pieces(key, kept):
                        rest = piece
                        while rest:
                            rest = rest[file.write(rest) or 0 :]
                os.replace(old, new, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                with suppress(OSError):
                    os.unlink(old, dir_fd=directory)
                raise
        except OSError as error:
            with self._lock:
                self.fault = (
                    f"{self._folder.path}: the factor cache could not be written ({error.strerror or error}), so the rest is not "
                    "kept. Make room, or empty it: its files can be removed at any time."
                )

    def _path(self, key: str) -> Path:
        return self._folder.path / f"{key}{SUFFIX}"

    def _remove_abandoned(self) -> None:
        """Remove what killed processes have left unfinished: a day older than the folder's last change, whatever the clock says."""
        with suppress(OSError):
            changed = self._folder.path.stat().st_mtime
            for path in self._folder.path.iterdir():
                if path.suffix == TEMPORARY and re.fullmatch("[0-9a-f]{16}", path.stem):
                    name, directory = reach(path, self._folder)
                    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode) and changed - status.st_mtime > ABANDONED_SECONDS:
                        os.unlink(name, dir_fd=directory)

    def close(self) -> None:
        self._folder.close()

    def __enter__(self) -> FactorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _machine() -> dict[str, Any]:
    """What decides the bits of decompositions besides the matrices: programs, and the type of the machine."""
    from threadpoolctl import threadpool_info

    libraries = [library for library in threadpool_info() if library.get("user_api") == "blas"]
    # Other packages in the process, such as torch, may have a BLAS of their own, which numpy does not use.
    own = [library for library in libraries if "numpy" in str(library.get("filepath"))]
    blas = [
        [str(library.get(part)) for part in ("internal_api", "version", "architecture")]
        for library in own or libraries
    ]
    return {
        "alnico": __version__,
        "arithmetic": ARITHMETIC,
        "numpy": np.__version__,
        "machine": [sys.platform, platform.machine()],
        "blas": sorted(blas),
    }


def _open_folder(path: Path) -> Folder:
    """Open the folder of a cache, made if needed. Errors: OutputError for one that is not the user's own."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = Folder(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be opened as the factor cache ({error.strerror or error}); expected a folder, not a link, or a "
            "name for a new one. Choose another --factor-cache."
        ) from None
    fault = fault_of(folder.status(), user_id())
    if fault is not None:
        folder.close()
        raise OutputError(
            f"{path}: {fault}; the factor cache must be a folder of your own that nobody else can write, since its files "
            "become part of merges. Choose another --factor-cache."
        )
    return folder


def _pieces(key: str, kept: KeptArrays) -> Iterator[memoryview]:
    """The bytes of a file: its header, and the elements of its arrays in the order in which they are in memory."""
    orders = "".join("C" if a.flags.c_contiguous else "F" for a in kept.arrays)
    stored = [a if order == "C" else a.T for a, order in zip(kept.arrays, orders, strict=True)]
    stored = [a if a.flags.c_contiguous else np.ascontiguousarray(a) for a in stored]
    views = [memoryview(a.reshape(-1).view(np.uint8)) for a in stored]
    metadata = {"format": FORMAT, "key": key, "orders": orders, "notes": _notes_text(kept.notes)}
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    entries = [(f"{i:04d}", NAMES[a.dtype], a.shape) for i, a in enumerate(stored)]
    digest.update(json.dumps(entries).encode())
    for view in views:
        digest.update(view)
    start, _ = build(entries, metadata | {"sha256": digest.hexdigest()})
    yield memoryview(start)
    yield from views


def _read(descriptor: int, file_size: int, key: str) -> KeptArrays | None:
    """Read a file, if its hash is that of its content. Errors: those of a header that is wrong; OSError."""
    prefix = bytearray(8)
    read_fully(descriptor, memoryview(prefix), 0)
    length = parse_length(bytes(prefix), file_size, key)
    if length > MOST_HEADER_BYTES:
        return None
    text = bytearray(length)
    read_fully(descriptor, memoryview(text), 8)
    header = parse(bytes(text), file_size, key)
    metadata = dict(header.metadata)
    expected = metadata.pop("sha256")
    if metadata["format"] != FORMAT or metadata["key"] != key:
        return None
    entries = [(t.name, t.dtype, t.shape) for t in header.tensors]
    if [name for name, _, _ in entries] != [f"{i:04d}" for i in range(len(entries))]:
        return None
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    digest.update(json.dumps(entries).encode())
    stored = [_read_array(descriptor, header, i, digest) for i in range(len(entries))]
    if digest.hexdigest() != expected or len(metadata["orders"]) != len(stored):
        return None
    notes = _notes(metadata["notes"])
    arrays = [a if order == "C" else a.T for a, order in zip(stored, metadata["orders"], strict=True)]
    return None if notes is None else KeptArrays(tuple(arrays), notes)


def _read_array(descriptor: int, header: Header, place: int, digest: Any) -> np.ndarray:
    info = header.tensors[place]
    array: np.ndarray = np.empty(info.shape, NUMPY[info.dtype])
    view = memoryview(array.reshape(-1).view(np.uint8))
    for start in range(0, len(view), HASHED_BYTES):
        part = view[start : start + HASHED_BYTES]
        read_fully(descriptor, part, info.begin + start)
        digest.update(part)
    return array


def _notes_text(notes: Sequence[MatrixNote]) -> str:
    return json.dumps([[note.text, list(note.values)] for note in notes])


def _notes(text: str) -> tuple[MatrixNote, ...] | None:
    """The notes of a file; None for texts that would do more than name models and numbers."""
    notes = []
    for form, values in json.loads(text):
        rest = PLACE.sub("", form)
        if "{" in rest or "}" in rest or len(PLACE.findall(form)) != len(values):
            return None
        if not all(type(value) in (int, float) for value in values):
            return None
        notes.append(MatrixNote(form, tuple(values)))
    return tuple(notes)
