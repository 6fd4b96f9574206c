"""Adapters combined from their files, against the dense matrices in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import alnico
import made
from alnico.lora.combine import Combined, combine
from lora.made_adapters import factors, linear, save
from lora.references import combined as reference
from lora.references.combined import by_reference, deltas
from references import dare_linear, dare_ties, ties

WEIGHTS = {"positive": [0.7, 0.3], "negative": [1.5, -0.5], "one each": [1.0, 1.0]}


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Adapters of unequal ranks and alphas, one of them rsLoRA, with a layer of its own."""
    one = linear(tmp_path / "one", rank=3, seed=1, alpha=6)
    tensors = factors("m.q", 30, 20, 5, 7) | factors("m.v", 10, 20, 5, 8) | factors("m.o", 20, 30, 5, 9)
    return [one, save(tmp_path / "two", tensors, r=5, lora_alpha=4, use_rslora=True)]


def summed(adapters: list[Path], weights: list[float]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for module, delta in deltas(adapter).items():
            found[module] = found.get(module, 0.0) + weight * delta
    return found


def near(found: np.ndarray, expected: np.ndarray, within: float = 1e-6) -> None:
    assert np.abs(found - expected).max() <= within * max(np.abs(expected).max(), 1e-300)


def all_near(out: Path, expected: dict[str, np.ndarray], within: float = 1e-6) -> None:
    found = deltas(out)
    assert found.keys() == expected.keys()
    for module, values in expected.items():
        near(found[module], values, within)


def combined(adapters: list[Path], out: Path, **asked) -> Combined:
    return combine(adapters, out, dtype="float64", **asked)


# Sums.


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_cat_is_the_weighted_sum_and_its_ranks_add(tmp_path, two, weights):
    result = combine(two, tmp_path / "out", method="cat", weights=weights)
    assert result.error == 0
    assert {m.name: m.rank for m in result.modules} == {"m.q": 8, "m.o": 8, "m.v": 5}
    all_near(tmp_path / "out", summed(two, weights))
    combined(two, tmp_path / "wide", method="cat", weights=weights)
    all_near(tmp_path / "wide", summed(two, weights), 1e-14)


def test_cat_keeps_the_bits_of_factors_where_all_have_one_scale(tmp_path):
    adapters = [
        linear(tmp_path / "a", rank=3, seed=1, alpha=2),
        linear(tmp_path / "b", rank=6, seed=2, alpha=4),
    ]
    combine(adapters, tmp_path / "out", method="cat", weights=[0.3, 0.3])
    parts = [made.read_model(a) for a in adapters]
    found = made.read_model(tmp_path / "out")
    for module in ("m.q", "m.o"):
        a, b = (f"base_model.model.{module}.lora_{x}.weight" for x in "AB")
        np.testing.assert_array_equal(found[a], np.concatenate([p[a] for p in parts]))
        np.testing.assert_array_equal(found[b], np.concatenate([p[b] for p in parts], 1))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 9
    assert config["lora_alpha"] == pytest.approx(0.3 * 2 / 3 * 9, rel=1e-15)
    all_near(tmp_path / "out", summed(adapters, [0.3, 0.3]), 1e-14)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("rank", [1, 2, 4, 7])
def test_svd_is_the_best_approximation_of_its_rank(tmp_path, two, weights, rank):
    result = combined(two, tmp_path / "out", weights=weights, rank=rank)
    whole = summed(two, weights)
    all_near(tmp_path / "out", {m: reference.best(d, rank) for m, d in whole.items()}, 1e-12)
    for module in result.modules:
        assert module.error == pytest.approx(reference.distance(whole[module.name], rank), abs=1e-12)
    left_out = sum((reference.distance(d, rank) * np.linalg.norm(d)) ** 2 for d in whole.values())
    assert result.error == pytest.approx(
        math.sqrt(left_out / sum(np.linalg.norm(d) ** 2 for d in whole.values())), abs=1e-12
    )


def test_the_default_rank_of_a_sum_is_the_largest_of_the_adapters(tmp_path, two):
    result = combine(two, tmp_path / "out")
    assert {m.name: m.rank for m in result.modules} == {"m.q": 5, "m.o": 5, "m.v": 5}
    assert result.notes[-1] == (
        "no rank is set, so each update has the largest rank of the adapters. Set rank or energy to change that."
    )


def test_more_ranks_than_the_matrix_has_rows(tmp_path):
    adapters = [linear(tmp_path / str(i), 6, 5, rank=4, seed=i) for i in range(4)]
    result = combined(adapters, tmp_path / "out", rank=16, weights=[1, -2, 3, 0.5])
    assert {m.rank for m in result.modules} == {5}
    all_near(tmp_path / "out", summed(adapters, [1, -2, 3, 0.5]), 1e-12)
    assert result.error < 1e-15


def test_energy_takes_the_smallest_rank_that_keeps_the_share(tmp_path, two):
    result = combined(two, tmp_path / "out", energy=0.9)
    for module in result.modules:
        squares = np.linalg.svd(summed(two, [1, 1])[module.name], compute_uv=False) ** 2
        kept = np.cumsum(squares) / squares.sum()
        assert kept[module.rank - 1] >= 0.9
        assert module.rank == 1 or kept[module.rank - 2] < 0.9
    assert all(m.rank <= 2 for m in combined(two, tmp_path / "cut", energy=0.9, rank=2).modules)
    assert {m.rank for m in combined(two, tmp_path / "all", energy=1).modules} == {8, 5}


def test_an_adapter_of_zeros_changes_nothing(tmp_path, two):
    zeros = save(
        tmp_path / "zeros",
        {n: np.zeros_like(v) for n, v in factors("m.q", 30, 20, 4, 0).items()},
        r=4,
        lora_alpha=4,
    )
    for method in ("svd", "cat", "tsv", "iso_c", "dare_linear"):
        adapters = [two[0], zeros] if method == "tsv" else [*two, zeros]
        combined(adapters, tmp_path / method, method=method, **({} if method == "cat" else {"rank": 12}))
    all_near(tmp_path / "svd", summed(two, [1, 1]), 1e-12)
    all_near(tmp_path / "cat", summed(two, [1, 1]), 1e-12)
    all_near(tmp_path / "dare_linear", summed(two, [1, 1]), 1e-6)
    all_near(tmp_path / "tsv", deltas(two[0]), 1e-12)
    alone = combined([zeros, zeros], tmp_path / "nothing")
    assert [(m.rank, m.error) for m in alone.modules] == [(1, 0.0)]
    assert not any(v.any() for v in made.read_model(tmp_path / "nothing").values())


def test_two_identical_adapters(tmp_path, two):
    same = [two[0], two[0]]
    combined(same, tmp_path / "sum", weights=[0.25, 0.5])
    all_near(tmp_path / "sum", summed(same, [0.25, 0.5]), 1e-12)
    assert combined(same, tmp_path / "out").error < 1e-15  # the sum has the rank of one
    gone = combined(same, tmp_path / "gone", weights=[1, -1])
    assert not any(v.any() for v in made.read_model(tmp_path / "gone").values())
    assert gone.error == 0
    combined(same, tmp_path / "tsv", method="tsv")
    all_near(tmp_path / "tsv", deltas(two[0]), 1e-12)


def test_task_arithmetic_takes_the_registrys_options(tmp_path, two):
    combined(
        two, tmp_path / "out", method="task_arithmetic", weights=[1, 3], scale=0.5, divide="weight", rank=9
    )
    all_near(tmp_path / "out", summed(two, [0.125, 0.375]), 1e-12)


# Methods of task vectors.

DELTA = [
    ("ties", {"density": 0.4}),
    ("ties", {"density": [0.3, 0.6], "elect": "mass", "divide": "count"}),
    ("dare_ties", {"density": 0.5}),
    ("dare_linear", {"density": 0.5, "rescale": "inverse"}),
]
MERGES = {"ties": ties.merge, "dare_ties": dare_ties.merge, "dare_linear": dare_linear.merge}


@pytest.mark.parametrize(("method", "options"), DELTA, ids=str)
def test_whole_matrices_are_merged_as_a_merge_on_disk_does(tmp_path, two, method, options):
    """Thresholds, noise and votes are those of the same method on dense matrices under the base's names."""
    dense = [{f"{m}.weight": d.astype(np.float32) for m, d in deltas(a).items()} for a in two]
    names = dict.fromkeys(n for d in dense for n in d)
    for one, other in (dense, dense[::-1]):
        one |= {n: np.zeros_like(other[n]) for n in names if n not in one}
    base = {n: np.zeros_like(dense[0][n]) for n in names}
    expected = alnico.merge_state_dicts(dense, method, base=base, weights=[0.8, 0.4], seed=5, **options)
    combined(two, tmp_path / "out", method=method, weights=[0.8, 0.4], seed=5, rank=30, **options)
    all_near(
        tmp_path / "out", {n.removesuffix(".weight"): v.astype(np.float64) for n, v in expected.items()}, 2e-6
    )


@pytest.mark.parametrize(("method", "options"), DELTA, ids=str)
def test_whole_matrices_are_merged_as_the_paper_says(tmp_path, method, options):
    from references.noise import uniform

    adapters = [linear(tmp_path / str(i), rank=3, seed=i) for i in range(2)]
    combined(adapters, tmp_path / "out", method=method, weights=[0.8, 0.4], seed=5, rank=30, **options)
    given = {
        n: v if isinstance(v, list) or n in ("elect", "divide", "rescale") else [v] * 2
        for n, v in options.items()
    }
    expected = {}
    for module in ("m.q", "m.o"):
        dense = [deltas(a)[module] for a in adapters]
        noise = [uniform(5, f"{module}.weight", i, dense[0].shape) for i in range(2)]
        expected[module] = MERGES[method](
            dense, np.zeros_like(dense[0]), {**given, "weight": [0.8, 0.4]}, noise
        )
    all_near(tmp_path / "out", expected, 1e-5)


def test_a_rank_cuts_what_a_method_made_with_the_least_error(tmp_path):
    adapters = [linear(tmp_path / str(i), rank=3, seed=i) for i in range(2)]
    asked = {"method": "ties", "weights": [0.8, 0.4], "density": 0.4}
    combined(adapters, tmp_path / "whole", rank=20, **asked)
    whole = deltas(tmp_path / "whole")
    result = combined(adapters, tmp_path / "cut", rank=4, **asked)
    all_near(tmp_path / "cut", {m: reference.best(d, 4) for m, d in whole.items()}, 1e-6)
    for module in result.modules:
        assert module.error == pytest.approx(reference.distance(whole[module.name], 4), rel=1e-6)
    default = combined(adapters, tmp_path / "default", **asked)
    assert {m.rank for m in default.modules} == {6}
    assert "at most the sum of the adapters' ranks" in default.notes[-1]


@pytest.mark.parametrize("asked", [{"rank": 9}, {"energy": 0.9}, {"energy": 0.9, "rank": 4}], ids=str)
@pytest.mark.parametrize("sides", [(150, 220), (220, 150)], ids=str)
def test_large_matrices_are_cut_with_the_same_result(tmp_path, monkeypatch, sides, asked):
    """Only the leading singular vectors are computed, from blocks of rows; the error that is told is that of what is written."""
    from alnico.lora import reduce

    adapters = [linear(tmp_path / str(i), *sides, rank=3, seed=i) for i in range(2)]
    small = combined(adapters, tmp_path / "small", method="ties", density=0.5, **asked)
    whole = deltas_of_ties(adapters, 0.5)
    monkeypatch.setattr(reduce, "EXACT_ELEMENTS", 0)
    large = combined(adapters, tmp_path / "large", method="ties", density=0.5, **asked)
    assert [m.rank for m in small.modules] == [m.rank for m in large.modules]
    for module in large.modules:
        left_out = np.linalg.norm(
            deltas(tmp_path / "large")[module.name] - whole[module.name]
        ) / np.linalg.norm(whole[module.name])
        assert module.error == pytest.approx(left_out, rel=1e-4)
        assert module.error <= 1.02 * reference.distance(whole[module.name], module.rank)


def deltas_of_ties(adapters: list[Path], density: float) -> dict[str, np.ndarray]:
    dense = [deltas(a) for a in adapters]
    return {
        m: ties.merge([d[m] for d in dense], 0 * dense[0][m], {"density": [density] * 2}, None)
        for m in dense[0]
    }


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_what_is_linear_loses_nothing_in_a_space(tmp_path, two, space, method):
    combined(two, tmp_path / "out", method=method, space=space, weights=[0.6, -0.7])
    all_near(tmp_path / "out", summed(two, [0.6, -0.7]), 1e-12)


@pytest.mark.parametrize("ranks", [(3, 3), (2, 7)], ids=str)
def test_ties_in_a_space_is_ties_on_its_matrices(tmp_path, ranks):
    adapters = [linear(tmp_path / str(i), rank=r, seed=i) for i, r in enumerate(ranks)]
    weights, density = [0.8, 0.4], [0.5, 0.5]

    def merge(parts):
        return ties.merge(parts, np.zeros_like(parts[0]), {"weight": weights, "density": density}, None)

    for space in ("core", "knots"):
        combined(adapters, tmp_path / space, method="ties", space=space, weights=weights, density=0.5)
    dense = [deltas(a) for a in adapters]
    all_near(
        tmp_path / "knots", {m: reference.in_knots([d[m] for d in dense], merge) for m in dense[0]}, 1e-10
    )
    tensors = [
        {n.removeprefix("base_model.model."): v.astype(np.float64) for n, v in made.read_model(a).items()}
        for a in adapters
    ]
    expected = {}
    for module in dense[0]:
        lefts = [t[f"{module}.lora_B.weight"] * (6 / r) for t, r in zip(tensors, ranks, strict=True)]
        expected[module] = reference.in_core_space(
            lefts, [t[f"{module}.lora_A.weight"] for t in tensors], merge
        )
    all_near(tmp_path / "core", expected, 1e-10)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("tsv", {"scale": 0.7}),
        ("tsv", {"calibrate": "none", "least": 0.1}),
        ("iso_c", {"scale": 1.5}),
        ("iso_cts", {"common": 0.4}),
        ("dc_merge", {"density": 0.2}),
        ("swudi", {"filter": "time", "share": 0.3}),
    ],
    ids=str,
)
def test_methods_over_whole_matrices_are_those_of_recipes(tmp_path, method, options):
    for weights, ranks in (([1, 1, 1], (3, 3, 3)), ([0.7, -1.2, 0], (2, 5, 3))):
        adapters = [linear(tmp_path / f"{ranks}-{i}", rank=r, seed=i) for i, r in enumerate(ranks)]
        out = tmp_path / f"{ranks}"
        combined(adapters, out, method=method, weights=weights, **options)
        dense = [deltas(a) for a in adapters]
        spelled = {n: [v] * 3 if n == "density" else v for n, v in options.items()}
        expected = {m: by_reference(method, [d[m] for d in dense], weights, **spelled) for m in dense[0]}
        all_near(out, expected, 1e-9)


