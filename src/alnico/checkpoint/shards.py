"""Splits the output into files, before a byte is written."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Protocol

from alnico.checkpoint.header import Header, add_prefix, build
from alnico.checkpoint.weight_files import STEM
from alnico.numerics.dtypes import DTYPES

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000


class StoredLayout(Protocol):
    """How the bytes of a tensor stand in a file that has them in another form."""

    @property
    def is_encoded(self) -> bool:
        """Are they others, so that they cannot be read back? Otherwise they stand in other places alone."""
        ...

    def stored(self, tensor: str, offset: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yield places in the tensor's bytes in the file, and what stands there of ``data``, which begins at byte ``offset``."""
        ...

    def places(self, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Yield the place in the file of bytes [begin, end) of ``size`` bytes from ``offset`` on: place, begin, end."""
        ...


@dataclass(frozen=True)
class OutputShard:
    """One output file: its name, its first bytes, and the place of each tensor."""

    name: str
    start: bytes
    header: Header
    prefix: str = ""
    """Folder of the module that the tensors belong to, ending in ``/``; empty for the model's own."""
    layouts: Mapping[str, StoredLayout] = field(default_factory=dict)
    """How tensors stand in the file whose bytes are others there than they are computed."""

    @property
    def byte_size(self) -> int:
        return self.header.tensors[-1].end if self.header.tensors else len(self.start)


def split_into_shards(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    max_shard_bytes: int,
    single_name: str | None,
    stem: str = STEM,
    folders: Mapping[str, str] = MappingProxyType({}),
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> tuple[OutputShard, ...]:
    """Split tensors (name, dtype, shape), in order, into shards of at most ``max_shard_bytes`` of data.

    A larger tensor gets its own shard. A single shard is called ``STEM.safetensors``; ``single_name`` puts
    all tensors into one file of that name. A tensor whose name begins with one of ``folders``, such as
    ``2_Dense/linear.weight``, goes into files of that folder, whose names begin with the stem that ``folders`` has for it. Within a shard wider dtypes come first, so that
    every tensor is aligned to its element size. Each file has the ``metadata``.
    """
    parts: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
    for name, dtype, shape in tensors:
        prefix = _prefix(name, folders) if single_name is None else ""
        parts.setdefault(prefix, []).append((name.removeprefix(prefix), dtype, shape))
    shards: list[OutputShard] = []
    for prefix, inside in parts.items() or {"": []}.items():
        groups = _groups(inside, max_shard_bytes if single_name is None else None)
        own, count = _stem_of_folder(prefix, folders) if prefix else stem, len(groups)
        names = [f"{own}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = [single_name or f"{own}.safetensors"]
        for name, group in zip(names, groups, strict=True):
            start, header = build(sorted(group, key=lambda t: -DTYPES[t[1]].bits), metadata)
            shards.append(OutputShard(prefix + name, start, add_prefix(header, prefix), prefix))
    return tuple(shards)


def _stem_of_folder(prefix: str, folders: Mapping[str, str]) -> str:
    """The first part of the names of files in a folder: that of the nearest folder above which is listed."""
    path = PurePosixPath(prefix)
    return next(folders[str(p)] for p in (path, *path.parents) if str(p) in folders)


def _prefix(name: str, folders: Collection[str]) -> str:
    """Return the folder in a tensor's name, ending in ``/``; empty if it is not in or below ``folders``."""
    folder = name.rpartition("/")[0]
    return f"{folder}/" if any(folder == top or folder.startswith(f"{top}/") for top in folders) else ""


def _groups(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], max_shard_bytes: int | None
) -> list[list[tuple[str, str, tuple[int, ...]]]]:
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor[2]) * DTYPES[tensor[1]].bits // 8
        if groups[-1] and max_shard_bytes is not None and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    return groups


def indices_of(shards: Iterable[OutputShard]) -> dict[str, str]:
    """Return the index of each set of several shards: file name to text."""
    parts: dict[str, list[OutputShard]] = {}
    for shard in shards:
        parts.setdefault(shard.prefix, []).append(shard)
    return dict(index_of(inside, prefix) for prefix, inside in parts.items() if len(inside) > 1)


def index_of(shards: Iterable[OutputShard], prefix: str = "") -> tuple[str, str]:
    """Return the name and text of the index of several shards, in the folder ``prefix``."""
    weight_map = {
        t.name.removeprefix(prefix): shard.name.removeprefix(prefix)
        for shard in shards
        for t in shard.header.tensors
    }
    total = sum(t.byte_size for shard in shards for t in shard.header.tensors)
    text = json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2
    )
    stem = next(iter(weight_map.values())).partition("-")[0]
    return f"{prefix}{stem}.safetensors.index.json", text + "\n"
