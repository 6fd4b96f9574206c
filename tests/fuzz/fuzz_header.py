"""The header of a safetensors file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from alnico.checkpoint.header import parse, parse_length
from alnico.numerics.dtypes import DTYPES
from fuzz.harness import Target, header_of, mutated_json

WIDTHS = {"F32": 4, "BF16": 2, "U8": 1, "F64": 8}


def read(data: bytes, _: Path) -> None:
    length = parse_length(data[:8], len(data), "f")
    header = parse(data[8 : 8 + length], len(data), "f")
    assert all(8 + length <= t.begin <= t.end <= len(data) for t in header.tensors)
    assert sum(t.byte_size for t in header.tensors) == len(data) - 8 - length


def seeds() -> list[bytes]:
    models = [
        {"a": ("F32", (2, 3)), "b": ("BF16", (5,))}, {"w": ("U8", (0,)), "v": ("F64", ())}, {},
        {f"layers.{i}.weight": ("BF16", (2, i)) for i in range(8)},
    ]  # fmt: skip
    found = []
    for model in models:
        header = {"__metadata__": {"format": "pt"}, **header_of(model, WIDTHS)}
        end = max([e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"], default=0)
        found.append(_framed(json.dumps(header).encode(), bytes(end)))
    return found


def _framed(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def mutate(data: bytes, draw: random.Random, words: Sequence[str]) -> bytes | None:
    """Change the JSON alone, with the length that it then has."""
    length = int.from_bytes(data[:8], "little")
    changed = mutated_json(data[8 : 8 + length], draw, words) if length < len(data) else None
    return None if changed is None else _framed(changed, data[8 + length :])


TARGET = Target(
    read, seeds, (*DTYPES, "dtype", "shape", "data_offsets", "__metadata__", "format"), mutate=mutate
)
