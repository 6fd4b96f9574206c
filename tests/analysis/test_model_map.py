"""The map of models: distances and angles against numpy in float64."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np
import pytest
from made_analyses import made_analysis

from alnico.analysis.map_section import map_section, map_words
from alnico.analysis.model_map import ModelMap, map_models
from alnico.analysis.results import Analysis
from analysis.reference import reference_analysis

RANDOM = np.random.default_rng(20)
SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (24, 8),
    "model.layers.1.mlp.up_proj.weight": (24, 8),
    "norm.weight": (8,),
}
BASE = {name: RANDOM.standard_normal(shape) for name, shape in SHAPES.items()}
DELTAS = [{n: 0.1 * (i + 1) * RANDOM.standard_normal(s) for n, s in SHAPES.items()} for i in range(5)]


def analysis_of(*deltas: dict[str, np.ndarray]) -> Analysis:
    models = {f"m{i}": {n: BASE[n] + delta[n] for n in SHAPES} for i, delta in enumerate(deltas)}
    return reference_analysis(BASE, models)


def mixed(*weights: float, noise: float = 0.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        n: sum(w * d[n] for w, d in zip(weights, DELTAS, strict=False))
        + noise * rng.standard_normal(SHAPES[n])
        for n in SHAPES
    }


def flat(delta: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([delta[n].ravel() for n in SHAPES])


def placed(places: ModelMap) -> np.ndarray:
    return np.array([[p.x, p.y] for p in places.points])


def test_in_the_plane_of_two_all_distances_are_exact_and_the_merges_is_stated() -> None:
    merge = mixed(0.7, 0.4, noise=0.05)
    places = map_models(analysis_of(*DELTAS[:2], merge), merged=2)
    vectors = [flat(d) for d in (*DELTAS[:2], merge)]
    at = placed(places)
    assert places.kind == "plane"
    assert places.spanned_by == ("m0", "m1")
    assert [p.role for p in places.points] == ["model", "model", "merged"]
    assert np.hypot(*at[0]) == pytest.approx(np.linalg.norm(vectors[0]), rel=1e-12)
    assert np.hypot(*at[1]) == pytest.approx(np.linalg.norm(vectors[1]), rel=1e-12)
    assert np.linalg.norm(at[0] - at[1]) == pytest.approx(np.linalg.norm(vectors[0] - vectors[1]), rel=1e-12)
    assert at[0, 1] == 0
    assert at[1, 1] > 0
    basis, _ = np.linalg.qr(np.stack(vectors[:2]).T)
    inside = basis @ (basis.T @ vectors[2])
    assert places.points[2].outside == pytest.approx(np.linalg.norm(vectors[2] - inside), rel=1e-9)
    assert np.hypot(*at[2]) == pytest.approx(np.linalg.norm(inside), rel=1e-12)
    for other in (0, 1):
        assert np.linalg.norm(at[2] - at[other]) == pytest.approx(
            np.linalg.norm(inside - vectors[other]), rel=1e-10
        )
    assert all(p.outside == 0 for p in places.points[:2])
    assert "off the plane" in map_words(places)[0]


def test_a_merge_within_the_plane_is_at_its_weights_and_at_distance_0() -> None:
    places = map_models(analysis_of(*DELTAS[:2], mixed(0.5, -0.25)), merged=2)
    at = placed(places)
    assert at[2] == pytest.approx(0.5 * at[0] - 0.25 * at[1], rel=1e-9)
    assert places.points[2].outside == 0
    assert "m2 is in the plane." in map_words(places)[0]


def test_of_more_models_the_plane_is_that_of_the_largest_singular_values() -> None:
    merge = mixed(0.2, 0.2, 0.2, 0.2)
    places = map_models(analysis_of(*DELTAS[:4], merge), merged=4)
    vectors = np.stack([flat(d) for d in DELTAS[:4]])
    _, values, directions = np.linalg.svd(vectors, full_matrices=False)
    assert places.kind == "directions"
    assert places.share == pytest.approx((values[:2] ** 2).sum() / (values**2).sum(), rel=1e-12)
    expected = np.stack([*vectors, flat(merge)]) @ directions[:2].T
    at = placed(places)
    assert np.abs(at) == pytest.approx(np.abs(expected), rel=1e-9, abs=1e-12)
    for one, other in combinations(range(5), 2):
        assert at[one] @ at[other] == pytest.approx(expected[one] @ expected[other], rel=1e-8, abs=1e-12)
    assert at[:4].sum(axis=0).min() > 0  # a direction has no sign of its own
    outside = np.sqrt((np.stack([*vectors, flat(merge)]) ** 2).sum(axis=1) - (expected**2).sum(axis=1))
    assert [p.outside for p in places.points] == pytest.approx(outside.tolist(), rel=1e-9)


def test_without_two_directions_the_map_is_a_line() -> None:
    doubled = {n: 2 * d for n, d in DELTAS[0].items()}
    still = {n: np.zeros(s) for n, s in SHAPES.items()}
    for deltas, expected in (
        ([DELTAS[0]], 1),
        ([DELTAS[0], doubled], 2),
        ([still, DELTAS[0]], 2),
        ([still, still], 2),
    ):
        places = map_models(analysis_of(*deltas))
        assert places.kind == "line"
        assert len(places.points) == expected
        assert [p.x for p in places.points] == pytest.approx([np.linalg.norm(flat(d)) for d in deltas])
        assert all(p.y == 0 and p.outside == 0 for p in places.points)
    assert map_section(map_models(analysis_of(DELTAS[0]))) is None
    assert map_section(map_models(analysis_of(still, still))) is None


def test_one_parent_and_its_merge_span_the_plane() -> None:
    places = map_models(analysis_of(DELTAS[0], DELTAS[1]), merged=1)
    assert (places.kind, places.points[1].outside) == ("plane", 0)


def test_only_tensors_that_all_models_have_count_and_a_model_without_any_is_left_out() -> None:
    analysis = analysis_of(*DELTAS[:3])
    first, *others = analysis.tensors
    halved = dataclasses.replace(first, changes=(*first.changes[:2], None), pairs=first.pairs[:1])
    places = map_models(dataclasses.replace(analysis, tensors=(halved, *others)))
    assert (places.tensors, places.all_tensors) == (2, 3)
    rest = np.concatenate([DELTAS[0][n].ravel() for n in SHAPES if n != first.name])
    assert places.points[0].length == pytest.approx(np.linalg.norm(rest))
    assert "Only the 2 tensors of 3" in map_words(places)[0]
    none = tuple(
        dataclasses.replace(t, changes=(*t.changes[:2], None), pairs=t.pairs[:1]) for t in analysis.tensors
    )
    places = map_models(dataclasses.replace(analysis, tensors=none))
    assert [p.name for p in places.points] == ["m0", "m1"]
    assert places.left_out == ("m2",)


@pytest.mark.parametrize("models", [1, 2, 8, 12])
def test_inner_products_that_fit_no_vectors_still_give_numbers(models: int) -> None:
    places = map_models(made_analysis(models, 2))
    assert np.isfinite(placed(places)).all()
    assert places.share is None or 0 < places.share <= 1
