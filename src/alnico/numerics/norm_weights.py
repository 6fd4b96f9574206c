"""Computes weights of models from the norms of their task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from alnico.errors import MethodError

NormMode = Literal["linear", "power", "exp"]


def norm_weights(
    norms: Sequence[float],
    *,
    mode: NormMode = "exp",
    beta: float = 1.0,
    alpha: float = 1.5,
    scale: float = 1.0,
) -> tuple[float, ...]:
    """Weigh models by the L2 norms L of their task vectors: the farther a model is from the base, the less it
    counts.

    ``linear``: w ~ 1 / L; ``power``: w ~ 1 / L^alpha; ``exp``: w ~ exp(-beta L / mean L), and equal weights
    where all norms are 0; then ``w = scale * w / sum w``. Errors: MethodError for a norm of 0 in ``linear``
    and ``power``, for norms that are negative or not finite, and for a ``beta`` below 0, an ``alpha`` of at
    most 0 or a ``scale`` that is not finite.

    >>> norms = [182.63449804, 31.87331430, 0, 0.52867741, 9.26351817]
    >>> [f"{w:.6f}" for w in norm_weights(norms)]
    ['0.005153', '0.148450', '0.302100', '0.298560', '0.245736']
    >>> norm_weights([1, 3], mode="linear"), norm_weights([1, 4], mode="power", scale=9)
    ((0.75, 0.25), (8.0, 1.0))
    """
    if mode not in ("linear", "power", "exp"):
        raise MethodError(f"mode is {mode!r}; expected one of linear, power, exp.")
    if not 0 <= beta < math.inf or not 0 < alpha < math.inf or not math.isfinite(scale):
        raise MethodError(
            f"beta is {beta:g}, alpha {alpha:g}, scale {scale:g}; expected beta of at least 0, alpha above 0, all of them finite."
        )
    if not norms or not all(0 <= norm < math.inf for norm in norms):
        raise MethodError(
            f"norms are {[float(n) for n in norms]}; expected at least one, all of them finite and not negative."
        )
    least = min(norms)
    if mode == "exp":
        mean = _mean(norms)
        # Relative to the least norm: for any beta one of the exponents is 0.
        parts = [math.exp(-beta * ((norm - least) / mean)) if mean > 0 else 1.0 for norm in norms]
    elif least == 0:
        raise MethodError(
            f"norms[{list(norms).index(0)}] is 0, by which mode {mode} divides; expected models that differ from the base. "
            "Leave the model out, or choose mode exp."
        )
    else:
        parts = [(least / norm) ** (alpha if mode == "power" else 1.0) for norm in norms]
    total = math.fsum(parts)
    return tuple(scale * (part / total) for part in parts)


def _mean(norms: Sequence[float]) -> float:
    try:
        return math.fsum(norms) / len(norms)
    except OverflowError:  # the sum is beyond float64, the mean is not
        return math.fsum(norm / len(norms) for norm in norms)
