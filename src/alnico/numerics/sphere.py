"""Computes arcs between vectors and means on the sphere from their inner products.

``gram`` is one k x k matrix of inner products, or a stack (n, k, k) of them; what comes back are coefficients
of the k vectors, (k,) or (k, n). Numbers that are not finite are passed through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

PARALLEL = 0.9995
"""|cosine| above which ``arc_coefficients`` takes the straight line, as slerp does in mergekit."""


def arc_coefficients(
    gram: Sequence[Sequence[float]] | np.ndarray, t: float, parallel: float = PARALLEL
) -> np.ndarray:
    """Coefficients of two vectors at place ``t`` of the arc from the first (0) to the second (1).

    ``sin((1-t) theta) / sin(theta)`` and ``sin(t theta) / sin(theta)``, with the angle theta from ``gram``.
    The straight line ``1-t, t`` where |cos theta| > ``parallel``, or where a vector is 0.

    >>> arc_coefficients([[1.0, 0.0], [0.0, 4.0]], 0.5).tolist() == [math.sin(math.pi / 4)] * 2
    True
    >>> arc_coefficients([[1.0, 2.0], [2.0, 4.0]], 0.25).tolist()
    [0.75, 0.25]
    """
    products = np.asarray(gram, np.float64)
    lengths = np.sqrt(products[..., 0, 0]) * np.sqrt(products[..., 1, 1])
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.clip(products[..., 0, 1] / lengths, -1.0, 1.0)
        theta = np.arccos(cosine)
        straight = (lengths == 0) | (np.abs(cosine) > parallel) | (np.sin(theta) == 0)
        first, second = (np.sin(part * theta) / np.sin(theta) for part in (1.0 - t, t))
    return np.stack([np.where(straight, 1.0 - t, first), np.where(straight, t, second)])


def direction_coefficients(
    gram: Sequence[Sequence[float]] | np.ndarray, weight: Sequence[float]
) -> np.ndarray:
    """Coefficients of the weighted mean direction, scaled to the weighted mean length.

    ``c_i = sum_j w_j |x_j| * (w_i / |x_i|) / |sum_j w_j x_j / |x_j||``. Where the directions cancel, the
    weights themselves.

    >>> direction_coefficients([[1.0, 0.0], [0.0, 4.0]], [0.5, 0.5]).round(4).tolist()
    [1.0607, 0.5303]
    """
    products, weights = np.asarray(gram, np.float64), np.asarray(weight, np.float64)
    lengths = np.sqrt(np.diagonal(products))
    shares = _over(weights, lengths)
    length = math.sqrt(max(float(shares @ products @ shares), 0.0))
    if length <= 1e-8 * np.abs(weights).sum():
        return weights
    return np.asarray(float(weights @ lengths) * shares / length)


def karcher_coefficients(
    gram: Sequence[Sequence[float]] | np.ndarray, weight: Sequence[float], steps: int, tolerance: float
) -> np.ndarray:
    """Coefficients of the weighted Riemannian mean of the directions, scaled to the weighted mean length.

    Starts at the mean direction m and goes along ``T = sum_i w_i * theta_i / sin(theta_i) * (u_i -
    cos(theta_i) m)``, at most ``steps`` times, until ``|T| < tolerance`` (radians). All vectors are
    combinations of the k inputs, so a step takes k x k numbers. Inputs of length 0 have no direction and
    count in the length alone.

    >>> karcher_coefficients([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5], 10, 1e-5).round(4).tolist()
    [0.7071, 0.7071]
    """
    products, weights = np.asarray(gram, np.float64), np.asarray(weight, np.float64)
    lengths = np.sqrt(np.diagonal(products))
    is_nonzero = lengths > 0
    total = float(weights[is_nonzero].sum())
    if not is_nonzero.any() or total == 0 or not np.isfinite(products).all():
        return weights
    shares = np.where(is_nonzero, weights, 0.0) / total
    cosines = _over(_over(products, lengths[:, None]), lengths)
    mean = shares.copy()
    mean /= math.sqrt(max(mean @ cosines @ mean, 1e-300))
    for _ in range(steps):
        along = np.clip(cosines @ mean, -1.0, 1.0)
        theta = np.arccos(along)
        pull = shares * np.where(
            np.sin(theta) > 0, theta / np.where(np.sin(theta) > 0, np.sin(theta), 1.0), 1.0
        )
        step = pull - float(pull @ along) * mean
        length = math.sqrt(max(float(step @ cosines @ step), 0.0))
        if length < tolerance:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * step
        mean /= math.sqrt(max(mean @ cosines @ mean, 1e-300))
    return np.asarray(float(weights @ lengths) * _over(mean, lengths))


def _over(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``values / lengths``, 0 where a length is 0."""
    result: Any = np.divide(
        values, lengths, out=np.zeros(np.broadcast_shapes(values.shape, lengths.shape)), where=lengths != 0
    )
    return np.asarray(result)