def test_tsv_blows_up_nothing_that_nearly_equal_adapters_differ_in(tmp_path):
    """With the paper's rule half of the energy lies outside of what either adapter adds."""
    one = factors("m.q", 40, 40, 3, 0)
    random = np.random.default_rng(1)
    other = {
        n: v + np.float32(1e-3) * random.standard_normal(v.shape).astype(np.float32) for n, v in one.items()
    }
    adapters = [save(tmp_path / str(i), t, r=3, lora_alpha=3) for i, t in enumerate((one, other))]
    delta = deltas(adapters[0])["m.q"]
    combined(adapters, tmp_path / "out", method="tsv")
    near(deltas(tmp_path / "out")["m.q"], delta, 5e-3)
    combined(adapters, tmp_path / "paper", method="tsv", least=0)
    paper = deltas(tmp_path / "paper")["m.q"]
    assert np.sum(paper * delta) / np.linalg.norm(paper) / np.linalg.norm(delta) < 0.85


# Kinds of parameters.


def test_biases_of_lora_are_merged_with_what_they_belong_to(tmp_path):
    random = np.random.default_rng(0)
    adapters, biases = [], []
    for i, (rank, alpha) in enumerate(((3, 6), (2, 1))):
        bias = random.standard_normal(30).astype(np.float32)
        tensors = factors("m.q", 30, 20, rank, i) | {"m.q.lora_B.bias": bias}
        adapters.append(save(tmp_path / str(i), tensors, r=rank, lora_alpha=alpha, lora_bias=True))
        biases.append(alpha / rank * bias.astype(np.float64))
    name = "base_model.model.m.q.lora_B.bias"
    for method, options, expected in (
        ("svd", {}, 0.5 * biases[0] - 2 * biases[1]),
        ("cat", {}, 0.5 * biases[0] - 2 * biases[1]),
        ("tsv", {}, (0.5 * biases[0] - 2 * biases[1]) / 2),
        ("magmax", {}, np.where(np.abs(biases[0]) >= np.abs(biases[1]), biases[0], biases[1])),
        ("ties", {"space": "core"}, ties.merge(biases, np.zeros(30), {"weight": [0.5, -2.0]}, None)),
    ):
        weights = None if method == "magmax" else [0.5, -2]
        combined(adapters, tmp_path / method, method=method, weights=weights, **options)
        near(made.read_model(tmp_path / method)[name], expected)
    combined(
        adapters[:1], tmp_path / "alone", method="cat", weights=[0.75]
    )  # its scale is in alpha, which scales the bias too
    alone = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    near(alone["lora_alpha"] / alone["r"] * made.read_model(tmp_path / "alone")[name], 0.75 * biases[0])
    config = json.loads((tmp_path / "svd" / "adapter_config.json").read_text())
    assert (config["lora_bias"], config["r"], config["lora_alpha"]) == (True, 3, 3)


