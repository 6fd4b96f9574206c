"""Shoemake 1985 on flat vectors; the straight line within 0.9995 of parallel (mergekit's threshold)."""

import numpy as np


def merge(models, base, options, noise):
    a, b = models
    t = options["t"]
    if options.get("over") == "row" and a.ndim > 1:
        pairs = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
        return np.array([merge(pair, None, {"t": t}, None) for pair in pairs]).reshape(a.shape)
    cosine = (
        np.dot(a.ravel(), b.ravel()) / (np.linalg.norm(a) * np.linalg.norm(b)) if a.any() and b.any() else 1.0
    )
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    theta = np.arccos(cosine)
    return np.sin((1 - t) * theta) / np.sin(theta) * a + np.sin(t * theta) / np.sin(theta) * b
