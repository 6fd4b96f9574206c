"""Statistics beside models: what a plan makes of them, what it refuses, and what the lock says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.engine.merge_session import Resident
from alnico.engine.run import run_plan
from alnico.errors import MismatchError, ModelError, NonFiniteError, RecipeError, ResourceError
from alnico.methods import registry
from alnico.methods.base import MatrixMethod, combine, method
from alnico.output.validate import local_paths
from made import read_model, save_model
from methods.merging import recipe_for, write_inputs
from methods.sides import made, write
from references import made_statistics

LAYER = {"mean": 1.0, "rows": 9, "is_transposed": False}


def two(root: Path, shapes: dict[str, tuple[int, ...]] | None = None) -> list[Path]:
    random = np.random.default_rng(0)
    shapes = shapes or {"layer.weight": (6, 8), "layer.bias": (6,), "head.weight": (3, 6)}
    models = [{n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(2)]
    return write_inputs(root, models[0], models)[1]


def of_layer(kind: str, model: Path, place: int, **entry: Any) -> Path:
    """Statistics of the layer's matrix alone."""
    shape = read_model(model)["layer.weight"].shape
    values = made_statistics.fisher(shape, place) if kind == "fisher" else made_statistics.gram(shape, place)
    given = {"mean": float(values.mean()), "rows": 50, "is_transposed": False, **entry}
    return write(
        model.parent / f"{model.name}-{kind}",
        kind,
        model,
        {"stored": values},
        {"layer.weight": {"stored": "stored", **given}},
        l2_norm=1.0,
    )


