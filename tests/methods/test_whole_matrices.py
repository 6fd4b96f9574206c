"""Methods over whole matrices agree with their papers on matrices of every kind, and treat copies and zeros as they say."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alnico.methods import registry
from alnico.methods.base import MatrixMethod
from alnico.numerics.decompositions import leading_vectors, polar_factor
from alnico.numerics.low_rank import Decomposed
from methods.merging import merge_arrays

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("tsv", {}),
    ("tsv", {"rank": 0.5, "least": 0.3, "calibrate": "none"}),
    ("dc_merge", {}),
    ("dc_merge", {"density": 0.05, "rank": 1.0, "calibrate": "none"}),
    ("swudi", {}),
    ("swudi", {"vectors": "all", "calibrate": "none"}),
    ("swudi", {"vectors": "all", "filter": "time", "time": 50.0, "initial": "mean"}),
    ("swudi", {"vectors": "all", "filter": "all", "initial": "zero"}),
    ("iso_c", {}),
    ("iso_cts", {}),
    ("iso_cts", {"common": 0.5, "calibrate": "none"}),
    ("svd", {"rank": 0.6}),
    ("svd", {"energy": 0.7, "calibrate": "projection"}),
    ("resmerge", {}),
    ("resmerge", {"head": 3, "budget": 0.5}),
]
METHODS = list(dict.fromkeys(name for name, _ in SETTINGS if name != "resmerge"))
"""Methods that note copies and have a projection scale; resmerge counts copies as often as they are listed."""


class MadeMatrices:
    """Arrays as :class:`alnico.methods.base.Matrices`, with what was noted."""

    def __init__(self, values: Sequence[np.ndarray], *, is_transposed: bool = False) -> None:
        self.values = values
        self.models = len(values)
        self.shape = self.whole = values[0].shape
        self.is_transposed = is_transposed
        self.notes: list[str] = []

    def value(self, model: int) -> np.ndarray:
        return self.values[model].copy()

    def leading(self, model: int, count: int) -> Decomposed:
        return leading_vectors(self.values[model], count)

    def kept(self, _name: Hashable, _models: Sequence[int], make: Callable[[], Any]) -> Any:
        return make()

    def note(self, text: str, *values: float) -> None:
        self.notes.append(text.format(*values))


def bound(name: str, options: dict[str, Any], models: int) -> MatrixMethod:
    found = registry()[name].bind(options, models)
    assert isinstance(found, MatrixMethod)
    return found


def made(name: str, options: dict[str, Any], matrices: MadeMatrices) -> np.ndarray:
    method = bound(name, options, matrices.models)
    return method.make(matrices, *method.arguments)


def expected(name: str, options: dict[str, Any], deltas: Sequence[np.ndarray]) -> np.ndarray:
    density = {"density": [options["density"]] * len(deltas)} if "density" in options else {}
    reference = importlib.import_module(f"references.{name}")
    return reference.merge(list(deltas), np.zeros_like(deltas[0]), {**options, **density}, None)


def near(found: np.ndarray, wanted: np.ndarray, within: float = 1e-9) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=within * np.abs(wanted).max(initial=1e-300))


def random_deltas(count: int, rows: int, columns: int, rank: int | None = None) -> list[np.ndarray]:
    random = np.random.default_rng(rows + 7 * columns + count)
    deltas = []
    for i in range(count):
        # A slow decay of singular values, as fine-tunes have.
        k = min(rows, columns) if rank is None else rank
        left, right = random.standard_normal((rows, k)), random.standard_normal((k, columns))
        deltas.append(1e-2 * (1 + 0.3 * i) * (left * np.arange(1, k + 1) ** -0.5) @ right)
    return deltas


KINDS = {
    "square": (3, 70, 70, None),
    "tall": (3, 140, 70, None),
    "wide": (3, 70, 140, None),
    "wide, few rows": (2, 66, 300, None),
    "small": (2, 9, 5, None),
    "of low rank": (3, 80, 70, 9),
    "adapters": (3, 70, 90, 4),
    "many models": (12, 70, 75, None),
    "more models than rows": (5, 3, 80, None),
    "one model": (1, 70, 75, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_agrees_with_its_reference(kind: str) -> None:
    deltas = random_deltas(*KINDS[kind])
    weights = [1.0, -0.5, 0.7, 1.3, 0.2, 1.1, 0.9, 1.0, 0.4, 0.8, 1.2, 0.6][: len(deltas)]
    for name, options in SETTINGS:
        given = {**options, "weight": weights, "scale": 1.1}
        if not isinstance(registry()[name].bind(given, len(deltas)), MatrixMethod):
            continue
        # WUDI divides by eigenvalues down to 1e-12 of the largest.
        within = 1e-8 if options.get("filter") == "all" else 1e-9
        near(made(name, given, MadeMatrices(deltas)), expected(name, given, deltas), within)


def test_zeros_and_models_of_weight_0_change_nothing_but_the_rank() -> None:
    one, two = random_deltas(2, 70, 66)
    nothing = np.zeros_like(one)
    for name, options in SETTINGS:
        near(
            made(name, options, MadeMatrices([one, nothing, two])),
            expected(name, options, [one, nothing, two]),
        )
        weighted = {**options, "weight": [1.0, 0.0, 2.0]}
        near(
            made(name, weighted, MadeMatrices([one, random_deltas(1, 70, 66)[0], two])),
            expected(name, {**options, "weight": [1.0, 2.0]}, [one, two]),
        )
        assert not made(name, options, MadeMatrices([nothing, nothing])).any()


@pytest.mark.parametrize("name", METHODS)
def test_exact_copies_count_as_one_model_and_are_noted(name: str) -> None:
    one, two = random_deltas(2, 70, 66)
    matrices = MadeMatrices([one, two, one.copy()])
    given = {"weight": [1.0, 1.0, 0.5]}
    near(made(name, given, matrices), expected(name, {"weight": [0.75, 1.0]}, [one, two]))
    assert matrices.notes == ["0 and 2 change equally, and count as one model"]


@pytest.mark.parametrize("name", METHODS)
def test_near_copies_and_vectors_that_cancel_are_noted(name: str) -> None:
    one, two = random_deltas(2, 70, 66)
    matrices = MadeMatrices([one, two, one + 1e-3 * two])
    assert np.isfinite(made(name, {}, matrices)).all()
    assert [n.partition(" (")[0] for n in matrices.notes] == ["0 and 2 change almost equally"]
    matrices = MadeMatrices([one, -one])
    given = {"calibrate": "projection"}
    assert np.abs(made(name, given, matrices)).max() <= 3 * np.abs(one).max()
    assert "the task vectors cancel each other, so there is no projection scale; 1 is used" in matrices.notes


@pytest.mark.parametrize("name", METHODS)
def test_the_projection_scale_gives_the_merge_the_length_of_the_task_vectors(name: str) -> None:
    deltas = random_deltas(4, 70, 80)
    merged = made(name, {"calibrate": "projection", "scale": 1.0}, MadeMatrices(deltas))
    assert np.vdot(merged, sum(deltas)) == pytest.approx(sum(np.vdot(d, d) for d in deltas), rel=1e-10)


@pytest.mark.parametrize("name", ["tsv", "dc_merge", "swudi", "svd"])
def test_the_parts_of_the_models_add_up(name: str) -> None:
    deltas = random_deltas(3, 70, 66)
    matrices = MadeMatrices([*deltas, deltas[0].copy(), deltas[1]])
    method = bound(name, {"weight": [1.0, 0.3, -2.0, 1.5, 0.0]}, 5)
    parts = method.parts(matrices, *method.arguments)
    near(sum(parts), method.make(matrices, *method.arguments), 1e-12)
    near(parts[3], 1.5 * parts[0], 1e-12)
    assert not parts[4].any()


@pytest.mark.parametrize("name", ["swudi", "iso_cts"])
def test_what_is_stored_transposed_gives_the_transposed_result(name: str) -> None:
    deltas = random_deltas(3, 70, 100)
    turned = made(name, {}, MadeMatrices([d.T.copy() for d in deltas], is_transposed=True))
    near(turned.T, expected(name, {}, deltas))


def test_task_vectors_in_orthogonal_directions_are_added_up() -> None:
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.standard_normal((70, 12)))[0] for _ in range(2))
    deltas = [
        (left[:, s] * np.array([3.0, 2.0, 1.0, 0.5])) @ right[:, s].T
        for s in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    for name, options in (
        ("tsv", {}),
        ("tsv", {"calibrate": "none"}),
        ("dc_merge", {"density": 1.0}),
        ("swudi", {}),
        ("svd", {}),
    ):
        near(made(name, options, MadeMatrices(deltas)), sum(deltas), 1e-10)


def test_iso_c_has_the_nuclear_norm_of_the_sum_in_every_direction() -> None:
    deltas = random_deltas(3, 90, 70)
    total = sum(deltas)
    left, values, right = np.linalg.svd(total, full_matrices=False)
    merged = made("iso_c", {"calibrate": "none", "scale": 1.0}, MadeMatrices(deltas))
    near(merged, values.sum() / 70 * (left @ right), 1e-10)
    assert np.vdot(left @ right, total) == pytest.approx(values.sum())
    assert np.vdot(merged, total) == pytest.approx(values.sum() ** 2 / 70)


@pytest.mark.parametrize("filter", ["participation", "time", "all"])
def test_swudi_of_one_model_is_that_model(filter: str) -> None:
    for shape in ((70, 90), (90, 70)):
        (delta,) = random_deltas(1, *shape)
        near(made("swudi", {"filter": filter, "weight": 2.0}, MadeMatrices([delta])), 2 * delta, 1e-8)


def test_wudi_minimises_the_interference_of_its_paper() -> None:
    deltas = random_deltas(3, 30, 66)
    options = {"vectors": "all", "filter": "all", "calibrate": "none"}
    merged = made("swudi", options, MadeMatrices(deltas))
    gradient = sum((merged - d) @ d.T @ d / np.vdot(d, d) for d in deltas)
    assert np.abs(gradient).max() < 1e-12


def test_matrices_of_one_row_are_merged() -> None:
    deltas = random_deltas(3, 1, 80)
    for name, options in SETTINGS:
        assert np.isfinite(made(name, options, MadeMatrices(deltas))).all()
    for name in ("tsv", "swudi", "svd"):
        near(made(name, {"weight": 2.0}, MadeMatrices(deltas[:1])), 2 * deltas[0], 1e-12)


def test_numpy_and_torch_arrays_have_the_same_decompositions() -> None:
    torch = pytest.importorskip("torch")
    for shape in ((150, 80), (80, 150), (20, 30)):
        (matrix,) = random_deltas(1, *shape)
        one, other = leading_vectors(matrix, 15), leading_vectors(torch.from_numpy(matrix), 15)
        np.testing.assert_allclose(other.values.numpy(), one.values, rtol=1e-12)
        near((other.left * other.values @ other.right).numpy(), one.left * one.values @ one.right, 1e-11)
        near(polar_factor(torch.from_numpy(matrix)).numpy(), polar_factor(matrix), 1e-10)


def test_the_polar_factor_has_no_direction_of_its_own() -> None:
    for rows, columns in ((8, 6), (90, 70)):
        left, right = np.random.default_rng(0).standard_normal((2, rows, columns))
        matrix = left[:, :2] @ right[:2]
        found = polar_factor(matrix)
        u, _, v = np.linalg.svd(matrix)
        np.testing.assert_allclose(found, u[:, :2] @ v[:2], atol=1e-12)
    np.testing.assert_allclose(polar_factor(np.diag([1.0, 0.05]), least=0.1), np.diag([1.0, 0.0]), atol=1e-15)


def test_stacks_of_experts_and_kernels_are_merged_matrix_by_matrix(tmp_path: Path) -> None:
    shapes = {"experts.weight": (2, 20, 40), "conv.weight": (10, 3, 2, 2)}
    random = np.random.default_rng(3)
    base = {n: random.standard_normal(s) for n, s in shapes.items()}
    models = [{n: v + 0.1 * random.standard_normal(v.shape) for n, v in base.items()} for _ in range(3)]
    merged = merge_arrays(tmp_path, "tsv", base, models, {}, "F64")
    for i in range(2):
        deltas = [m["experts.weight"][i] - base["experts.weight"][i] for m in models]
        near(merged["experts.weight"][i] - base["experts.weight"][i], expected("tsv", {}, deltas))
    deltas = [(m["conv.weight"] - base["conv.weight"]).reshape(10, -1) for m in models]
    near((merged["conv.weight"] - base["conv.weight"]).reshape(10, -1), expected("tsv", {}, deltas))