def test_embeddings_and_convolutions_keep_their_shapes(tmp_path):
    random = np.random.default_rng(0)

    def numbers(*shape):
        return random.standard_normal(shape).astype(np.float32)

    adapters = [
        save(
            tmp_path / str(rank),
            {
                "e.lora_embedding_A": numbers(rank, 50), "e.lora_embedding_B": numbers(8, rank),
                "c.lora_A.weight": numbers(rank, 4, 3, 3), "c.lora_B.weight": numbers(12, rank, 1, 1),
            },
            r=rank, lora_alpha=2,
        )
        for rank in (2, 3)
    ]  # fmt: skip
    for method, options in (
        ("svd", {"rank": 5}),
        ("cat", {}),
        ("dare_linear", {}),
        ("dare_linear", {"space": "knots"}),
    ):
        combined(adapters, tmp_path / "out", method=method, weights=[0.5, 2], overwrite=True, **options)
        found = made.read_model(tmp_path / "out")
        assert {n.removeprefix("base_model.model."): v.shape for n, v in found.items()} == {
            "e.lora_embedding_A": (5, 50), "e.lora_embedding_B": (8, 5), "c.lora_A.weight": (5, 4, 3, 3), "c.lora_B.weight": (12, 5, 1, 1),
        }  # fmt: skip
        all_near(tmp_path / "out", summed(adapters, [0.5, 2]), 1e-5)


