"""Which entries of a task vector are kept, and how the kept ones are scaled to make up for the rest.

A sparsifier is a ``keep(delta, limit)`` of one number, the ``limit`` it compares with (a number a model, a fact, or
draws), and a ``factor`` a model on what is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from alnico.kernels.facts import Argument, Bernoulli, Derived, KthLargest, Sum, magnitude

Rescale = Literal["l1", "inverse", "none"]
"""``l1``: the sum of magnitudes stays; ``inverse``: divide by the density; ``none``."""


@dataclass(frozen=True)
class Sparse:
    """What is kept of each task vector."""

    keep: Callable[[float, float], float]
    limit: Argument
    factor: Argument


def keep_large(delta: float, limit: float) -> float:
    """``delta`` if its magnitude is at least ``limit``, else 0."""
    return delta if abs(delta) >= limit else 0.0


def keep_drawn(delta: float, drawn: float) -> float:
    """``delta`` if it was drawn (1.0), else 0."""
    return delta if drawn > 0 else 0.0


def large_kept(delta: float, limit: float) -> float:
    return abs(keep_large(delta, limit))


def drawn_kept(delta: float, drawn: float) -> float:
    return abs(keep_drawn(delta, drawn))


def keep_largest(density: tuple[float, ...], rescale: Rescale) -> Sparse:
    """Keep the share ``density`` of largest magnitude; entries equal to the threshold are all kept."""
    ones = (1.0,) * len(density)
    if set(density) == {1.0}:
        return Sparse(keep_large, (0.0,) * len(density), ones)
    limit = KthLargest(density)
    return Sparse(keep_large, limit, _factor(rescale, density, Sum(large_kept, (limit,))))


def keep_random(density: tuple[float, ...], rescale: Rescale) -> Sparse:
    """Keep each entry with probability ``density``, independently."""
    ones = (1.0,) * len(density)
    if set(density) == {1.0}:
        return Sparse(keep_large, (0.0,) * len(density), ones)
    drawn = Bernoulli(density)
    return Sparse(keep_drawn, drawn, _factor(rescale, density, Sum(drawn_kept, (drawn,))))


def _factor(rescale: Rescale, density: tuple[float, ...], kept: Sum) -> Argument:
    if rescale == "l1":
        return Derived(_same_l1, (Sum(magnitude), kept))
    return tuple(1.0 / d for d in density) if rescale == "inverse" else (1.0,) * len(density)


def _same_l1(total: tuple[float, ...], kept: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(t / k if k > 0 else 1.0 for t, k in zip(total, kept, strict=True))
