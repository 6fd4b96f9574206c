"""Every method agrees with its paper, written plainly in float64 in tests/references, on continuous inputs."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from alnico.methods import registry
from alnico.testing import MethodCase, check_reference
from methods import sides
from methods.cases import BY_NOISE, SETTINGS, counts, options
from methods.merging import merge_arrays
from references import noise

SHAPES = {"a.weight": (37, 129), "b.weight": (8, 4, 3, 3), "c.bias": (1000,), "d.weight": (300, 257)}
TOLERANCE = 2e-6


def made(count: int, seed: int = 0) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    random = np.random.default_rng(seed)
    base = {n: random.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    return base, [
        {
            n: v + (0.1 + 0.05 * i) * random.standard_normal(v.shape).astype(np.float32)
            for n, v in base.items()
        }
        for i in range(count)
    ]


QUICKLY_LEFT = (1,)
"""Numbers of models left to ./check --all: each is a compilation of its own."""

CASES = [
    pytest.param(
        name,
        setting,
        count,
        id=f"{name}-{i}-k{count}",
        marks=[pytest.mark.slow] if count in QUICKLY_LEFT else [],
    )
    for name in registry()
    for i, setting in enumerate(SETTINGS.get(name, [None]))
    for count in counts(name)
]


@pytest.mark.parametrize(("name", "setting", "count"), CASES)
def test_a_method_agrees_with_its_reference(
    name: str, setting: dict | None, count: int, tmp_path: Path
) -> None:
    assert setting is not None, f"add settings for {name} to tests/methods/cases.py"
    reference = importlib.import_module(f"references.{name}")
    # Drawing 77,100 numbers in Python integers for 8 models takes seconds; the other tensors show the noise.
    shapes = {n: s for n, s in SHAPES.items() if not (name in BY_NOISE and s == (300, 257))}
    draw = noise.uniform if name in BY_NOISE else lambda *_: None
    check_reference(
        MethodCase(registry()[name], options(setting, count), count, sides.made),
        tmp_path,
        reference.merge,
        tolerance=TOLERANCE,
        undecided=getattr(reference, "undecided", None),
        shapes=shapes,
        draw=draw,
    )


@pytest.mark.parametrize(
    ("name", "setting"), [(n, s) for n in ("nuslerp", "multislerp") for s in SETTINGS[n]]
)
def test_without_a_base_the_values_are_the_parameters(name: str, setting: dict, tmp_path: Path) -> None:
    reference = importlib.import_module(f"references.{name}")
    _, models = made(2)
    merged = merge_arrays(tmp_path, name, {}, models, options(setting, 2))
    for tensor in SHAPES:
        expected = reference.merge(
            [m[tensor].astype(np.float64) for m in models], None, options(setting, 2), None
        )
        assert np.abs(merged[tensor] - expected).max() / np.abs(expected).max() <= TOLERANCE, tensor


def test_every_method_has_a_reference_that_imports_nothing_of_alnico() -> None:
    for name in registry():
        text = (Path(__file__).parent.parent / "references" / f"{name}.py").read_text()
        assert "alnico" not in text


def test_slerp_of_far_apart_models_takes_the_arc(tmp_path: Path) -> None:
    # Two orthogonal unit vectors: half way the arc gives cos 45 degrees of each, the straight line one half.
    a, b = np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32)
    a[0, 0] = b[1, 3] = 1.0
    merged = merge_arrays(tmp_path, "slerp", {}, [{"w": a}, {"w": b}], {"t": 0.5})["w"]
    assert merged[0, 0] == pytest.approx(np.sqrt(0.5), rel=1e-7)
    assert merged[1, 3] == pytest.approx(np.sqrt(0.5), rel=1e-7)


def test_multislerp_with_a_base_is_the_mean_direction_at_the_mean_norm(tmp_path: Path) -> None:
    """As model_stock's documentation says; some texts call this Model Stock."""
    base, models = made(3)
    merged = merge_arrays(tmp_path, "multislerp", base, models, {})
    for tensor in SHAPES:
        deltas = [m[tensor].astype(np.float64) - base[tensor] for m in models]
        norms = [np.linalg.norm(d) for d in deltas]
        direction = sum(d / n for d, n in zip(deltas, norms, strict=True))
        expected = base[tensor] + np.mean(norms) * direction / np.linalg.norm(direction)
        np.testing.assert_allclose(merged[tensor], expected, rtol=0, atol=TOLERANCE, err_msg=tensor)
    assert "``multislerp`` with a ``base_model``" in registry()["model_stock"].documentation


