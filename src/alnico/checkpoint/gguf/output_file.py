"""Lays out a GGUF file before a byte of it is written: its header, and the place of each tensor."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from alnico.checkpoint.gguf.block_types import BLOCK_TYPES
from alnico.checkpoint.gguf.file_header import DEFAULT_ALIGNMENT, MAGIC
from alnico.checkpoint.gguf.gguf_layout import GgufLayout
from alnico.checkpoint.gguf.value_reader import ARRAY, STRING, ValueReader
from alnico.checkpoint.header import Header, TensorInfo
from alnico.checkpoint.shards import OutputShard

VERSION = 3
COUNTS = struct.Struct("<QQ")
"""The numbers of tensors and of keys."""
CODES = {kind.name: kind.code for kind in BLOCK_TYPES.values()}
ARRAY_TYPES = {"<i4": 5, "<f4": 6}
"""The types of arrays that are written, by numpy's spelling."""

WrittenTensor = tuple[str, str, Sequence[int]]
"""A tensor of the file: its name there, its type, and its shape with the last dimension last."""


def lay_out(
    file: str,
    keys: Mapping[str, Any],
    tensors: Sequence[WrittenTensor],
    constants: Mapping[str, np.ndarray],
    parts: Sequence[Sequence[tuple[str, str, GgufLayout]]],
) -> OutputShard:
    """Return a GGUF file. ``parts`` are, for each of the ``tensors``, the tensors of the merge that it is made of, one after the other:
    name, dtype and layout. ``constants`` are vectors of float32 that stand before them and are written with the header.

    >>> layout = GgufLayout((2, 32), 4, is_encoded=True)
    >>> shard = lay_out("m.gguf", {"general.architecture": "llama"}, [("w", "Q8_0", (2, 32))], {}, [[("a", "F32", layout)]])
    >>> shard.byte_size - len(shard.start), shard.header.tensors[0].begin % 32
    (68, 0)
    """
    described = [*((name, "F32", values.shape) for name, values in constants.items()), *tensors]
    sizes = [values.nbytes for values in constants.values()]
    sizes += [sum(layout.byte_size for _, _, layout in inside) for inside in parts]
    offsets = []
    position = 0
    for size in sizes:
        offsets.append(position)
        position += _padded(size)
    head = bytearray(MAGIC + struct.pack("<I", VERSION) + COUNTS.pack(len(described), len(keys)))
    for key, value in keys.items():
        head += _text(key) + _value(value)
    for (name, kind, shape), offset in zip(described, offsets, strict=True):
        head += _text(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", size) for size in reversed(shape))
        head += struct.pack("<IQ", CODES[kind], offset)
    head += bytes(_padded(len(head)) - len(head))
    data_begin = len(head)
    for values in constants.values():
        head += values.astype("<f4").tobytes()
        head += bytes(_padded(len(head)) - len(head))
    infos, layouts = [], {}
    for inside, offset in zip(parts, offsets[len(constants) :], strict=True):
        begin = data_begin + offset
        for name, dtype, layout in inside:
            infos.append(TensorInfo(name, dtype, layout.shape, begin, begin + layout.byte_size))
            if layout.is_encoded or layout.heads:
                layouts[name] = layout
            begin += layout.byte_size
    return OutputShard(file, bytes(head), Header(tuple(infos), {}, data_begin), layouts=layouts)


def with_keys(shard: OutputShard, keys: Mapping[str, Any], metadata: Mapping[str, str]) -> OutputShard:
    """Return a file of :func:`lay_out` with more keys, after the first ones that begin with ``general.``, and the ``metadata`` in its header.

    The last of the keys is text. Newlines are added to it until the keys take whole steps of the alignment, so that nothing else moves
    within its step.
    """
    content = list(keys.items())
    key, text = content[-1]
    block = b"".join(_text(name) + _value(value) for name, value in content)
    filled = text + "\n" * (-len(block) % DEFAULT_ALIGNMENT)
    block = b"".join(_text(name) + _value(value) for name, value in [*content[:-1], (key, filled)])
    reader = ValueReader(
        lambda offset, count: shard.start[offset : offset + count], len(shard.start), shard.name
    )
    for code in ("4s", "I"):
        reader.number(code)
    tensor_count, key_count = reader.number("Q"), reader.number("Q")
    place = reader.position
    for _ in range(key_count):
        name = reader.string("a key")
        if not name.startswith("general."):
            break
        reader.value(reader.number("I"), name)
        place = reader.position
    start = shard.start[: len(MAGIC) + 4] + COUNTS.pack(tensor_count, key_count + len(content))
    start += shard.start[len(start) : place] + block + shard.start[place:]
    infos = [replace(t, begin=t.begin + len(block), end=t.end + len(block)) for t in shard.header.tensors]
    header = Header(tuple(infos), metadata, shard.header.data_begin + len(block))
    return replace(shard, start=start, header=header)


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Format a value with its type before it: bool, u32, f32, text, or an array of text or of numbers."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", ARRAY, ARRAY_TYPES[value.dtype.str], value.size) + value.tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
