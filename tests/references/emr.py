"""Huang et al. 2024, section 3.2: the unified task vector."""

import numpy as np

from references.ties import near_tie


def entries_of(models, base, options):
    return [w * (m - base) for w, m in zip(options.get("weight", [1.0] * len(models)), models, strict=True)]


def undecided(models, base, options):
    return near_tie(entries_of(models, base, options), [1.0] * len(models))


def merge(models, base, options, noise):
    entries = np.stack(entries_of(models, base, options))
    sign = np.sign(entries.sum(axis=0))
    size = np.where(np.sign(entries) == sign, np.abs(entries), 0.0).max(axis=0)
    return base + options.get("scale", 1.0) * sign * size
