"""Wortsman et al. 2022, section 2, written plainly."""

import numpy as np


def merge(models, base, options, noise):
    weight = options.get("weight", [1.0] * len(models))
    total = sum(w * m for w, m in zip(weight, models, strict=True))
    return total / sum(weight) if options.get("normalize", True) else np.asarray(total)
