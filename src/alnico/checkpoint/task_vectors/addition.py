"""Adds stored differences to a base in one pass over its bytes, compiled or with numpy: the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alnico.kernels.choice import kernel_for
from alnico.kernels.constants import CODES
from alnico.kernels.mix_kernel import MixKernel
from alnico.kernels.template import Real


def scaled_sum(x: Sequence[float], factor: float) -> float:
    """The base plus a multiple of the difference."""
    return x[0] + factor * x[1]


def between(x: Sequence[float], weight: float) -> float:
    """The base's value, moved towards the fine-tune's."""
    return x[0] + weight * (x[1] - x[0])


NO_BASE = np.empty(0, np.uint8)
KERNELS = {
    (mix, real): MixKernel(mix, 2, False, ("number",), real)
    for mix in (scaled_sum, between)
    for real in ("float32", "float64")
}


def combine(
    is_difference: bool,
    base: np.ndarray,
    base_dtype: str,
    added: np.ndarray,
    dtype: str,
    factor: float,
    out: np.ndarray,
) -> bool:
    """Fill ``out``, float32 or float64, from the raw bytes of the base and of what is added to it; return whether all is finite.

    ``added`` is a difference, which is multiplied by ``factor``, or the fine-tune's values.
    """
    real: Real = "float64" if out.dtype == np.float64 else "float32"
    kernel = kernel_for(KERNELS[scaled_sum if is_difference else between, real], out.size)
    codes = np.array([CODES[base_dtype], CODES[dtype]], np.int64)
    raw = out.view(np.uint8)
    return (
        kernel(
            (base, added),
            codes,
            NO_BASE,
            CODES["F32"],
            raw,
            CODES["F64" if real == "float64" else "F32"],
            0,
            0,
            factor,
        )
        < 0
    )
