"""Fisher merging, plainly: Matena and Raffel 2022, equation 2."""

from __future__ import annotations

import numpy as np

from references import made_statistics


def merge(models: list[np.ndarray], base: np.ndarray | None, options: dict, uniforms: object) -> np.ndarray:
    weights = options.get("weight", [1.0] * len(models))
    information = [made_statistics.fisher(m.shape, i).astype(np.float64) for i, m in enumerate(models)]
    floored = [np.maximum(f, options.get("floor", 0.0) * f.mean()) for f in information]
    norms = [
        i + 2.0 if options.get("normalize", True) else 1.0 for i in range(len(models))
    ]  # as methods.sides writes them
    parts = [w * f / n for w, f, n in zip(weights, floored, norms, strict=True)]
    total = np.sum(parts, axis=0)
    mean = np.sum([w * m for w, m in zip(weights, models, strict=True)], axis=0) / sum(weights)
    kept = np.sum([p * m for p, m in zip(parts, models, strict=True)], axis=0)
    return np.where(total > 0, kept / np.where(total > 0, total, 1), mean)
