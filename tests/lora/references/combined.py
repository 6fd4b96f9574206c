"""Combinations of adapters from the formulas alone, on the whole matrices in float64. Nothing of alnico is imported."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

PREFIX = "base_model.model."


def deltas(adapter: Path) -> dict[str, np.ndarray]:
    """What a saved adapter without patterns adds to each module's weight: s B A, an embedding's as (dim, tokens)."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = {
        n.removeprefix(PREFIX): v.astype(np.float64)
        for n, v in load_file(adapter / "adapter_model.safetensors").items()
    }
    found = {}
    for name, right in tensors.items():
        for part, other in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if name.endswith(part):
                module = name.removesuffix(part)
                rank = config.get("rank_pattern", {}).get(module, config["r"])
                alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
                scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
                left = tensors[module + other]
                found[module] = scale * left.reshape(len(left), -1) @ right.reshape(len(right), -1)
    return found


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrix of a rank (Eckart and Young)."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def distance(matrix: np.ndarray, rank: int) -> float:
    """How far the nearest matrix of a rank is, by the norm of the matrix."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return math.sqrt(np.sum(values[rank:] ** 2) / np.sum(values**2))


def by_reference(method: str, matrices: list[np.ndarray], weights: list[float], **options: Any) -> np.ndarray:
    """The merge of whole matrices by the reference of a method of recipes."""
    reference = importlib.import_module(f"references.{method}")
    return reference.merge(matrices, np.zeros_like(matrices[0]), {"weight": weights, **options}, None)


def in_knots(matrices: list[np.ndarray], merge) -> np.ndarray:
    """Stoica et al. 2025: a merge of the S V_i^T of the matrices beside one another, back through U."""
    left, values, right = np.linalg.svd(np.concatenate(matrices, 1), full_matrices=False)
    rank = int(np.sum(values > 1e-10 * values[0]))
    parts = np.split(values[:rank, None] * right[:rank], len(matrices), axis=1)
    return left[:, :rank] @ merge(parts)


def in_core_space(lefts: list[np.ndarray], rights: list[np.ndarray], merge) -> np.ndarray:
    """Panariello et al. 2025: a merge of U^T B_i A_i V in the bases of the stacked factors; scales are in the B_i."""

    def basis(stacked: np.ndarray) -> np.ndarray:
        vectors, values, _ = np.linalg.svd(stacked, full_matrices=False)
        return vectors[:, values > 1e-10 * values[0]]

    left, right = basis(np.concatenate(lefts, 1)), basis(np.concatenate(rights, 0).T)
    merged = merge([left.T @ b @ a @ right for b, a in zip(lefts, rights, strict=True)])
    return left @ merged @ right.T
