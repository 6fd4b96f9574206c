"""Reinforced Agent Merging 2026, RAM+ with the ratios of each tensor, as in mergekit 0.1.5."""

import numpy as np

from references.ram import changed_of, undecided  # noqa: F401


def merge(models, base, options, noise):
    deltas, changed, count = changed_of(models, base, options)
    change = np.zeros(base.shape)
    for delta, own in zip(deltas, changed, strict=True):
        shared, unique = (own & (count > 1)).sum(), (own & (count == 1)).sum()
        ratio = shared / unique if unique else np.inf if shared else 0.0
        factor = 1 + options.get("r", 0.1) * min(ratio, options.get("alpha", 0.2))
        change += np.where(own, np.where(count == 1, factor * delta, delta / np.maximum(count, 1)), 0.0)
    return base + change
