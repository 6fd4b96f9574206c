"""The weighted mean of unit vectors, made a unit vector, times the weighted mean length; mergekit's documentation, in float64."""

import numpy as np


def merge(models, base, options, noise):
    weight = np.array(options.get("weight", [1.0] * len(models)))
    if options.get("normalize_weights", True):
        weight = weight / weight.sum()
    x = np.stack([(m if base is None else m - base).ravel() for m in models])
    origin = np.zeros_like(models[0]) if base is None else base
    lengths = np.linalg.norm(x, axis=1)
    units = x / np.where(lengths == 0, 1.0, lengths)[:, None]
    direction = weight @ units
    length = np.linalg.norm(direction)
    if length < 1e-8:
        return origin + (weight @ x).reshape(origin.shape)
    return origin + (direction / length * (weight @ lengths)).reshape(origin.shape)
