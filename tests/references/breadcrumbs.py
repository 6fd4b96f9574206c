"""Davari and Belilovsky 2023, section 3: both tails of each tensor's task vector are left out."""

import numpy as np

from references.ties import rescaled


def middle(delta, density, gamma):
    n = delta.size
    if density >= 1 or n == 0:
        return delta
    kept = max(1, int(density * n))
    skipped = min(int(gamma * n), n - kept)
    ordered = np.sort(np.abs(delta).ravel())[::-1]
    high, low = ordered[skipped], ordered[skipped + kept - 1]
    return np.where((np.abs(delta) >= low) & (np.abs(delta) <= high), delta, 0.0)


def kept_of(models, base, options):
    k = len(models)
    density, gamma = options.get("density", [1.0] * k), options.get("gamma", [0.01] * k)
    deltas = [m - base for m in models]
    how = options.get("rescale", "none")
    return [rescaled(middle(d, s, g), d, s, how) for d, s, g in zip(deltas, density, gamma, strict=True)]


def merge(models, base, options, noise):
    weight = options.get("weight", [1.0] * len(models))
    total = sum(w * k for w, k in zip(weight, kept_of(models, base, options), strict=True))
    return base + options.get("scale", 1.0) * total / (
        sum(weight) if options.get("divide", "none") == "weight" else 1.0
    )
