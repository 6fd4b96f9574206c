"""TSV-M, plainly: Gargiulo et al. 2025, algorithm 1, with the projection scale."""

from __future__ import annotations

import numpy as np

from references.whole_matrices import cut_svd, merge_by, polar, projection


def merge(models: list[np.ndarray], base: np.ndarray, options: dict, uniforms: object) -> np.ndarray:
    def method(deltas: list[np.ndarray], weights: list[float]) -> np.ndarray:
        k = max(int(options.get("rank", 1.0) * min(deltas[0].shape) / len(deltas)), 1)
        us, ss, vs = zip(*(cut_svd(d, k) for d in deltas), strict=True)
        least = options.get("least", 0.01)
        u, v = polar(np.hstack(us), least), polar(np.vstack(vs), least)
        edges = np.cumsum([0, *(len(s) for s in ss)])
        parts = [u[:, a:b] @ np.diag(s) @ v[a:b] for a, b, s in zip(edges[:-1], edges[1:], ss, strict=True)]
        c = projection(sum(parts), deltas) if options.get("calibrate", "projection") == "projection" else 1.0
        return c * sum(w * t for w, t in zip(weights, parts, strict=True))

    return merge_by(method, models, base, options)
