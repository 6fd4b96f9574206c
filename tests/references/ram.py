"""Reinforced Agent Merging 2026: unique entries as they are, shared ones averaged."""

import numpy as np


def changed_of(models, base, options):
    deltas = np.stack([m - base for m in models])
    changed = np.abs(deltas) > options.get("epsilon", 1e-5)
    return deltas, changed, changed.sum(axis=0)


def undecided(models, base, options):
    epsilon = options.get("epsilon", 1e-5)
    return np.any(
        [np.abs(np.abs(m - base) - epsilon) < 1e-6 * epsilon + 1e-7 * np.abs(base) for m in models], axis=0
    )


def merge(models, base, options, noise):
    deltas, changed, count = changed_of(models, base, options)
    unique = (deltas * changed * (count == 1)).sum(axis=0)
    shared = (deltas * changed * (count > 1)).sum(axis=0) / np.maximum(count, 1)
    return base + unique + shared
