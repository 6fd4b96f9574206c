"""alchemonaut 2024: interpolate with weight t / |difference|, at most 1."""

import numpy as np


def merge(models, base, options, noise):
    distance = np.abs(models[0] - base)
    share = np.where(distance > 0, np.minimum(1.0, options["t"] / np.where(distance > 0, distance, 1.0)), 1.0)
    return (1 - share) * base + share * models[0]
