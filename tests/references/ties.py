"""Yadav et al. 2023, algorithm 1, a tensor at a time; the choices of mergekit 0.1.5 as options."""

import numpy as np


def trimmed(delta, density):
    flat = np.sort(np.abs(delta).ravel())[::-1]
    k = max(1, int(density * flat.size))
    return np.where(np.abs(delta) >= flat[k - 1], delta, 0.0)


def rescaled(kept, delta, density, how):
    if how == "l1" and np.abs(kept).sum() > 0:
        return kept * (np.abs(delta).sum() / np.abs(kept).sum())
    return kept / density if how == "inverse" else kept


def consensus(kept, weight, elect, divide, tie="auto"):
    """Algorithm 1 elects sgn(sum), 0 on a tie, which no kept entry has; mergekit, whose vote is weighted, takes +1."""
    weighted = [w * k for w, k in zip(weight, kept, strict=True)]
    ballots = {"weighted": weighted, "mass": kept, "count": [np.sign(k) for k in kept]}[elect]
    majority = np.sign(sum(ballots))
    if tie == "plus" or (tie == "auto" and elect != "count"):
        majority = np.where(majority == 0, 1.0, majority)
    agree = [(np.sign(ballot) == majority) & (ballot != 0) for ballot in ballots]
    total = sum(np.where(a, d, 0.0) for a, d in zip(agree, weighted, strict=True))
    if divide == "none":
        return total
    share = sum(
        np.where(a, w if divide == "weight" else 1.0, 0.0) for a, w in zip(agree, weight, strict=True)
    )
    return total / np.where(share == 0, 1.0, share)


def near_tie(kept, weight, elect="weighted"):
    """Is an election within 1e-6 of a tie, relative to its votes? Then rounding decides."""
    votes = [w * k if elect == "weighted" else k for w, k in zip(weight, kept, strict=True)]
    scale = sum(np.abs(v) for v in votes)
    return (np.abs(sum(votes)) < 1e-6 * scale) & (elect != "count")


def undecided(models, base, options):
    return near_tie(*kept_of(models, base, options), options.get("elect", "weighted"))


def kept_of(models, base, options):
    weight = options.get("weight", [1.0] * len(models))
    density = options.get("density", [1.0] * len(models))
    deltas = [m - base for m in models]
    kept = [
        rescaled(trimmed(d, s), d, s, options.get("rescale", "none"))
        for d, s in zip(deltas, density, strict=True)
    ]
    return kept, weight


def merge(models, base, options, noise):
    kept, weight = kept_of(models, base, options)
    change = consensus(
        kept,
        weight,
        options.get("elect", "weighted"),
        options.get("divide", "weight"),
        options.get("tie", "auto"),
    )
    return base + options.get("scale", 1.0) * change
