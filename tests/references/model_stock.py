"""Jang et al. 2024, section 4: the ratio t from the mean cosine of all pairs, per tensor or per row."""

from itertools import combinations

import numpy as np


def ratio(deltas):
    cosines = []
    for a, b in combinations(deltas, 2):
        area = np.linalg.norm(a) * np.linalg.norm(b)
        cosines.append(a @ b / area if area > 0 else 0.0)
    c, k = np.mean(cosines), len(deltas)
    return k * c / (1 + (k - 1) * c) if abs(1 + (k - 1) * c) >= 1e-6 else 0.0


def merge(models, base, options, noise):
    deltas = [m - base for m in models]
    mean = sum(deltas) / len(deltas)
    if not options.get("filter_wise", False):
        return base + ratio([d.ravel() for d in deltas]) * mean
    if base.size == 0:
        return base
    rows = np.stack([np.atleast_1d(d).reshape(-1, np.atleast_1d(d).shape[-1]) for d in deltas])
    t = np.array([ratio(rows[:, r]) for r in range(rows.shape[1])])
    return base + (t[:, None] * rows.mean(0)).reshape(base.shape)
