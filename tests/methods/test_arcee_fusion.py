"""Arcee Fusion's numbers: exact quartiles, rows of one element, values far apart; and the functions it is made of."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from alnico.kernels.build import compile_kernel
from alnico.kernels.constants import CODES, LEAF
from alnico.kernels.measure_kernels import MeasureKernel
from alnico.methods.shared.exponential import exponential, logarithm
from methods.merging import merge_arrays
from references import arcee_fusion_exact as exact
from references.arcee_fusion import importance_of


def test_quartiles_are_of_all_elements(tmp_path: Path) -> None:
    """More than a million, of which a sample would not find the same limit."""
    random = np.random.default_rng(4)
    base = random.standard_normal((1030, 1024)).astype(np.float32)
    tuned = base + 1e-3 * random.standard_normal(base.shape).astype(np.float32)
    merged = merge_arrays(tmp_path, "arcee_fusion", {}, [{"w": base}, {"w": tuned}], {})["w"]
    importance, limit = importance_of([base.astype(np.float64), tuned.astype(np.float64)])
    decided = np.abs(importance - limit) > 1e-6 * limit
    assert (~decided).sum() <= 20
    assert np.array_equal(merged[decided], np.where(importance >= limit, tuned, base)[decided])
    assert 0.02 < (importance >= limit).mean() < 0.3


def test_rows_of_one_element_have_no_divergence_and_are_taken_whole(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    base, tuned = (random.standard_normal((50, 1)).astype(np.float32) for _ in range(2))
    merged = merge_arrays(tmp_path, "arcee_fusion", {}, [{"w": base}, {"w": tuned}], {})["w"]
    assert np.array_equal(merged, tuned)


def test_rows_far_apart_do_not_overflow(tmp_path: Path) -> None:
    """Values of thousands, as the running variances of BatchNorm are: a row's largest value is taken away first."""
    random = np.random.default_rng(6)
    base = (random.standard_normal((6, 40)) + np.array([0, 1e3, -1e3, 5e3, -5e3, 1e4])[:, None]).astype(
        np.float32
    )
    tuned = base + 0.3 * random.standard_normal(base.shape).astype(np.float32)
    merged = merge_arrays(tmp_path, "arcee_fusion", {}, [{"w": base}, {"w": tuned}], {})["w"]
    importance, limit = importance_of([base.astype(np.float64), tuned.astype(np.float64)])
    assert np.array_equal(merged, np.where(importance >= limit, tuned, base))


@pytest.mark.parametrize("apart", [650.0, 670.0, 705.0, 720.0, 1e4, -690.0, -706.0, -1e5])
def test_rows_of_the_two_models_far_apart_have_a_divergence(tmp_path: Path, apart: float) -> None:
    random = np.random.default_rng(7)
    base = random.standard_normal((12, 40)).astype(np.float32)
    tuned = base + 0.3 * random.standard_normal(base.shape).astype(np.float32)
    tuned[::4] += apart
    tuned[1::4, 3] += apart
    merged = merge_arrays(tmp_path, "arcee_fusion", {}, [{"w": base}, {"w": tuned}], {})["w"]
    importance, limit = exact.importance_of([base.astype(np.longdouble), tuned.astype(np.longdouble)])
    decided = np.abs(importance - limit) > 1e-9 * limit
    assert decided.mean() > 0.9
    assert np.array_equal(merged[decided], np.where(importance >= limit, tuned, base)[decided])


def test_the_exponential_is_right_to_two_units_in_the_last_place() -> None:
    random = np.random.default_rng(7)
    for x in [-708.0 * float(r) ** 3 for r in random.random(500)]:
        assert abs(Fraction(exponential(x)) / Fraction(math.exp(x)) - 1) <= Fraction(4.5e-16)
    assert exponential(-708.5) == exponential(-math.inf) == 0.0
    assert exponential(0.0) == 1.0


def test_the_logarithm_is_right_to_two_units_in_the_last_place() -> None:
    x = np.exp(np.random.default_rng(8).uniform(-300, 300, 500))
    assert (
        max(abs(a - math.log(b)) / abs(math.log(b)) for a, b in zip(logarithm(x), x, strict=True)) <= 4.5e-16
    )
    near = 1 + np.random.default_rng(9).uniform(-1e-6, 1e-6, 500)
    assert max(abs(a - math.log1p(b)) for a, b in zip(logarithm(near), near - 1, strict=True)) <= 1e-21


def own(x):
    return x


@pytest.mark.parametrize(("reduction", "reduce"), [("sum of rows", math.fsum), ("largest of rows", max)])
def test_a_reduction_of_rows_is_of_the_part_of_each_row_in_each_leaf(reduction: str, reduce) -> None:
    row, start, count = 700, 3 * LEAF, LEAF + 5000
    values = np.random.default_rng(10).standard_normal((2, count)).astype(np.float32) - 9
    segment = np.array([e // row + e // LEAF for e in range(start, start + count)])
    parts = np.zeros((2, segment[-1] - segment[0] + 1))
    codes = np.array([CODES["F32"]] * 2, np.int64)
    run = compile_kernel(MeasureKernel(reduction, own, 2, False, (), "float32"))  # type: ignore[arg-type]
    run(
        tuple(v.view(np.uint8) for v in values),
        codes,
        np.empty(0, np.uint8),
        0,
        start,
        np.arange(2),
        row,
        parts,
    )
    for found, own_values in zip(parts, values.astype(np.float64), strict=True):
        expected = [reduce(own_values[segment == s]) for s in range(segment[0], segment[-1] + 1)]
        assert found == pytest.approx(expected, rel=1e-14)
