"""`protect`: a merge changes nothing that a model gives on its own inputs, whatever the method; checked with float64 in numpy."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.errors import MismatchError, RecipeError, ResourceError
from alnico.methods import registry
from alnico.testing import MethodCase, check_interrupt_and_resume, check_threads_and_blocks
from alnico.testing.small_models import random_models
from made import model_bytes, read_model, save_model
from methods import sides
from methods.cases import options
from methods.merging import recipe_for, write_inputs
from references import noise

SHAPES = {"a.weight": (37, 129), "b.weight": (90, 40), "c.bias": (200,)}
ROWS = 25
"""Inputs that a Gram matrix is of: fewer than a matrix has columns."""
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "slerp": {"t": 0.3},
    "karcher": {},
    "task_arithmetic": {"scale": 0.7},
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.6},
    "della": {"density": 0.6},
    "nuslerp": {"weight": [0.6, 0.4], "flatten": False},
    "arcee_fusion": {},
    "regmean": {"gram": "one directory a model"},
    "tsv": {},
    "iso_c": {},
}
"""One method of each kind of fact, and whole matrices in both spaces."""


def inputs_of(name: str, size: int) -> np.ndarray:
    random = np.random.default_rng([size, *name.encode()])
    return random.standard_normal((ROWS, size)) * random.random(size) ** 4


def gram_of(
    root: Path, model: Path, *, turned: Sequence[str] = (), rows: Mapping[str, np.ndarray] | None = None
) -> Path:
    """Write the Gram matrices of a model; ``turned`` matrices are (inputs, outputs)."""
    tensors, entries = {}, {}
    for name, values in read_model(model).items():
        if values.ndim == 2:
            x = (rows or {}).get(name, inputs_of(name, values.shape[0 if name in turned else 1]))
            tensors[name] = (x.T @ x).astype(np.float32)
            entries[name] = {"rows": len(x), "is_transposed": name in turned}
    return sides.write(root / f"{model.name}-inputs", "gram", model, tensors, entries)


def projected(merged: np.ndarray, kept: np.ndarray, x: np.ndarray, energy: float) -> np.ndarray:
    """``A + (M - A)(I - V V^T)``, from the singular vectors of the inputs themselves."""
    _, values, vectors = np.linalg.svd(x, full_matrices=False)
    shares = np.cumsum(values**2) / np.sum(values**2)
    v = vectors[: int((shares < energy * (1 - 1e-12)).sum()) + 1]
    return kept + (merged - kept) - (merged - kept) @ v.T @ v


def made(root: Path, name: str, count: int) -> tuple[Path, list[Path]]:
    random = np.random.default_rng(5)
    base = {n: random.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    models = [
        {n: v + 0.1 * random.standard_normal(v.shape).astype(np.float32) for n, v in base.items()}
        for _ in range(count)
    ]
    start, paths = write_inputs(root, base, models)
    return (paths[0] if registry()[name].base == "first" else start), paths


@pytest.mark.parametrize("name", METHODS)
def test_what_is_merged_is_projected_out_of_the_protected_inputs(name: str, tmp_path: Path) -> None:
    count = 2
    base, paths = made(tmp_path, name, count)
    given = options(METHODS[name], count)
    gram = gram_of(tmp_path, base)
    recipe = recipe_for(
        name, paths, base, given, protect={"gram": str(gram), "energy": 0.9}, base_model=str(base)
    )
    alnico.merge(recipe, tmp_path / "out")
    merged, kept = read_model(tmp_path / "out"), read_model(base)
    wide = [{n: v.astype(np.float64) for n, v in read_model(p).items()} for p in paths]
    reference = importlib.import_module(f"references.{name}")
    for tensor in ("a.weight", "b.weight"):
        start = kept[tensor].astype(np.float64)
        draws = [noise.uniform(0, tensor, i, SHAPES[tensor]) for i in range(count)]
        whole = reference.merge([m[tensor] for m in wide], start, given, draws)
        expected = projected(whole, start, inputs_of(tensor, SHAPES[tensor][1]), 0.9)
        found = merged[tensor]
        away = np.abs(found - expected) > 2e-6 * np.abs(expected).max()
        undecided = getattr(reference, "undecided", None)
        if undecided is not None:  # an entry on a threshold, in float64 or in float32, moves its whole row
            away &= ~undecided([m[tensor] for m in wide], start, given).any(1, keepdims=True)
        assert not away.any(), (tensor, np.abs(found - expected).max())
        assert not np.allclose(found, whole, atol=1e-3), tensor
    assert np.array_equal(merged["c.bias"], kept["c.bias"])


def test_with_all_energy_the_outputs_on_the_inputs_are_the_protected_ones(tmp_path: Path) -> None:
    base, paths = made(tmp_path, "task_arithmetic", 2)
    gram = gram_of(tmp_path, base)
    protect = {"gram": str(gram), "energy": 1}
    alnico.merge(recipe_for("task_arithmetic", paths, base, {}, protect=protect), tmp_path / "out")
    merged, kept = read_model(tmp_path / "out"), read_model(base)
    for tensor in ("a.weight", "b.weight"):
        x = inputs_of(tensor, SHAPES[tensor][1])
        change = x @ (merged[tensor].astype(np.float64) - kept[tensor]).T
        assert np.abs(change).max() < 1e-5 * np.abs(x @ kept[tensor].T.astype(np.float64)).max()
        assert np.abs(merged[tensor] - kept[tensor]).max() > 0.1


def test_a_matrix_stored_by_inputs_is_protected_as_its_transpose(tmp_path: Path) -> None:
    base, paths = made(tmp_path, "task_arithmetic", 2)
    protect = {"gram": str(gram_of(tmp_path, base)), "energy": 0.95}
    alnico.merge(recipe_for("task_arithmetic", paths, base, {}, protect=protect), tmp_path / "out")
    turned = [
        save_model(
            tmp_path / "turned" / p.name,
            {n: ("F32", v.T.copy() if v.ndim == 2 else v) for n, v in read_model(p).items()},
        )
        for p in (base, *paths)
    ]
    gram = gram_of(tmp_path / "turned", turned[0], turned=("a.weight", "b.weight"))
    recipe = recipe_for("task_arithmetic", turned[1:], turned[0], {}, protect={**protect, "gram": str(gram)})
    alnico.merge(recipe, tmp_path / "other")
    for tensor in ("a.weight", "b.weight"):
        turned_back = read_model(tmp_path / "other")[tensor].T
        assert turned_back == pytest.approx(read_model(tmp_path / "out")[tensor], abs=1e-6)


def test_another_model_than_the_base_is_protected_and_need_not_be_merged(tmp_path: Path) -> None:
    base, paths = made(tmp_path, "task_arithmetic", 3)
    for i, merged in ((0, paths[:2]), (2, paths[:2])):
        protect = {"model": str(paths[i]), "gram": str(gram_of(tmp_path, paths[i])), "energy": 0.9}
        out = tmp_path / f"out{i}"
        alnico.merge(recipe_for("task_arithmetic", merged, base, {}, protect=protect), out)
        models = [{n: v.astype(np.float64) for n, v in read_model(p).items()} for p in (base, *paths)]
        whole = models[1]["a.weight"] + models[2]["a.weight"] - models[0]["a.weight"]
        expected = projected(whole, models[1 + i]["a.weight"], inputs_of("a.weight", 129), 0.9)
        assert read_model(out)["a.weight"] == pytest.approx(expected, abs=1e-6)
        assert np.array_equal(read_model(out)["c.bias"], read_model(paths[i])["c.bias"])


def test_one_model_that_would_be_copied_is_protected_and_the_protected_one_is_copied(tmp_path: Path) -> None:
    base, paths = made(tmp_path, "task_arithmetic", 1)
    protect = {"gram": str(gram_of(tmp_path, base)), "energy": 0.9}
    plan = alnico.plan(recipe_for("task_arithmetic", paths, base, {}, protect=protect))
    assert [(j.name, j.kind) for j in plan.jobs] == [
        ("a.weight", "matrix"),
        ("b.weight", "matrix"),
        ("c.bias", "copy"),
    ]
    alnico.merge(plan.recipe, tmp_path / "out")
    start, one = (read_model(p)["a.weight"].astype(np.float64) for p in (base, *paths))
    assert read_model(tmp_path / "out")["a.weight"] == pytest.approx(
        projected(one, start, inputs_of("a.weight", 129), 0.9), abs=1e-6
    )
    own = {"model": str(paths[0]), "gram": str(gram_of(tmp_path, paths[0]))}
    plan = alnico.plan(recipe_for("task_arithmetic", paths, base, {}, protect=own))
    assert {j.kind for j in plan.jobs} == {"copy"}


def test_tensors_without_a_gram_matrix_are_kept_or_merged_as_asked_for_and_counted(tmp_path: Path) -> None:
    base, paths = made(tmp_path, "task_arithmetic", 2)
    gram = str(gram_of(tmp_path, base))
    kept = alnico.plan(recipe_for("task_arithmetic", paths, base, {}, protect={"gram": gram}))
    assert (
        f"protect: 2 matrices keep what {base} gives on 0.99 of its inputs' squares; 1 tensor without a Gram matrix stay whole."
        in kept.notes
    )
    merged = alnico.plan(
        recipe_for("task_arithmetic", paths, base, {}, protect={"gram": gram, "others": "merge"})
    )
    assert "protect: 1 tensor without a Gram matrix is merged as without it." in merged.notes
    alnico.merge(merged.recipe, tmp_path / "out")
    alnico.merge(recipe_for("task_arithmetic", paths, base, {}), tmp_path / "plain")
    assert np.array_equal(read_model(tmp_path / "out")["c.bias"], read_model(tmp_path / "plain")["c.bias"])


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_rows_in_which_the_merge_equals_the_protected_model_keep_their_bits(
    dtype: str, tmp_path: Path
) -> None:
    """What is left of law 4: a row, not an entry."""
    random = np.random.default_rng(0)
    base = {"w": random.standard_normal((40, 30)).astype(np.float32)}
    base["w"][0, :3] = [-0.0, 0.0, 1e-30]
    changed = base["w"] + 0.1 * random.standard_normal((40, 30)).astype(np.float32)
    changed[:20] = base["w"][:20]
    changed[20:, :15] = base["w"][20:, :15]
    start, paths = write_inputs(tmp_path, base, [{"w": changed}] * 2, dtype)
    protect = {"gram": str(gram_of(tmp_path, start)), "energy": 0.5}
    alnico.merge(recipe_for("task_arithmetic", paths, start, {}, protect=protect), tmp_path / "out")
    found, kept = read_model(tmp_path / "out")["w"], read_model(start)["w"]
    assert found[:20].tobytes() == kept[:20].tobytes()
    assert (found[20:] != kept[20:]).mean() > 0.6  # entries that no model changed, too


@dataclass(frozen=True)
class ProtectedCase(MethodCase):
    """A method whose merges protect the base."""

    def recipe(self, models: Sequence[Path], base: Path | None, **keys: Any) -> dict[str, Any]:
        start = models[0] if self.method.base == "first" else base
        assert start is not None
        gram = gram_of(start.parent, start)
        keys |= {"protect": {"gram": str(gram), "energy": 0.8}, "base_model": str(start)}
        return super().recipe(models, base, **keys)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("ties", {"density": 0.3, "scope": "model"}),
        ("della", {"density": 0.6}),
        ("tsv", {}),
    ],
)
def test_threads_blocks_and_an_interrupt_change_no_bit(
    name: str, given: dict[str, Any], tmp_path: Path
) -> None:
    case = ProtectedCase(registry()[name], given, 2, sides.made)
    shapes = {"a.weight": (300, 500), "b.bias": (50,), "c.weight": (40, 30)}  # of three leaves, and small
    base, models = random_models(shapes, 2)
    inputs = write_inputs(tmp_path, base, models, "BF16")
    check_threads_and_blocks(case, tmp_path, inputs)
    check_interrupt_and_resume(case, tmp_path, inputs)


def test_a_threshold_of_the_whole_model_is_that_of_the_merge_without_protection(tmp_path: Path) -> None:
    base, paths = made(tmp_path, "ties", 2)
    given = {"density": [0.3, 0.3], "scope": "model"}
    alnico.merge(recipe_for("ties", paths, base, given), tmp_path / "plain")
    protect = {"gram": str(gram_of(tmp_path, base)), "energy": 0.9, "others": "merge"}
    alnico.merge(recipe_for("ties", paths, base, given, protect=protect), tmp_path / "out")
    start = read_model(base)["a.weight"].astype(np.float64)
    whole = read_model(tmp_path / "plain")["a.weight"].astype(np.float64)
    expected = projected(whole, start, inputs_of("a.weight", 129), 0.9)
    assert read_model(tmp_path / "out")["a.weight"] == pytest.approx(expected, abs=2e-6)


def test_weights_from_norms_are_protected_too(tmp_path: Path) -> None:
    base, paths = made(tmp_path, "task_arithmetic", 2)
    protect = {"gram": str(gram_of(tmp_path, base)), "energy": 0.9}
    recipe = recipe_for("task_arithmetic", paths, base, {}, parameters={"weight": {"from": "l2_norm"}})
    alnico.merge(recipe, tmp_path / "plain")
    alnico.merge({**recipe, "protect": protect}, tmp_path / "out")
    start = read_model(base)["b.weight"].astype(np.float64)
    whole = read_model(tmp_path / "plain")["b.weight"].astype(np.float64)
    expected = projected(whole, start, inputs_of("b.weight", 40), 0.9)
    assert read_model(tmp_path / "out")["b.weight"] == pytest.approx(expected, abs=2e-6)


def test_a_merge_in_memory_has_the_bits_of_the_files(tmp_path: Path) -> None:
    base, paths = made(tmp_path, "ties", 2)
    protect = {"gram": str(gram_of(tmp_path, base)), "energy": 0.9}
    alnico.merge(recipe_for("ties", paths, base, {"density": [0.4, 0.4]}, protect=protect), tmp_path / "out")
    states = [read_model(p) for p in paths]
    found = alnico.merge_state_dicts(states, "ties", base=read_model(base), density=0.4, protect=protect)
    for name, values in read_model(tmp_path / "out").items():
        assert found[name].tobytes() == values.tobytes()
    own = {**protect, "gram": str(gram_of(tmp_path, paths[0]))}
    of_first = alnico.merge_state_dicts(
        states, "ties", base=read_model(base), protect={**own, "model": states[0]}
    )
    assert np.array_equal(of_first["c.bias"], states[0]["c.bias"])
    another = alnico.merge_state_dicts(
        states[1:], "ties", base=read_model(base), protect={**own, "model": read_model(paths[0])}
    )
    assert np.array_equal(another["c.bias"], states[0]["c.bias"])


def test_a_protected_merge_is_verified_reproduced_and_written_down(tmp_path: Path) -> None:
    base, paths = made(tmp_path, "task_arithmetic", 2)
    protect = {"gram": str(gram_of(tmp_path, base)), "energy": 0.9}
    alnico.merge(recipe_for("task_arithmetic", paths, base, {}, protect=protect), tmp_path / "out")
    found = alnico.verify(tmp_path / "out", against_inputs=True)
    assert (found.tensors, found.recomputed.tensors, found.unchecked) == (3, 3, ())
    alnico.reproduce(tmp_path / "out", tmp_path / "again")
    assert model_bytes(tmp_path / "again") == model_bytes(tmp_path / "out")
    lock = json.loads((tmp_path / "out" / "alnico.lock.json").read_text())
    assert lock["recipe"]["protect"] == {"gram": protect["gram"], "energy": 0.9, "others": "keep"}


def test_the_plan_counts_the_memory_of_the_projection(tmp_path: Path) -> None:
    shapes = {"w": (64, 1500)}
    random = np.random.default_rng(0)
    base = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    start, paths = write_inputs(tmp_path, base, [base] * 2)
    protect = {"gram": str(gram_of(tmp_path, start))}
    recipe = recipe_for("task_arithmetic", paths, start, {}, protect=protect)
    plain, plan = alnico.plan({k: v for k, v in recipe.items() if k != "protect"}), alnico.plan(recipe)
    assert plan.memory.peak_bytes - plain.memory.peak_bytes >= 8 * 5 * 1500**2
    with pytest.raises(ResourceError, match="w is merged as a whole matrix and needs"):
        alnico.plan(recipe, memory="420MiB")


def test_what_cannot_be_protected_is_refused_in_one_message(tmp_path: Path) -> None:
    base, paths = made(tmp_path, "task_arithmetic", 2)
    gram = str(gram_of(tmp_path, base))

    def refusal(kind: type[Exception], **changes: Any) -> str:
        recipe = {**recipe_for("task_arithmetic", paths, base, {}, protect={"gram": gram}), **changes}
        with pytest.raises(kind) as caught:
            alnico.merge({k: v for k, v in recipe.items() if v is not None}, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert (
        "protect keeps what the base gives, but there is no base_model; expected the model that must not change."
        in refusal(RecipeError, merge_method="linear", base_model=None)
    )
    assert (
        "protect.energy is 1.5; expected the share of the inputs' squares that is kept, in (0, 1]."
        in refusal(RecipeError, protect={"gram": gram, "energy": 1.5})
    )
    assert "its statistics were measured of one with" in refusal(
        MismatchError, protect={"gram": gram, "model": str(paths[0])}
    )
    fisher = str(sides.made("fisher", base, 0))
    assert "contains fisher statistics; expected gram" in refusal(MismatchError, protect={"gram": fisher})
    other = {n: ("F32", v[:, :-1] if n == "a.weight" else v) for n, v in read_model(base).items()}
    small = save_model(tmp_path / "small", other)
    of_small = str(gram_of(tmp_path, small))
    assert refusal(MismatchError, protect={"gram": of_small, "model": str(small)}).startswith(
        f"a.weight: has the shape (37, 128) in {small}, which protect keeps, and the merge makes it (37, 129); expected a tensor of one shape."
    )
    without = save_model(tmp_path / "without", {n: v for n, v in other.items() if n != "a.weight"})
    assert refusal(
        MismatchError, protect={"gram": str(gram_of(tmp_path, without)), "model": str(without)}
    ).startswith(f"a.weight: is missing in {without}, which protect keeps")
    named = Path(gram) / "statistics.json"
    told = json.loads(named.read_text())
    del told["tensors"]["b.weight"]
    named.write_text(json.dumps({**told, "left_out": {"c.bias": "not a matrix"}}))
    assert refusal(MismatchError).startswith(
        f"b.weight: the gram statistics of {gram} neither contain it nor say why"
    )
