"""Turns the shape of a learning-rate decay into the coefficients of an average of checkpoints.

Let a run at a constant learning rate save checkpoints theta_0, ..., theta_{n-1}, and let u_i = theta_i - theta_{i-1} be what
it changed before checkpoint i. A decayed rate would have made the same changes smaller, the later the more:
``theta_0 + sum_{i=1}^{n-1} w_i u_i`` with 1 >= w_1 >= w_2 >= ... >= 0. Putting the u_i in gives an average,

    sum_j c_j theta_j   with   c_j = w_j - w_{j+1},   w_0 = 1,   w_n = 0,

since theta_j has u_i for all i <= j, so that u_i has the sum of c_j over j >= i, which is w_i. The coefficients sum to w_0.
With w_j = f(j / n), where f falls from f(0) = 1 to f(1) = 0, every shape of a decay is an average. The linear decay
f(t) = 1 - t gives c_j = 1 / n, the plain mean; f(t) = 1 - sqrt(t) gives c_j = (sqrt(j + 1) - sqrt(j)) / sqrt(n), which is
largest for the oldest checkpoint.

The formula is derived here, and is that of Tian et al. 2025, WSM, https://arxiv.org/abs/2507.17634, section 3. The weights of
``ema`` and ``wma`` are those of Li et al. 2025, PMA, https://arxiv.org/abs/2505.12082, section 3, written as such a decay.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

DEFAULT_DECAY = 0.8
"""How much of the moving average of ``ema`` is kept with each checkpoint."""

DECAYS: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
        "1-sqrt": lambda t: 1 - math.sqrt(t),
    }
)
"""f by the name of a decay whose coefficients are differences."""

SHAPES = ("uniform", "linear", *DECAYS, "ema", "wma")
"""The names of all shapes."""


@functools.lru_cache(maxsize=16)  # a plan asks for each model of each tensor
def decay_coefficients(shape: str, checkpoints: int, decay: float = DEFAULT_DECAY) -> tuple[float, ...]:
    """Return the coefficient of each checkpoint, the oldest first. They sum to 1.

    - ``uniform``, ``linear``: 1 / n each, the plain mean, which emulates a linear decay (SMA, SWA, LAWA)
    - ``cosine``: from f(t) = (1 + cos(pi t)) / 2; largest in the middle
    - ``1-sqrt``: from f(t) = 1 - sqrt(t); largest for the oldest
    - ``ema``: the average A_j = decay A_{j-1} + (1 - decay) theta_j that begins with A_0 = theta_0, so that w_j = 1 - decay^(n-j)
      for j >= 1; the oldest has decay^(n-1)
    - ``wma``: 1, 2, ..., n, divided by their sum, so that w_j = 1 - j (j + 1) / (n (n + 1))

    >>> decay_coefficients("linear", 4), decay_coefficients("ema", 3, decay=0.5), decay_coefficients("wma", 4)
    ((0.25, 0.25, 0.25, 0.25), (0.25, 0.25, 0.5), (0.1, 0.2, 0.3, 0.4))
    >>> [f"{c:.4f}" for c in decay_coefficients("1-sqrt", 4)], [f"{c:.4f}" for c in decay_coefficients("cosine", 4)]
    (['0.5000', '0.2071', '0.1589', '0.1340'], ['0.1464', '0.3536', '0.3536', '0.1464'])
    """
    n = checkpoints
    if shape in ("uniform", "linear"):
        return (1 / n,) * n
    if shape == "ema":
        return (decay ** (n - 1), *((1 - decay) * decay ** (n - 1 - j) for j in range(1, n)))
    if shape == "wma":
        return tuple(2 * (j + 1) / (n * (n + 1)) for j in range(n))
    f = DECAYS[shape]
    return differences(tuple(f(j / n) for j in range(n)))


@functools.lru_cache(maxsize=16)
def differences(decay: tuple[float, ...]) -> tuple[float, ...]:
    """Return c_j = w_j - w_{j+1} for the w_j of all checkpoints, the oldest first; after the last one w is 0.

    >>> differences((1.0, 0.75, 0.25))
    (0.25, 0.5, 0.25)
    """
    return tuple(a - b for a, b in zip(decay, (*decay[1:], 0.0), strict=True))
