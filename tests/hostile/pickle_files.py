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
    Malformed("is no checkpoint of torch that can be read", "is no checkpoint of torch that can be read (UnpicklingError: it ends too early)", file(b"")),
    Malformed("is a zip archive without one data.pkl", "is a zip archive without one data.pkl", file(zipped(pickled({"w": GOOD}), {"m/constants.pkl": b""}))),
    Malformed("{}: {} has {} bytes or is compressed", "m/data.pkl has", file(zipped(pickled({"w": GOOD}), compressed="m/data.pkl"))),
    Malformed("was written by a big-endian machine", "was written by a big-endian machine", file(zipped(pickled({"w": GOOD}), {"m/byteorder": b"big"}))),
    Malformed("storage {} is missing or compressed", "storage '0' is missing or compressed", file(zipped(pickled({"w": GOOD}), compressed="m/data/0"))),
    Malformed("is a pickle, but no checkpoint of torch from a little-endian", "is a pickle, but no checkpoint", file(legacy(pickled({"w": GOOD}), magic=7))),
    Malformed("a storage whose key is no text", "a storage whose key is no text", file(legacy(pickled({"w": GOOD}), keys=(("0",),)))),
    Malformed("storage {} has {} elements, its tensors say {}", "storage '0' has 15 elements, its tensors say 16", file(legacy(pickled({"w": GOOD}), count=15))),
    Malformed("its pickle asks for {}.{}", "its pickle asks for os.system", held({"w": GOOD, "x": Name("os", "system")})),
    Malformed("a storage of an unknown kind", "a storage of an unknown kind", held(view(Identified("module", FLOAT, "0", "cpu", 16), 0, (2,), (1,)))),
    Malformed("storage {} is two things", "storage '0' is two things", held({"w": GOOD, "v": tensor((2,), (1,), count=8)})),
    Malformed("a tensor without a shape and strides of at most {} dimensions", "strides of at most 64 dimensions", held({"w": tensor((1,) * 65, (1,) * 65)})),
    Malformed("a tensor without a storage, a dtype and sizes", "a tensor without a storage, a dtype and sizes", held(view(Stored("FloatStorage", "0", 16), 0, (-1, -2), (1, 1)))),
    Malformed("holds {} ({}); expected dense tensors", "holds a sparse tensor", held({"w": GOOD, "x": Name("torch._utils", "_rebuild_sparse_tensor")})),
    Malformed("metadata other than the bits", "a tensor with metadata other than the bits", held({"w": made({"neg": 1})})),
    Malformed("that is negated or conjugated", "a tensor of BOOL that is negated", held({"w": made({"neg": True}, "BoolStorage")})),
    Malformed("another type than torch.Tensor", "a tensor of another type than torch.Tensor", held({"w": GOOD, "x": of_type(Name("torch", "Size"), Name("torch", "Tensor"))})),
    Malformed("saved with another dtype than its own", "saved with another dtype than its own", held({"w": by_way_of_the_cpu("float16")})),
    Malformed("a dtype of numpy without a name", "a dtype of numpy without a name", held({"w": GOOD, "x": Call(Name("numpy", "dtype"), 8)})),
    Malformed("a scalar of numpy without a dtype and bytes", "a scalar of numpy without a dtype and bytes", held({"w": GOOD, "x": scalar(None)})),
    Malformed("a scalar of numpy that is no number ({})", "a scalar of numpy that is no number ('f8')", held({"w": GOOD, "x": scalar(b"1234")})),
    Malformed("is an array of numpy, expected a tensor", "x is an array of numpy", held({"w": GOOD, "x": Call(Name("numpy.core.multiarray", "_reconstruct"), Name("numpy", "ndarray"), (0,), b"b")})),
    Malformed("a state for {}", "a state for a tensor", file(zipped(pickled({"w": GOOD})[:-2] + pickle.NONE + pickle.BUILD + pickle.SETITEM + pickle.STOP))),
    Malformed("bytes in an unknown encoding", "bytes in an unknown encoding", held({"w": GOOD, "x": Call(Name("_codecs", "encode"), "a", "utf-7")})),
    Malformed("its tensors lie in more than {} wrappers", "in more than 8 wrappers", file(zipped(pickled(nested())))),
    Malformed("{}: holds {}; expected tensors by name", "holds a list; expected tensors by name", held([GOOD])),
    Malformed("holds no tensors by name", "holds no tensors by name (its keys: lr)", held({"lr": 1})),
    Malformed("half of a character in its name | Unicode text", "has half of a character in its name", held({"\ud800": GOOD})),
    Malformed("no dtype | one of {}", "has no dtype; expected one of", held({"w": AS_BYTES})),
    Malformed("a stride for each size", "expected a stride for each size", held({"w": tensor((1,), (3, 1))})),
    Malformed("storage of {} ends at byte {}, the file has {}. It is cut", "It is cut; download it again", file(legacy(pickled({"w": GOOD}))[:-40])),
    Malformed("elements to {} of its storage | at most {}", "has elements to 17 of its storage; expected at most 16", held({"w": tensor((2,), (1,), offset=15)})),
    Malformed("{} bytes, elements of its storage again and again", "elements of its storage again and again", held({"w": tensor((1 << 10, 1 << 10), (0, 0))})),
    # unpickling.py
    Malformed("the opcode {}, which no state dict has", "the opcode b'i', which no state dict has", spelled(pickle.MARK + b"ios\nsystem\n")),
    Malformed("it ends too early", "it ends too early", spelled(pickle.BINUNICODE + struct.pack("<I", 1 << 31))),
    Malformed("a name without an end", "a name without an end", spelled(pickle.GLOBAL + b"x" * 2000 + b"\ny\n")),
    Malformed("a tuple of what is not there", "a tuple of what is not there", spelled(pickle.MARK + pickle.NONE + pickle.TUPLE2)),
    Malformed("a list was expected", "a list was expected", spelled(pickle.EMPTY_TUPLE + pickle.NONE + pickle.APPEND)),
    Malformed("a dict was expected, and pairs for it", "a dict was expected", spelled(pickle.EMPTY_LIST + pickle.NONE + pickle.NONE + pickle.SETITEM)),
    Malformed("a name that is no text", "a name that is no text", spelled(pickle.NONE + pickle.NONE + pickle.STACK_GLOBAL)),
    Malformed("a call of what is no known name", "a call of what is no known name", spelled(pickle.EMPTY_DICT + pickle.EMPTY_TUPLE + pickle.REDUCE)),
    Malformed("a key of the type {}", "a key of the type tuple", spelled(pickle.EMPTY_DICT + pickle.EMPTY_TUPLE + pickle.NONE + pickle.SETITEM)),
)  # fmt: skip
