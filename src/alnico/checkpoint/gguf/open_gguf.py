"""Opens GGUF models: one file, or the files of a model that was split."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from alnico.checkpoint import header as headers
from alnico.checkpoint.file_kinds import GGUF, SNIFFED_BYTES, refuse_other
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.files import open_to_read, read_fully
from alnico.checkpoint.gguf.file_header import GgufHeader, GgufTensor, read_header
from alnico.checkpoint.gguf.gguf_model import GgufModel
from alnico.checkpoint.gguf.metadata import Metadata
from alnico.checkpoint.source import Shard
from alnico.checkpoint.weight_files import GGUF_SPLIT
from alnico.errors import ModelError

SHOWN = 3


def open_gguf(label: str, path: Path) -> GgufModel:
    """Open a GGUF model by the path of its file, or of one of its files; reads headers only.

    Errors: ModelError for a wrong header, a file of a split model that is missing or of another, and for what is no model of a family
    that is known.
    """
    paths = _all_files(path)
    read = [_read_file(one) for one in paths]
    for one, (_, header) in zip(paths, read, strict=True):
        count = (
            Metadata(header.metadata, str(one)).integer("split.count", 0) or 1
        )  # 0 of files that were joined again
        if count != len(paths):
            raise ModelError(
                f"{one}: is of a model of {count} files by its key split.count; expected {len(paths)}, as their names say. Get "
                "all files of the model, with their names."
            )
    files = FileModel(label, path, [shard for shard, _ in read])
    try:
        return GgufModel(files, [header for _, header in read])
    except BaseException:
        files.close()
        raise


def _all_files(path: Path) -> list[Path]:
    """Return all files of a model. Errors: ModelError for one that is missing."""
    match = GGUF_SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    names = [f"{match['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing or not names:
        raise ModelError(
            f"{path}: is one of {count} files of a model; {len(missing)} of the others are missing, such as {missing[0] if missing else names}. "
            "Complete the download."
        )
    return [path.parent / name for name in names]


def _read_file(path: Path) -> tuple[Shard, GgufHeader]:
    descriptor = open_to_read(path)
    try:
        status = os.fstat(descriptor)

        def read(offset: int, count: int) -> bytes:
            data = bytearray(count)
            read_fully(descriptor, memoryview(data), offset, path)
            return bytes(data)

        refuse_other(read(0, min(SNIFFED_BYTES, status.st_size)), path, "a GGUF file", GGUF)
        header = read_header(read, status.st_size, str(path))
    finally:
        os.close(descriptor)
    tensors = tuple(_stored(tensor) for tensor in header.tensors)
    digest = xxhash.xxh3_128_hexdigest(header.start)
    stored = headers.Header(tensors, {}, tensors[0].begin if tensors else len(header.start))
    return Shard(path, stored, status.st_size, status.st_mtime_ns, digest), header


def _stored(tensor: GgufTensor) -> headers.TensorInfo:
    """Describe a tensor as it is stored: blocks are bytes."""
    if tensor.type.dtype:
        return headers.TensorInfo(tensor.name, tensor.type.dtype, tensor.shape, tensor.begin, tensor.end)
    return headers.TensorInfo(tensor.name, "U8", (tensor.end - tensor.begin,), tensor.begin, tensor.end)