def test_the_noise_of_an_embedding_is_that_of_the_base_tensor(tmp_path):
    """The base stores the transpose of B A; an element's place there decides."""
    random = np.random.default_rng(0)
    a, b = (
        random.standard_normal((2, 9)).astype(np.float32),
        random.standard_normal((4, 2)).astype(np.float32),
    )
    adapter = save(tmp_path / "a", {"e.lora_embedding_A": a, "e.lora_embedding_B": b}, r=2, lora_alpha=2)
    combined([adapter], tmp_path / "out", method="dare_linear", density=0.5, rescale="none", rank=9)
    delta = {"e.weight": (b @ a).T.copy()}
    expected = alnico.merge_state_dicts(
        [delta], "dare_linear", base={"e.weight": np.zeros((9, 4), np.float32)}, density=0.5, rescale="none"
    )
    near(deltas(tmp_path / "out")["e"].T, expected["e.weight"], 1e-5)


def expert_deltas(adapter: Path, experts: int) -> np.ndarray:
    """The matrices of experts: in A their ranks one expert after the other, in B one rank after the other."""
    tensors = made.read_model(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    right = tensors["base_model.model.m.experts.lora_A.weight"].astype(np.float64)
    left = tensors["base_model.model.m.experts.lora_B.weight"].astype(np.float64)
    rank = len(right) // experts
    rights = right.reshape(experts, rank, -1)
    lefts = left.reshape(len(left), rank, experts)
    return config["lora_alpha"] / config["r"] * np.stack([lefts[:, :, e] @ rights[e] for e in range(experts)])


def test_each_expert_is_combined_by_itself(tmp_path):
    random = np.random.default_rng(0)
    adapters = []
    for rank in (2, 3):
        tensors = {"lora_A.weight": (4 * rank, 6), "lora_B.weight": (7, 4 * rank)}
        adapters.append(
            save(
                tmp_path / str(rank),
                {f"m.experts.{n}": random.standard_normal(s).astype(np.float32) for n, s in tensors.items()},
                r=rank,
                lora_alpha=2,
                target_parameters=["experts.up"],
            )
        )
    one, other = (expert_deltas(a, 4) for a in adapters)
    whole = 0.5 * one - other
    for method, options in (
        ("svd", {"rank": 5}),
        ("cat", {}),
        ("dare_linear", {"space": "core"}),
        ("dare_linear", {}),
    ):
        combined(adapters, tmp_path / "out", method=method, weights=[0.5, -1], overwrite=True, **options)
        near(expert_deltas(tmp_path / "out", 4), whole, 1e-5)
    combined(adapters, tmp_path / "cut", weights=[0.5, -1], rank=2)
    near(expert_deltas(tmp_path / "cut", 4), np.stack([reference.best(w, 2) for w in whole]), 1e-10)
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert (config["r"], config["target_parameters"], config["target_modules"]) == (2, ["experts.up"], [])


# What adapters hold whole.


def saving(directory: Path, value: float, seed: int, **config) -> Path:
    tensors = factors("m.q", 6, 5, 2, seed) | {"score.weight": np.full((3, 4), value, np.float32)}
    return save(directory, tensors, r=2, lora_alpha=2, modules_to_save=["score"], **config)


def test_modules_to_save_are_summed_where_the_weights_sum_to_one(tmp_path):
    adapters = [
        saving(tmp_path / "a", 1, 1),
        saving(tmp_path / "b", 5, 2),
        linear(tmp_path / "c", 6, 5, 2, seed=3),
    ]
    combine(adapters, tmp_path / "out", weights=[0.25, 0.75, 9])
    np.testing.assert_array_equal(
        made.read_model(tmp_path / "out")["base_model.model.score.weight"], np.full((3, 4), 4.0)
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]


def test_modules_to_save_are_averaged_or_left_out_if_that_is_asked_for(tmp_path):
    adapters = [saving(tmp_path / "a", 1, 1), saving(tmp_path / "b", 5, 2)]
    result = combine(adapters, tmp_path / "mean", weights=[1, 3], saved="average")
    np.testing.assert_array_equal(
        made.read_model(tmp_path / "mean")["base_model.model.score.weight"], np.full((3, 4), 4.0)
    )
    assert any("score.weight: the weighted mean of the adapters' tensors" in n for n in result.notes)
    combine(adapters, tmp_path / "drop", method="ties", saved="drop")
    assert "base_model.model.score.weight" not in made.read_model(tmp_path / "drop")
    assert json.loads((tmp_path / "drop" / "adapter_config.json").read_text())["modules_to_save"] is None


def test_a_bases_embeddings_that_come_with_adapters_stay(tmp_path):
    """PEFT stores them with an adapter that changes the embedding; no one trained them."""
    adapters = []
    for i in range(2):
        tensors = {
            "e.lora_embedding_A": np.ones((1, 4), np.float32),
            "e.lora_embedding_B": np.ones((3, 1), np.float32),
        }
        adapters.append(
            save(tmp_path / str(i), {**tensors, "e.base_layer.weight": np.full((4, 3), 7, np.float32)})
        )
    combine(adapters, tmp_path / "out", method="ties")
    np.testing.assert_array_equal(
        made.read_model(tmp_path / "out")["base_model.model.e.base_layer.weight"], np.full((4, 3), 7.0)
    )


# The result.


@pytest.mark.parametrize("asked", [{}, {"method": "dare_ties", "density": 0.5}, {"method": "tsv"}], ids=str)
def test_threads_and_memory_change_no_bit(tmp_path, two, asked):
    combine(two, tmp_path / "first", threads=1, **asked)
    combine(two, tmp_path / "second", threads=4, memory="3GiB", **asked)
    assert made.model_bytes(tmp_path / "first") == made.model_bytes(tmp_path / "second")
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two", "first", "second"}


def test_the_seed_decides_the_noise(tmp_path, two):
    for seed in (0, 1):
        combine(two, tmp_path / str(seed), method="dare_linear", density=0.5, seed=seed)
    one, other = (made.read_model(tmp_path / str(seed)) for seed in (0, 1))
    assert not any(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    ("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16"), (np.float64, "F64"), (None, "F32")]
)
def test_the_output_has_the_dtype_that_is_asked_for(tmp_path, two, dtype, stored):
    combine(two, tmp_path / "out", dtype=dtype)
    found = made.read_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {d for d, _ in found.values()} == {stored}


