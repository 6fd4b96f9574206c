"""What the references of methods over whole matrices share: which tensors are matrices, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from references import ties


def merge_by(
    method: Callable[[list[np.ndarray], list[float]], np.ndarray],
    models: list[np.ndarray],
    base: np.ndarray,
    options: dict,
) -> np.ndarray:
    """Apply ``method`` to the task vectors (and weights) of the models that take part; other tensors get their mean."""
    weights = [float(w) for w in options.get("weight", [1.0] * len(models))]
    scale = options.get("scale", 1.0)
    deltas = [m - base for m in models]
    if base.ndim < 2 or min(base.shape) == 1:
        others = options.get("others", "mean")
        scale *= options.get("others_scale", 1.0)
        if others == "ties":
            return ties.merge(models, base, {"weight": weights, "scale": scale}, None)
        if others == "base":
            return base
        divisor = sum(w != 0 for w in weights) if others == "mean" else 1
        return base + scale * sum(w * d for w, d in zip(weights, deltas, strict=True)) / divisor
    flat = [d.reshape(len(d), -1).astype(np.float64) for d in deltas]
    used = [i for i, w in enumerate(weights) if w]
    if not used:
        return base
    merged = method([flat[i] for i in used], [weights[i] for i in used])
    return base + scale * merged.reshape(base.shape)


def polar(x: np.ndarray, least: float = 0.0) -> np.ndarray:
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    keep = s > max(least, 1e-6 * s.max(initial=0.0))
    return u[:, keep] @ vt[keep]


def cut_svd(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first k singular vectors; singular values up to a millionth of the largest are 0."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    k = min(k, int((s > 1e-6 * s.max(initial=0.0)).sum()))
    return u[:, :k], s[:k], vt[:k]


def projection(x: np.ndarray, deltas: list[np.ndarray]) -> float:
    """1 where the task vectors cancel each other, or are zeros."""
    unit = max(np.abs(x).max(), 1e-300)
    squares, products = (
        sum(((a / unit) * (d / unit)).sum() for a, d in zip(s, deltas, strict=True))
        for s in (deltas, [x] * len(deltas))
    )
    return squares / products if products * 100 > squares else 1.0
