"""Reads the safetensors files that all ranks leave where torch's HuggingFaceStorageWriter saves in parallel.

    shard-0000R-model-0000I-of-0000N.safetensors    rank R's parts of the tensors of file I of N

The metadata of a file say under ``DCP_SHARDING_INFO`` where its parts begin in the whole tensors; nothing says how large these are, or
how many ranks there were. torchtitan and torchtune save so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alnico.checkpoint.file_model import FileModel, open_shard
from alnico.checkpoint.files import check_inside
from alnico.checkpoint.header import Header, TensorInfo
from alnico.checkpoint.pickles import is_size
from alnico.checkpoint.source import Shard
from alnico.checkpoint.training.distributed_checkpoint import SHARDING
from alnico.checkpoint.training.piece_table import PieceTable, StoredPiece, piece_table
from alnico.checkpoint.training.recognise import STORAGE_SHARD
from alnico.checkpoint.training.sharded_model import ShardedModel, closed_on_failure
from alnico.checkpoint.training.trainer_names import choose_model
from alnico.errors import ModelError

TensorParts = dict[str, list[tuple[StoredPiece, str]]]
"""The parts of each tensor, with their dtypes."""


def open_storage_shards(label: str, folder: Path, part: str = "") -> ShardedModel:
    """Open the files of all ranks as one model; reads headers only.

    ``part`` is the key of what to read, where the files hold more than one model. Errors: ModelError for files of several
    checkpoints, a part without a place, and parts that leave a gap or overlap.
    """
    found = [match for name in sorted(os.listdir(folder)) if (match := STORAGE_SHARD.fullmatch(name))]
    counts = sorted({match["count"] for match in found})
    if len(counts) > 1:
        raise ModelError(
            f"{label}: has shards of models of {int(counts[0])} and of {int(counts[1])} files; expected those of one checkpoint. Remove the "
            "others."
        )
    parts: TensorParts = {}
    shards = [_open_file(folder, match[0], parts) for match in found]
    chosen = choose_model(list(parts), {}, part, label)
    tables = {name: _table(label, saved, parts[saved]) for name, saved in chosen.names.items()}
    ranks = {match["shard"] for match in found}
    notes = [
        *chosen.notes(label),
        f"{label}: {len(tables)} tensors are put together of the files of {len(ranks)} ranks. The files do not say how many ranks there were: "
        "check that all are there.",
    ]
    files = FileModel(label, folder, shards)
    with closed_on_failure(files):
        return ShardedModel(label, folder, files, tables, notes)


def _open_file(folder: Path, name: str, parts: TensorParts) -> Shard:
    """Read the header of a file, and add its tensors to ``parts``. Errors: ModelError."""
    path = folder / name
    check_inside(path, folder)
    shard = open_shard(path)
    places = _places(shard.header.metadata.get(SHARDING, ""))
    infos = []
    for tensor in shard.header.tensors:
        offsets = _offsets(places.get(tensor.name), tensor)
        stored = f"{name}/{tensor.name}"
        if offsets is None:
            raise ModelError(
                f"{path}: does not say where {tensor.name[:80]} {list(tensor.shape)} begins in the whole tensor; expected an offset for each "
                f"dimension in {SHARDING}. Copy the checkpoint again."
            )
        parts.setdefault(tensor.name, []).append((StoredPiece(offsets, tensor.shape, stored), tensor.dtype))
        infos.append(replace(tensor, name=stored))
    return replace(shard, header=Header(tuple(infos), {}, shard.header.data_begin))


def _places(text: str) -> Mapping[str, Any]:
    """What a file says of its tensors, by name; empty where it says nothing."""
    try:
        stated = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return stated if isinstance(stated, dict) else {}


def _offsets(stated: Any, tensor: TensorInfo) -> tuple[int, ...] | None:
    """Where a part begins in the whole tensor; None where that is not stated."""
    offsets = stated.get("saved_offsets") if isinstance(stated, dict) else None
    if not isinstance(offsets, list) or len(offsets) != len(tensor.shape) or not all(map(is_size, offsets)):
        return None
    return tuple(offsets)


def _table(label: str, name: str, parts: list[tuple[StoredPiece, str]]) -> PieceTable:
    """Put the parts of a tensor together. Errors: ModelError."""
    pieces = [piece for piece, _ in parts]
    table, shape = None, ()
    if len({(dtype, len(piece.sizes)) for piece, dtype in parts}) == 1:
        ends = [[o + n for o, n in zip(p.offsets, p.sizes, strict=True)] for p in pieces]
        shape = tuple(map(max, zip(*ends, strict=True)))
        filled = [piece.offsets for piece in pieces if math.prod(piece.sizes)]
        if len(set(filled)) == len(filled):
            table = piece_table(parts[0][1], shape, pieces)
    if table is None:
        shown = ", ".join(f"{dtype} {list(p.sizes)} at {list(p.offsets)}" for p, dtype in parts[:4])
        raise ModelError(
            f"{label}: the {len(parts)} parts of {name[:80]} ({shown[:160]}) leave a gap or overlap; expected parts of one dtype that cover "
            "the tensor once. A rank is missing, or files are of different runs: copy the checkpoint again."
        )
    return table