def test_factors_share_the_size_of_their_product(tmp_path, two):
    combine(two, tmp_path / "out")
    tensors = made.read_model(tmp_path / "out")
    for name, right in tensors.items():
        if name.endswith("lora_A.weight"):
            left = tensors[name.replace("lora_A", "lora_B")]
            np.testing.assert_allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1), rtol=1e-5)


def test_the_lock_says_what_was_read(tmp_path, two):
    combine(two, tmp_path / "out", method="ties_svd", density=0.5, rank=4)
    lock = json.loads((tmp_path / "out" / "alnico.lock.json").read_text())
    assert lock["options"]["method"] == "ties"
    assert lock["options"]["written"] == "ties_svd"
    assert lock["options"]["options"] == {
        "elect": "mass",
        "divide": "count",
        "density": 0.5,
        "weight": [1.0, 1.0],
    }
    assert [set(i["tensors"]) for i in lock["inputs"]] == [set(made.read_model(a)) for a in two]
    assert set(lock["output"]) == set(made.read_model(tmp_path / "out"))


def test_the_card_says_what_was_combined(tmp_path, two):
    for adapter in two:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": "owner/base"})
        )
    combine(two, tmp_path / "out", weights=[0.5, 0.25])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: owner/base\nbase_model_relation: adapter\nlibrary_name: peft\n")
    assert "| one | 0.5 | not from the hub | 3 |\n| two | 0.25 | not from the hub | 5 |\n" in card
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "owner/base"
    )


