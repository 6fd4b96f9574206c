"""How the output is cut into files: decided before a byte is written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import SupportsIndex

from alnico.checkpoint.header import Header, build, prefixed
from alnico.checkpoint.weight_files import STEM
from alnico.errors import AlnicoError
from alnico.numerics.dtypes import DTYPES

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
         "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}  # fmt: skip


@dataclass(frozen=True)
class OutputShard:
    """One output file: its name, its first bytes, and where each tensor goes."""

    name: str
    start: bytes
    header: Header
    prefix: str = ""
    """The folder of the module whose tensors it holds, with a ``/``; empty for those of the model itself."""

    @property
    def byte_size(self) -> int:
        return self.header.tensors[-1].end if self.header.tensors else len(self.start)


MOST_BYTES = 1 << 62
"""What a larger size means: no limit that anything reaches, and a number that every computation holds."""


def parse_size(text: str) -> int:
    """Read a size in bytes: ``5GB`` is 5e9, ``2GiB`` is 2 * 2**30, letters of any case. ValueError if it is none.

    >>> parse_size("5GB"), parse_size("1.5 GiB"), parse_size("4096")
    (5000000000, 1610612736, 4096)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or (size := int(Fraction(match[1]) * unit)) <= 0:
        raise ValueError(f"{text!r} is no size; expected a number with a unit, such as 5GB or 2GiB")
    return min(size, MOST_BYTES)


def bytes_of(size: int | str) -> int:
    """Return a size that is given as a number of bytes or as text. Errors: AlnicoError if it is none, or not above 0."""
    if isinstance(size, str):
        try:
            return parse_size(size)
        except ValueError as error:
            raise AlnicoError(f"{error}.") from None
    if isinstance(size, bool) or not isinstance(size, SupportsIndex):
        raise AlnicoError(f"{size!r} is no size; expected a whole number of bytes, or text such as '2GiB'.")
    value = min(int(size), MOST_BYTES)
    if value <= 0:
        raise AlnicoError(f"{max(value, -MOST_BYTES)} is no size; expected a number of bytes above 0.")
    return value


def format_size(size: float) -> str:
    """Write a number of bytes for people: ``1.2 GB``; powers of 1,000, as ``--max-shard-size`` reads them.

    >>> format_size(90868376), format_size(512)
    ('90.9 MB', '512 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < (1000 if unit == "B" else 999.95):
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def cut(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    max_shard_bytes: int,
    single_name: str | None,
    stem: str = STEM,
    folders: Collection[str] = (),
) -> tuple[OutputShard, ...]:
    """Cut tensors (name, dtype, shape), in order, into shards of at most ``max_shard_bytes`` of data.

    A larger tensor has a shard of its own. One shard is ``model.safetensors``, or what ``stem`` says in place of ``model``; ``single_name``
    puts all into one file of that name. A tensor that is named by one of ``folders``, as ``2_Dense/linear.weight``, goes into files of
    that folder. Within a shard wider dtypes come first, so that every tensor is aligned to its element size.
    """
    parts: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
    for name, dtype, shape in tensors:
        prefix = _prefix(name, folders) if single_name is None else ""
        parts.setdefault(prefix, []).append((name.removeprefix(prefix), dtype, shape))
    shards: list[OutputShard] = []
    for prefix, inside in parts.items() or {"": []}.items():
        groups = _groups(inside, max_shard_bytes if single_name is None else None)
        own, count = STEM if prefix else stem, len(groups)
        names = [f"{own}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = [single_name or f"{own}.safetensors"]
        for name, group in zip(names, groups, strict=True):
            start, header = build(sorted(group, key=lambda t: -DTYPES[t[1]].bits), {"format": "pt"})
            shards.append(OutputShard(prefix + name, start, prefixed(header, prefix), prefix))
    return tuple(shards)


def _prefix(name: str, folders: Collection[str]) -> str:
    """The folder that a tensor is named by, with a ``/``; empty where it is none of ``folders`` or inside one."""
    folder = name.rpartition("/")[0]
    return f"{folder}/" if any(folder == known or folder.startswith(f"{known}/") for known in folders) else ""


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
    """Return the indices of what is in several shards: name to text."""
    parts: dict[str, list[OutputShard]] = {}
    for shard in shards:
        parts.setdefault(shard.prefix, []).append(shard)
    return dict(index_of(inside, prefix) for prefix, inside in parts.items() if len(inside) > 1)


def index_of(shards: Iterable[OutputShard], prefix: str = "") -> tuple[str, str]:
    """Return the name and text of the index of several shards, in the folder ``prefix``."""
    weight_map = {t.name.removeprefix(prefix): shard.name.removeprefix(prefix) for shard in shards for t in shard.header.tensors}
    total = sum(t.byte_size for shard in shards for t in shard.header.tensors)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    stem = next(iter(weight_map.values())).partition("-")[0]
    return f"{prefix}{stem}.safetensors.index.json", text + "\n"
