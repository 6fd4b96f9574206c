"""mergekit 0.1.5's arcee_fusion with exact quartiles, as it stands there, in float64."""

import numpy as np


def importance_of(models):
    base, tuned = models
    p, q = (np.exp(m - m.max(axis=-1, keepdims=True)) for m in (tuned, base))
    p, q = (e / e.sum(axis=-1, keepdims=True) + 1e-8 for e in (p, q))
    importance = np.abs(tuned - base) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    lower, middle, upper = (
        np.sort(importance.ravel())[int(s * (importance.size - 1))] for s in (0.25, 0.5, 0.75)
    )
    return importance, middle + 1.5 * (upper - lower)


def undecided(models, base, options):
    importance, limit = importance_of(models)
    return np.abs(importance - limit) < 1e-5 * limit


def merge(models, base, options, noise):
    importance, limit = importance_of(models)
    return np.where(importance >= limit, models[1], models[0])
