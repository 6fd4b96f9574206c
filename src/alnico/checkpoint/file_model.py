"""Reads models from files: shards with or without an index, or a single file.

Files are safetensors, or pickled by torch; where a directory has both, the safetensors are read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.lib.stride_tricks import as_strided

from alnico.checkpoint import header as headers
from alnico.checkpoint.file_kinds import SAFETENSORS, SNIFFED_BYTES, refuse_other
from alnico.checkpoint.files import (
    OpenFiles,
    copy_fully,
    open_to_read,
    read_fully,
    read_side_by_side,
    read_spans,
)
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.page_cache import DiskReads, ask_to_read, let_go, missing_from_cache
from alnico.checkpoint.reference import PICKLES
from alnico.checkpoint.remote.remote_weights import RemoteWeights, note_asked
from alnico.checkpoint.sidecars import config_path
from alnico.checkpoint.source import Origin, Shard, read_tensor
from alnico.checkpoint.virtual_read import read_computed
from alnico.checkpoint.weight_files import INDICES, PICKLE_INDICES
from alnico.errors import HubError, ModelError
from alnico.numerics import dtypes


class FileModel:
    """A model of one or more files: on this machine, on the hub, or at a URL, where ``remote`` reads their weights."""

    reading_bytes = 0

    def __init__(
        self,
        label: str,
        location: Path,
        shards: list[Shard],
        origin: Origin | None = None,
        remote: RemoteWeights | None = None,
    ) -> None:
        self.label = label
        self.remote = remote
        self.location = location
        self.shards = shards
        self.origin = origin
        self.notes = [note for shard in shards for note in shard.notes]
        self.disk_reads: DiskReads | None = None
        """Who wants to know what is read of the files on this machine."""
        self._files = OpenFiles(on_open=self._refuse_changed)
        self._reordered: dict[str, memoryview] = {}
        self._lock = threading.Lock()
        self._locations: dict[str, tuple[Shard, headers.TensorInfo]] = {}
        for shard in shards:
            for tensor in shard.header.tensors:
                if tensor.name in self._locations:
                    other = self._locations[tensor.name][0].name
                    raise ModelError(
                        f"{location}: tensor {tensor.name!r} is in {other} and in {shard.name}; "
                        "expected it in one file. Remove the file that does not belong to the model."
                    )
                self._locations[tensor.name] = (shard, tensor)
        self.tensors: Mapping[str, headers.TensorInfo] = {n: t for n, (_, t) in self._locations.items()}

    @property
    def held_bytes(self) -> int:
        """Pickled views, which are put in row-major order on the first read and kept."""
        return sum(t.byte_size for t in self.tensors.values() if t.strides is not None)

    @property
    def directory(self) -> Path | None:
        return self.location if self.location.is_dir() else None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        path = config_path(self.location)
        return read_json(path) if path is not None else {}

    @property
    def is_read_by_ranges(self) -> bool:
        """Are weights requested from a server when they are read?"""
        return self.remote is not None and not self.remote.is_whole

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        if self.is_read_by_ranges:
            note_asked(self, tensors)
            tensors = ()
        if self.remote is not None and self.origin is None:
            return self.remote.absent() if side_files else {}
        if self.origin is None:
            return {}
        files = list(dict.fromkeys(self._file(self._locations[name][0]) for name in tensors))
        return self.origin.absent(files + (self.origin.side_files() if side_files else []))

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        if self.origin is None:
            if self.remote is not None:
                self.remote.fetch(files, report)
            return
        names = list(files)
        self.origin.fetch(names, report)
        for shard in self.shards:
            if self._file(shard) in names and not has_same_header(arrived := open_shard(shard.path), shard):
                raise HubError(
                    f"{self.label}: {shard.path.name} arrived with a different header ({arrived.size} bytes) "
                    f"than the one planned for ({shard.size} bytes). Remove {shard.path.resolve()} and merge "
                    "again."
                )

    def _file(self, shard: Shard) -> str:
        folder = self.location if self.remote is None else self.remote.directory
        return shard.path.relative_to(folder).as_posix()

    def request(self, name: str) -> tuple[RemoteWeights, str, headers.TensorInfo]:
        """Where a tensor is read from by ranges: the weights, the name of its file, and its place in it."""
        shard, tensor = self._locations[name]
        assert self.remote is not None
        return self.remote, self._file(shard), tensor

    def _read_remote(self, name: str, offset: int, buffer: memoryview) -> None:
        remote, file, tensor = self.request(name)
        if remote.ahead is None or not remote.ahead.read_into(self, name, offset, buffer):
            remote.read_into(file, tensor, offset, buffer)

    def refuse_changed(self) -> None:
        """Refuse files at a URL that have changed since they were opened. Errors: ModelError, HubError."""
        if self.remote is not None:
            self.remote.refuse_changed()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        shard, tensor = self._locations[name]
        if self.is_read_by_ranges:
            self._read_remote(name, offset, buffer)
        elif tensor.is_stored_as_is:
            with self._files.descriptor(shard.path) as descriptor:
                read_fully(descriptor, buffer, tensor.begin + offset, shard.path, name)
            self._note_read(name, len(buffer))
        elif tensor.strides is not None:
            buffer[:] = self._row_major(name)[offset : offset + len(buffer)]
        else:
            dtype = np.dtype(dtypes.DTYPES[tensor.dtype].storage)
            read_computed(offset, buffer, dtype, lambda first, out: self._read_negated(name, first, out))

    def read_spans(self, name: str, spans: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        """Fill ``buffer`` with spans of a tensor's raw bytes, one after the other, as :meth:`read_into` does."""
        shard, tensor = self._locations[name]
        if self.is_read_by_ranges or not tensor.is_stored_as_is:
            read_spans(lambda start, part: self.read_into(name, start, part), spans, buffer)
            return
        with self._files.descriptor(shard.path) as descriptor:
            read_spans(
                lambda start, part: read_fully(descriptor, part, tensor.begin + start, shard.path, name),
                spans,
                buffer,
            )
        self._note_read(name, len(buffer))

    def _note_read(self, name: str, size: int) -> None:
        if (reads := self.disk_reads) is not None:
            reads.was_read(self, name, size)

    def missing_from_cache(self) -> float:
        """The share of its files that the system must read from the disk, as far as it says. Errors: ModelError."""
        missing = 0.0
        for shard in self.shards:
            with self._files.descriptor(shard.path) as descriptor:
                missing += shard.size * missing_from_cache(descriptor, shard.size)
        return missing / max(sum(shard.size for shard in self.shards), 1)

    def ask_to_read(self, path: Path, begin: int, end: int) -> None:
        """Ask the system to read bytes of a file before they are needed. Errors: ModelError."""
        with self._files.descriptor(path) as descriptor:
            ask_to_read(descriptor, begin, end - begin)

    def let_go(self, path: Path, begin: int, end: int) -> None:
        """Tell the system that bytes of a file are not read again. Errors: ModelError."""
        with self._files.descriptor(path) as descriptor:
            let_go(descriptor, begin, end - begin)

    def read_whole(self, tensors: Sequence[tuple[str, memoryview]]) -> None:
        """Fill a buffer with each of some tensors. Those that lie side by side in a file are read together."""
        places = []
        for name, buffer in tensors:
            shard, tensor = self._locations[name]
            if self.is_read_by_ranges or not tensor.is_stored_as_is:
                self.read_into(name, 0, buffer)
            else:
                places.append((shard.name, tensor.begin, shard.path, name, buffer))
        runs: list[tuple[Path, int, list[str], list[memoryview]]] = []
        file, end = "", 0
        for shard_name, begin, path, name, buffer in sorted(places, key=itemgetter(0, 1)):
            if begin != end or shard_name != file:
                runs.append((path, begin, [], []))
            runs[-1][2].append(name)
            runs[-1][3].append(buffer)
            file, end = shard_name, begin + len(buffer)
        for path, begin, names, buffers in runs:
            if len(names) == 1:
                self.read_into(names[0], 0, buffers[0])
                continue
            with self._files.descriptor(path) as descriptor:
                read_side_by_side(descriptor, buffers, begin, path, names[0])
            for name, buffer in zip(names, buffers, strict=True):
                self._note_read(name, len(buffer))

    def _read_negated(self, name: str, first: int, out: np.ndarray) -> None:
        """Fill ``out`` with elements from ``first`` on of a tensor whose values are the negative or the
        conjugate of the stored ones."""
        shard, tensor = self._locations[name]
        raw = out.view(np.uint8)
        with self._files.descriptor(shard.path) as descriptor:
            read_fully(descriptor, memoryview(raw), tensor.begin + first * out.itemsize, shard.path, name)
        dtypes.negate(raw, tensor.dtype, is_negated=tensor.is_negated, is_conjugated=tensor.is_conjugated)

    def _refuse_changed(self, path: Path, descriptor: int) -> None:
        """Refuse a file that has changed since its header was read. Errors: ModelError."""
        shard = next(s for s in self.shards if s.path == path)
        status = os.fstat(descriptor)
        # A file from the hub may be downloaded again while open; its header and hash are checked then.
        if status.st_size != shard.size or (self.origin is None and status.st_mtime_ns != shard.mtime_ns):
            raise ModelError(
                f"{path}: changed after its header was read ({_describe_size(shard.size, status.st_size)}); "
                "expected an unchanged file. Run the command again when nothing writes to the file."
            )

    def place_of(self, name: str) -> tuple[Path, int] | None:
        """The file of a tensor and the byte where it begins; None if its stored bytes are not those that are
        read."""
        shard, tensor = self._locations[name]
        return (shard.path, tensor.begin) if tensor.is_stored_as_is and not self.is_read_by_ranges else None

    def copy_to(self, name: str, offset: int, size: int, descriptor: int, begin: int) -> bool:
        """Copy a tensor's raw bytes into a file, at its byte ``begin``, without reading them. Returns False
        where that is not possible."""
        shard, tensor = self._locations[name]
        if not tensor.is_stored_as_is or self.is_read_by_ranges:
            return False
        with self._files.descriptor(shard.path) as source:
            is_copied = copy_fully(source, tensor.begin + offset, descriptor, begin, size, shard.path, name)
        if is_copied:
            self._note_read(name, size)
        return is_copied

    def _row_major(self, name: str) -> memoryview:
        """The bytes of a strided view in row-major order."""
        with self._lock:
            if name not in self._reordered:
                shard, tensor = self._locations[name]
                span = np.empty(tensor.end - tensor.begin, np.uint8)
                with self._files.descriptor(shard.path) as descriptor:
                    read_fully(descriptor, memoryview(span), tensor.begin, shard.path, name)
                width = dtypes.DTYPES[tensor.dtype].bytes
                assert tensor.strides is not None
                view = as_strided(span.view(f"V{width}"), tensor.shape, [s * width for s in tensor.strides])
                raw = np.ascontiguousarray(view).view(np.uint8).reshape(-1)
                if tensor.is_negated or tensor.is_conjugated:
                    dtypes.negate(
                        raw, tensor.dtype, is_negated=tensor.is_negated, is_conjugated=tensor.is_conjugated
                    )
                self._reordered[name] = memoryview(raw)
            return self._reordered[name]

    def read(self, name: str) -> np.ndarray:
        return read_tensor(self, name)

    def identity(self) -> list[dict[str, Any]]:
        if self.origin is not None:  # the commit identifies the file; a new download changes its time
            commit = self.origin.commit
            return [
                {"file": s.name, "size": s.size, "commit": commit, "header": s.header_digest}
                for s in self.shards
            ]
        if self.remote is not None:
            return [
                {
                    "file": s.name,
                    **self.remote.identity(self._file(s)),
                    "size": s.size,
                    "header": s.header_digest,
                }
                for s in self.shards
            ]
        return [
            {"file": s.name, "size": s.size, "mtime_ns": s.mtime_ns, "header": s.header_digest}
            for s in self.shards
        ]

    def paths(self) -> list[Path]:
        return [shard.path for shard in self.shards]

    def close(self) -> None:
        self._files.close()
        if self.remote is not None:
            self.remote.close()

    def __enter__(self) -> FileModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<model {self.label}: {len(self.tensors)} tensors in {len(self.shards)} files>"


