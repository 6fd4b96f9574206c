"""The kernel that selects a kth largest value: against sorting, compiled and with numpy."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from alnico.kernels.build import compile_kernel
from alnico.kernels.choice import Interpreted
from alnico.kernels.selection_kernel import SelectionKernel
from alnico.kernels.template import Real


def rows(real: Real, size: int) -> np.ndarray:
    """Values that are not negative: spread over all exponents, few that are different, equal ones, and special ones."""
    random = np.random.default_rng(size)
    spread = np.abs(random.standard_normal(size)) * 10.0 ** random.uniform(-30, 30, size)
    few = np.round(np.abs(random.standard_normal(size)), 1)
    special = random.choice([0.0, -0.0, 1e-45, 1.0, np.inf, np.nan, -np.nan], size)
    return np.stack([spread, few, np.full(size, 0.7), special]).astype(real)


@pytest.mark.parametrize("real", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 2, 7, 1000, 4097])
def test_the_value_at_each_place_is_that_of_the_sorted_row(real: Real, size: int) -> None:
    values = rows(real, size)
    bits = values.view(f"u{values.itemsize}")
    kernel = cast(Any, SelectionKernel(real))
    for share in (0.0, 0.001, 0.2, 0.5, 0.93, 1.0):
        place = min(size - 1, int(share * size))
        expected = np.sort(values, axis=1)[:, place]
        for run in (compile_kernel(kernel), Interpreted(kernel)):
            out = np.empty(len(values), bits.dtype)
            run(bits, np.full(len(values), place), np.empty(size, bits.dtype), out)
            np.testing.assert_array_equal(out.view(real), expected)
