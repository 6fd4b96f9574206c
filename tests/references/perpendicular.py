"""add_perpendicular of sd-mecha for any number of models: of each task vector, what no sum of those before it can reach."""

import numpy as np


def merge(models, base, options, noise):
    deltas = [(m - base).ravel() for m in models]
    weight = options.get("weight", [1.0] * len(models))
    unit = max(np.abs(d).max(initial=0) for d in deltas)
    if not unit:
        return base
    total, known = np.zeros_like(deltas[0]), []
    for w, d in zip(weight, deltas, strict=True):
        left = d / unit
        for _ in range(2):  # the second time for the rounding of the first
            for q in known:
                left = left - (left @ q) * q
        length = np.linalg.norm(left)
        if length > 3e-7 * np.linalg.norm(d / unit):
            known.append(left / length)
            total = total + w * left
    return base + (total * unit).reshape(base.shape)
