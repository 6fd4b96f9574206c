"""The measures of a pair of models, in the order, words and colours of the page and the pictures."""

from __future__ import annotations

from collections.abc import Sequence

from alnico.analysis.page import DIVERGING, SEQUENTIAL
from alnico.analysis.results import GROUPS, Analysis, Pair, ScopeStatistics

CONFLICT = DIVERGING[::-1]
"""Colours of a share of opposite signs: blue below one half, the value for unrelated task vectors, orange
above."""

PAIR_MEASURES: tuple[tuple[str, str, Sequence[str]], ...] = (
    ("Cosine", "−1 opposite, 0 unrelated, 1 the same", DIVERGING),
    ("Sign conflict", "share of entries with opposite signs", CONFLICT),
    ("Weighted conflict", "the same, by magnitude", CONFLICT),
    ("Top overlap", "largest changes in common", SEQUENTIAL),
    ("Conflict at the top", "opposite signs among these", CONFLICT),
    ("Subspace, left", "leading output directions", SEQUENTIAL),
    ("Subspace, right", "leading input directions", SEQUENTIAL),
)
"""The measures of a pair: name, explanation, colour scale. The first is in [-1, 1], the others are in [0,
1]."""


def pair_values(pair: Pair) -> tuple[float | None, ...]:
    """Return the values of a pair, in the order of PAIR_MEASURES."""
    left, right = (None, None) if pair.subspace is None else (pair.subspace.left, pair.subspace.right)
    return (
        pair.cosine,
        pair.sign_conflict,
        pair.weighted_sign_conflict,
        pair.top_overlap,
        pair.top_sign_conflict,
        left,
        right,
    )


def short_value(which: int, value: float) -> str:
    return f"{value:.2f}".replace("-", "−") if which in (0, 5, 6) else f"{100 * value:.0f}%"


def scopes_of(analysis: Analysis) -> list[tuple[str, ScopeStatistics]]:
    """Return the whole model and its groups, with their labels."""
    return [
        ("whole model", analysis.whole),
        *((group, analysis.groups[group]) for group in group_names(analysis)),
    ]


def group_names(analysis: Analysis) -> list[str]:
    """Return the groups of tensors that the model has, in their order."""
    return [group for group in GROUPS if group in analysis.groups]
