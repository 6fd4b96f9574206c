"""Merges what a method over whole matrices leaves: norms, biases, tables of embeddings."""

from __future__ import annotations

from typing import Literal

from alnico.methods.base import Merge, Method
from alnico.methods.breadcrumbs import breadcrumbs
from alnico.methods.consensus import consensus
from alnico.methods.dare_ties import dare_ties
from alnico.methods.magmax import magmax
from alnico.methods.shared.elect import sum_all
from alnico.methods.shared.sparsify import keep_all
from alnico.methods.ties import ties

Others = Literal["mean", "sum", "base", "ties", "dare_ties", "breadcrumbs", "magmax", "consensus"]
"""How other tensors are merged: the mean or the sum of the weighted task vectors, the base's own tensor, or a method with
its default options."""

Embeddings = Literal["others", "matrix"]
"""How tables of tokens and positions, and token heads, are merged: like other tensors, or as matrices."""

METHODS: dict[str, Method] = {m.name: m for m in (ties, dare_ties, breadcrumbs, magmax, consensus)}


def merge_others(others: Others, weight: tuple[float, ...], scale: float) -> Merge:
    """Bind the method for other tensors. ``mean`` divides by the number of models whose weight is not 0.

    >>> merge_others("base", (1.0, 1.0), 1.0).copies
    'base'
    """
    if others == "base":
        return sum_all(keep_all(len(weight)), weight, 0.0, "none")
    if others in ("mean", "sum"):
        count = sum(w != 0 for w in weight) if others == "mean" else 1
        return sum_all(keep_all(len(weight)), weight, scale / max(count, 1), "none")
    merge = METHODS[others].bind({"weight": weight, "scale": scale}, len(weight))
    assert isinstance(merge, Merge)
    return merge


def merge_trivially(weight: tuple[float, ...], scale: float) -> Merge | None:
    """Return the merge of weights or a scale of 0, which is the base; None for all others."""
    return merge_others("base", weight, 0.0) if scale == 0 or not any(weight) else None
