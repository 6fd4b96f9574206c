"""Reads a model from one file per rank (``model_world_size_N_rank_R.pt``), as verl and other trainers save it.

Each file is a state dict that torch.save wrote. Its tensors are the rank's parts of distributed tensors (DTensor or
ShardedTensor), which say where they belong, or plain ones that every rank has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.files import check_inside
from alnico.checkpoint.pickle_parser import PickledObject
from alnico.checkpoint.pickles import (
    MAX_WRAPPERS,
    WRAPPERS,
    Pickle,
    PickledTensor,
    is_size,
    load_pickle,
    shard_of,
)
from alnico.checkpoint.training.piece_table import PieceTable, StoredPiece, piece_table
from alnico.checkpoint.training.recognise import RANK_FILE
from alnico.checkpoint.training.sharded_model import ShardedModel, closed_on_failure
from alnico.checkpoint.training.trainer_names import choose_model, list_groups
from alnico.errors import ModelError

CLASSES = re.compile(r"torch\.(distributed|_C\._distributed)(\.|$)")
"""Modules of the classes of distributed tensors. They are known by their names; nothing of them is run."""

SAMPLE_BYTES = 4096
"""First and last bytes of a plain tensor that are compared between ranks."""

OTHER_FILES = re.compile(r"(optim|extra_state)_world_size_\d+_rank_\d+\.pt")
"""Files of a rank's optimizer, scheduler and random numbers."""


@dataclass(frozen=True)
class RankPart:
    """One rank's part of a tensor: where it is in the whole, or how it is placed on the mesh of ranks."""

    tensor: PickledTensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...] | None = None
    coordinates: tuple[int, ...] = ()
    placements: tuple[tuple[str, int, int], ...] = ()
    """Kind, dimension and split factor for each dimension of the mesh."""
    is_plain: bool = False


def open_rank_files(label: str, folder: Path, part: str = "") -> ShardedModel:
    """Open the files of all ranks as one model; reads the pickles, not the tensors.

    Errors: ModelError for a missing rank, ranks of different runs, parts that do not make up their tensors, placements that
    are no plain division, and a pickle with more than tensors.
    """
    paths = _rank_paths(label, folder)
    pickles = [load_pickle(path, CLASSES) for path in paths]
    states = [_state_dict(p.value, f"{label}: {path.name}") for p, path in zip(pickles, paths, strict=True)]
    parts = [_parts(state, f"{label}: {path.name}") for state, path in zip(states, paths, strict=True)]
    _check_names(label, paths, parts)
    chosen = choose_model(list(parts[0]), {}, part, label)
    files = FileModel(label, folder, _shards(paths, pickles, parts, chosen.names.values()))
    with closed_on_failure(files):
        tables = {
            name: _table(label, stored, [rank[stored] for rank in parts], files)
            for name, stored in chosen.names.items()
        }
        return ShardedModel(
            label, folder, files, tables, [*chosen.notes(label), *_left_out(label, folder, states[0])]
        )


def _rank_paths(label: str, folder: Path) -> list[Path]:
    """The files of all ranks in their order. Errors: ModelError for a missing rank, and files of several runs."""
    found = [match for name in sorted(os.listdir(folder)) if (match := RANK_FILE.fullmatch(name)) is not None]
    counts = sorted({int(match["ranks"]) for match in found})
    ranks = {int(match["rank"]): match[0] for match in found}
    missing = [rank for rank in range(counts[0]) if rank not in ranks]
    if len(counts) > 1 or missing or len(ranks) > counts[0]:
        what = (
            f"files of runs with {' and '.join(map(str, counts))} ranks"
            if len(counts) > 1
            else f"no file of rank {missing[0]}"
            if missing
            else f"files of {len(ranks)} ranks"
        )
        raise ModelError(
            f"{label}: has {what}; expected model_world_size_{counts[0]}_rank_R.pt for each of {counts[0]} ranks. Copy the "
            "checkpoint again, with the files of all ranks and of one run."
        )
    paths = [folder / ranks[rank] for rank in range(counts[0])]
    for path in paths:
        check_inside(path, folder)
    return paths


def _state_dict(loaded: Any, where: str) -> Mapping[Any, Any]:
    """The state dict in what a rank saved, without wrappers. Errors: ModelError."""
    for _ in range(MAX_WRAPPERS):
        inner = (
            next((loaded[w] for w in WRAPPERS if isinstance(loaded.get(w), Mapping)), None)
            if isinstance(loaded, Mapping)
            else None
        )
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping):
        raise ModelError(
            f"{where}: holds a {type(loaded).__name__}; expected one rank's tensors by name. Save the state dict of the model."
        )
    return loaded


