"""What the texts of all kernels share: their first lines, the kinds of their arguments, and their types."""

from __future__ import annotations

from typing import Any, Literal

Kind = Literal["number", "numbers", "noise", "bernoulli"]
"""What an argument is to a kernel: one number; one a model; uniform noise; draws of 1.0 or 0.0."""

Real = Literal["float32", "float64"]

DECORATOR = '@njit({options}nogil=True, error_model="numpy")'
PREAMBLE = """\
import math

import numpy as np
from numba import njit
from alnico.kernels.tiles import decode{bits} as decode, encode{bits} as encode, fill_noise, select

REAL = np.float{bits}
ZERO = REAL(0.0)
ONE = REAL(1.0)
"""


def argument_types(kinds: tuple[Kind, ...], numbers: Any, number: Any, keys: Any) -> list[Any]:
    """The numba types of a kernel's arguments, in order; noise has a number (or numbers) and a key (or keys)."""
    flat: list[Any] = []
    for kind in kinds:
        flat += [number] if kind == "number" else [numbers]
        flat += [keys] if kind in ("noise", "bernoulli") else []
    return flat
