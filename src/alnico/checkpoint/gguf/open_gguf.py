"""Opens GGUF models: one file, or the files of a model that was split."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from alnico.checkpoint import header as headers
from alnico.checkpoint.file_kinds import GGUF, SNIFFED_BYTES, refuse_other
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.files import open_to_read, read_fully
from alnico.checkpoint.gguf.file_header import GgufHeader, GgufTensor, read_header
from alnico.checkpoint.gguf.gguf_model import GgufModel
from alnico.checkpoint.gguf.metadata import Metadata
from alnico.checkpoint.source import Shard
from alnico.checkpoint.weight_files import GGUF_ENDING, GGUF_SPLIT
from alnico.errors import ModelError
from alnico.run_options import Access

if TYPE_CHECKING:
    from alnico.checkpoint.remote.remote_weights import RemoteWeights


def open_gguf(label: str, path: Path) -> GgufModel:
    """Open a GGUF model by the path of its file, or of one of its files; reads headers only.

    Errors: ModelError for a wrong header, a file of a split model that is missing or of another, and for what is no model of a family
    that is known.
    """
    names = _all_files(str(path), path.name, lambda name: (path.parent / name).is_file())
    read = [_read_file(path.parent / name) for name in names]
    return _opened(FileModel(label, path, [shard for shard, _ in read]), [header for _, header in read])


def open_gguf_at_url(label: str, access: Access) -> GgufModel:
    """Open a GGUF model at a URL, by that of its file, or of one of its files: headers are read, weights by ranges when they are asked for.

    Errors: as for :func:`open_gguf`; HubError.
    """
    from alnico.checkpoint.remote.open_remote_model import open_remote_weights  # with what reads URLs

    remote, file = open_remote_weights(label, (GGUF_ENDING,), access=access)
    try:
        names = _all_files(label, file, lambda name: remote.version(name) is not None)
        read = [_read_remote(remote, name) for name in names]
    except BaseException:
        remote.close()
        raise
    files = FileModel(label, remote.directory / file, [shard for shard, _ in read], remote=remote)
    return _opened(files, [header for _, header in read])


def _opened(files: FileModel, headers: Sequence[GgufHeader]) -> GgufModel:
    """Open the files of a model, which are closed where that fails. Errors: ModelError."""
    try:
        for shard, header in zip(files.shards, headers, strict=True):
            # 0 of files that were joined again
            count = Metadata(header.metadata, str(shard.path)).integer("split.count", 0) or 1
            if count != len(headers):
                raise ModelError(
                    f"{shard.path}: is of a model of {count} files by its key split.count; expected {len(headers)}, as their names say. Get "
                    "all files of the model, with their names."
                )
        return GgufModel(files, headers)
    except BaseException:
        files.close()
        raise


def _all_files(where: str, file: str, is_there: Callable[[str], bool]) -> list[str]:
    """Return the names of all files of a model. Errors: ModelError for one that is missing."""
    match = GGUF_SPLIT.fullmatch(file)
    if match is None:
        return [file]
    count = int(match["count"])
    names = [f"{match['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    missing = [name for name in names if not is_there(name)]
    if missing or not names:
        raise ModelError(
            f"{where}: is one of {count} files of a model; {len(missing)} of the others are missing, such as {missing[0] if missing else names}. "
            "Complete the download."
        )
    return names


def _read_file(path: Path) -> tuple[Shard, GgufHeader]:
    descriptor = open_to_read(path)
    try:
        status = os.fstat(descriptor)

        def read(offset: int, count: int) -> bytes:
            data = bytearray(count)
            read_fully(descriptor, memoryview(data), offset, path)
            return bytes(data)

        return _read_shard(path, str(path), status.st_size, status.st_mtime_ns, read)
    finally:
        os.close(descriptor)


def _read_remote(remote: RemoteWeights, file: str) -> tuple[Shard, GgufHeader]:
    def read(offset: int, count: int) -> bytes:
        data = bytearray(count)
        remote.request(file, offset, memoryview(data))
        return bytes(data)

    size = remote.versions[file].size
    return _read_shard(remote.directory / file, f"{remote.address}/{file}", size, 0, read)


def _read_shard(
    path: Path, where: str, size: int, mtime_ns: int, read: Callable[[int, int], bytes]
) -> tuple[Shard, GgufHeader]:
    """Read the header of a file through ``read(offset, count)``. Errors: ModelError."""
    refuse_other(read(0, min(SNIFFED_BYTES, size)), where, "a GGUF file", GGUF)
    header = read_header(read, size, where)
    tensors = tuple(_stored(tensor) for tensor in header.tensors)
    digest = xxhash.xxh3_128_hexdigest(header.start)
    stored = headers.Header(tensors, {}, tensors[0].begin if tensors else len(header.start))
    return Shard(path, stored, size, mtime_ns, digest), header


def _stored(tensor: GgufTensor) -> headers.TensorInfo:
    """Describe a tensor as it is stored: blocks are bytes."""
    if tensor.type.dtype:
        return headers.TensorInfo(tensor.name, tensor.type.dtype, tensor.shape, tensor.begin, tensor.end)
    return headers.TensorInfo(tensor.name, "U8", (tensor.end - tensor.begin,), tensor.begin, tensor.end)
