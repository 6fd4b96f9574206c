"""Malformed pickles, each with the check that refuses it."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

from hostile.malformed import Malformed, Read, reading
from made_pickles import Call, Name, Stored, legacy, pickled, tensor, zipped

GOOD = tensor((2, 3), (3, 1))


def file(content: bytes):
    def make(folder: Path) -> Read:
        (folder / "m.pt").write_bytes(content)
        return reading(folder / "m.pt")

    return make


def held(thing: object):
    """A checkpoint in a zip that holds a thing."""
    return file(zipped(pickled(thing)))


def spelled(body: bytes):
    """A checkpoint whose pickle is spelled out, beside a tensor that is as it should be."""
    return file(zipped(pickled({"w": GOOD})[:-1] + body + pickle.POP + pickle.STOP))


def view(*arguments: object) -> dict[str, object]:
    return {"w": Call(Name("torch._utils", "_rebuild_tensor_v2"), *arguments)}


class Identified(Stored):
    """A storage whose identifier is any."""

    def __init__(self, *identifier: object) -> None:
        self.identifier = identifier


def nested() -> dict[str, object]:
    """A state dict in ten wrappers. (One that holds itself would go on for ever without the check.)"""
    found: dict[str, object] = {"w": GOOD}
    for _ in range(10):
        found = {"model": found}
    return found


FLOAT = Name("torch", "FloatStorage")


def made(bits: object, kind: str = "FloatStorage") -> Call:
    """A tensor with what torch calls metadata."""
    return Call(
        Name("torch._utils", "_rebuild_tensor_v2"), Stored(kind, "1", 8), 0, (2,), (1,), False, {}, bits
    )


def of_type(rebuild: Name, kind: object) -> Call:
    return Call(Name("torch._tensor", "_rebuild_from_type_v2"), rebuild, kind, ([],), {})


def by_way_of_the_cpu(dtype: str) -> Call:
    return Call(
        Name("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"),
        GOOD,
        Name("torch", dtype),
        "xla:0",
        False,
    )


def scalar(data: object) -> Call:
    return Call(
        Name("numpy._core.multiarray", "scalar"), Call(Name("numpy", "dtype"), "f8", False, True), data
    )


AS_BYTES = Call(
    Name("torch._utils", "_rebuild_tensor_v3"),
    Stored("UntypedStorage", "0", 64),
    0,
    (2,),
    (1,),
    False,
    {},
    "F33",
)

PICKLE_FILES = (
    # pickles.py
    Malformed("is not a readable torch checkpoint", "is not a readable torch checkpoint (UnpicklingError: it ends too early)", file(b"\x80\x02")),
    Malformed("is a zip archive without one data.pkl", "is a zip archive without one data.pkl", file(zipped(pickled({"w": GOOD}), {"m/constants.pkl": b""}))),
    Malformed("{}: {} has {} bytes or is compressed", "m/data.pkl has", file(zipped(pickled({"w": GOOD}), compressed="m/data.pkl"))),
    Malformed("was written by a big-endian machine", "was written by a big-endian machine", file(zipped(pickled({"w": GOOD}), {"m/byteorder": b"big"}))),
    Malformed("storage {} is missing or compressed", "storage '0' is missing or compressed", file(zipped(pickled({"w": GOOD}), compressed="m/data/0"))),
    Malformed("is a pickle, but not a torch checkpoint from a little-endian", "is a pickle, but not a torch checkpoint", file(legacy(pickled({"w": GOOD}), magic=7))),
    Malformed("a storage whose key is not text", "a storage whose key is not text", file(legacy(pickled({"w": GOOD}), keys=(("0",),)))),
    Malformed("storage {} has {} elements; its tensors claim {}", "storage '0' has 15 elements; its tensors claim 16", file(legacy(pickled({"w": GOOD}), count=15))),
    Malformed("its pickle needs {}.{}", "its pickle needs os.system", held({"w": GOOD, "x": Name("os", "system")})),
    Malformed("a storage of an unknown kind", "a storage of an unknown kind", held(view(Identified("module", FLOAT, "0", "cpu", 16), 0, (2,), (1,)))),
    Malformed("storage {} is described in two ways", "storage '0' is described in two ways", held({"w": GOOD, "v": tensor((2,), (1,), count=8)})),
    Malformed("a tensor without a shape and strides of at most {} dimensions", "strides of at most 64 dimensions", held({"w": tensor((1,) * 65, (1,) * 65)})),
    Malformed("a tensor without a storage, a dtype and non-negative sizes", "a tensor without a storage, a dtype and non-negative sizes", held(view(Stored("FloatStorage", "0", 16), 0, (-1, -2), (1, 1)))),
    Malformed("holds {} ({}); expected dense tensors", "holds a sparse tensor", held({"w": GOOD, "x": Name("torch._utils", "_rebuild_sparse_tensor")})),
    Malformed("metadata other than the bits", "a tensor with metadata other than the bits", held({"w": made({"neg": 1})})),
    Malformed("that is negated or conjugated", "a tensor of BOOL that is negated", held({"w": made({"neg": True}, "BoolStorage")})),
    Malformed("another type than torch.Tensor", "a tensor of another type than torch.Tensor", held({"w": GOOD, "x": of_type(Name("torch", "Size"), Name("torch", "Tensor"))})),
    Malformed("saved with a different dtype", "saved with a different dtype", held({"w": by_way_of_the_cpu("float16")})),
    Malformed("a numpy dtype without a name", "a numpy dtype without a name", held({"w": GOOD, "x": Call(Name("numpy", "dtype"), 8)})),
    Malformed("a numpy scalar without a dtype and bytes", "a numpy scalar without a dtype and bytes", held({"w": GOOD, "x": scalar(None)})),
    Malformed("a numpy scalar that is not a number ({})", "a numpy scalar that is not a number ('f8')", held({"w": GOOD, "x": scalar(b"1234")})),
    Malformed("is a numpy array; expected a tensor", "x is a numpy array", held({"w": GOOD, "x": Call(Name("numpy.core.multiarray", "_reconstruct"), Name("numpy", "ndarray"), (0,), b"b")})),
    Malformed("a state for {}", "a state for a tensor", file(zipped(pickled({"w": GOOD})[:-2] + pickle.NONE + pickle.BUILD + pickle.SETITEM + pickle.STOP))),
    Malformed("bytes in an unknown encoding", "bytes in an unknown encoding", held({"w": GOOD, "x": Call(Name("_codecs", "encode"), "a", "utf-7")})),
    Malformed("its tensors are inside more than {} wrappers", "inside more than 8 wrappers", file(zipped(pickled(nested())))),
    Malformed("{}: holds {}; expected tensors by name", "holds a list; expected tensors by name", held([GOOD])),
    Malformed("holds no tensors by name", "holds no tensors by name (its keys: lr)", held({"lr": 1})),
    Malformed("an unpaired surrogate in its name | Unicode text", "has an unpaired surrogate in its name", held({"\ud800": GOOD})),
    Malformed("no dtype | one of {}", "has no dtype; expected one of", held({"w": AS_BYTES})),
    Malformed("a stride for each size", "expected a stride for each size", held({"w": tensor((1,), (3, 1))})),
    Malformed("storage of {} ends at byte {}, the file has {}. The file is truncated", "The file is truncated; download it again", file(legacy(pickled({"w": GOOD}))[:-40])),
    Malformed("elements to {} of its storage | at most {}", "has elements to 17 of its storage; expected at most 16", held({"w": tensor((2,), (1,), offset=15)})),
    Malformed("{} bytes of repeated elements", "of repeated elements", held({"w": tensor((1 << 10, 1 << 10), (0, 0))})),
    # unpickling.py
    Malformed("the opcode {}, which state dicts do not use", "the opcode b'i', which state dicts do not use", spelled(pickle.MARK + b"ios\nsystem\n")),
    Malformed("it ends too early", "it ends too early", spelled(pickle.BINUNICODE + struct.pack("<I", 1 << 31))),
    Malformed("an unterminated name", "an unterminated name", spelled(pickle.GLOBAL + b"x" * 2000 + b"\ny\n")),
    Malformed("a tuple with too few values", "a tuple with too few values", spelled(pickle.MARK + pickle.NONE + pickle.TUPLE2)),
    Malformed("a list was expected", "a list was expected", spelled(pickle.EMPTY_TUPLE + pickle.NONE + pickle.APPEND)),
    Malformed("a dict and pairs for it were expected", "a dict and pairs for it were expected", spelled(pickle.EMPTY_LIST + pickle.NONE + pickle.NONE + pickle.SETITEM)),
    Malformed("a name that is not text", "a name that is not text", spelled(pickle.NONE + pickle.NONE + pickle.STACK_GLOBAL)),
    Malformed("a call of something that is not an allowed name", "a call of something that is not an allowed name", spelled(pickle.EMPTY_DICT + pickle.EMPTY_TUPLE + pickle.REDUCE)),
    Malformed("a key of the type {}", "a key of the type tuple", spelled(pickle.EMPTY_DICT + pickle.EMPTY_TUPLE + pickle.NONE + pickle.SETITEM)),
)  # fmt: skip
