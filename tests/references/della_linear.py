"""Deep et al. 2024, section 3: entries are kept by chance, the larger the likelier, row by row; L1 rescale as in mergekit 0.1.5."""

import numpy as np

from references.ties import rescaled


def chance(delta, density, epsilon):
    """The probability of each entry: even steps over the ranks of its row, equal magnitudes at their mean rank."""
    if delta.size == 0 or density >= 1:
        return np.ones(delta.shape)
    rows = np.abs(np.atleast_1d(delta)).reshape(-1, np.atleast_1d(delta).shape[-1])
    n = rows.shape[1]
    if n == 1:
        return np.full(delta.shape, density)
    ranks = np.empty(rows.shape)
    for row, values in zip(ranks, rows, strict=True):
        ordered = np.sort(values)
        row[:] = (
            np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") - 1
        ) / 2
    return (density - epsilon + 2 * epsilon * ranks / (n - 1)).reshape(delta.shape)


def kept_of(models, base, options, noise):
    k = len(models)
    density, epsilon = options.get("density", [1.0] * k), options.get("epsilon", [0.15] * k)
    found = []
    for model, d, e, uniform in zip(models, density, epsilon, noise, strict=True):
        delta = model - base
        found.append(
            rescaled(
                np.where(uniform < chance(delta, d, e), delta, 0.0), delta, d, options.get("rescale", "l1")
            )
        )
    return found


def merge(models, base, options, noise):
    weight = options.get("weight", [1.0] * len(models))
    total = sum(w * k for w, k in zip(weight, kept_of(models, base, options, noise), strict=True))
    return base + options.get("scale", 1.0) * total / (
        sum(weight) if options.get("divide", "none") == "weight" else 1.0
    )