def _parts(state: Mapping[Any, Any], where: str) -> dict[str, RankPart]:
    """The tensors of one rank. Errors: ModelError for a distributed tensor that is not understood."""
    parts = {}
    for name, value in state.items():
        if isinstance(value, PickledTensor):
            parts[str(name)] = RankPart(value, value.shape, (0,) * len(value.shape), is_plain=True)
        elif isinstance(value, PickledObject):
            part = _part_of(value)
            if part is None:
                raise ModelError(
                    f"{where}: {str(name)[:80]} is a {value.name[:80]} that is not understood; expected a DTensor or a ShardedTensor "
                    "with its part, its size and its placement. Save the model with torch.distributed.checkpoint."
                )
            parts[str(name)] = part
    return parts


def _part_of(value: PickledObject) -> RankPart | None:
    """What an object says about one rank's part of a tensor; None if that is not clear."""
    kind = value.name.rpartition(".")[2]
    if kind == "ShardedTensor" and isinstance(value.state, tuple) and len(value.state) > 1:
        return _sharded_part(*value.state[:2])
    fields = value.fields()
    tensor, spec = fields.get("_local_tensor"), fields.get("_spec")
    if kind != "DTensor" or not isinstance(tensor, PickledTensor) or not isinstance(spec, PickledObject):
        return None
    mesh, placed = spec.fields().get("mesh"), spec.fields().get("placements")
    place = mesh.fields().get("_coordinate_on_dim") if isinstance(mesh, PickledObject) else None
    shape = value.arguments[2] if len(value.arguments) > 2 else None
    if not _are_sizes(shape) or not _are_sizes(place) or not isinstance(placed, (tuple, list)):
        return None
    placements = [_placement(p, len(shape)) for p in placed]
    if len(shape) != len(tensor.shape) or len(placements) != len(place) or None in placements:
        return None
    return RankPart(tensor, tuple(shape), None, tuple(place), tuple(p for p in placements if p is not None))


def _sharded_part(local: Any, metadata: Any) -> RankPart | None:
    """The part in the state of a ShardedTensor with one local shard."""
    one = local[0] if isinstance(local, list) and len(local) == 1 else None
    fields = one.fields() if isinstance(one, PickledObject) else {}
    tensor, own = fields.get("tensor"), fields.get("metadata")
    offsets = own.fields().get("shard_offsets") if isinstance(own, PickledObject) else None
    shape = metadata.fields().get("size") if isinstance(metadata, PickledObject) else None
    if not isinstance(tensor, PickledTensor) or not _are_sizes(offsets) or not _are_sizes(shape):
        return None
    if not len(offsets) == len(shape) == len(tensor.shape):
        return None
    return RankPart(tensor, tuple(shape), tuple(offsets))


def _placement(value: Any, dimensions: int) -> tuple[str, int, int] | None:
    """Kind, dimension and split factor of a placement; None for one that is no plain division."""
    if not isinstance(value, PickledObject):
        return None
    kind, fields = value.name.rpartition(".")[2], value.fields()
    if kind == "Replicate":
        return kind, 0, 1
    dimension, factor = fields.get("dim"), fields.get("split_factor", 1)
    if kind not in ("Shard", "_StridedShard") or not is_size(dimension) or not is_size(factor):
        return None
    return (kind, dimension, factor) if dimension < dimensions else None


def _are_sizes(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, (tuple, list)) and all(map(is_size, value))


def _check_names(label: str, paths: Sequence[Path], parts: Sequence[Mapping[str, RankPart]]) -> None:
    """Refuse ranks that have other tensors, or the same with another shape, dtype or placement. Errors: ModelError."""
    for path, rank in zip(paths, parts, strict=True):
        for name in [*parts[0], *rank]:
            a, b = parts[0].get(name), rank.get(name)
            if a is None or b is None or _kind_of(a) != _kind_of(b):
                raise ModelError(
                    f"{label}: {name[:80]} is {_describe(a)} in {paths[0].name} and {_describe(b)} in {path.name}; expected the same in "
                    "all ranks. The files are of different runs; copy the checkpoint again."
                )


def _kind_of(part: RankPart) -> tuple[object, ...]:
    return part.tensor.dtype, part.shape, part.placements, part.is_plain, len(part.coordinates)


def _describe(part: RankPart | None) -> str:
    if part is None:
        return "missing"
    placed = ", ".join(kind if kind == "Replicate" else f"{kind}({d})" for kind, d, _ in part.placements)
    return f"{part.tensor.dtype} {list(part.shape)}" + (f" placed as {placed}" if placed else "")


