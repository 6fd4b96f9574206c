"""Marczak et al. 2024, section 3: the entry of largest magnitude."""

import numpy as np


def merge(models, base, options, noise):
    entries = np.stack(
        [w * (m - base) for w, m in zip(options.get("weight", [1.0] * len(models)), models, strict=True)]
    )
    largest = np.take_along_axis(entries, np.abs(entries).argmax(axis=0)[None], axis=0)[0]
    return base + options.get("scale", 1.0) * largest
