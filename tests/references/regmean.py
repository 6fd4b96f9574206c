"""RegMean, plainly: Jin et al. 2023, equation 2, with off-diagonals scaled by alpha and a ridge in each model's Gram matrix; vectors by LOT."""

from __future__ import annotations

import numpy as np

from references import made_statistics


def merge(models: list[np.ndarray], base: np.ndarray | None, options: dict, uniforms: object) -> np.ndarray:
    weights = options.get("weight", [1.0] * len(models))
    if models[0].ndim == 1 and options.get("vectors") == "inputs":
        squares = [
            w * made_statistics.squares(m.shape, i).astype(np.float64)
            for i, (w, m) in enumerate(zip(weights, models, strict=True))
        ]
        if options.get("normalize"):
            squares = [s / made_statistics.ROWS[i] for i, s in enumerate(squares)]
        total = np.sum(squares, axis=0)
        mean = np.sum([w * m for w, m in zip(weights, models, strict=True)], axis=0) / sum(weights)
        weighted = np.sum([s * m for s, m in zip(squares, models, strict=True)], axis=0)
        return np.where(total > 0, weighted / np.where(total > 0, total, 1), mean)
    if models[0].ndim != 2:
        return np.sum([w * m for w, m in zip(weights, models, strict=True)], axis=0) / sum(weights)
    alpha, ridge = options.get("alpha", 0.9), options.get("ridge", 1e-6)
    grams = []
    for i, m in enumerate(models):
        g = made_statistics.gram(m.shape, i).astype(np.float64) * weights[i]
        g = g / made_statistics.ROWS[i] if options.get("normalize") else g
        diagonal = np.diag(np.diag(g))
        grams.append(alpha * g + (1 - alpha) * diagonal + ridge * np.trace(g) / len(g) * np.eye(len(g)))
    total = np.sum([m @ g for m, g in zip(models, grams, strict=True)], axis=0)
    return total @ np.linalg.inv(np.sum(grams, axis=0))