@pytest.mark.parametrize(("name", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
def test_tensors_without_statistics_are_the_weighted_mean_and_the_plan_says_so(
    name: str, kind: str, tmp_path: Path
) -> None:
    paths = two(tmp_path)
    sides = [of_layer(kind, p, i) for i, p in enumerate(paths)]
    recipe = recipe_for(name, paths, None, {kind: [str(s) for s in sides], "weight": [1.0, 3.0]})
    plan = alnico.plan(recipe)
    assert {j.name: j.why for j in plan.jobs} == {
        "layer.weight": "",
        "layer.bias": f"no {kind} statistics" if kind == "fisher" else "not a matrix",
        "head.weight": f"no {kind} statistics",
    }
    alnico.merge(recipe, tmp_path / "out")
    one, other, merged = (read_model(p) for p in (*paths, tmp_path / "out"))
    for tensor in ("layer.bias", "head.weight"):
        assert merged[tensor] == pytest.approx(
            (one[tensor] + 3 * other[tensor].astype(np.float64)) / 4, abs=1e-7
        )
    assert not np.allclose(
        merged["layer.weight"], (one["layer.weight"] + 3 * other["layer.weight"]) / 4, atol=1e-3
    )


def test_a_model_that_lacks_statistics_of_a_tensor_is_named(tmp_path: Path) -> None:
    paths = two(tmp_path)
    sides = [made("fisher", paths[0], 0), of_layer("fisher", paths[1], 1)]
    plan = alnico.plan(recipe_for("fisher", paths, None, {"fisher": [str(s) for s in sides]}))
    assert {j.why for j in plan.jobs} == {"", f"no fisher statistics of it in {paths[1]}"}


def test_matrices_that_are_stored_by_inputs_are_merged_as_their_transposes(tmp_path: Path) -> None:
    paths = two(tmp_path, {"layer.weight": (8, 8)})
    grams = [str(of_layer("gram", p, i)) for i, p in enumerate(paths)]
    alnico.merge(recipe_for("regmean", paths, None, {"gram": grams}), tmp_path / "out")
    turned = [
        save_model(tmp_path / f"t{i}", {"layer.weight": ("F32", read_model(p)["layer.weight"].T)})
        for i, p in enumerate(paths)
    ]
    grams = [str(of_layer("gram", p, i, is_transposed=True)) for i, p in enumerate(turned)]
    alnico.merge(recipe_for("regmean", turned, None, {"gram": grams}), tmp_path / "turned")
    found = read_model(tmp_path / "turned")["layer.weight"].T
    assert found == pytest.approx(read_model(tmp_path / "out")["layer.weight"], abs=1e-6)


def test_gram_matrices_of_zeros_give_the_weighted_mean(tmp_path: Path) -> None:
    paths = two(tmp_path, {"layer.weight": (5, 4)})
    entry = {"layer.weight": LAYER}
    zeros = {"layer.weight": np.zeros((4, 4), np.float32)}
    grams = [str(write(tmp_path / f"zeros-{i}", "gram", p, zeros, entry)) for i, p in enumerate(paths)]
    alnico.merge(recipe_for("regmean", paths, None, {"gram": grams}), tmp_path / "out")
    one, other = (read_model(p)["layer.weight"] for p in paths)
    assert read_model(tmp_path / "out")["layer.weight"] == pytest.approx((one + other) / 2, abs=1e-7)


def test_the_lock_has_the_hash_of_every_statistics_tensor_and_of_what_is_told_of_them(tmp_path: Path) -> None:
    paths = two(tmp_path)
    sides = [made("gram", p, i) for i, p in enumerate(paths)]
    alnico.merge(recipe_for("regmean", paths, None, {"gram": [str(s) for s in sides]}), tmp_path / "out")
    lock = json.loads((tmp_path / "out" / "alnico.lock.json").read_text())
    listed = [i for i in lock["inputs"] if "statistics" in i]
    assert [i["statistics"] for i in listed] == [str(s) for s in sides]
    for entry in listed:
        assert sorted(f["file"] for f in entry["files"]) == ["statistics.json", "statistics.safetensors"]
        assert sorted(entry["tensors"]) == ["head.weight", "layer.weight"]
        assert all(len(digest) == 32 for digest in entry["tensors"].values())


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    paths = two(tmp_path)
    sides = [made("fisher", p, i) for i, p in enumerate(paths)]
    recipe = recipe_for("fisher", paths, None, {"fisher": [str(s) for s in reversed(sides)]})
    with pytest.raises(
        MismatchError,
        match=r"its statistics were measured of one with .*; expected statistics of the model they stand",
    ):
        alnico.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with (
        Resident(open_model) as resident,
        pytest.raises(MismatchError, match="its statistics were measured of one with"),
    ):
        resident.merge(resident.plan(alnico.load_recipe(recipe)))


def test_statistics_of_another_kind_or_shape_or_of_no_merged_tensor_are_refused(tmp_path: Path) -> None:
    paths = two(tmp_path)
    grams = [str(made("gram", p, i)) for i, p in enumerate(paths)]
    with pytest.raises(MismatchError, match="contains gram statistics; expected fisher"):
        alnico.plan(recipe_for("fisher", paths, None, {"fisher": grams}))
    entry = {"layer.weight": LAYER}
    wrong = [
        str(write(tmp_path / f"w{i}", "gram", p, {"layer.weight": np.eye(6)}, entry))
        for i, p in enumerate(paths)
    ]
    with pytest.raises(
        MismatchError,
        match=r"layer.weight: the gram statistics of .* are F32 \(6, 6\); expected F32 \(8, 8\), because the",
    ):
        alnico.plan(recipe_for("regmean", paths, None, {"gram": wrong}))
    fishers = [str(of_layer("fisher", p, i)) for i, p in enumerate(paths)]
    rule = {"filter": "bias", "merge_method": "fisher", "parameters": {"fisher": fishers}}
    with pytest.raises(
        MismatchError,
        match=r"has statistics of layer.weight and others, but of no tensor that is merged with them",
    ):
        alnico.plan({"merge_method": "linear", "models": [str(p) for p in paths], "methods": [rule]})


def test_statistics_that_are_not_there_or_damaged_are_refused(tmp_path: Path) -> None:
    paths = two(tmp_path)
    with pytest.raises(
        ModelError,
        match="statistics 'none': does not exist; expected a directory written by `alnico statistics`",
    ):
        alnico.plan(recipe_for("fisher", paths, None, {"fisher": ["none", "none"]}))
    folder = made("fisher", paths[0], 0)
    (folder / "statistics.json").write_text('{"schema": 1, "kind": "fisher", "tensors": {"a": {}}}')
    with pytest.raises(ModelError, match=r"statistics.json: is damaged"):
        alnico.plan(recipe_for("fisher", paths, None, {"fisher": [str(folder)] * 2}))
    (folder / "statistics.json").write_text(
        '{"schema": 1, "kind": "fisher", "tensors": {"a": {"digest": ""}}}'
    )
    with pytest.raises(ModelError, match=r"names 'a', which statistics.safetensors does not hold"):
        alnico.plan(recipe_for("fisher", paths, None, {"fisher": [str(folder)] * 2}))


def test_a_nan_in_statistics_names_tensor_and_index(tmp_path: Path) -> None:
    paths = two(tmp_path)
    for name, kind in (("fisher", "fisher"), ("regmean", "gram")):
        sides = []
        for i, path in enumerate(paths):
            values = np.ones((6, 8) if kind == "fisher" else (8, 8))
            values[3, 5] = np.nan
            entry = {"layer.weight": LAYER}
            sides.append(
                str(write(tmp_path / f"{kind}-{i}", kind, path, {"layer.weight": values}, entry, l2_norm=1.0))
            )
        with pytest.raises(
            NonFiniteError, match=r"layer.weight\[3, 5\]: .* has NaN; expected finite numbers"
        ):
            alnico.merge(recipe_for(name, paths, None, {kind: sides}), tmp_path / "out")


def test_every_model_needs_a_path_and_a_list_is_none() -> None:
    with pytest.raises(RecipeError, match=r"models\[1\] lacks fisher: the directory that"):
        alnico.load_recipe(
            {"merge_method": "fisher", "models": [{"model": "a", "parameters": {"fisher": "f"}}, "b"]}
        )
    with pytest.raises(
        RecipeError,
        match=r"models\[0\].parameters.fisher is 3; expected the directory that `alnico statistics fisher`",
    ):
        alnico.load_recipe(
            {"merge_method": "fisher", "models": [{"model": "a", "parameters": {"fisher": 3}}]}
        )
    with pytest.raises(
        RecipeError,
        match=r"parameters.gram is a list over the layers; expected the path of one model's statistics",
    ):
        alnico.load_recipe(
            {"merge_method": "regmean", "models": ["a", "b"], "parameters": {"gram": ["f", "g"]}}
        )


def test_a_matrix_that_does_not_fit_the_budget_is_refused_with_one_that_is_enough(tmp_path: Path) -> None:
    paths = two(tmp_path, {"layer.weight": (700, 900)})
    grams = [str(made("gram", p, i)) for i, p in enumerate(paths)]
    recipe = recipe_for("regmean", paths, None, {"gram": grams})
    with pytest.raises(
        ResourceError,
        match=r"layer.weight is merged as a whole matrix and needs .* Raise --memory to (\d+)MiB",
    ) as caught:
        alnico.plan(recipe, memory="380MiB")
    enough = str(caught.value).partition("--memory to ")[2].partition(",")[0]
    assert alnico.plan(recipe, memory=enough).memory.peak_bytes <= int(enough.removesuffix("MiB")) << 20


def test_a_whole_matrix_of_task_vectors_is_added_to_the_base_whose_bits_stay_where_it_is_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halves() -> MatrixMethod:
        """Half the sum of the task vectors, in the upper rows."""

        def make(matrices: Any, share: float) -> np.ndarray:
            total = share * (matrices.value(0) + matrices.value(1))
            total[len(total) // 2 :] = 0
            return total

        return MatrixMethod(make, lambda rows, columns, *_: 3 * rows * columns, combine((0.0, 0.0)), (0.5,))

    toy = method(space="delta", source="an example")(halves)
    monkeypatch.setitem(registry().others, "halves", toy)
    paths = two(tmp_path)
    random = np.random.default_rng(5)
    start = {n: random.standard_normal(v.shape).astype(np.float32) for n, v in read_model(paths[0]).items()}
    start["layer.weight"][4, 0] = -0.0
    base = save_model(tmp_path / "start", {n: ("F32", v) for n, v in start.items()})
    alnico.merge(recipe_for("halves", paths, base, {}, unrelated="allow"), tmp_path / "out")
    merged = read_model(tmp_path / "out")
    wide = start["layer.weight"].astype(np.float64)
    expected = wide + 0.5 * sum(read_model(p)["layer.weight"].astype(np.float64) - wide for p in paths)
    assert merged["layer.weight"][:3].tobytes() == expected[:3].astype(np.float32).tobytes()
    assert merged["layer.weight"][3:].tobytes() == start["layer.weight"][3:].tobytes()
    assert merged["layer.bias"].tobytes() == start["layer.bias"].tobytes()


def test_whole_matrices_are_made_with_one_blas_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    seen: list[int] = []
    solve = np.linalg.solve

    def watched(*arguments: Any) -> Any:
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return solve(*arguments)

    monkeypatch.setattr(np.linalg, "solve", watched)
    paths = two(tmp_path)
    grams = [str(made("gram", p, i)) for i, p in enumerate(paths)]
    with threadpool_limits(2, user_api="blas"):
        run_plan(alnico.plan(recipe_for("regmean", paths, None, {"gram": grams})), tmp_path / "out")
    assert seen
    assert set(seen) == {1}


@pytest.mark.parametrize(
    ("name", "kind", "option", "values"),
    [("regmean", "gram", "alpha", (0.9, 0.2)), ("fisher", "fisher", "floor", (0.0, 0.5))],
)
def test_merges_over_open_models_follow_the_options_of_methods_with_statistics(
    name: str, kind: str, option: str, values: tuple[float, ...], tmp_path: Path
) -> None:
    paths = two(tmp_path)
    sides = {kind: [str(made(kind, p, i)) for i, p in enumerate(paths)]}
    with Resident(lambda reference: open_model(reference)) as resident:
        for value in values:
            recipe = recipe_for(name, paths, None, {**sides, option: value})
            found = {
                n: v.tobytes() for n, v in resident.merge(resident.plan(alnico.load_recipe(recipe))).items()
            }
            alnico.merge(recipe, tmp_path / f"out-{value}")
            assert found == {n: v.tobytes() for n, v in read_model(tmp_path / f"out-{value}").items()}


def test_the_card_names_statistics_and_no_path_of_them(tmp_path: Path) -> None:
    paths = two(tmp_path)
    grams = [str(made("gram", p, i)) for i, p in enumerate(paths)]
    alnico.merge(recipe_for("regmean", paths, None, {"gram": grams}), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "The statistics of data that it takes, m0-gram-0, m1-gram-1, were on the maker's disk, too." in card
    )
    assert "gram: m0-gram-0" in card
    assert str(tmp_path) not in card
    assert local_paths(tmp_path / "out") == [*map(str, paths), *grams]
