"""Merges in memory over models that stay open: the bits of files, whatever was merged before, and nothing measured twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.resident_model import SharedBudget
from alnico.engine import measure, mix
from alnico.engine.merge_session import Resident
from alnico.errors import MismatchError, NonFiniteError
from alnico.kernels.constants import LEAF
from alnico.recipe.load import load_recipe
from alnico.run_options import RunOptions
from made import family, llama_config, llama_shapes, read_file, save_model

SHAPE = {"hidden": 16, "layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return family(tmp_path_factory.mktemp("family"), 3, shards=2, **SHAPE)


def on_disk(recipe: dict[str, Any], out: Path) -> dict[str, tuple[str, bytes]]:
    alnico.merge(recipe, out)
    return {
        n: (d, v.tobytes()) for file in out.glob("*.safetensors") for n, (d, v) in read_file(file).items()
    }


def in_memory(resident: Resident, recipe: dict[str, Any]) -> dict[str, tuple[str, bytes]]:
    plan = resident.plan(load_recipe(recipe))
    arrays = resident.merge(plan)
    found = {}
    for name, dtype, _ in resident.layout:
        raw = arrays[name].tobytes()
        found[name] = (
            dtype,
            (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("f4").tobytes() if dtype == "BF16" else raw,
        )
    assert list(found) == [job.name for job in plan.jobs]
    return found


def recipes(base: Path, tuned: list[Path]) -> list[dict[str, Any]]:
    names = [str(t) for t in tuned]

    def delta(method: str, models: list[str] = names, **parameters: Any) -> dict[str, Any]:
        return {"merge_method": method, "base_model": str(base), "models": models, "parameters": parameters}

    each = [
        {"model": n, "parameters": {"density": d, "weight": 1.0}}
        for n, d in zip(names, (0.2, 0.5, 0.8), strict=True)
    ]
    other = [
        {"model": n, "parameters": {"density": d, "weight": 1.0}}
        for n, d in zip(names, (0.2, 0.9, 0.8), strict=True)
    ]
    norms = {"model": names[0], "parameters": {"weight": {"from": "l2_norm"}}}
    return [
        {"merge_method": "linear", "models": names},
        {"merge_method": "linear", "models": names[1:]},
        delta("task_arithmetic", weight=0.4),
        delta("ties", density=0.3),
        {**delta("ties"), "models": each},
        {**delta("ties"), "models": other},
        delta("ties", density=0.3, **{"lambda": 0.7}),
        delta("ties", density=0.25, scope="model"),
        delta("ties", density=0.25, scope="model", **{"lambda": 2.0}),
        delta("ties", density=0.3, rescale="l1"),
        delta("dare_ties", density=0.6),
        {**delta("dare_ties", density=0.6), "seed": 3},
        delta("della", density=0.6, epsilon=0.1),
        delta("breadcrumbs", density=0.6, gamma=0.1),
        delta("sce", select_topk=0.5),
        delta("slerp", names[:1], t=0.3),
        delta("slerp", names[:1], t=0.8),
        delta("model_stock"),
        {**delta("task_arithmetic"), "models": [norms, {**norms, "model": names[1]}]},
        {**delta("task_arithmetic"), "models": [norms, {**norms, "model": names[1]}], "dtype": "float32"},
        {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": names[i], "layer_range": [0, 2]}]} for i in (0, 1)],
        },
        {
            "merge_method": "linear",
            "models": names,
            "methods": [{"filter": "mlp", "merge_method": "passthrough", "model": names[2]}],
        },
        {"merge_method": "linear", "models": names},
    ]


def test_every_recipe_has_the_bits_of_files_whatever_came_before(
    models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, tuned = models
    asked = recipes(base, tuned)
    expected = [on_disk(recipe, tmp_path / str(i)) for i, recipe in enumerate(asked)]
    with Resident(open_model, run=RunOptions(threads=2)) as resident:
        for i in [*range(len(asked)), *reversed(range(len(asked)))]:
            assert in_memory(resident, asked[i]) == expected[i], asked[i]


def test_the_arrays_stay_the_same_while_the_layout_does(models: tuple[Path, list[Path]]) -> None:
    base, tuned = models
    linear, ties = recipes(base, tuned)[0], recipes(base, tuned)[3]
    with Resident(open_model, run=RunOptions(threads=1)) as resident:
        first = dict(resident.merge(resident.plan(load_recipe(linear))))
        again = resident.merge(resident.plan(load_recipe(ties)))
        assert all(again[name] is array for name, array in first.items())
        wide = resident.merge(resident.plan(load_recipe({**ties, "dtype": "float32"})))
        assert all(wide[name].nbytes == 2 * array.nbytes for name, array in first.items())


def test_a_merge_is_made_where_it_is_scored_unless_its_bytes_are_kept(
    models: tuple[Path, list[Path]],
) -> None:
    base, tuned = models
    asked = [{**recipe, "dtype": "bfloat16"} for recipe in recipes(base, tuned)[:4]]
    name = "model.embed_tokens.weight"
    with Resident(open_model, run=RunOptions(threads=2)) as resident:
        expected = [resident.merge(resident.plan(load_recipe(recipe)))[name].copy() for recipe in asked]
        elements = expected[0].size // 2
        first, second = (np.zeros(elements, np.float32) for _ in range(2))
        resident.follow(name, [first, second])
        for recipe, of in zip(asked, expected, strict=True):
            resident.merge(resident.plan(load_recipe(recipe)))
            wide = of.view("<u2").astype("<u4") << 16
            assert name not in resident.arrays
            assert (first.view("<u4") == wide).all()
            assert (second.view("<u4") == wide).all()
            assert (resident.bytes_of(name) == of).all()
        kept = resident.bytes_of(name)
        resident.keep(name)
        resident.merge(resident.plan(load_recipe(asked[0])))
        assert resident.bytes_of(name) is kept
        assert (kept == expected[0]).all()
        assert (first.view("<u4") == second.view("<u4")).all()


def test_what_stays_in_memory_is_mixed_by_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[int] = []
    call = mix.Mixer.__call__
    monkeypatch.setattr(
        mix.Mixer,
        "__call__",
        lambda self, start, block, out: (spans.append(start), call(self, start, block, out))[1],
    )
    random = np.random.default_rng(5)
    values = random.standard_normal((3, 9, LEAF)).astype(np.float32)
    files = [save_model(tmp_path / f"m{i}", {"w": ("BF16", v)}) for i, v in enumerate(values)]
    linear = {"merge_method": "linear", "models": [str(file) for file in files], "unrelated": "allow"}
    expected = on_disk(linear, tmp_path / "out")
    assert sorted(spans) == [0, 8 * LEAF]
    spans.clear()
    with Resident(open_model, run=RunOptions(threads=1)) as resident:
        assert in_memory(resident, linear) == expected
    assert spans == [0]


def test_facts_are_measured_once_a_model(
    models: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = models
    counted: list[int] = []
    init = measure._KthLargestSearch.__init__

    def counting(self: Any, fact: Any, known: Any) -> None:
        init(self, fact, known)
        counted.append(self.chosen.size)

    monkeypatch.setattr(measure._KthLargestSearch, "__init__", counting)

    def searched(
        resident: Resident, densities: tuple[float, ...], chosen: list[Path] = tuned, **keys: Any
    ) -> int:
        counted.clear()
        entries = [
            {"model": str(t), "parameters": {"density": d}} for t, d in zip(chosen, densities, strict=True)
        ]
        recipe = {"merge_method": "ties", "base_model": str(base), "models": entries, **keys}
        resident.merge(resident.plan(load_recipe(recipe)))
        return sum(counted)

    tensors = len(llama_shapes(**SHAPE))
    with Resident(open_model, run=RunOptions(threads=1)) as resident:
        assert searched(resident, (0.2, 0.5, 0.8)) == 3 * tensors
        assert searched(resident, (0.2, 0.5, 0.8), parameters={"lambda": 0.5}) == 0
        assert searched(resident, (0.2, 0.5), tuned[:2]) == 0
        assert searched(resident, (0.2, 0.8), [tuned[0], tuned[2]]) == 0
        assert searched(resident, (0.2, 0.5, 0.8), dtype="float64") == 3 * tensors
    with Resident(open_model, run=RunOptions(threads=1)) as resident:
        assert searched(resident, (0.2, 0.5), tuned[:2]) == 2 * tensors
        assert searched(resident, (0.2, 0.5), tuned[::2]) == tensors
        for density in (0.6, 0.4, 0.9):
            assert searched(resident, (0.2, density), tuned[:2]) == 0
    monkeypatch.setattr(SharedBudget, "take", lambda *_: False)
    with Resident(open_model, run=RunOptions(threads=1)) as resident:
        asked = [searched(resident, (0.2, density), tuned[:2]) for density in (0.5, 0.6, 0.7, 0.8)]
        assert asked == [2 * tensors, 0, tensors, tensors]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_thresholds_of_large_tensors_are_those_of_files(dtype: str, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    base = random.standard_normal((300, 257)).astype(np.float32)
    values = [base + 0.1 * random.standard_normal(base.shape).astype(np.float32) for _ in range(3)]
    origin, *models = (
        save_model(tmp_path / f"m{i}", {"w": (dtype, v)}) for i, v in enumerate([base, *values])
    )
    with Resident(open_model, run=RunOptions(threads=2)) as resident:
        for i, (a, b, chosen) in enumerate(
            [(0.2, 0.5, (0, 1)), (0.2, 0.5, (0, 2)), (0.3, 0.9, (0, 1)), (0.7, 1e-9, (2, 1))]
        ):
            entries = [
                {"model": str(models[m]), "parameters": {"density": d}}
                for m, d in zip(chosen, (a, b), strict=True)
            ]
            for method in ("ties", "breadcrumbs"):
                recipe = {
                    "merge_method": method,
                    "base_model": str(origin),
                    "models": entries,
                    "dtype": "float32",
                }
                assert in_memory(resident, recipe) == on_disk(recipe, tmp_path / f"{method}-{i}")


def test_models_of_two_origins_are_refused_when_they_first_meet(tmp_path: Path) -> None:
    big = {"hidden": 64, "layers": 2}
    base, tuned = family(tmp_path / "a", 1, **big)
    strange, _ = family(tmp_path / "b", 0, seed=5, **big)
    with Resident(open_model, run=RunOptions(threads=1)) as resident:
        alone = {"merge_method": "linear", "models": [str(base), str(tuned[0])]}
        resident.merge(resident.plan(load_recipe(alone)))
        pair = {"merge_method": "linear", "models": [str(base), str(strange)]}
        for _ in range(2):
            with pytest.raises(MismatchError, match="were not tuned from one base"):
                resident.merge(resident.plan(load_recipe(pair)))
        resident.merge(resident.plan(load_recipe({**pair, "unrelated": "allow"})))
        with pytest.raises(MismatchError, match="were not tuned from one base"):
            resident.merge(resident.plan(load_recipe(pair)))


def test_a_merge_that_failed_leaves_no_trace_in_the_next(tmp_path: Path) -> None:
    shapes = llama_shapes(**SHAPE)
    random = np.random.default_rng(0)
    values = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    good = save_model(tmp_path / "good", {n: ("F32", v) for n, v in values.items()}, llama_config(**SHAPE))
    spoilt = {n: v.copy() for n, v in values.items()}
    spoilt["model.norm.weight"][3] = np.nan
    bad = save_model(tmp_path / "bad", {n: ("F32", v) for n, v in spoilt.items()}, llama_config(**SHAPE))
    copy = {"merge_method": "passthrough", "models": [str(good)]}
    with Resident(open_model, run=RunOptions(threads=1)) as resident:
        expected = in_memory(resident, copy)
        mixed = {"merge_method": "linear", "models": [str(good), str(bad)], "unrelated": "allow"}
        with pytest.raises(NonFiniteError, match=r"model\.norm\.weight\[3\]: .*bad has NaN"):
            resident.merge(resident.plan(load_recipe(mixed)))
        assert in_memory(resident, copy) == expected
