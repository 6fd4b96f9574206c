"""Iso-C, plainly: Marczak et al. 2025, algorithm 1, with the projection scale."""

from __future__ import annotations

import numpy as np

from references.whole_matrices import cut_svd, merge_by, projection


def merge(models: list[np.ndarray], base: np.ndarray, options: dict, uniforms: object) -> np.ndarray:
    def method(deltas: list[np.ndarray], weights: list[float]) -> np.ndarray:
        weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
        u, s, v = cut_svd(sum(weighted), min(deltas[0].shape))
        x = s.mean() * u @ v if len(s) else 0 * deltas[0]
        return x * (projection(x, weighted) if options.get("calibrate", "projection") == "projection" else 1)

    return merge_by(method, models, base, {"scale": 2.0, "others_scale": 0.5, **options})
