"""SWUDI, plainly: arXiv 2606.07289, from the inputs' product of the whole matrices, with the projection scale."""

from __future__ import annotations

import math

import numpy as np

from references.whole_matrices import cut_svd, merge_by, projection


def merge(models: list[np.ndarray], base: np.ndarray, options: dict, uniforms: object) -> np.ndarray:
    def method(whole: list[np.ndarray], weights: list[float]) -> np.ndarray:
        k = max(int(options.get("rank", 1.0) * min(whole[0].shape) / len(whole)), 1)
        k = min(whole[0].shape) if options.get("vectors") == "all" else k
        deltas = [(u * s) @ v for u, s, v in (cut_svd(d, k) for d in whole)]
        units = [d / max(np.abs(d).max(), 1e-300) for d in deltas]
        products = [d.T @ d / max((d**2).sum(), 1.0) for d in units]
        lam, v = np.linalg.eigh(sum(products))
        lam, v = lam[::-1], v[:, ::-1]
        real = int((lam > 1e-12 * lam[0]).sum())
        lam, v = lam[:real], v[:, :real]
        kind = options.get("filter", "participation")
        f = np.ones(real)
        if kind == "time":
            f = 1 - np.exp(-options.get("time", 300.0) * lam)
            f[int(options.get("share", 0.65) * deltas[0].shape[1]) :] = 0
        elif kind == "participation" and real:
            f[math.ceil(np.sqrt(lam).sum() ** 2 / lam.sum() * (1 - 1e-9)) :] = 0
        first = {"sum": 1.0, "mean": 1 / len(deltas), "zero": 0.0}[options.get("initial", "sum")]
        parts = [
            first * (d - d @ v @ np.diag(f) @ v.T) + d @ p @ v @ np.diag(f / lam) @ v.T
            for d, p in zip(deltas, products, strict=True)
        ]
        c = projection(sum(parts), whole) if options.get("calibrate", "projection") == "projection" else 1.0
        return c * sum(w * t for w, t in zip(weights, parts, strict=True))

    return merge_by(method, models, base, options)
