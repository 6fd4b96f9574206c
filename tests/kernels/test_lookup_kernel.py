"""The kernel that decodes codes by a table: each element against its definition, compiled and with numpy."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from alnico.kernels.lookup_kernel import CodeOrder, IndexedKernel, LookupKernel
from kernels.both_ways import in_both_ways


@pytest.mark.parametrize("order", ["byte", "low half first", "high half first"])
@pytest.mark.parametrize(
    ("rows", "columns", "group", "offset"), [(3, 64, 16, 0), (2, 37, 32, 6), (1, 1, 8, 0), (4, 130, 130, 0)]
)
def test_an_element_is_the_value_of_its_code_less_zero_times_scale(
    order: CodeOrder, rows: int, columns: int, group: int, offset: int
) -> None:
    random = np.random.default_rng(0)
    is_byte = order == "byte"
    codes = random.integers(0, 256, (rows, columns if is_byte else -(-columns // 2))).astype(np.uint8)
    table = random.standard_normal(256 if is_byte else 16).astype(np.float32)
    groups = -(-(columns + offset) // group)
    zeros, scales = (random.standard_normal((rows, groups)).astype(np.float32) for _ in range(2))
    expected = np.empty((rows, columns), np.float32)
    for r in range(rows):
        for c in range(columns):
            if is_byte:
                code = int(codes[r, c])
            else:
                is_high = (c % 2 == 1) == (order == "low half first")
                code = int(codes[r, c // 2]) >> (4 if is_high else 0) & 15
            g = (c + offset) // group
            expected[r, c] = np.float32(table[code] - zeros[r, g]) * scales[r, g]
    out = np.empty_like(expected)
    in_both_ways(cast(Any, LookupKernel(order)))(codes, table, zeros, scales, group, offset, out)
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("order", ["byte", "low half first", "high half first"])
@pytest.mark.parametrize(("rows", "columns"), [(3, 64), (2, 37), (1, 1)])
def test_a_column_may_name_its_group(order: CodeOrder, rows: int, columns: int) -> None:
    random = np.random.default_rng(0)
    is_byte = order == "byte"
    codes = random.integers(0, 256, (rows, columns if is_byte else -(-columns // 2))).astype(np.uint8)
    table = random.standard_normal(256 if is_byte else 16).astype(np.float32)
    zeros, scales = (random.standard_normal((rows, 5)).astype(np.float32) for _ in range(2))
    index = random.integers(0, 5, columns).astype(np.uint32)
    expected = np.empty((rows, columns), np.float32)
    for r in range(rows):
        for c in range(columns):
            is_high = (c % 2 == 1) == (order == "low half first")
            code = codes[r, c] if is_byte else int(codes[r, c // 2]) >> (4 if is_high else 0) & 15
            expected[r, c] = np.float32(table[code] - zeros[r, index[c]]) * scales[r, index[c]]
    out = np.empty_like(expected)
    in_both_ways(cast(Any, IndexedKernel(order)))(codes, table, zeros, scales, index, out)
    assert out.tobytes() == expected.tobytes()
