"""A malformed file, and how it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.checkpoint.open_model import open_model
from fuzz.harness import header_of, put_header

Read = Callable[[], object]
WIDTHS = {
    "F32": 4,
    "BF16": 2,
    "I32": 4,
    "F64": 8,
    "U8": 1,
    "F8_E8M0": 1,
    "F8_E4M3": 1,
    "I8": 1,
    "I64": 8,
    "F16": 2,
}


@dataclass(frozen=True)
class Malformed:
    """``check`` is a part of the check's message in the source, of it alone; ``told`` of what the user reads; ``make`` writes the
    files into a folder and returns what reads them."""

    check: str
    told: str
    make: Callable[[Path], Read]


def reading(path: Path | str) -> Read:
    """Open a model, and read all of its tensors."""

    def read() -> None:
        with open_model(path) as model:
            for name in model.tensors:
                model.read(name)

    return read


def save(path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> Path:
    """A safetensors file of zeros."""
    path.parent.mkdir(parents=True, exist_ok=True)
    put_header(path, header_of(tensors, WIDTHS))
    return path


def save_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path
