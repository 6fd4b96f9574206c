"""Iso-CTS, plainly: Marczak et al. 2025, algorithm 2, with the projection scale."""

from __future__ import annotations

import numpy as np

from references.whole_matrices import cut_svd, merge_by, polar, projection


def merge(models: list[np.ndarray], base: np.ndarray, options: dict, uniforms: object) -> np.ndarray:
    def method(deltas: list[np.ndarray], weights: list[float]) -> np.ndarray:
        weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
        r, n = min(deltas[0].shape), len(deltas)
        own = (r - int(options.get("common", 0.8) * r)) // n
        u0, s0, v0 = cut_svd(sum(weighted), r - n * own)
        us, ss, vs = [], [], []
        for d in weighted:
            u, s, v = cut_svd(d - u0 @ u0.T @ d, own)
            unit = np.abs(d).max() or 1.0
            kept = s / unit > 1e-6 * np.linalg.norm(d / unit)
            us, ss, vs = [*us, u[:, kept]], [*ss, s[kept]], [*vs, v[kept]]
        s = np.concatenate([*ss, s0])
        least = options.get("least", 0.01)
        if not len(s):
            return 0 * deltas[0]
        x = s.mean() * polar(np.hstack([*us, u0]), least) @ polar(np.vstack([*vs, v0]), least)
        return x * (projection(x, weighted) if options.get("calibrate", "projection") == "projection" else 1)

    return merge_by(method, models, base, {"scale": 2.0, "others_scale": 0.5, **options})
