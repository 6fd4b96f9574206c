"""Chooses which task-vector entries are kept, and scales them to make up for the rest.

A sparsifier is a function ``keep(delta, limit, ceiling)`` of one number, the limits (numbers per model,
facts, or draws; some use only ``limit``), and a ``factor`` per model for the kept entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from alnico.errors import MethodError
from alnico.kernels.facts import Argument, Bernoulli, Derived, KthLargest, Sum, magnitude

Scope = Literal["tensor", "model"]
"""What a density is a share of: each tensor, or a whole task vector."""

Rescale = Literal["l1", "inverse", "none"]
"""``l1``: the sum of magnitudes stays; ``inverse``: divide by the density; ``none``."""


@dataclass(frozen=True)
class Sparse:
    """A way to keep entries of each task vector. ``trims``: whether entries may be left out."""

    keep: Callable[[float, float, float], float]
    limit: Argument
    ceiling: Argument
    factor: Argument
    trims: bool


def keep_large(delta: float, limit: float, ceiling: float) -> float:
    """``delta`` if its magnitude is at least ``limit``, else 0."""
    return delta if abs(delta) >= limit else 0.0


def keep_between(delta: float, limit: float, ceiling: float) -> float:
    """``delta`` if its magnitude is at least ``limit`` and at most ``ceiling``, else 0."""
    return delta if abs(delta) >= limit and abs(delta) <= ceiling else 0.0


def keep_drawn(delta: float, limit: float, ceiling: float) -> float:
    """``delta`` if it was drawn (a limit of 1.0), else 0."""
    return delta if limit > 0 else 0.0


def keep_drawn_large(delta: float, drawn: float, limit: float) -> float:
    """``delta`` if it was drawn (1.0) and its magnitude is at least ``limit``, else 0."""
    return delta if drawn > 0 and abs(delta) >= limit else 0.0


def magnitude_if_large(delta: float, limit: float) -> float:
    return abs(keep_large(delta, limit, limit))


def magnitude_if_between(delta: float, limit: float, ceiling: float) -> float:
    return abs(keep_between(delta, limit, ceiling))


def magnitude_if_drawn(delta: float, drawn: float) -> float:
    return abs(keep_drawn(delta, drawn, drawn))


def magnitude_if_drawn_large(delta: float, drawn: float, limit: float) -> float:
    return abs(keep_drawn_large(delta, drawn, limit))


def keep_all(models: int) -> Sparse:
    """Keep everything."""
    zeros, ones = (0.0,) * models, (1.0,) * models
    return Sparse(keep_large, zeros, zeros, ones, trims=False)


def keep_largest(density: tuple[float, ...], rescale: Rescale, scope: Scope = "tensor") -> Sparse:
    """Keep the share ``density`` of largest magnitude; entries equal to the threshold are all kept."""
    if set(density) == {1.0}:
        return keep_all(len(density))
    limit = _or_nothing(KthLargest(_measured(density), over=scope), density)
    return Sparse(
        keep_large,
        limit,
        (0.0,) * len(density),
        _factor(rescale, density, Sum(magnitude_if_large, (limit,))),
        trims=True,
    )


def keep_middle(density: tuple[float, ...], gamma: tuple[float, ...], rescale: Rescale) -> Sparse:
    """Leave out the share ``gamma`` of largest magnitude and keep the share ``density`` below it."""
    if set(density) == {1.0}:
        return keep_all(len(density))
    shares = _measured(density)
    limit, ceiling = (
        _or_nothing(KthLargest(shares, skip=gamma), density),
        KthLargest(shares, skip=gamma, end="first"),
    )
    factor = _factor(rescale, density, Sum(magnitude_if_between, (limit, ceiling)))
    return Sparse(keep_between, limit, ceiling, factor, trims=True)


def keep_random(density: tuple[float, ...], rescale: Rescale) -> Sparse:
    """Keep each entry with probability ``density``, independently."""
    return _keep_drawn(Bernoulli(density), rescale)


def keep_random_then_large(density: tuple[float, ...], trim: tuple[float, ...], rescale: Rescale) -> Sparse:
    """Keep each entry with probability ``density``, then the share ``trim`` of largest magnitude of all
    entries, of which those that were dropped count as 0; a ``trim`` of 1 keeps all that were drawn."""
    if set(trim) == {1.0}:
        return keep_random(density, rescale)
    drawn = Bernoulli(density)
    limit = KthLargest(trim, magnitude_if_drawn, (drawn,))
    factor = _factor(rescale, density, Sum(magnitude_if_drawn_large, (drawn, limit)))
    return Sparse(keep_drawn_large, drawn, limit, factor, trims=True)


def keep_by_rank(density: tuple[float, ...], epsilon: tuple[float, ...], rescale: Rescale) -> Sparse:
    """Keep each entry with a probability from ``density - epsilon`` to ``density + epsilon``, by its rank in
    its row."""
    for d, e in zip(density, epsilon, strict=True):
        if 0 < d < 1 and not (d - e > 0 and d + e < 1):
            raise MethodError(
                f"density {d:g} and epsilon {e:g} give probabilities from {d - e:g} to {d + e:g}; expected them between 0 and 1. "
                "Choose a smaller epsilon."
            )
    return _keep_drawn(
        Bernoulli(density, tuple(0.0 if d in (0, 1) else e for d, e in zip(density, epsilon, strict=True))),
        rescale,
    )


def _keep_drawn(drawn: Bernoulli, rescale: Rescale) -> Sparse:
    density = drawn.chance
    if set(density) == {1.0}:
        return keep_all(len(density))
    return Sparse(
        keep_drawn,
        drawn,
        (0.0,) * len(density),
        _factor(rescale, density, Sum(magnitude_if_drawn, (drawn,))),
        trims=True,
    )


def _factor(rescale: Rescale, density: tuple[float, ...], kept_sum: Sum) -> Argument:
    if rescale == "l1":
        return Derived(_same_l1, (Sum(magnitude), kept_sum))
    return tuple(1.0 / d if d else 1.0 for d in density) if rescale == "inverse" else (1.0,) * len(density)


def _measured(density: tuple[float, ...]) -> tuple[float, ...]:
    """The shares whose thresholds are measured: a density of 0 has no threshold to measure, like a density of
    1."""
    return tuple(d or 1.0 for d in density)


def _or_nothing(limit: KthLargest, density: tuple[float, ...]) -> KthLargest | Derived:
    """A threshold that no entry reaches, for models that keep nothing."""
    return limit if all(density) else Derived(partial(_raised, density), (limit,))


def _raised(density: tuple[float, ...], limit: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(threshold) if d else math.inf for threshold, d in zip(limit, density, strict=True))


def _same_l1(total: tuple[float, ...], kept_sum: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(t / k if k > 0 else 1.0 for t, k in zip(total, kept_sum, strict=True))
