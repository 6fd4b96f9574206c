"""The statistics of a model: their summary and the header of their tensors."""

from __future__ import annotations

import json
from pathlib import Path

from alnico.checkpoint.statistics import SUMMARY, TENSORS, open_statistics
from alnico.errors import ModelError
from fuzz.harness import Target, files_of, header_of, put


def read(data: bytes, folder: Path) -> None:
    put(folder, files_of(data), (SUMMARY, TENSORS))
    opened = open_statistics(str(folder))
    try:
        for name, found in opened.entries.items():
            assert found.stored in opened.tensors
            for key in ("examples", "rows"):
                try:
                    assert isinstance(opened.number(name, key), float)
                except ModelError:
                    continue
        opened.identity()
    finally:
        opened.close()


def seeds() -> list[bytes]:
    tensors = header_of({"w": ("F32", (2, 3)), "gram.0": ("F32", (3, 3))}, {"F32": 4})
    inputs = [
        {SUMMARY: {"schema": 1, "kind": "fisher", "model": {"reference": "m"}, "examples": 8, "tensors": {"w": {"digest": "0a"}}}, TENSORS: tensors},
        {SUMMARY: {"schema": 1, "kind": "gram", "tensors": {"w": {"digest": "0a", "stored": "gram.0", "rows": 64.0}, "v": {"digest": "0b", "stored": "gram.0"}}}, TENSORS: tensors},
    ]  # fmt: skip
    return [json.dumps(i).encode() for i in inputs]


WORDS = (
    SUMMARY,
    TENSORS,
    "schema",
    "kind",
    "fisher",
    "gram",
    "tensors",
    "digest",
    "stored",
    "rows",
    "examples",
    "gram.0",
    "w",
    "dtype",
    "shape",
    "data_offsets",
)
TARGET = Target(read, seeds, WORDS)
