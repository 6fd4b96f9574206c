"""Karcher 1977: log and exp maps on the unit sphere, carried out on the vectors themselves; ten steps at most, as in mergekit."""

import numpy as np


def merge(models, base, options, noise):
    weight = np.array(options.get("weight", [1.0] * len(models)))
    weight = weight / weight.sum()
    x = np.stack([m.ravel() for m in models])
    lengths = np.linalg.norm(x, axis=1)
    there = lengths > 0
    if not there.any():
        return np.zeros_like(models[0])
    units, share = x[there] / lengths[there, None], weight[there] / weight[there].sum()
    mean = share @ units
    mean /= np.linalg.norm(mean)
    for _ in range(int(options.get("max_iter", 10))):
        tangent = np.zeros_like(mean)
        for s, u in zip(share, units, strict=True):
            across = u - (u @ mean) * mean
            sine = np.linalg.norm(across)
            if sine > 0:
                tangent += s * np.arctan2(sine, u @ mean) / sine * across
        step = np.linalg.norm(tangent)
        if step < options.get("tol", 1e-5):
            break
        mean = np.cos(step) * mean + np.sin(step) * tangent / step
        mean /= np.linalg.norm(mean)
    return (mean * (weight @ lengths)).reshape(models[0].shape)
