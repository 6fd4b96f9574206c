"""Malformed files of trainers, each with the check that refuses it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from hostile.malformed import Malformed, Read, reading
from made_pickles import Built, Call, Name, pickled, zipped
from made_shards import (
    PLACEMENTS,
    chunk,
    dtensor,
    entry,
    item,
    key,
    metadata,
    model_states,
    optimizer,
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

ENTRIES, PLACES, FILES = two_rows()
ROWS = {".metadata": metadata(ENTRIES, PLACES), **FILES}


def folder_of(files: Mapping[str, bytes], part: str = "", inside: str = ""):
    """A checkpoint of files; ``inside`` is the one that is opened."""

    def make(folder: Path) -> Read:
        return reading(f"{put_files(folder / 'c', files)}{inside and '/'}{inside}{part and '@'}{part}")

    return make


def distributed(entries: object = ENTRIES, places: object = PLACES, planned: object = None, **files: bytes):
    return folder_of({".metadata": metadata(entries, places, planned), **FILES, **files})


def one(name: str = "w", shape: tuple[object, ...] = (2, 3), **more: object):
    """A tensor in one chunk."""
    return distributed(
        {name: entry(shape, [chunk((0, 0), (2, 3))])},
        {key(name, (0, 0)): place("__0_0.distcp", 0, len(item((2, 3))), **more)},
    )


def two_models():
    names = ("actor.w", "critic.w")
    entries = {name: entry((2, 3), [chunk((0, 0), (2, 3))]) for name in names}
    places = {key(name, (0, 0)): place("__0_0.distcp", 0, len(item((2, 3)))) for name in names}
    return distributed(entries, places, {name: tuple(name.split(".")) for name in names})


def of_two_ranks(*shapes: tuple[int, ...]):
    """Metadata of each rank by itself."""
    data = {
        f"__{r}.metadata": metadata({"w": entry(shape, [chunk((2 * r, 0), (2, 3))])}, {key("w", (2 * r, 0)): place(f"__{r}_0.distcp", 0, len(item((2, 3))))})
        for r, shape in enumerate(shapes)
    }  # fmt: skip
    return folder_of({**data, **FILES})


def checkpoint(value: object, part: str):
    return folder_of({"m.ckpt": zipped(pickled(value))}, part, "m.ckpt")


def nemo(folder: Path) -> Read:
    with tarfile.open(folder / "m.nemo", "w") as archive:
        archive.addfile(tarfile.TarInfo("other"), io.BytesIO())
    return reading(folder / "m.nemo")


SHAPES = [{"w": (2, 3), "b": (4,)}]
STAGE_2 = partitions([values((6,))], [values((6,))], shapes=SHAPES)
STAGE_3 = partitions([values((5,))], [values((5,))], shapes=SHAPES, stage=3)
FIRST, SECOND = (f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(2))
MODEL = "mp_rank_00_model_states.pt"
SLICES = [{"w": Built(Name("deepspeed.utils.tensor_fragment", "fragment_address"), {"start": 3, "numel": 6})}]
TWO_FLOATS = {"w": values((2,), "0")}

WHOLE = {"w": values((2, 3)), "b": values((4,))}
HALVES = {storage_name(r): storage_shard({"w": ((2 * r, 0), (2, 3))}) for r in range(2)}

TRAINING_FILES = (
    # pickles.py
    Malformed("an attribute of something that is not a known class", "an attribute of something that is not a known class", folder_of({".metadata": pickled(Call(Name("builtins", "getattr"), 3, "real"))})),
    # quantised/formats.py
    Malformed("in shards of a trainer; expected floating-point values", "its weights are quantised (it has 'w.weight_scale')", one("w.weight_scale")),
    # trainer_names.py
    Malformed("expected {}. Name the one to read: PATH@KEY", "has tensors under actor, critic; expected one model", two_models()),
    Malformed("is a flat parameter of FSDP", "_flat_param is a flat parameter of FSDP", folder_of(rank_files({"_flat_param": values((2,))}))),
    # distributed_checkpoint.py
    Malformed("is not the metadata of a distributed checkpoint", "is not the metadata of a distributed checkpoint", folder_of({".metadata": pickled({})})),
    Malformed("for this rank, and {}", "w is F32 [5, 3] for this rank, and F32 [4, 3] for another", of_two_ranks((4, 3), (5, 3))),
    Malformed("expected a known dtype and at most", "expected a known dtype and at most 64 sizes whose bytes can be counted", one(shape=(1 << 40, 1 << 40))),
    Malformed("a chunk of {} has the offsets {} and sizes {}", "expected 2 of each", distributed({"w": entry((4, 3), [chunk((0,), (2,))])})),
    Malformed("expected a place in a file of the folder", "is in ../x at byte 0; expected a place in a file of the folder", distributed(places={key("w", (2 * r, 0)): place("../x", 0, 9) for r in range(2)})),
    Malformed("was transformed when it was saved", "w was transformed when it was saved (['zstd'])", one(transform_descriptors=["zstd"])),
    Malformed("the {} chunks of {} {} leave a gap or overlap", "the 1 chunks of w [3, 3] leave a gap or overlap", one(shape=(3, 3))),
    Malformed("is missing, which holds {} chunks", "__1_0.distcp is missing, which holds 1 chunks", folder_of({n: d for n, d in ROWS.items() if n != "__1_0.distcp"})),
    Malformed("the metadata place chunks up to byte {}", "The file is truncated, or of another run", folder_of({**ROWS, "__1_0.distcp": item((2, 3))[:-10]})),
    Malformed("as the metadata say", "is F32 [3, 2] in the file; expected F32 [2, 3], as the metadata say", folder_of({**ROWS, "__1_0.distcp": item((3, 2))})),
    # rank_files.py
    Malformed("expected model_world_size_{}_rank_R.pt for each of {} ranks", "has no file of rank 0", folder_of({n: d for n, d in rank_files(TWO_FLOATS, TWO_FLOATS).items() if "rank_1" in n})),
    Malformed("expected one rank's tensors by name", "holds a list; expected one rank's tensors by name", folder_of(rank_files([1]))),
    Malformed("that is not understood", "w is a torch.distributed.tensor.DTensor that is not understood", folder_of(rank_files({"w": dtensor((2,), (2,), (0,), Built(Name(PLACEMENTS, "Partial"), {"reduce_op": "sum"}))}))),
    Malformed("expected the same in all ranks", "v is missing in model_world_size_2_rank_0.pt", folder_of(rank_files(TWO_FLOATS, TWO_FLOATS | {"v": values((1,))}))),
    Malformed("or of a division that is not read", "rank 0 has [3] of F32 [4] placed as Shard(0); expected [2]", folder_of(rank_files(*({"w": dtensor((3,), (4,), (r,), shard())} for r in range(2))))),
    Malformed("the parts of {} {} of {} ranks leave a gap or overlap", "the parts of w [4] of 2 ranks leave a gap or overlap", folder_of(rank_files(*({"w": sharded_tensor((2,), (4,), (0,))} for _ in range(2))))),
    Malformed("is a plain tensor that differs between rank 0 and rank {}", "w is a plain tensor that differs between rank 0 and rank 1", folder_of({**rank_files(TWO_FLOATS, TWO_FLOATS), "model_world_size_2_rank_1.pt": zipped(pickled(TWO_FLOATS), {"m/data/0": b"\1" * 64})})),
    # model_states.py, optimizer_partitions.py
    Malformed("so the model is divided into layers", "has mp_rank_01_model_states.pt, so the model is divided", folder_of({**STAGE_2, "mp_rank_01_model_states.pt": b""})),
    Malformed("expected one *_optim_states.pt for each of {} ranks", "has no file of rank 1", folder_of({n: d for n, d in STAGE_2.items() if n != SECOND})),
    Malformed("groups of master weights of ZeRO {}, {} {} of ZeRO {}", "has 2 groups of master weights of ZeRO 1 or 2", folder_of({**STAGE_2, SECOND: optimizer([values((3,)), values((3,))], 2)})),
    Malformed("has no flat master weights with a number of partitions", "has no flat master weights with a number of partitions", folder_of({**STAGE_2, FIRST: optimizer([values((2, 3))], 2)})),
    Malformed("which has the names of the parameters", "mp_rank_00_model_states.pt is missing", folder_of({n: d for n, d in STAGE_2.items() if n != MODEL})),
    Malformed("or they have other parameters", "is of step 9 and zero_pp_rank_0_mp_rank_00_model_states.pt of step None", folder_of({**STAGE_3, "zero_pp_rank_1_mp_rank_00_model_states.pt": model_states(SHAPES, global_steps=9)})),
    Malformed("has no param_shapes that name the parameters", "has no param_shapes that name the parameters", folder_of({**STAGE_2, MODEL: model_states([{"w": (-1,)}])})),
    Malformed("the frozen parameter {} {} has the parts {}", "the frozen parameter f [3] has the parts [[2]]", folder_of({**STAGE_2, MODEL: model_states(SHAPES, frozen_param_shapes={"f": (3,)}, frozen_param_fragments={"f": values((2,))})})),
    Malformed("has master weights of {} groups and the names of {}", "has master weights of 1 groups and the names of 2", folder_of({**STAGE_2, MODEL: model_states([*SHAPES, {"c": (0,)}])})),
    Malformed("the master weights of {} ranks have {} elements", "the master weights of 2 ranks have 12 elements, the parameters 60", folder_of({**STAGE_2, MODEL: model_states([{"w": (6, 10)}])})),
    Malformed("a rank has {} elements of master weights", "a rank has 5 elements of master weights; expected 2", folder_of(partitions([values((5,))], [values((5,))], shapes=[{"w": (4,)}], stage=3))),
    Malformed("says that {} is {} elements from {} on", "says that w is 6 elements from 3 on; expected [(0, 6)]", folder_of({**STAGE_2, FIRST: optimizer([values((6,))], 2, param_slice_mappings=SLICES)})),
    Malformed("has {} {}, {} {}; expected the ranks of one step", "step 8, zero_pp_rank_0_mp_rank_00_optim_states.pt 7; expected the ranks of one step", folder_of({**STAGE_2, **{n: optimizer([values((6,))], 2, base_optimizer_state={"step": 7 + r}) for r, n in enumerate((FIRST, SECOND))}})),
    # universal_checkpoint.py
    Malformed("{}; expected the weights of the {} parameters", "zero/b/fp32.pt is missing; expected the weights of the 2 parameters", folder_of(universal({"w": values((2, 3))}, SHAPES))),
    Malformed("holds {}; expected {} {}. The files are of different runs", "holds a tensor of [3, 2]; expected w [2, 3]", folder_of(universal({**WHOLE, "w": values((3, 2))}, SHAPES))),
    # storage_shards.py
    Malformed("has shards of models of {} and of {} files", "has shards of models of 1 and of 2 files", folder_of({**HALVES, storage_name(2, 2): storage_shard({"v": ((0,), (1,))})})),
    Malformed("does not say where {} {} begins in the whole tensor", "does not say where w [2, 3] begins in the whole tensor", folder_of({**HALVES, storage_name(0): storage_shard({"w": ((0, 0), (2, 3))}, {"w": {"saved_offsets": [-1, 0]}})})),
    Malformed("leave a gap or overlap; expected parts of one dtype", "the 2 parts of w (F32 [2, 3] at [0, 0], F32 [2, 3] at [3, 0]) leave a gap or overlap", folder_of({**HALVES, storage_name(1): storage_shard({"w": ((3, 0), (2, 3))})})),
    # averaged_weights.py
    Malformed("has nothing like a state dict under {}", "has nothing like a state dict under teacher", checkpoint({"state_dict": TWO_FLOATS}, "teacher")),
    Malformed("averaged weights (EMA): {}; expected them under one key", "averaged weights (EMA): none", checkpoint({"state_dict": TWO_FLOATS}, "ema")),
    # nemo_archive.py, open_training.py
    Malformed("at its top ({}); expected a NeMo archive", "has no model_weights.ckpt at its top (other)", nemo),
    Malformed("holds the flat parameters of each rank of FSDP", "holds the flat parameters of each rank", folder_of({"pytorch_model_fsdp_rank0.bin": zipped(pickled(TWO_FLOATS))})),
    Malformed("is a part that one rank saved", "is a part that one rank saved", folder_of(ROWS, inside="__0_0.distcp")),
)  # fmt: skip
