"""Wang et al. 2024, section 4: masks of the tasks, then the sum where enough of them overlap."""

import numpy as np


def parts(models, base, options):
    weight = options.get("weight", [1.0] * len(models))
    threshold = options.get("threshold", [0.4] * len(models))
    entries = [w * (m - base) for w, m in zip(weight, models, strict=True)]
    total = sum(entries)
    return total, [(np.abs(e), s * np.abs(total - e)) for e, s in zip(entries, threshold, strict=True)]


def undecided(models, base, options):
    """Is a model's need within 1e-6 of the edge?"""
    sides = parts(models, base, options)[1]
    return np.any([np.abs(own - others) < 1e-6 * (own + others) for own, others in sides], axis=0)


def merge(models, base, options, noise):
    total, sides = parts(models, base, options)
    needed = sum((own >= others).astype(int) for own, others in sides)
    return base + np.where(needed >= options.get("at_least", 2), options.get("scale", 1.0) * total, 0.0)
