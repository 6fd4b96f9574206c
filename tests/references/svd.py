"""Task arithmetic of task vectors that are cut to a rank or a share of their squares, plainly."""

from __future__ import annotations

import numpy as np

from references.whole_matrices import cut_svd, merge_by, projection


def merge(models: list[np.ndarray], base: np.ndarray, options: dict, uniforms: object) -> np.ndarray:
    def method(deltas: list[np.ndarray], weights: list[float]) -> np.ndarray:
        k = max(int(options.get("rank", 1.0) * min(deltas[0].shape) / len(deltas)), 1)
        energy = options.get("energy", 1.0)
        parts = []
        for d in deltas:
            u, s, v = cut_svd(d, k)
            whole = np.linalg.svd(d, compute_uv=False)
            unit = whole[0] or 1.0
            reached = np.flatnonzero(np.cumsum((s / unit) ** 2) >= energy * ((whole / unit) ** 2).sum())
            n = len(s) if energy == 1 or not reached.size else reached[0] + 1
            parts.append((u[:, :n] * s[:n]) @ v[:n])
        c = projection(sum(parts), deltas) if options.get("calibrate", "none") == "projection" else 1.0
        return c * sum(w * t for w, t in zip(weights, parts, strict=True))

    return merge_by(method, models, base, {"others": "sum", **options})
