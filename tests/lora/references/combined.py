"""Combinations of adapters from the formulas alone, on the whole matrices in float64. Nothing of alnico is imported."""

from __future__ import annotations

import json
import math
from pathlib import Path

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


def polar(matrix: np.ndarray, least: float) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    kept = values > max(least, 1e-12 * values.max(initial=0))
    return left[:, kept] @ right[kept]


def tsv(
    matrices: list[np.ndarray], weights: list[float], scale: float = 1.0, least: float = 0.1
) -> np.ndarray:
    """Gargiulo et al. 2025, each matrix to its numerical rank and to the Nth part of the smaller side at most."""
    most = min(matrices[0].shape) // len(matrices)
    lefts, values, rights = [], [], []
    for matrix, weight in zip(matrices, weights, strict=True):
        left, singular, right = np.linalg.svd(matrix, full_matrices=False)
        rank = min(int(np.sum(singular > 1e-10 * max(singular.max(), 1e-300))), most) if weight else 0
        lefts.append(left[:, :rank])
        values.append(weight * singular[:rank])
        rights.append(right[:rank].T)
    left, right = polar(np.concatenate(lefts, 1), least), polar(np.concatenate(rights, 1), least)
    return scale * left @ np.diag(np.concatenate(values)) @ right.T


def iso_c(matrices: list[np.ndarray], weights: list[float], scale: float = 1.0) -> np.ndarray:
    """Marczak et al. 2025, over the numerical rank of the sum."""
    left, values, right = np.linalg.svd(
        sum(w * m for w, m in zip(weights, matrices, strict=True)), full_matrices=False
    )
    rank = int(np.sum(values > 1e-10 * values[0]))
    return scale * values[:rank].mean() * left[:, :rank] @ right[:rank]


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
