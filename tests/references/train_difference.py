"""trainDifference of supermerger: A + 1.8 alpha sign(B - C) |B - C| |B - A| / (|B - A| + |B - C|)."""

import numpy as np


def merge(models, base, options, noise):
    a, b = models
    to_a, to_base = np.abs(b - a), np.abs(b - base)
    both = to_a + to_base
    share = np.where(both > 0, to_a / np.where(both > 0, both, 1), 0)
    return a + 1.8 * options.get("strength", 1.0) * np.sign(b - base) * share * to_base
