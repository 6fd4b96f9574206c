"""Du et al. 2024, section 3, as in the authors' code, a tensor at a time and without its tangent."""

import numpy as np


def parts(models, base, options):
    deltas = [m - base for m in models]
    total, n = sum(deltas), base.size
    found = []
    for delta, density in zip(deltas, options.get("density", [0.1] * len(models)), strict=True):
        size = np.sort(np.abs(delta).ravel())
        low, high = size[int((1 - (1 - 1e-4)) * (n - 1))], size[n - 1 - int(1e-4 * n)]
        place = (np.clip(np.abs(delta), low, high) - low) / (high - low)
        strength = np.maximum(np.exp(len(models) * (place**2 - 1)) * delta * total, 0.0)
        limit = 0.0 if density >= 1 else np.sort(strength.ravel())[::-1][max(1, int(density * n)) - 1]
        found.append((delta, strength, limit))
    return found


def merge(models, base, options, noise):
    total, shares = np.zeros(base.shape), np.zeros(base.shape)
    for (delta, strength, limit), weight in zip(
        parts(models, base, options), options.get("weight", [1.0] * len(models)), strict=True
    ):
        share = np.where(
            (strength > 0) & (strength >= limit), (strength - limit) / (strength.max() - limit), 0.0
        )
        total += share * weight * delta
        shares += share
    return base + options.get("scale", 1.0) * np.where(
        shares > 0, total / np.where(shares > 0, shares, 1.0), 0.0
    )
