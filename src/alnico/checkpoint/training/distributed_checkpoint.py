"""Reads checkpoints of torch.distributed.checkpoint: a folder with ``.metadata`` and files of each rank.

    .metadata        a pickle: the size, dtype and chunks of each tensor, and the place of each chunk in the files
    __R_N.distcp     chunks that rank R wrote, each as torch.save writes a tensor; or all of them as safetensors
    __R.metadata     the same as .metadata for what rank R wrote, where ranks save without each other

FSDP writes such folders, and so do Accelerate, torchtitan, Lightning and NeMo.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from alnico.checkpoint.file_kinds import SAFETENSORS, SNIFFED_BYTES, kind_of
from alnico.checkpoint.file_model import FileModel, open_shard
from alnico.checkpoint.files import check_inside, is_text, open_to_read, read_small
from alnico.checkpoint.header import MAX_DIMENSIONS, Header, TensorInfo
from alnico.checkpoint.pickle_parser import MAX_PICKLE_BYTES, PickledObject
from alnico.checkpoint.pickles import (
    PickledTensor,
    damage_refused,
    is_size,
    load_objects,
    load_pickle_inside,
    locate_tensor,
)
from alnico.checkpoint.source import Shard
from alnico.checkpoint.training.piece_table import PieceTable, StoredPiece, piece_table
from alnico.checkpoint.training.recognise import METADATA, RANK_METADATA
from alnico.checkpoint.training.sharded_model import ShardedModel, closed_on_failure
from alnico.checkpoint.training.trainer_names import choose_model, list_groups
from alnico.checkpoint.weight_files import is_inside
from alnico.errors import ModelError
from alnico.numerics.dtypes import DTYPES

CLASSES = re.compile(r"(torch\.distributed|pathlib)(\.|$)")
"""Modules of the objects in a ``.metadata``. They are known by their names; nothing of them is run."""

SHARDING = "DCP_SHARDING_INFO"
"""Key of the metadata of a rank's safetensors file: where its tensors begin in the whole ones."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor, the name that it is saved under, and the bytes of the file that has it."""

    saved_name: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """What metadata say about a tensor."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


Places = Mapping[tuple[object, object], Any]
"""Where chunks are stored, by name and offsets."""


@dataclass(frozen=True)
class CheckpointIndex:
    """One file of metadata: the entries of tensors, the places of their chunks, the names of what is no tensor, and the keys
    that led to each name where that is stated."""

    where: str
    entries: Mapping[str, Mapping[str, Any]]
    places: Places
    others: Sequence[str]
    paths: Mapping[str, Sequence[object]]


def open_distributed_checkpoint(label: str, folder: Path, part: str = "") -> ShardedModel:
    """Open a distributed checkpoint as a model; reads the metadata, and where each chunk is in its file.

    ``part`` is the key of what to read, where the checkpoint holds more than one model. Errors: ModelError for metadata that
    contradict themselves or the files, a missing or truncated file, chunks with a gap or an overlap, transformed (compressed,
    for example) chunks, and a pickle with more than data.
    """
    indices, digest = _read_indices(label, folder)
    stored = list(dict.fromkeys(name for index in indices for name in index.entries))
    paths = {name: path for index in indices for name, path in index.paths.items()}
    chosen = choose_model(stored, paths, part, label)
    tensors = {name: _merged(saved, indices) for name, saved in chosen.names.items()}
    tables = {name: _table(label, name, tensor) for name, tensor in tensors.items()}
    files = FileModel(label, folder, _open_files(label, folder, tensors))
    others = list(dict.fromkeys(name for index in indices for name in index.others))
    notes = [f"{label}: left out, as they are no tensors: {list_groups(others)}."] if others else []
    with closed_on_failure(files):
        return ShardedModel(label, folder, files, tables, [*chosen.notes(label), *notes], digest)


def _read_indices(label: str, folder: Path) -> tuple[list[CheckpointIndex], str]:
    """Read the metadata of a folder: one file, or one of each rank; and their digest. Errors: ModelError."""
    names = [METADATA]
    if not os.path.lexists(folder / METADATA):
        names = sorted(name for name in os.listdir(folder) if RANK_METADATA.fullmatch(name))
    indices = []
    digest = hashlib.sha256()
    for name in names:
        check_inside(folder / name, folder)
        data = read_small(folder / name, MAX_PICKLE_BYTES, "the metadata of a distributed checkpoint")
        digest.update(data)
        where = f"{label}: {name}"
        indices.append(_parse_index(load_objects(data, where, CLASSES), where))
    return indices, digest.hexdigest()


def _parse_index(metadata: Any, where: str) -> CheckpointIndex:
    """Read the value of a file of metadata. Errors: ModelError for a value of another kind."""
    fields = metadata.fields() if isinstance(metadata, PickledObject) else {}
    entries, stored, planned = (
        fields.get(key) for key in ("state_dict_metadata", "storage_data", "planner_data")
    )
    if not isinstance(entries, dict) or not isinstance(stored, dict):
        raise ModelError(
            f"{where}: is not the metadata of a distributed checkpoint: it has no state_dict_metadata and storage_data. "
            "Copy the checkpoint again."
        )
    found = {str(n): e.fields() if isinstance(e, PickledObject) else {} for n, e in entries.items()}
    paths = {
        name: path
        for name, path in (planned if isinstance(planned, dict) else {}).items()
        if isinstance(name, str) and isinstance(path, (tuple, list)) and path
    }
    return CheckpointIndex(
        where,
        {name: entry for name, entry in found.items() if "size" in entry},
        {_key_of(key): place for key, place in stored.items()},
        [name for name, entry in found.items() if "size" not in entry],
        paths,
    )


def _key_of(key: Any) -> tuple[object, object]:
    """Name and offsets of the chunk that a place belongs to; None for those of other types."""
    fields = key.fields() if isinstance(key, PickledObject) else {}
    name, offsets = fields.get("fqn"), fields.get("offset")
    return name if isinstance(name, str) else None, offsets if _are_sizes(offsets) else None


def _are_sizes(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and len(value) <= MAX_DIMENSIONS and all(map(is_size, value))


def _merged(name: str, indices: Sequence[CheckpointIndex]) -> ChunkedTensor:
    """What the metadata of all ranks say about a tensor. Errors: ModelError where they contradict each other."""
    own = [_tensor(name, index) for index in indices if name in index.entries]
    first = own[0]
    for other, index in zip(own, (i for i in indices if name in i.entries), strict=True):
        if (other.dtype, other.shape) != (first.dtype, first.shape):
            raise ModelError(
                f"{index.where}: {name[:80]} is {other.dtype} {list(other.shape)} for this rank, and {first.dtype} "
                f"{list(first.shape)} for another; expected the ranks of one run. Copy the checkpoint again."
            )
    return replace(first, chunks=tuple(chunk for tensor in own for chunk in tensor.chunks))


def _tensor(name: str, index: CheckpointIndex) -> ChunkedTensor:
    """Read what one file of metadata says about a tensor. Errors: ModelError."""
    properties, shape, chunks = (index.entries[name].get(key) for key in ("properties", "size", "chunks"))
    state = properties.state if isinstance(properties, PickledObject) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if (
        not isinstance(dtype, str)
        or dtype not in DTYPES
        or not _are_sizes(shape)
        or math.prod(shape) * DTYPES[dtype].bytes >= 1 << 63
        or not isinstance(chunks, list)
        or not is_text(name)
    ):
        raise ModelError(
            f"{index.where}: {name[:80]} has the dtype {str(dtype)[:40]} and the size {str(shape)[:80]}; expected a known dtype and "
            f"at most {MAX_DIMENSIONS} sizes whose bytes can be counted. The metadata are damaged; copy the checkpoint again."
        )
    return ChunkedTensor(dtype, shape, tuple(_chunk(name, dtype, len(shape), c, index) for c in chunks))


def _chunk(name: str, dtype: str, dimensions: int, chunk: Any, index: CheckpointIndex) -> Chunk:
    """Read one chunk and its place. Errors: ModelError."""
    fields = chunk.fields() if isinstance(chunk, PickledObject) else {}
    offsets, sizes = fields.get("offsets"), fields.get("sizes")
    if not (_are_sizes(offsets) and _are_sizes(sizes) and len(offsets) == len(sizes) == dimensions):
        raise ModelError(
            f"{index.where}: a chunk of {name[:80]} has the offsets {str(offsets)[:80]} and sizes {str(sizes)[:80]}; expected "
            f"{dimensions} of each. The metadata are damaged; copy the checkpoint again."
        )
    place = index.places.get((name, offsets), index.places.get((name, None)))
    stored = place.fields() if isinstance(place, PickledObject) else {}
    file, begin, length = (stored.get(key) for key in ("relative_path", "offset", "length"))
    if not (
        (isinstance(file, str) and is_inside(file) and is_text(file) and is_size(begin) and is_size(length))
        or not math.prod(sizes)
    ):
        raise ModelError(
            f"{index.where}: the chunk of {name[:80]} at {list(offsets)} is in {str(file)[:80]} at byte {str(begin)[:40]}; expected a "
            "place in a file of the folder. A rank is missing, or the metadata are damaged; copy the checkpoint again."
        )
    if stored.get("transform_descriptors"):
        raise ModelError(
            f"{index.where}: {name[:80]} was transformed when it was saved ({str(stored['transform_descriptors'])[:80]}), so its "
            "bytes are not those of numbers; expected plain chunks. Save the checkpoint without extensions."
        )
    return Chunk(name, dtype, offsets, sizes, str(file), begin or 0, length or 0)


def _piece_name(name: str, chunk: Chunk) -> str:
    """A name for a stored chunk, which no other has."""
    return f"{name}@{','.join(map(str, chunk.offsets))}"


def _table(label: str, name: str, tensor: ChunkedTensor) -> PieceTable:
    """Put the chunks of a tensor together. Errors: ModelError for those that do not cover it once."""
    pieces = [StoredPiece(c.offsets, c.sizes, _piece_name(name, c)) for c in tensor.chunks]
    table = piece_table(tensor.dtype, tensor.shape, pieces)
    if table is None:
        raise ModelError(
            f"{label}: the {len(pieces)} chunks of {name[:80]} {list(tensor.shape)} leave a gap or overlap; expected chunks that "
            "cover it once, as the ranks of one run write them. Copy the checkpoint again, with the files of all ranks."
        )
    return table


def _open_files(label: str, folder: Path, tensors: Mapping[str, ChunkedTensor]) -> list[Shard]:
    """Locate all chunks in their files. Errors: ModelError."""
    wanted: dict[str, dict[str, Chunk]] = {}
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            if math.prod(chunk.sizes):
                wanted.setdefault(chunk.file, {})[_piece_name(name, chunk)] = chunk
    return [_open_file(label, folder, file, chunks) for file, chunks in sorted(wanted.items())]


def _open_file(label: str, folder: Path, file: str, chunks: Mapping[str, Chunk]) -> Shard:
    """Locate chunks in one file. Errors: ModelError."""
    path = folder / file
    if not os.path.lexists(path):
        raise ModelError(
            f"{label}: {file} is missing, which holds {len(chunks)} chunks; expected the files of all ranks. Copy the checkpoint "
            "again, with all of them."
        )
    check_inside(path, folder)
    descriptor = open_to_read(path)
    try:
        status = os.fstat(descriptor)
        if kind_of(os.pread(descriptor, SNIFFED_BYTES, 0)) == SAFETENSORS:
            return _from_safetensors(path, chunks)
        end = max(chunk.begin + chunk.length for chunk in chunks.values())
        if end > status.st_size:
            raise ModelError(
                f"{path}: has {status.st_size} bytes; the metadata place chunks up to byte {end}. The file is truncated, or of "
                "another run; copy the checkpoint again."
            )
        infos = [_in_torch_file(descriptor, str(path), name, chunk) for name, chunk in chunks.items()]
        header = Header(_in_order(infos), {}, 0)
        return Shard(path, header, status.st_size, status.st_mtime_ns, _digest(infos))
    finally:
        os.close(descriptor)


def _in_torch_file(descriptor: int, where: str, name: str, chunk: Chunk) -> TensorInfo:
    """Locate a chunk that torch.save wrote into a part of a file. Errors: ModelError."""
    end = chunk.begin + chunk.length
    loaded = load_pickle_inside(descriptor, chunk.begin, chunk.length, f"{where}: {name[:80]}", end)
    tensor = loaded.value if isinstance(loaded.value, PickledTensor) else None
    _check_chunk(where, chunk, None if tensor is None else (tensor.dtype, tensor.shape))
    assert tensor is not None
    with damage_refused(where):
        return locate_tensor(name, tensor, loaded.storages, loaded.size, where)


def _from_safetensors(path: Path, chunks: Mapping[str, Chunk]) -> Shard:
    """Locate chunks in a safetensors file, which has each name once. Errors: ModelError."""
    shard = open_shard(path)
    stored = {tensor.name: tensor for tensor in shard.header.tensors}
    offsets = _saved_offsets(shard.header.metadata.get(SHARDING, ""))
    infos = []
    for name, chunk in chunks.items():
        tensor = stored.get(chunk.saved_name)
        is_it = tensor is not None and offsets.get(chunk.saved_name, chunk.offsets) == chunk.offsets
        _check_chunk(str(path), chunk, (tensor.dtype, tensor.shape) if tensor is not None and is_it else None)
        assert tensor is not None
        infos.append(replace(tensor, name=name))
    return replace(shard, header=Header(_in_order(infos), {}, shard.header.data_begin))


def _saved_offsets(text: str) -> dict[str, tuple[int, ...]]:
    """Where the tensors of a rank's safetensors file begin in the whole ones, as far as the file says."""
    try:
        saved = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    entries = saved.items() if isinstance(saved, dict) else ()
    return {
        name: tuple(entry["saved_offsets"])
        for name, entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("saved_offsets"), list)
    }


def _check_chunk(where: str, chunk: Chunk, found: tuple[str, tuple[int, ...]] | None) -> None:
    """Refuse a stored tensor that is not the chunk that the metadata mean. Errors: ModelError."""
    if found != (chunk.dtype, chunk.sizes):
        shown = "not" if found is None else f"{found[0]} {list(found[1])}"
        raise ModelError(
            f"{where}: the chunk of {chunk.saved_name[:80]} at {list(chunk.offsets)} is {shown} in the file; expected {chunk.dtype} "
            f"{list(chunk.sizes)}, as the metadata say. The file is of another run, or damaged; copy the checkpoint again."
        )


def _in_order(infos: Iterable[TensorInfo]) -> tuple[TensorInfo, ...]:
    return tuple(sorted(infos, key=lambda t: (t.begin, t.end, t.name)))


def _digest(infos: Iterable[TensorInfo]) -> str:
    """A digest of where chunks are in a file."""
    text = json.dumps([[t.name, t.dtype, t.shape, t.begin, t.end, t.strides] for t in infos])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