def _describe_size(before: int, now: int) -> str:
    return f"it had {before} bytes, now {now}" if before != now else "its modification time differs"


def describe_change(before: Mapping[Path, tuple[int, int]]) -> str:
    """Describe the first file that differs from what :func:`file_states` returned; '' if none does."""
    for path, (size, mtime_ns) in before.items():
        try:
            status = path.stat()
        except OSError as error:
            return f"{path} ({error.strerror})"
        if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
            return f"{path} ({_describe_size(size, status.st_size)})"
    return ""


def file_states(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Return the size and time of each file that exists. Errors: ModelError."""
    states = {}
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ModelError(
                f"{path}: cannot be read ({error.strerror}). Check the path and its permissions."
            ) from None
        states[path] = (status.st_size, status.st_mtime_ns)
    return states


def open_shard(path: Path, prefix: str = "") -> Shard:
    """Open one file and check its header. ``prefix`` goes before the names of its tensors."""
    if path.suffix in PICKLES:
        from alnico.checkpoint.pickles import open_pickle

        return add_prefix(open_pickle(path), prefix)
    descriptor = open_to_read(path)
    try:
        status = os.fstat(descriptor)

        def read(offset: int, count: int) -> bytes:
            data = bytearray(count)
            read_fully(descriptor, memoryview(data), offset, str(path))
            return bytes(data)

        return add_prefix(read_shard(path, status.st_size, status.st_mtime_ns, str(path), read), prefix)
    finally:
        os.close(descriptor)


def open_written(path: Path, start: bytes, header: headers.Header, prefix: str = "") -> Shard:
    """Open a file that should begin with ``start``, whose ``header`` is known; any other as :func:`open_shard` does."""
    descriptor = open_to_read(path)
    try:
        status = os.fstat(descriptor)
        if os.pread(descriptor, len(start), 0) == start:
            digest = xxhash.xxh3_128_hexdigest(start[8:])
            return Shard(path, header, status.st_size, status.st_mtime_ns, digest, prefix=prefix)
    finally:
        os.close(descriptor)
    return open_shard(path, prefix)


def add_prefix(shard: Shard, prefix: str) -> Shard:
    """Return a file with its module's folder before the names of its tensors."""
    if not prefix:
        return shard
    return replace(shard, header=headers.add_prefix(shard.header, prefix), prefix=prefix)


def read_shard(path: Path, size: int, mtime_ns: int, where: str, read: Callable[[int, int], bytes]) -> Shard:
    """Read and check the header of a file, local or remote, through ``read(offset, count)``.

    A file of another format is named by its first bytes: of a remote file by the 8 that were read.
    """
    start = read(0, min(8, size))
    try:
        text = read(8, headers.parse_length(start, size, where))
        header = headers.parse(text, size, where)
    except ModelError:
        if path.exists():
            start = read(0, min(SNIFFED_BYTES, size))
        expected = "safetensors" if path.suffix == ".safetensors" else "a model"
        refuse_other(start, where, expected, SAFETENSORS)
        raise
    return Shard(path, header, size, mtime_ns, xxhash.xxh3_128_hexdigest(text))


def has_same_header(a: Shard, b: Shard) -> bool:
    return (a.size, a.header_digest) == (b.size, b.header_digest)


def check_index(model: FileModel) -> None:
    """Refuse an index that contradicts the headers. Errors: ModelError."""
    for prefix in dict.fromkeys(shard.prefix for shard in model.shards):
        _check_index(
            [shard for shard in model.shards if shard.prefix == prefix], prefix, model.location / prefix
        )


def _check_index(shards: Sequence[Shard], prefix: str, folder: Path) -> None:
    is_pickled = any(shard.path.suffix in PICKLES for shard in shards)
    names = (*INDICES, *PICKLE_INDICES) if is_pickled else INDICES
    index = next((path for name in names if (path := folder / name).exists()), None)
    if index is None:
        return
    weight_map = read_json(index)["weight_map"]
    file_of = {t.name.removeprefix(prefix): s.path for s in shards for t in s.header.tensors}
    opened = {shard.path: shard.path for shard in shards}
    paths = {name: opened.get(folder / name) for name in set(weight_map.values())}
    for tensor, name in weight_map.items():
        holder = file_of.get(tensor)
        if holder is None or holder is not paths[name]:
            raise ModelError(
                f"{index}: says that {tensor!r} is in {name}, which does not hold it. "
                "The index and the shards are from different downloads; download the model again."
            )
    unlisted = [tensor for tensor in file_of if tensor not in weight_map]
    if unlisted:
        raise ModelError(
            f"{file_of[unlisted[0]]}: holds {unlisted[0]!r}, which {index.name} does not list "
            f"({len(unlisted)} such tensors). The index and the shards are from different downloads; "
            "download the model again."
        )
