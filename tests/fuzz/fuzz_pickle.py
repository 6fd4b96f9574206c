"""A checkpoint that torch has pickled: a byte says what the rest is, a pickle in a zip, one in the older format, or a whole file."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from alnico.checkpoint.model import open_model
from alnico.checkpoint.pickles import KNOWN, LEGACY_MAGIC, LEGACY_PROTOCOL, STORAGES, TORCH_DTYPES
from fuzz.harness import Target

ZIP, LEGACY, WHOLE = 0, 1, 2
STORED = 64
MOST_READ = 1 << 16


def read(data: bytes, folder: Path) -> None:
    path = folder / "m.bin"
    kind, rest = (data[0] % 3, data[1:]) if data else (WHOLE, b"")
    path.write_bytes(_zipped(rest) if kind == ZIP else _legacy(rest) if kind == LEGACY else rest)
    size = path.stat().st_size
    with open_model(path) as opened:
        for name, tensor in opened.tensors.items():
            if tensor.byte_size <= MOST_READ and opened.shards[0].header.tensors:
                opened.read(name)
        assert all(0 <= t.begin <= t.end <= size for t in opened.shards[0].header.tensors)


def _zipped(text: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, held in {"m/data.pkl": text, "m/byteorder": b"little", "m/data/0": bytes(STORED), "m/data/1": bytes(STORED)}.items():
            archive.writestr(zipfile.ZipInfo(name), held)
    return made.getvalue()


def _legacy(text: bytes) -> bytes:
    head = [pickle.dumps(v, 2) for v in (LEGACY_MAGIC, LEGACY_PROTOCOL, {"little_endian": True, "protocol_version": LEGACY_PROTOCOL})]
    count = (STORED // 4).to_bytes(8, "little")
    return b"".join(head) + text + pickle.dumps(["0"], 2) + count + bytes(STORED)


class _Name:
    """Pickles as a name of torch."""

    def __init__(self, module: str, name: str) -> None:
        self.place = module, name


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes what torch writes, without torch: names that are not there, calls of them, storages by their key."""

    def save(self, thing, save_persistent_id=True):
        if isinstance(thing, _Name):
            self.write(pickle.GLOBAL + f"{thing.place[0]}\n{thing.place[1]}\n".encode())
        elif isinstance(thing, _Call):
            self.save(thing.name)
            self.save(thing.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(thing, save_persistent_id)

    def persistent_id(self, thing):
        return thing.identifier if isinstance(thing, _Stored) else None


class _Call:
    def __init__(self, name: _Name, *arguments: object) -> None:
        self.name, self.arguments = name, arguments


class _Stored:
    def __init__(self, kind: str, key: str, count: int) -> None:
        self.identifier = ("storage", _Name("torch", kind), key, "cpu", count)


def _pickled(thing: object) -> bytes:
    made = io.BytesIO()
    _Pickler(made, 2).dump(thing)
    return made.getvalue()


def _tensor(shape: tuple[int, ...], strides: tuple[int, ...], *, kind: str = "FloatStorage", offset: int = 0, key: str = "0", count: int = 16) -> _Call:
    return _Call(_Name("torch._utils", "_rebuild_tensor_v2"), _Stored(kind, key, count), offset, shape, strides, False, OrderedDict())


def seeds() -> list[bytes]:
    held: list[object] = [
        {"w": _tensor((2, 3), (3, 1)), "v": _tensor((4,), (1,), offset=6)},
        {"state_dict": {"w": _tensor((2, 3), (1, 2)), "lr": 0.1}, "epoch": 3, "optimizer": [1, 2]},
        {"w": _Call(_Name("torch._utils", "_rebuild_parameter"), _tensor((2, 2), (2, 1), kind="HalfStorage", key="1", count=32), True, OrderedDict())},
        {"w": _tensor((3, 4), (0, 1)), "x": {1, 2}, "y": b"abc", "z": None},
        {"w": _Call(_Name("os", "system"), "true")},
        {"w": _Call(_Name("builtins", "eval"), "1")},
        {"w": _tensor((1 << 20, 1 << 20), (0, 0))},
    ]  # fmt: skip
    texts = [_pickled(h) for h in held]
    return [*(bytes([ZIP]) + t for t in texts), *(bytes([LEGACY]) + t for t in texts), bytes([WHOLE]) + _zipped(texts[0]), bytes([WHOLE]) + _legacy(texts[0])]


OPCODES = [v for n, v in vars(pickle).items() if n.isupper() and isinstance(v, bytes) and len(v) == 1]


def mutate(data: bytes, draw: random.Random, words: Sequence[str]) -> bytes | None:
    """Put a word of pickles at some place: an opcode, a name that is known or not, a number."""
    if draw.random() < 0.5 or len(data) < 2:
        return None
    at = draw.randrange(1, len(data))
    kind = draw.randrange(4)
    if kind == 0:
        part = draw.choice(OPCODES)
    elif kind == 1:
        module, name = draw.choice([*KNOWN, ("torch", draw.choice([*STORAGES, *TORCH_DTYPES])), ("os", "system"), ("posix", "system"), ("copyreg", "_reconstructor")])
        part = pickle.GLOBAL + f"{module}\n{name}\n".encode()
    elif kind == 2:
        part = pickle.dumps(draw.choice((0, -1, 255, 1 << 31, 1 << 63, 1 << 200, "0", "1", (), {}, None, True, 1.5)), 2)[2:-1]
    else:
        begin = draw.randrange(1, len(data))
        part = data[begin : begin + draw.randrange(1, 40)]
    return data[:at] + part + data[at + draw.choice((0, 0, len(part), 1)) :]


TARGET = Target(read, seeds, mutate=mutate)
