"""Small adapters in PEFT's format, made without PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import made

PREFIX = "base_model.model."


def save(directory: Path, tensors: Mapping[str, np.ndarray], dtype: str = "F32", **config: Any) -> Path:
    """Save tensors, named as in the base, with a config; ``r`` and ``lora_alpha`` may be left out where they do not matter."""
    made.save_file(
        directory / "adapter_model.safetensors", {PREFIX + n: (dtype, v) for n, v in tensors.items()}
    )
    (directory / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, **config})
    )
    return directory


def factors(module: str, rows: int, columns: int, rank: int, seed: int) -> dict[str, np.ndarray]:
    """Random factors of one linear layer, exact in single precision."""
    random = np.random.default_rng(seed)
    numbers = {f"{module}.lora_A.weight": (rank, columns), f"{module}.lora_B.weight": (rows, rank)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in numbers.items()}


def linear(
    directory: Path,
    rows: int = 30,
    columns: int = 20,
    rank: int = 3,
    seed: int = 0,
    alpha: float = 6,
    **config: Any,
) -> Path:
    """An adapter of two layers, ``m.q`` (rows, columns) and ``m.o`` (columns, rows)."""
    tensors = factors("m.q", rows, columns, rank, 10 * seed) | factors(
        "m.o", columns, rows, rank, 10 * seed + 1
    )
    return save(directory, tensors, r=rank, lora_alpha=alpha, **config)
