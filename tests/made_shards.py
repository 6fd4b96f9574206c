"""Files of trainers made without torch: distributed checkpoints, one rank's files, partitions of an optimizer."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from made_pickles import Built, Call, Name, pickled, tensor, zipped

CHECKPOINT, FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
DTENSOR = Name("torch.distributed.tensor", "DTensor")
PLACEMENTS = "torch.distributed.tensor.placement_types"
SHARDED = "torch.distributed._shard.sharded_tensor"
Shape = tuple[int, ...]


def strides(shape: Shape) -> Shape:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def values(shape: Shape, key: str = "0") -> Call:
    """A tensor in float32, of at most 16 elements, as many as a storage of a made checkpoint has."""
    return tensor(shape, strides(shape), key=key)


def item(shape: Shape) -> bytes:
    """A chunk as torch.save writes it."""
    return zipped(pickled(values(shape)), {"m/data/1": None})


def size(shape: Sequence[Any]) -> Call:
    return Call(Name("torch", "Size"), tuple(shape))


def chunk(offsets: Sequence[Any], sizes: Sequence[Any]) -> Built:
    return Built(Name(CHECKPOINT, "ChunkStorageMetadata"), {"offsets": size(offsets), "sizes": size(sizes)})


def entry(shape: Sequence[Any], chunks: Sequence[object], dtype: str = "float32") -> Built:
    """What metadata say about a tensor."""
    properties = Built(Name(CHECKPOINT, "TensorProperties"), (Name("torch", dtype), None, False, None, False))
    fields = {"properties": properties, "size": size(shape), "chunks": list(chunks)}
    return Built(Name(CHECKPOINT, "TensorStorageMetadata"), fields)


def key(name: str, offsets: Sequence[int]) -> Built:
    return Built(Name(CHECKPOINT, "MetadataIndex"), {"fqn": name, "offset": size(offsets), "index": 0})


def place(file: str, begin: int, length: int, **more: object) -> Built:
    return Built(
        Name(FILES, "_StorageInfo"), {"relative_path": file, "offset": begin, "length": length, **more}
    )


def metadata(entries: object, places: object, planned: object = None) -> bytes:
    fields = {
        "state_dict_metadata": entries,
        "storage_data": places,
        "planner_data": planned,
        "version": "1.0.0",
    }
    return pickled(Built(Name(CHECKPOINT, "Metadata"), fields))


def two_rows(**more: object) -> tuple[dict[str, Built], dict[Built, Built], dict[str, bytes]]:
    """A tensor of 4 x 3 in two chunks of rows: its entry, its places, and the files of two ranks."""
    data = item((2, 3))
    entries = {"w": entry((4, 3), [chunk((0, 0), (2, 3)), chunk((2, 0), (2, 3))])}
    places = {key("w", (2 * r, 0)): place(f"__{r}_0.distcp", 0, len(data), **more) for r in range(2)}
    return entries, places, {f"__{r}_0.distcp": data for r in range(2)}


def dtensor(local: Shape, shape: Shape, coordinate: Sequence[int], *placements: object) -> Call:
    """One rank's part of a distributed tensor."""
    mesh = Built(
        Name("torch.distributed.device_mesh", "DeviceMesh"), {"_coordinate_on_dim": list(coordinate)}
    )
    spec = Built(
        Name("torch.distributed.tensor._dtensor_spec", "DTensorSpec"),
        {"mesh": mesh, "placements": tuple(placements)},
    )
    made = (DTENSOR, Name("torch", "float32"), shape, strides(shape), 0, None, "cpu", False)
    state = (None, {"_local_tensor": values(local), "_spec": spec})
    return Call(
        Name("torch._tensor", "_rebuild_from_type_v2"),
        Name("torch._utils", "_rebuild_wrapper_subclass"),
        DTENSOR,
        made,
        state,
    )


def shard(dimension: int = 0) -> Built:
    return Built(Name(PLACEMENTS, "Shard"), {"dim": dimension})


def sharded_tensor(local: Shape, shape: Shape, offsets: Sequence[int]) -> Call:
    """One rank's part of a tensor of the kind before DTensor."""
    kind = Name(f"{SHARDED}.api", "ShardedTensor")
    own = Built(
        Name("torch.distributed._shard.metadata", "ShardMetadata"),
        (None, {"shard_offsets": list(offsets), "shard_sizes": list(local)}),
    )
    part = Built(Name(f"{SHARDED}.shard", "Shard"), (None, {"tensor": values(local), "metadata": own}))
    whole = Built(Name(f"{SHARDED}.metadata", "ShardedTensorMetadata"), {"size": size(shape)})
    made = (kind, Name("torch", "float32"), shape, strides(shape), 0, None, "cpu", False)
    return Call(
        Name("torch._tensor", "_rebuild_from_type_v2"), Name("torch._utils", "_rebuild_wrapper_subclass"), kind, made,
        ([part], whole, None, None, False),
    )  # fmt: skip


def rank_files(*states: object) -> dict[str, bytes]:
    """The files of all ranks."""
    return {f"model_world_size_{len(states)}_rank_{r}.pt": zipped(pickled(s)) for r, s in enumerate(states)}


def optimizer(groups: object, ranks: object, stage: int = 2, **more: object) -> bytes:
    """One rank's partition of an optimizer."""
    name = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    return zipped(pickled({"optimizer_state_dict": {name: groups, "partition_count": ranks, **more}}))


def model_states(shapes: object, **more: object) -> bytes:
    """The file of the model next to the partitions."""
    return zipped(pickled({"module": {}, "param_shapes": shapes, "shared_params": {}, **more}))


def partitions(*groups: object, shapes: object, stage: int = 2, **more: object) -> dict[str, bytes]:
    """The files of all ranks of ZeRO."""
    ranks = len(groups)
    files = {
        f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt": optimizer(g, ranks, stage)
        for r, g in enumerate(groups)
    }
    if stage == 3:
        return files | {
            f"zero_pp_rank_{r}_mp_rank_00_model_states.pt": model_states(shapes, **more) for r in range(ranks)
        }
    return files | {"mp_rank_00_model_states.pt": model_states(shapes, **more)}


def universal(weights: Mapping[str, object], shapes: object, **more: object) -> dict[str, bytes]:
    """A universal checkpoint of DeepSpeed."""
    files = {f"zero/{name}/fp32.pt": zipped(pickled(value)) for name, value in weights.items()}
    return files | {"mp_rank_00_model_states.pt": model_states(shapes, **more)}


def storage_shard(parts: Mapping[str, tuple[Shape, Shape]], stated: object = None) -> bytes:
    """One rank's safetensors file with zeros in float32, by name: offsets and sizes. ``stated`` is claimed in place of them."""
    places = {name: {"saved_offsets": list(offsets)} for name, (offsets, _) in parts.items()}
    head: dict[str, Any] = {
        "__metadata__": {"DCP_SHARDING_INFO": json.dumps(places if stated is None else stated)}
    }
    end = 0
    for name, (_, sizes) in parts.items():
        begin, end = end, end + 4 * math.prod(sizes)
        head[name] = {"dtype": "F32", "shape": list(sizes), "data_offsets": [begin, end]}
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def storage_name(rank: int, count: int = 1) -> str:
    return f"shard-{rank + 1:05d}-model-00001-of-{count:05d}.safetensors"


def put_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder
