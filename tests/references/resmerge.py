"""ResMerge, plainly: Sun et al. 2026, with cosines of all pairs, as the authors' program computes them."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from references.whole_matrices import cut_svd, merge_by


def length(x: np.ndarray) -> float:
    unit = np.abs(x).max(initial=0)
    return float(np.linalg.norm(x / unit) * unit) if unit else 0.0


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    long = [length(a), length(b)]
    return float(((a / long[0]) * (b / long[1])).sum()) if all(long) else 0.0


def merge(models: list[np.ndarray], base: np.ndarray, options: dict, uniforms: object) -> np.ndarray:
    low, high = options.get("beta_min", 0.7), options.get("beta_max", 1.0)

    def method(deltas: list[np.ndarray], weights: list[float]) -> np.ndarray:
        weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
        heads = []
        for d in weighted:
            u, s, v = cut_svd(d, options.get("head", 1))
            heads.append((u * s) @ v)
        residuals = [d - h for d, h in zip(weighted, heads, strict=True)]
        residuals = [
            r if length(r) > 1e-6 * length(d) else 0 * r for r, d in zip(residuals, weighted, strict=True)
        ]
        count = len(residuals)
        directions = [r / length(r) if length(r) else r for r in residuals]
        total = sum(directions)
        c = length(total) / count
        pairs = [cosine(a, b) for a, b in combinations(directions, 2)]
        s = np.mean(pairs) if pairs else 1.0
        if count > 1 and c <= 1 / np.sqrt(count):
            merged = sum(r / count for r in residuals)
        elif not c:
            merged = total
        else:
            beta = high - (high - low) * ((s + 1) / 2 + (c + 1) / 2) / 2
            merged = c**beta * np.mean([length(r) for r in residuals]) * total / length(total)
        there = [h for h in heads if length(h)]
        agree = [max(0.0, cosine(a, b)) for a, b in combinations(there, 2)]
        agreement = np.mean(agree) if agree else float(len(there))
        mean = sum(h / count for h in heads)
        if length(mean):
            size = options.get("budget", 0.2) * agreement * length(merged)
            merged = merged + mean / length(mean) * size
        return merged

    return merge_by(method, models, base, options)
