"""Reads the header of a GGUF file and checks every claim in it.

A file is ``GGUF | u32 version | u64 tensors | u64 keys | keys | tensors | data``, all little-endian. A key is ``string | u32 type |
value``; a tensor is ``string | u32 dimensions | u64 sizes | u32 type | u64 offset``, the last dimension first. The data begins at a
multiple of ``general.alignment``, and so does every tensor in it, one directly after the other.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from alnico.checkpoint.gguf.block_types import BLOCK_TYPES, BlockType
from alnico.checkpoint.gguf.value_reader import ValueReader
from alnico.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""They have the same layout; version 3 also allows big-endian files."""
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_DIMENSIONS = 4
"""ggml has no more."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a file: its shape with the last dimension last, and the bytes [begin, end) of the file that it takes."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def row(self) -> int:
        """Elements of a row: the last dimension."""
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True)
class GgufHeader:
    """A checked header: keys and values, and the tensors in the order of their bytes. ``start`` are the bytes of the header."""

    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    start: bytes


def read_header(read: Callable[[int, int], bytes], size: int, where: str) -> GgufHeader:
    """Read the header of a file of ``size`` bytes through ``read(offset, count)``.

    Errors: ModelError, with ``where`` for the file, for another magic or version, a big-endian file, counts and lengths beyond
    the file, a key or a tensor that is there twice, an alignment that is no power of two, an unknown type of tensor, a row that is not
    whole blocks, and for tensors that overlap, leave a gap or go beyond the file.
    """
    reader = ValueReader(read, size, where)
    _check_magic(reader, where)
    tensor_count, key_count = reader.number("Q"), reader.number("Q")
    for count, least, what in ((key_count, 13, "keys"), (tensor_count, 24, "tensors")):
        if count * least > reader.left:
            raise ModelError(
                f"{where}: the header claims {count} {what}, which need more than the {reader.left} bytes that are left; expected all of "
                "them in the file. The file is truncated or damaged; download it again."
            )
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = reader.string("a key")
        if key in metadata:
            raise ModelError(
                f"{where}: the key {key[:80]!r} is there twice; expected it once. Get the file from its source."
            )
        metadata[key] = reader.value(reader.number("I"), key)
    entries = [_entry(reader, where) for _ in range(tensor_count)]
    alignment = _alignment(metadata, where)
    data_begin = -(-reader.position // alignment) * alignment
    return GgufHeader(metadata, _placed(entries, data_begin, alignment, size, where), reader.start)


def _check_magic(reader: ValueReader, where: str) -> None:
    magic = reader.number("4s")
    if magic != MAGIC:
        raise ModelError(f"{where}: begins with {magic!r}; expected {MAGIC!r}. The file is not GGUF.")
    version = reader.number("I")
    if version & 0xFFFFFF == 0 and version >> 24 in VERSIONS:
        raise ModelError(
            f"{where}: is a big-endian GGUF file; expected a little-endian one, as nearly all are. Convert it with the gguf package's "
            "gguf_convert_endian."
        )
    if version not in VERSIONS:
        raise ModelError(
            f"{where}: is GGUF of the version {version}; expected 2 or 3. Convert the model again with a current llama.cpp."
        )


def _alignment(metadata: Mapping[str, Any], where: str) -> int:
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ModelError(
            f"{where}: {ALIGNMENT_KEY} is {str(alignment)[:40]}; expected a power of two up to {MAX_ALIGNMENT}. The file is damaged; "
            "download it again."
        )
    return alignment


HeaderEntry = tuple[str, BlockType, tuple[int, ...], int]
"""A tensor as the header describes it: name, type, shape and offset in the data."""


def _entry(reader: ValueReader, where: str) -> HeaderEntry:
    name = reader.string("the name of a tensor")
    count = reader.number("I")
    if count > MAX_DIMENSIONS:
        raise ModelError(
            f"{where}: tensor {name[:80]!r} has {count} dimensions; expected at most {MAX_DIMENSIONS}. The file is damaged; download it "
            "again."
        )
    shape = tuple(reader.number("Q") for _ in range(count))[::-1]
    code, offset = reader.number("I"), reader.number("Q")
    if code not in BLOCK_TYPES:
        raise ModelError(
            f"{where}: tensor {name[:80]!r} has the type {code}; known are {', '.join(f'{t.name} ({t.code})' for t in BLOCK_TYPES.values())}. "
            "A newer alnico may know it; else use a file of another type of the same model."
        )
    return name, BLOCK_TYPES[code], shape, offset


def _placed(
    entries: list[HeaderEntry], data_begin: int, alignment: int, size: int, where: str
) -> tuple[GgufTensor, ...]:
    """Check where the tensors lie, and return them in the order of their bytes."""
    tensors: dict[str, GgufTensor] = {}
    position = data_begin
    for name, kind, shape, offset in sorted(entries, key=lambda entry: entry[3]):
        if name in tensors:
            raise ModelError(
                f"{where}: tensor {name[:80]!r} is there twice; expected it once. Get the file from its source."
            )
        if (shape[-1] if shape else 1) % kind.elements:
            raise ModelError(
                f"{where}: tensor {name[:80]!r} is {kind.name} with rows of {shape[-1] if shape else 1} elements; expected whole blocks of "
                f"{kind.elements}. The file is damaged; download it again."
            )
        begin = data_begin + offset
        if begin != position:
            raise ModelError(
                f"{where}: tensor {name[:80]!r} begins at byte {begin}, expected {position}, directly after the one before: tensors may "
                "neither overlap nor leave gaps. The file is damaged; download it again."
            )
        end = begin + math.prod(shape) // kind.elements * kind.byte_size
        if end > size:
            raise ModelError(
                f"{where}: tensor {name[:80]!r} ends at byte {end}, the file has {size}; expected it whole. The file is truncated; "
                "download it again."
            )
        tensors[name] = GgufTensor(name, kind, shape, begin, end)
        position = -(-end // alignment) * alignment
    return tuple(tensors.values())
