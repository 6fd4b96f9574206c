"""Yu et al. 2024, section 3.1, with the noise given; L1 rescale as mergekit 0.1.5."""

import numpy as np


def dropped(delta, density, uniform, how):
    kept = np.where(uniform < np.float32(density), delta, 0.0)
    if how == "l1" and np.abs(kept).sum() > 0:
        return kept * (np.abs(delta).sum() / np.abs(kept).sum())
    return kept / density if how == "inverse" else kept


def kept_of(models, base, options, noise):
    density = options.get("density", [1.0] * len(models))
    how = options.get("rescale", "l1")
    return [dropped(m - base, d, u, how) for m, d, u in zip(models, density, noise, strict=True)]


def merge(models, base, options, noise):
    weight = options.get("weight", [1.0] * len(models))
    change = sum(w * k for w, k in zip(weight, kept_of(models, base, options, noise), strict=True))
    if options.get("divide", "none") == "weight":
        change = change / sum(weight)
    return base + options.get("scale", 1.0) * change
