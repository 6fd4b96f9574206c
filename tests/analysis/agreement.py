"""Holds an analysis against the reference: counts are equal, float64 sums as near as another order of adding allows."""

from __future__ import annotations

import math

from alnico.analysis.results import QUANTILE_ERROR, Analysis, DeltaStatistics, Pair, ScopeStatistics, Subspace

SUMS = 1e-11
"""How far float64 sums in another order may be apart, of themselves."""

LEAST = 2.0**-133
"""Entries below it count as 0 in the quantiles of groups."""

FEW = 1000
"""Elements below which quantiles are not close to the entries beside them."""


def agree(found: Analysis, expected: Analysis) -> None:
    assert found.top_share == expected.top_share
    assert {(s.tensor, s.model, s.elements) for s in found.skipped} == {
        (s.tensor, s.model, s.elements) for s in expected.skipped
    }
    same_scope(found.whole, expected.whole, QUANTILE_ERROR)
    for ours, theirs in ((found.groups, expected.groups), (found.layers, expected.layers)):
        assert set(ours) == set(theirs)
        for key in theirs:
            same_scope(ours[key], theirs[key], QUANTILE_ERROR)
    assert [t.name for t in found.tensors] == [t.name for t in expected.tensors]
    for one, other in zip(found.tensors, expected.tensors, strict=True):
        assert (one.shape, one.group, one.layer, one.module) == (
            other.shape,
            other.group,
            other.layer,
            other.module,
        )
        same_scope(one, other, 2**-24 if one.dtype == "F64" else 0.0)


def same_scope(found: ScopeStatistics, expected: ScopeStatistics, error: float) -> None:
    where = found.name
    assert len(found.changes) == len(expected.changes)
    for one, other in zip(found.changes, expected.changes, strict=True):
        assert (one is None) == (other is None), where
        if one is not None and other is not None:
            same_change(one, other, error, where)
    assert [p.models for p in found.pairs] == [p.models for p in expected.pairs], where
    for ours, theirs in zip(found.pairs, expected.pairs, strict=True):
        same_pair(ours, theirs, expected, where)
    assert found.sign_conflict == expected.sign_conflict, where
    near(found.cancelled, expected.cancelled, 0.0, SUMS, f"{where}: cancelled")


def near(found: float | None, expected: float | None, relative: float, absolute: float, where: str) -> None:
    assert (found is None) == (expected is None), f"{where}: {found}, expected {expected}"
    if found is not None and expected is not None:
        assert math.isclose(found, expected, rel_tol=relative, abs_tol=absolute), (
            f"{where}: {found}, expected {expected}"
        )


def same_change(found: DeltaStatistics, expected: DeltaStatistics, error: float, where: str) -> None:
    assert (found.elements, found.unchanged) == (expected.elements, expected.unchanged), where
    for name in ("l1", "l2", "relative_l1", "relative_l2"):
        near(getattr(found, name), getattr(expected, name), SUMS, 0.0, f"{where}: {name}")
    near(found.max_abs, expected.max_abs, 2**-24 if error else 0.0, 0.0, f"{where}: max_abs")
    assert math.copysign(1.0, found.max_abs) > 0, where
    near(found.mean, expected.mean, SUMS, SUMS * expected.max_abs, f"{where}: mean")
    near(found.std, expected.std, 1e-9, SUMS * expected.max_abs, f"{where}: std")
    near(found.skewness, expected.skewness, 1e-8, 1e-8, f"{where}: skewness")
    near(found.excess_kurtosis, expected.excess_kurtosis, 1e-8, 1e-8, f"{where}: excess_kurtosis")
    near(found.effective_sparsity, expected.effective_sparsity, 0.0, SUMS, f"{where}: effective_sparsity")
    for at, (one, other) in enumerate(zip(found.quantiles, expected.quantiles, strict=True)):
        is_end = at in (0, len(found.quantiles) - 1)
        held = min(error, 2**-24) if is_end else error
        # Between few entries a quantile may be far smaller than those it is interpolated from, which the error is of.
        absolute = ((held if found.elements < FEW else 0.0) + 1e-15) * expected.max_abs + (
            LEAST if error else 0.0
        )
        near(one, other, held, absolute, f"{where}: quantile {at}")


def same_pair(found: Pair, expected: Pair, scope: ScopeStatistics, where: str) -> None:
    for name in ("sign_conflict", "top_overlap", "top_sign_conflict"):
        assert getattr(found, name) == getattr(expected, name), f"{where}: {name} of {found.models}"
    near(found.cosine, expected.cosine, 0.0, SUMS, f"{where}: cosine")
    near(
        found.weighted_sign_conflict,
        expected.weighted_sign_conflict,
        0.0,
        SUMS,
        f"{where}: weighted_sign_conflict",
    )
    sizes = [c.l2 for i in found.models if (c := scope.changes[i]) is not None]
    near(found.distance, expected.distance, 1e-9, 1e-7 * max(sizes), f"{where}: distance")
    same_subspace(found.subspace, expected.subspace, where)


def same_subspace(found: Subspace | None, expected: Subspace | None, where: str) -> None:
    assert (found is None) == (expected is None), f"{where}: {found}, expected {expected}"
    if found is not None and expected is not None:
        assert (found.rank, found.matrices) == (expected.rank, expected.matrices), where
        near(found.left, expected.left, 0.0, 1e-6, f"{where}: left")
        near(found.right, expected.right, 0.0, 1e-6, f"{where}: right")
