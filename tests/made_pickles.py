"""Pickled checkpoints made without torch, as torch writes them and as nobody should."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from alnico.checkpoint.pickles import LEGACY_MAGIC, LEGACY_PROTOCOL

STORED = 64
"""Bytes of a storage."""


def zipped(text: bytes, records: Mapping[str, bytes | None] | None = None, compressed: str = "") -> bytes:
    """A checkpoint in a zip archive around the pickle ``text``; ``records`` replaces some, or leaves them out."""
    made = io.BytesIO()
    held: dict[str, bytes | None] = {
        "m/data.pkl": text,
        "m/byteorder": b"little",
        "m/data/0": bytes(STORED),
        "m/data/1": bytes(STORED),
    }
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in {**held, **(records or {})}.items():
            if data is not None:
                archive.writestr(
                    zipfile.ZipInfo(name),
                    data,
                    zipfile.ZIP_DEFLATED if name == compressed else zipfile.ZIP_STORED,
                )
    return made.getvalue()


def legacy(text: bytes, keys: Any = ("0",), count: int = STORED // 4, magic: int = LEGACY_MAGIC) -> bytes:
    """A checkpoint of the format before torch 1.6 around the pickle ``text``."""
    head = [
        pickle.dumps(v, 2)
        for v in (magic, LEGACY_PROTOCOL, {"little_endian": True, "protocol_version": LEGACY_PROTOCOL})
    ]
    return b"".join(head) + text + pickle.dumps(list(keys), 2) + count.to_bytes(8, "little") + bytes(STORED)


class Name:
    """Pickles as a name of torch."""

    def __init__(self, module: str, name: str) -> None:
        self.place = module, name


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes what torch writes, without torch: names that are not there, calls of them, storages by their key."""

    def save(self, thing, save_persistent_id=True):
        if isinstance(thing, Name):
            self.write(pickle.GLOBAL + f"{thing.place[0]}\n{thing.place[1]}\n".encode())
        elif isinstance(thing, Built):
            self.save(thing.name)
            self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
            self.save(thing.state)
            self.write(pickle.BUILD)
        elif isinstance(thing, Call):
            self.save(thing.name)
            self.save(thing.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(thing, save_persistent_id)

    def persistent_id(self, thing):
        return thing.identifier if isinstance(thing, Stored) else None


class Call:
    """Pickles as a call of a name."""

    def __init__(self, name: Name, *arguments: object) -> None:
        self.name, self.arguments = name, arguments


class Built:
    """Pickles as an object of a class that has a state."""

    def __init__(self, name: Name, state: object) -> None:
        self.name, self.state = name, state


class Stored:
    """A storage, as a persistent identifier."""

    def __init__(self, kind: str, key: str, count: int) -> None:
        self.identifier = ("storage", Name("torch", kind), key, "cpu", count)


def pickled(thing: object) -> bytes:
    made = io.BytesIO()
    _Pickler(made, 2).dump(thing)
    return made.getvalue()


def tensor(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    kind: str = "FloatStorage",
    offset: int = 0,
    key: str = "0",
    count: int = 16,
) -> Call:
    return Call(
        Name("torch._utils", "_rebuild_tensor_v2"),
        Stored(kind, key, count),
        offset,
        shape,
        strides,
        False,
        OrderedDict(),
    )
