"""Sums kept task-vector entries with weights: all, or those that agree with an elected sign."""

from __future__ import annotations

from typing import Any, Literal

from alnico.methods.base import Merge, total_weight
from alnico.methods.shared.sparsify import Sparse

Elect = Literal["weighted", "mass", "count"]
"""What decides the sign: the weighted entries, the entries as they are, or one vote per model."""

Divide = Literal["weight", "count", "none"]
"""What the sum of the agreeing entries is divided by: their weights, their number, or nothing."""

Tie = Literal["auto", "plus", "none"]
"""What a balance of exactly 0 elects: plus, or no sign at all; ``auto`` is none where each model has one
vote, else plus."""


def vote_weighted(entry, weight):
    return weight * entry


def vote_mass(entry, weight):
    return entry


def vote_count(entry, weight):
    return 1.0 if entry > 0 else (-1.0 if entry < 0 else 0.0)


def share_weight(weight):
    return weight


def share_count(weight):
    return 1.0


def share_none(weight):
    return 0.0


def agrees_or_plus(ballot, balance):
    return (ballot > 0) if balance >= 0 else (ballot < 0)


def agrees(ballot, balance):
    return (ballot > 0 and balance > 0) or (ballot < 0 and balance < 0)


VOTES = {"weighted": vote_weighted, "mass": vote_mass, "count": vote_count}
SHARES = {"weight": share_weight, "count": share_count, "none": share_none}


def sum_elected(
    sparse: Sparse, weight: tuple[float, ...], scale: float, elect: Elect, tie: Tie, divide: Divide
) -> Merge:
    """Sum the entries that have the elected sign, and divide by the weights or the number of those models."""
    keep, vote, share_of = sparse.keep, VOTES[elect], SHARES[divide]
    # With one vote per model, two models that disagree always tie; electing plus would then pull weights up.
    is_elected = agrees if tie == "none" or (tie == "auto" and elect == "count") else agrees_or_plus

    def mix(delta, limit, ceiling, factor, weight, scale):
        balance = 0.0
        for i in range(len(delta)):
            balance += vote(factor[i] * keep(delta[i], limit[i], ceiling[i]), weight[i])
        total = 0.0
        share = 0.0
        for i in range(len(delta)):
            entry = factor[i] * keep(delta[i], limit[i], ceiling[i])
            ballot = vote(entry, weight[i])
            if is_elected(ballot, balance):
                total += weight[i] * entry
                share += share_of(weight[i])
        return scale * (total / share if share != 0 else total)

    alone = len(weight) == 1 and not sparse.trims and scale * (weight[0] if divide == "none" else 1.0) == 1
    alone = alone and weight[0] > 0 and (divide != "count" or weight[0] == 1)
    return Merge(
        mix,
        (sparse.limit, sparse.ceiling, sparse.factor, weight, scale),
        copies=_copies(alone, weight, scale),
    )


def sum_all(
    sparse: Sparse, weight: tuple[float, ...], scale: float, divide: Literal["weight", "none"]
) -> Merge:
    """Sum all kept entries with their weights; ``divide`` "weight" divides by the sum of the weights."""
    keep = sparse.keep
    total = total_weight(weight, instead=", or set normalize: false") if divide == "weight" else 1.0

    def mix(delta, limit, ceiling, factor, weight, scale):
        total = 0.0
        for i in range(len(delta)):
            total += weight[i] * (factor[i] * keep(delta[i], limit[i], ceiling[i]))
        return scale * total

    alone = len(weight) == 1 and not sparse.trims and scale * weight[0] / total == 1
    return Merge(
        mix,
        (sparse.limit, sparse.ceiling, sparse.factor, weight, scale / total),
        copies=_copies(alone, weight, scale),
    )


def _copies(alone: bool, weight: tuple[float, ...], scale: float) -> Any:
    """What the plan copies: the one model, or the base where nothing is added."""
    if scale == 0 or not any(weight):
        return "base"
    return 0 if alone else None
