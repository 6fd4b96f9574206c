"""A checkpoint that torch has pickled: a byte says what the rest is, a pickle in a zip, one in the older format, or a whole file."""

from __future__ import annotations

import pickle
import random
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.pickles import ALLOWED_NAMES, STORAGES, TORCH_DTYPES
from fuzz.harness import Target
from made_pickles import Call, Name, Stored, legacy, pickled, tensor, zipped

ZIP, LEGACY, WHOLE = 0, 1, 2
MOST_READ = 1 << 16


def read(data: bytes, folder: Path) -> None:
    path = folder / "m.bin"
    kind, rest = (data[0] % 3, data[1:]) if data else (WHOLE, b"")
    path.write_bytes(zipped(rest) if kind == ZIP else legacy(rest) if kind == LEGACY else rest)
    size = path.stat().st_size
    with open_model(path) as opened:
        for name, tensor in opened.tensors.items():
            if tensor.byte_size <= MOST_READ and opened.shards[0].header.tensors:
                opened.read(name)
        assert all(0 <= t.begin <= t.end <= size for t in opened.shards[0].header.tensors)


def bits(said: object, kind: str = "FloatStorage") -> Call:
    return Call(
        Name("torch._utils", "_rebuild_tensor_v2"),
        Stored(kind, "0", 8),
        0,
        (2, 2),
        (1, 2),
        False,
        OrderedDict(),
        said,
    )


def seeds() -> list[bytes]:
    held: list[object] = [
        {"w": tensor((2, 3), (3, 1)), "v": tensor((4,), (1,), offset=6)},
        {"state_dict": {"w": tensor((2, 3), (1, 2)), "lr": 0.1}, "epoch": 3, "optimizer": [1, 2]},
        {"w": Call(Name("torch._utils", "_rebuild_parameter"), tensor((2, 2), (2, 1), kind="HalfStorage", key="1", count=32), True, OrderedDict())},
        {"w": tensor((3, 4), (0, 1)), "x": {1, 2}, "y": b"abc", "z": None},
        {"w": Call(Name("os", "system"), "true")},
        {"w": Call(Name("builtins", "eval"), "1")},
        {"w": tensor((1 << 20, 1 << 20), (0, 0))},
        {"w": bits({"neg": True})},
        {"w": bits({"neg": True, "conj": True}, "ComplexFloatStorage")},
        {"w": Call(Name("torch._tensor", "_rebuild_from_type_v2"), Name("torch._utils", "_rebuild_tensor_v2"), Name("torch", "Tensor"), tensor((2,), (1,)).arguments, {"mark": 1})},
        {"w": tensor((2,), (1,)), "x": Call(Name("numpy._core.multiarray", "scalar"), Call(Name("numpy", "dtype"), "f8", False, True), b"12345678")},
        {"w": tensor((2,), (1,)), "x": Call(Name("numpy.core.multiarray", "_reconstruct"), Name("numpy", "ndarray"), (0,), b"b")},
        {"w": tensor((2,), (1,)), "x": Name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")},
    ]  # fmt: skip
    texts = [pickled(h) for h in held]
    return [
        *(bytes([ZIP]) + t for t in texts),
        *(bytes([LEGACY]) + t for t in texts),
        bytes([WHOLE]) + zipped(texts[0]),
        bytes([WHOLE]) + legacy(texts[0]),
    ]


OPCODES = [v for n, v in vars(pickle).items() if n.isupper() and isinstance(v, bytes) and len(v) == 1]


def mutate(data: bytes, draw: random.Random, _: Sequence[str]) -> bytes | None:
    """Put a word of pickles at some place: an opcode, a name that is known or not, a number."""
    if draw.random() < 0.5 or len(data) < 2:
        return None
    at = draw.randrange(1, len(data))
    kind = draw.randrange(4)
    if kind == 0:
        part = draw.choice(OPCODES)
    elif kind == 1:
        module, name = draw.choice(
            [
                *ALLOWED_NAMES,
                ("torch", draw.choice([*STORAGES, *TORCH_DTYPES])),
                ("os", "system"),
                ("posix", "system"),
                ("copyreg", "_reconstructor"),
            ]
        )
        part = pickle.GLOBAL + f"{module}\n{name}\n".encode()
    elif kind == 2:
        part = pickle.dumps(
            draw.choice((0, -1, 255, 1 << 31, 1 << 63, 1 << 200, "0", "1", (), {}, None, True, 1.5)), 2
        )[2:-1]
    else:
        begin = draw.randrange(1, len(data))
        part = data[begin : begin + draw.randrange(1, 40)]
    return data[:at] + part + data[at + draw.choice((0, 0, len(part), 1)) :]


TARGET = Target(read, seeds, mutate=mutate)
