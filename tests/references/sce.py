"""Wan et al. 2024, section 3.3, with the selection kept for the merge as in mergekit 0.1.5."""

import numpy as np

from references.ties import near_tie


def selection(deltas, share):
    """Where entries are kept, and how near to the limit each variance is."""
    variance = deltas.var(axis=0)
    if share >= 1:
        return np.ones(variance.shape, bool), np.full(variance.shape, np.inf)
    count = int(np.count_nonzero(variance) * share)
    if count == 0:
        return np.zeros(variance.shape, bool), np.full(variance.shape, np.inf)
    limit = np.sort(variance.ravel())[::-1][count - 1]
    return variance >= limit, np.where(variance == limit, np.inf, np.abs(variance - limit) / limit)


def undecided(models, base, options):
    deltas = np.stack([m - base for m in models])
    kept, nearness = selection(deltas, options.get("select_topk", 1.0))
    return (nearness < 1e-6) | near_tie(deltas * kept, [1.0] * len(models))


def merge(models, base, options, noise):
    deltas = np.stack([m - base for m in models])
    kept = deltas * selection(deltas, options.get("select_topk", 1.0))[0]
    energy = (kept**2).reshape(len(models), -1).sum(axis=1)
    weight = energy / energy.sum() if energy.sum() > 0 else np.full(len(models), 1 / len(models))
    sign = np.where(kept.sum(axis=0) >= 0, 1.0, -1.0)
    agree = np.sign(kept) == sign
    shaped = weight.reshape(-1, *(1,) * base.ndim)
    share = (shaped * agree).sum(axis=0)
    return base + (shaped * agree * kept).sum(axis=0) / np.where(share > 0, share, 1.0)
