"""The kernels that decode codes stored transposed: each element against its definition, compiled and with numpy."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import pytest

from alnico.kernels.transposed_kernel import Packing, TransposedBlocksKernel, TransposedKernel
from kernels.both_ways import in_both_ways

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28], np.uint32)
"""Where the codes of AWQ begin in a word, in the order of outputs."""


def random_words(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 1 << 32, shape, np.uint32)


@pytest.mark.parametrize("is_indexed", [False, True])
@pytest.mark.parametrize(("packing", "bits"), [("outputs", 4), ("inputs", 4), ("inputs", 8)])
@pytest.mark.parametrize(
    ("row", "rows", "column", "width", "group"),
    [(0, 136, 0, 600, 128), (3, 9, 34, 37, 32), (17, 1, 2, 300, 600), (8, 70, 254, 4, 6)],
)
def test_an_element_is_its_code_less_zero_times_scale(
    packing: Packing, bits: Literal[4, 8], is_indexed: bool, row: int, rows: int, column: int, width: int, group: int
) -> None:  # fmt: skip
    random = np.random.default_rng(0)
    outputs, inputs, per = 136, 600, 32 // bits
    words = random_words((inputs, outputs // per) if packing == "outputs" else (inputs // per, outputs))
    groups = -(-inputs // group)
    zeros = random.integers(0, 1 << bits, (outputs, groups)).astype(np.float32)
    scales = random.standard_normal((outputs, groups)).astype(np.float32)
    index = random.integers(0, groups, inputs if is_indexed else 0).astype(np.uint32)
    expected = np.empty((rows, width), np.float32)
    for r in range(rows):
        for c in range(width):
            o, i = row + r, column + c
            if packing == "outputs":
                code = int(words[i, o // per]) >> int(SHIFTS[o % per])
            else:
                code = int(words[i // per, o]) >> bits * (i % per)
            g = int(index[i]) if is_indexed else i // group
            expected[r, c] = np.float32(np.float32(code & (1 << bits) - 1) - zeros[o, g]) * scales[o, g]
    out = np.empty_like(expected)
    run = in_both_ways(cast(Any, TransposedKernel(packing, bits, is_indexed)))
    run(words, SHIFTS, zeros, scales, index, group, row, column, out)
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("row", "rows", "column", "width"), [(0, 96, 0, 130), (31, 2, 5, 64), (70, 3, 129, 1), (32, 32, 3, 100)]
)
def test_an_element_of_experts_is_its_code_times_a_power_of_two(
    row: int, rows: int, column: int, width: int
) -> None:
    inputs, outputs = 96, 130
    words = random_words((outputs, inputs // 8))
    scales = np.exp2(np.random.default_rng(0).integers(-127, 120, (inputs // 32, outputs))).astype(np.float32)
    expected = np.empty((rows, width), np.float32)
    for r in range(rows):
        for c in range(width):
            i, o = row + r, column + c
            code = int(words[o, i // 8]) >> 4 * (i % 8) & 15
            value = E2M1[code & 7] * (-1.0 if code & 8 else 1.0)
            expected[r, c] = np.float32(value) * scales[i // 32, o]
    out = np.empty_like(expected)
    in_both_ways(cast(Any, TransposedBlocksKernel()))(words, scales, row, column, out)
    assert out.tobytes() == expected.tobytes()