def _shards(
    paths: Sequence[Path], pickles: Sequence[Pickle], parts: Sequence[Mapping[str, RankPart]], names: Any
) -> list[Any]:
    """Locate the parts of the chosen tensors in the files of all ranks. Errors: ModelError."""
    shards = []
    for rank, (path, loaded, own) in enumerate(zip(paths, pickles, parts, strict=True)):
        tensors = {_piece_name(name, rank): own[name].tensor for name in names}
        shards.append(shard_of(path, loaded, tensors))
    return shards


def _piece_name(name: str, rank: int) -> str:
    return f"{name}@{rank}"


def _table(label: str, name: str, parts: Sequence[RankPart], files: FileModel) -> PieceTable:
    """Put the parts of a tensor together. Errors: ModelError."""
    first = parts[0]
    if first.is_plain:
        _check_replicas(label, name, len(parts), files)
        parts = parts[:1]
    mesh = [max(part.coordinates[d] for part in parts) + 1 for d in range(len(first.coordinates))]
    pieces = []
    for rank, part in enumerate(parts):
        box = (part.offsets, part.tensor.shape) if part.offsets is not None else _box(part, mesh)
        if box is None or box[1] != part.tensor.shape:
            raise ModelError(
                f"{label}: {name[:80]}: rank {rank} has {list(part.tensor.shape)} of {_describe(part)}; expected "
                f"{'a plain division' if box is None else list(box[1])} on a mesh of {' x '.join(map(str, mesh))} ranks. The files are of "
                "different runs, or of a division that is not read: save the model with torch.distributed.checkpoint."
            )
        pieces.append(StoredPiece(box[0], box[1], _piece_name(name, rank)))
    table = piece_table(first.tensor.dtype, first.shape, pieces)
    if table is None:
        raise ModelError(
            f"{label}: the parts of {name[:80]} {list(first.shape)} of {len(parts)} ranks leave a gap or overlap; expected parts that "
            "cover it once. The files are of different runs; copy the checkpoint again."
        )
    return table


def _box(part: RankPart, mesh: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Where a rank's part begins in the whole tensor, and its size; None for a division that is no plain one.

    ``Shard(d)`` divides dimension d among n ranks into runs of ``ceil(size / n)``, of which the last may be shorter or empty,
    from the first dimension of the mesh to the last. ``_StridedShard`` is divided after those that follow on it.
    """
    begins, sizes = [0] * len(part.shape), list(part.shape)
    order = [d for d, p in enumerate(part.placements) if p[0] == "Shard"]
    order += [d for d, p in reversed(list(enumerate(part.placements))) if p[0] == "_StridedShard"]
    divided = [1] * len(part.shape)
    for d in order:
        kind, dimension, factor = part.placements[d]
        if kind == "_StridedShard" and divided[dimension] != factor:
            return None
        run = -(-sizes[dimension] // mesh[d])
        begin = min(run * part.coordinates[d], sizes[dimension])
        begins[dimension] += begin
        sizes[dimension] = min(run, sizes[dimension] - begin)
        divided[dimension] *= mesh[d]
    return tuple(begins), tuple(sizes)


def _check_replicas(label: str, name: str, ranks: int, files: FileModel) -> None:
    """Refuse a plain tensor that differs between ranks: it may be a part whose place is not stated. Errors: ModelError."""
    first = _sample(files, _piece_name(name, 0))
    for rank in range(1, ranks):
        if _sample(files, _piece_name(name, rank)) != first:
            raise ModelError(
                f"{label}: {name[:80]} is a plain tensor that differs between rank 0 and rank {rank}; expected equal ones, or parts "
                "that say where they belong. Save the model with torch.distributed.checkpoint."
            )


def _sample(files: FileModel, name: str) -> bytes:
    """The first and last bytes of a tensor."""
    size = files.tensors[name].byte_size
    sample = bytearray(min(size, 2 * SAMPLE_BYTES))
    half = min(size, SAMPLE_BYTES)
    files.read_into(name, 0, memoryview(sample)[:half])
    files.read_into(name, size - (len(sample) - half), memoryview(sample)[half:])
    return bytes(sample)


def _left_out(label: str, folder: Path, state: Mapping[Any, Any]) -> list[str]:
    """Name what is no part of the model: other values, and the files of optimizers next to it."""
    values = [str(n) for n, v in state.items() if not isinstance(v, (PickledTensor, PickledObject))]
    files = [name for name in sorted(os.listdir(folder)) if OTHER_FILES.fullmatch(name)]
    return [
        *([f"{label}: left out, as they are no tensors: {list_groups(values)}."] if values else []),
        *(
            [f"{label}: left out, as they are the optimizer's: {files[0]} and {len(files) - 1} more files."]
            if files
            else []
        ),
    ]
