"""DC-Merge, plainly: arXiv 2603.06242, with the projection scale."""

from __future__ import annotations

import numpy as np

from references.whole_matrices import cut_svd, merge_by, polar, projection


def merge(models: list[np.ndarray], base: np.ndarray, options: dict, uniforms: object) -> np.ndarray:
    given = options.get("density", [0.001] * len(models))
    weights = options.get("weight", [1.0] * len(models))
    shares = [d for d, w in zip(given, weights, strict=True) if w]
    least = options.get("least", 0.01)

    def method(deltas: list[np.ndarray], weights: list[float]) -> np.ndarray:
        p, q, inner, ss = inner_of(deltas, options, least)
        for m, share, own in zip(inner, shares, ss, strict=True):
            count = max(int(share * m.size), len(own), 1)
            if m.size:
                m[np.abs(m) < 1e-12 * np.abs(m).max()] = 0
                m[np.abs(m) < np.sort(np.abs(m), axis=None)[-count]] = 0
        agree = (np.sign(inner) == np.sign(inner.sum(0))) & (inner != 0)
        block = np.repeat(np.arange(len(ss)), [len(s) for s in ss])
        mask = block[:, None] == block
        mean = np.where(agree, inner, 0) * mask / np.maximum(agree.sum(0), 1)
        parts = [p @ m @ q for m in mean]
        c = projection(sum(parts), deltas) if options.get("calibrate", "projection") == "projection" else 1.0
        return c * sum(w * t for w, t in zip(weights, parts, strict=True))

    return merge_by(method, models, base, options)


def inner_of(deltas: list[np.ndarray], options: dict, least: float) -> tuple:
    """The common directions, each task vector between them, and their singular values."""
    k = max(int(options.get("rank", 0.75) * min(deltas[0].shape) / len(deltas)), 1)
    us, ss, vs = zip(*(cut_svd(d, k) for d in deltas), strict=True)
    p, q = polar(np.hstack(us), least), polar(np.vstack(vs), least)
    return p, q, np.stack([p.T @ (u * s) @ v @ q.T for u, s, v in zip(us, ss, vs, strict=True)]), ss


def undecided(models: list[np.ndarray], base: np.ndarray, options: dict) -> np.ndarray:
    """Everywhere, if the entry that is the last to be kept ties with another up to rounding: either may be the one."""
    ties = []

    def method(deltas: list[np.ndarray], weights: list[float]) -> np.ndarray:
        inner, ss = inner_of(deltas, options, options.get("least", 0.01))[2:]
        given = options.get("density", [0.001] * len(models))
        shares = [d for d, w in zip(given, options.get("weight", [1.0] * len(models)), strict=True) if w]
        for m, share, own in zip(inner, shares, ss, strict=True):
            if m.size:
                m[np.abs(m) < 1e-12 * np.abs(m).max()] = 0  # as `merge` does: rounding errors tie at random
            sizes = np.sort(np.abs(m), axis=None)[::-1]
            count = max(int(share * m.size), len(own), 1)
            if count < m.size:
                ties.append(sizes[count] > (1 - 1e-9) * sizes[count - 1] > 0)
        return deltas[0]

    merge_by(method, models, base, options)
    return np.full(base.shape, any(ties))
