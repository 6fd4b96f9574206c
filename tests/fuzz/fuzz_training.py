"""Files of trainers: a byte says which file the rest is, beside others that are as they should be."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

from alnico.checkpoint.open_model import open_model
from fuzz.fuzz_pickle import mutate as mutate_pickle
from fuzz.harness import Target
from made_pickles import Built, Name, pickled, zipped
from made_shards import (
    CHECKPOINT,
    FILES,
    PLACEMENTS,
    chunk,
    dtensor,
    entry,
    item,
    key,
    metadata,
    partitions,
    place,
    put_files,
    rank_files,
    shard,
    sharded_tensor,
    storage_name,
    storage_shard,
    two_rows,
    universal,
    values,
)

METADATA, CHUNK, RANK, OPTIMIZER, MODEL, STAGE_3, AVERAGE, ARCHIVE, UNIVERSAL, STORAGE = range(10)
MOST_READ = 1 << 16
ENTRIES, PLACES, SHARDS = two_rows()
SHAPES = [{"w": (2, 3), "b": (4,)}]
ROW = {"w": dtensor((2,), (4,), (1,), shard()), "v": sharded_tensor((1,), (2,), (1,)), "n": values((3,))}
ZERO = partitions([values((6,))], [values((6,))], shapes=SHAPES)
THREE = partitions([values((5,))], [values((5,))], shapes=SHAPES, stage=3)
WHOLE = universal({"w": values((2, 3)), "b": values((4,))}, SHAPES)
HALF = storage_shard({"w": ((2, 0), (2, 3))})


def read(data: bytes, folder: Path) -> None:
    kind, rest = (data[0] % 10, data[1:]) if data else (METADATA, b"")
    place_of_it = folder / "c"
    place_of_it.mkdir(exist_ok=True)
    for left in place_of_it.rglob("*"):
        if left.is_file():
            left.unlink()
    packed = zipped(rest)
    made: dict[int, dict[str, bytes]] = {
        METADATA: {".metadata": rest, **SHARDS},
        CHUNK: {".metadata": metadata(ENTRIES, PLACES), **SHARDS, "__1_0.distcp": packed},
        RANK: {**rank_files({}, ROW), "model_world_size_2_rank_0.pt": packed},
        OPTIMIZER: {**ZERO, "zero_pp_rank_1_mp_rank_00_optim_states.pt": packed},
        MODEL: {**ZERO, "mp_rank_00_model_states.pt": packed},
        STAGE_3: {**THREE, "zero_pp_rank_0_mp_rank_00_model_states.pt": packed},
        AVERAGE: {"m.ckpt": packed},
        ARCHIVE: {"m.nemo": rest},
        UNIVERSAL: {**WHOLE, "zero/w/fp32.pt": packed},
        STORAGE: {storage_name(0): rest, storage_name(1): HALF},
    }
    put_files(place_of_it, made[kind])
    inside = {AVERAGE: "/m.ckpt@ema", ARCHIVE: "/m.nemo"}.get(kind, "")
    with open_model(f"{place_of_it}{inside}") as opened:
        for name, tensor in opened.tensors.items():
            if tensor.byte_size <= MOST_READ:
                opened.read(name)


def archive() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as packed:
        info = tarfile.TarInfo("./model_weights.ckpt")
        data = zipped(pickled({"w": values((2, 3))}))
        info.size = len(data)
        packed.addfile(info, io.BytesIO(data))
    return made.getvalue()


def seeds() -> list[bytes]:
    data = item((2, 3))
    columns = {
        "w": entry((2, 6), [chunk((0, 0), (2, 3)), chunk((0, 3), (2, 3))]),
        "s": Built(Name(CHECKPOINT, "BytesStorageMetadata"), {}),
    }
    places = {key("w", (0, 3 * r)): place(f"__{r}_0.distcp", 0, len(data)) for r in range(2)}
    slices = [
        {"w": Built(Name("deepspeed.utils.tensor_fragment", "fragment_address"), {"start": 0, "numel": 6})}
    ]
    frozen = {"frozen_param_shapes": {"f": (3,)}, "frozen_param_fragments": {"f": values((3,), "1")}}
    strided = Built(Name(PLACEMENTS, "_StridedShard"), {"dim": 0, "split_factor": 2})
    inputs: list[tuple[int, bytes]] = [
        (METADATA, metadata(ENTRIES, PLACES, {"w": ("model", "w")})),
        (METADATA, metadata(columns, places)),
        (METADATA, metadata({"w": entry((2, 3), [chunk((0, 0), (2, 3))])}, {key("w", (0, 0)): Built(Name(FILES, "_StorageInfo"), {"transform_descriptors": ["x"]})})),
        (CHUNK, pickled(values((2, 3)))),
        (RANK, pickled({"w": dtensor((2,), (4,), (0,), shard()), "v": sharded_tensor((1,), (2,), (0,)), "n": values((3,))})),
        (RANK, pickled({"w": dtensor((2,), (4,), (0, 1), strided, shard())})),
        (OPTIMIZER, pickled({"optimizer_state_dict": {"single_partition_of_fp32_groups": [values((6,))], "partition_count": [2], "param_slice_mappings": slices}})),
        (MODEL, pickled({"module": {"x": values((2,), "1")}, "param_shapes": SHAPES, "shared_params": {"a": "w"}, **frozen})),
        (STAGE_3, pickled({"module": {}, "param_shapes": SHAPES, "shared_params": [["a", "w"]]})),
        (AVERAGE, pickled({"state_dict": {"w": values((2,))}, "callbacks": {"EMA": {"ema_state_dict": {"w": values((2,), "1")}}}})),
        (AVERAGE, pickled({"state_dict": {"model.a.w": values((2,)), "model_ema.aw": values((2,), "1")}})),
        (ARCHIVE, archive()),
        (UNIVERSAL, pickled({"param": values((6,)), "cat_dim": 0})),
        (UNIVERSAL, pickled(values((2, 3)))),
        (STORAGE, storage_shard({"w": ((0, 0), (2, 3)), "v": ((0,), (4,))})),
    ]  # fmt: skip
    return [bytes([kind]) + text for kind, text in inputs]


def mutate(data: bytes, draw: random.Random, words: Sequence[str]) -> bytes | None:
    """Put a word of pickles at some place, or let the file be another one's."""
    if draw.random() < 0.05:
        return bytes([draw.randrange(10)]) + data[1:]
    return mutate_pickle(data, draw, words)


TARGET = Target(read, seeds, mutate=mutate)
