"""arcee_fusion without the 1e-8 that mergekit adds to probabilities: of logarithms of the softmax, whatever the values are."""

import numpy as np


def importance_of(models):
    base, tuned = models
    one, other = (m - m.max(axis=-1, keepdims=True) for m in (tuned, base))
    p, q = (m - np.log(np.exp(m).sum(axis=-1, keepdims=True)) for m in (one, other))
    divergence = (np.exp(p) * (p - q)).sum(axis=-1, keepdims=True)
    importance = np.abs(tuned - base) * np.where(
        divergence > 1e-15, divergence, 0
    )  # below, they are equal in float64
    lower, middle, upper = (
        np.sort(importance.ravel())[int(s * (importance.size - 1))] for s in (0.25, 0.5, 0.75)
    )
    return importance, middle + 1.5 * (upper - lower)


def undecided(models, base, options):
    importance, limit = importance_of(models)
    return np.abs(importance - limit) < 1e-9 * limit


def merge(models, base, options, noise):
    importance, limit = importance_of(models)
    return np.where(importance >= limit, models[1], models[0])