def test_ties_gives_the_numbers_of_a_hand_made_example(tmp_path: Path) -> None:
    # density 2/5 keeps 2 of 5; column 0: +4 and -3 elect plus, mean of agreeing is 4; column 1: kept by the second alone.
    base = np.zeros(5, np.float32)
    one = np.array([4.0, 0.1, -3.0, 0.2, 0.0], np.float32)
    two = np.array([-3.0, 2.0, 0.5, 0.1, 0.0], np.float32)
    merged = merge_arrays(tmp_path, "ties", {"w": base}, [{"w": one}, {"w": two}], {"density": [0.4, 0.4]})[
        "w"
    ]
    assert merged.tolist() == [4.0, 2.0, -3.0, 0.0, 0.0]


TIED = [[2.0, -2.0, 3.0, -3.0, 0.0], [-3.0, 4.0, 3.0, -3.0, 0.0]]
"""Two task vectors that disagree in their first two entries: one vote each."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # Yadav et al., algorithm 1: sgn(0) is 0, no kept entry has that sign, and nothing is added.
        ({"elect": "count"}, [0.0, 0.0, 3.0, -3.0, 0.0]),
        ({"elect": "count", "tie": "none"}, [0.0, 0.0, 3.0, -3.0, 0.0]),
        ({"elect": "count", "tie": "plus"}, [2.0, 4.0, 3.0, -3.0, 0.0]),
        ({"weight": [3.0, 2.0], "tie": "none"}, [0.0, 4.0, 3.0, -3.0, 0.0]),
        ({"weight": [3.0, 2.0]}, [2.0, 4.0, 3.0, -3.0, 0.0]),
    ],
)
@pytest.mark.parametrize("name", ["ties", "dare_ties", "della", "breadcrumbs_ties"])
def test_a_tied_vote_elects_what_is_asked_for(
    name: str, given: dict, expected: list[float], tmp_path: Path
) -> None:
    models = [{"w": np.array(v, np.float32)} for v in TIED]
    merged = merge_arrays(
        tmp_path, name, {"w": np.zeros(5, np.float32)}, models, {"divide": "weight", **given}
    )["w"]
    assert merged.tolist() == expected


def test_ties_preset_of_the_paper_elects_no_sign_on_a_tie(tmp_path: Path) -> None:
    base = {"w": np.zeros(4, np.float32)}
    models = [{"w": np.array(v, np.float32)} for v in ([2.0, 2.0, 1.0, 0.0], [-2.0, 1.0, 1.0, 0.0])]
    assert merge_arrays(tmp_path, "ties", base, models, {"density": [1.0, 1.0]}, keys={"preset": "paper"})[
        "w"
    ].tolist() == [
        0.0,
        1.5,
        1.0,
        0.0,
    ]


def test_ties_keeps_all_entries_equal_to_the_threshold(tmp_path: Path) -> None:
    base, one = np.zeros(8, np.float32), np.full(8, 0.5, np.float32)
    merged = merge_arrays(tmp_path, "ties", {"w": base}, [{"w": one}], {"density": [0.25]})["w"]
    assert merged.tolist() == [0.5] * 8


def test_dare_keeps_the_share_and_the_sum_of_magnitudes(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    base = random.standard_normal((400, 500)).astype(np.float32)
    one = base + random.standard_normal(base.shape).astype(np.float32)
    merged = merge_arrays(tmp_path, "dare_linear", {"w": base}, [{"w": one}], {"density": [0.3]})["w"]
    change = merged.astype(np.float64) - base
    kept = (change != 0).mean()
    # Three standard deviations of a Bernoulli mean over 200,000 draws.
    assert abs(kept - 0.3) < 3 * np.sqrt(0.3 * 0.7 / base.size)
    assert np.abs(change).sum() == pytest.approx(np.abs(one.astype(np.float64) - base).sum(), rel=1e-5)


def test_another_seed_drops_other_entries(tmp_path: Path) -> None:
    base, models = made(1)
    masks = []
    for seed in (0, 1):
        merged = merge_arrays(tmp_path, "dare_linear", base, models, {"density": [0.5]}, keys={"seed": seed})
        masks.append(merged["d.weight"] != base["d.weight"])
    assert 0.4 < (masks[0] == masks[1]).mean() < 0.6
