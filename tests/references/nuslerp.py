"""Shoemake 1985 on flat vectors, rows or columns; with a base on the differences from it."""

import numpy as np


def arc(a, b, t):
    if not a.any() or not b.any():
        return (1 - t) * a + t * b
    cosine = np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1)
    theta = np.arccos(cosine)
    if np.sin(theta) ** 2 <= 1e-16:
        return (1 - t) * a + t * b
    return np.sin((1 - t) * theta) / np.sin(theta) * a + np.sin(t * theta) / np.sin(theta) * b


def merge(models, base, options, noise):
    weight = options.get("weight", [1.0, 1.0])
    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    origin = np.zeros_like(models[0]) if base is None else base
    a, b = (np.atleast_1d(m - origin) for m in models)
    if options.get("flatten", True):
        return origin + arc(a.ravel(), b.ravel(), t).reshape(origin.shape)
    if a.size == 0:
        return origin
    axis = 0 if options.get("row_wise", False) and a.ndim > 1 else -1
    first, second = np.moveaxis(a, axis, -1), np.moveaxis(b, axis, -1)
    flat = zip(first.reshape(-1, first.shape[-1]), second.reshape(-1, first.shape[-1]), strict=True)
    arcs = np.array([arc(u, v, t) for u, v in flat]).reshape(first.shape)
    return origin + np.moveaxis(arcs, -1, axis).reshape(origin.shape)