def test_a_pattern_for_a_module_is_for_no_other_that_ends_with_its_name(tmp_path):
    tensors = factors("fc", 6, 5, 2, 0) | factors("block.fc", 6, 5, 4, 1) | factors("other", 6, 5, 4, 2)
    adapter = save(
        tmp_path / "a", tensors, r=4, lora_alpha=4, rank_pattern={"^fc": 2}, alpha_pattern={"^fc": 2}
    )
    combine([adapter], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"^fc": 2}, {"^fc": 2})


def test_the_config_keeps_that_layers_are_turned(tmp_path):
    turned = linear(tmp_path / "turned", seed=1, fan_in_fan_out=True)
    combine([turned, linear(tmp_path / "plain", seed=2)], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


@pytest.mark.parametrize(
    "asked", [{"method": m, "space": s} for m in ("ties", "dare_linear") for s in ("core", "knots", "dense")] + [{"method": "tsv"}, {"method": "iso_c"}], ids=str
)  # fmt: skip
def test_nothing_of_nothing_is_nothing(tmp_path, two, asked):
    zeros = save(
        tmp_path / "zeros",
        {n: np.zeros_like(v) for n, v in factors("m.q", 30, 20, 4, 0).items()},
        r=4,
        lora_alpha=4,
    )
    result = combined([zeros, zeros], tmp_path / "out", **asked)
    assert [(m.rank, m.error) for m in result.modules] == [(1, 0.0)]
    combined(two, tmp_path / "unweighted", weights=[0, 0], **asked)
    for out in ("out", "unweighted"):
        assert not any(v.any() for v in made.read_model(tmp_path / out).values())
