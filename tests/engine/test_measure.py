"""Facts of whole tensors are exact, however the tensor is cut and whatever the sample says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.engine import measure, row_ranks
from alnico.engine.arena import Arena
from alnico.engine.blocks import Block
from alnico.engine.kernel_arguments import KernelContext
from alnico.engine.measure import SMALL
from alnico.kernels.constants import LEAF
from alnico.kernels.facts import Bernoulli, Count, Gram, KthLargest, Sum, magnitude
from alnico.methods import find
from alnico.methods.base import combine
from alnico.numerics.noise import noise_key, uniform
from alnico.plan.job import Input, Job
from made import encoded

N = 3 * LEAF + 1234


def job_of(count: int, dtype: str = "F32", models: int = 1, base: bool = False) -> Job:
    size = count * (2 if dtype == "BF16" else 4)
    inputs = tuple(Input(i, "w", dtype, size) for i in range(models))
    return Job(
        "mix",
        "w",
        dtype,
        (count,),
        count,
        size,
        inputs,
        inputs[0] if base else None,
        combine((1.0,) * models),
    )


def raw_of(values: np.ndarray, dtype: str = "F32") -> np.ndarray:
    return np.frombuffer(encoded(dtype, values), np.uint8).copy()


def measured(
    fact,
    values: list[np.ndarray],
    dtype: str = "F32",
    cuts: list[int] | None = None,
    base: np.ndarray | None = None,
):
    """Measure a fact, or a list of them, over blocks that begin at ``cuts`` (multiples of a leaf), in a shuffled order."""
    facts = fact if isinstance(fact, list) else [fact]
    count = values[0].size
    job = job_of(count, dtype, len(values), base is not None)
    level = measure.LevelMeasurement(facts, KernelContext(job, 0, {}))
    raws, width = [raw_of(v, dtype) for v in values], 2 if dtype == "BF16" else 4
    of_base = raw_of(base, dtype) if base is not None else np.empty(0, np.uint8)
    edges = [*(cuts or [0]), count]
    spans = list(pairwise(edges))
    passes = 0
    if runs := level.runs:
        joined = [np.concatenate([r[a * width : b * width] for a, b in runs]) for r in [*raws, of_base]]
        level.sample(Block(joined[:-1], joined[-1]))
    while not level.done:
        np.random.default_rng(passes).shuffle(spans)
        for start, stop in spans:
            parts = [r[start * width : stop * width] for r in raws]
            level.fold(start, stop, Block(parts, of_base[start * width : stop * width]))
        level.turn()
        passes += 1
    results = level.results()
    return results if isinstance(fact, list) else results[fact], passes


def exact(values: np.ndarray, share: float) -> float:
    ordered = np.sort(np.abs(values))[::-1]
    return float(ordered[max(1, int(share * values.size)) - 1])


def normal(random: np.random.Generator) -> np.ndarray:
    return random.standard_normal(N)


def rows_of_different_size(random: np.random.Generator) -> np.ndarray:
    return random.standard_normal(N) * np.exp(random.standard_normal(N // 500 + 1)).repeat(500)[:N]


def mostly_frozen(random: np.random.Generator) -> np.ndarray:
    return np.where(random.random(N) < 0.97, 0.0, random.standard_normal(N))


def few_values(random: np.random.Generator) -> np.ndarray:
    return random.integers(-3, 4, N).astype(float)


def all_equal(_: np.random.Generator) -> np.ndarray:
    return np.full(N, 0.25)


def hidden_from_the_sample(random: np.random.Generator) -> np.ndarray:
    """Large values where no run of the sample is."""
    values = random.standard_normal(N) * 1e-3
    values[np.arange(N) % (N // measure.SAMPLED_RUNS) >= measure.SAMPLED_RUN] += 5.0
    return values


def subnormal(random: np.random.Generator) -> np.ndarray:
    return random.standard_normal(N) * 1e-40


DISTRIBUTIONS = [
    normal,
    rows_of_different_size,
    mostly_frozen,
    few_values,
    all_equal,
    hidden_from_the_sample,
    subnormal,
]


@pytest.mark.parametrize("share", [1e-9, 0.01, 0.3, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("make", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_kth_largest_is_exact(make: Callable, share: float, dtype: str) -> None:
    values = make(np.random.default_rng(1)).astype(np.float32)
    if dtype == "BF16":
        values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    expected = exact(values, share)
    assert measured(KthLargest((share,)), [values], dtype)[0] == (expected,)
    assert measured(KthLargest((share,)), [values], dtype, [0, LEAF, 2 * LEAF, 3 * LEAF])[0] == (expected,)


def test_one_pass_is_enough_for_plain_values_and_a_misled_sample_takes_more() -> None:
    random = np.random.default_rng(2)
    assert measured(KthLargest((0.3,)), [normal(random).astype(np.float32)])[1] == 1
    assert measured(KthLargest((0.3,)), [hidden_from_the_sample(random).astype(np.float32)])[1] == 3


def test_a_block_with_more_inside_than_fits_is_found_by_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MOST_INSIDE", -4000)
    values = normal(np.random.default_rng(3)).astype(np.float32)
    result, passes = measured(KthLargest((0.3,)), [values])
    assert (result, passes) == ((exact(values, 0.3),), 3)


def test_a_search_by_histogram_that_no_plan_foresaw_counts_towards_compiling_its_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elements: dict[str, int] = {}
    choose = measure.kernel_for

    def noted(kernel: Any, count: int = 0, **more: Any) -> Any:
        kind = getattr(kernel, "reduction", "selection")
        elements[kind] = elements.get(kind, 0) + count
        return choose(kernel, count, **more)

    monkeypatch.setattr(measure, "kernel_for", noted)
    values = hidden_from_the_sample(np.random.default_rng(2)).astype(np.float32)
    measured(KthLargest((0.3,)), [values])
    assert elements["histogram"] == 2 * values.size  # both of its passes


def test_no_more_is_kept_than_the_plan_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SELECTION_BYTES", 4096)
    values = normal(np.random.default_rng(3)).astype(np.float32)
    result, passes = measured(KthLargest((0.3,)), [values], "F32", [0, LEAF, 2 * LEAF, 3 * LEAF])
    assert (result, passes) == ((exact(values, 0.3),), 3)


def test_thresholds_of_one_function_are_searched_together_and_one_that_the_sample_misses_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(8)
    values = [normal(random).astype(np.float32), hidden_from_the_sample(random).astype(np.float32)]
    lower, upper = KthLargest((0.3, 1.0)), KthLargest((0.01, 0.3))
    calls: list[str] = []
    call = measure._FactState.call
    monkeypatch.setattr(
        measure._FactState,
        "call",
        lambda state, run, *rest: (calls.append(type(state).__name__), call(state, run, *rest)),
    )
    results, passes = measured([lower, upper], values)
    expected = {lower: (exact(values[0], 0.3), 0.0), upper: (exact(values[0], 0.01), exact(values[1], 0.3))}
    assert (results, passes) == (expected, 3)
    # The sample and the pass of both, then two passes for the one whose second value was not in its bracket.
    assert calls == ["_ByBracket"] * 2 + ["_ByHistogram"] * 2


def test_a_sample_is_of_the_whole_tensor_and_never_more_than_a_leaf() -> None:
    for count in (SMALL + 1, N, 10**10):
        job = job_of(count)
        runs = measure.LevelMeasurement([KthLargest((0.3,))], KernelContext(job, 0, {})).runs
        assert sum(stop - start for start, stop in runs) <= LEAF
        assert runs[0][0] == 0
        assert count - runs[-1][1] <= count // len(runs)


def test_models_with_share_one_are_not_measured() -> None:
    random = np.random.default_rng(5)
    values = [normal(random).astype(np.float32) for _ in range(3)]
    result, _ = measured(KthLargest((1.0, 0.2, 1.0)), values)
    assert result == (0.0, exact(values[1], 0.2), 0.0)


def test_the_kth_largest_of_deltas_is_that_of_the_differences() -> None:
    random = np.random.default_rng(6)
    base, model = normal(random).astype(np.float32), normal(random).astype(np.float32)
    assert measured(KthLargest((0.4,)), [model], base=base)[0] == (exact(model - base, 0.4),)


@pytest.mark.parametrize("cuts", [[0], [0, LEAF], [0, LEAF, 2 * LEAF, 3 * LEAF]])
def test_sums_counts_and_inner_products_do_not_depend_on_the_cuts(cuts: list[int]) -> None:
    random = np.random.default_rng(7)
    values = [(normal(random) * 10 ** random.uniform(-3, 3, N)).astype(np.float32) for _ in range(2)]
    for fact in (Sum(magnitude), Count(magnitude), Gram()):
        whole, parts = measured(fact, values)[0], measured(fact, values, cuts=cuts)[0]
        assert whole == parts
    sums = measured(Sum(magnitude), values)[0]
    gram = measured(Gram(), values)[0]
    for i, v in enumerate(values):
        assert sums[i] == pytest.approx(math.fsum(np.abs(v.astype(np.float64))), rel=1e-14)
        assert gram[i][i] == pytest.approx(math.fsum(v.astype(np.float64) ** 2), rel=1e-13)
    assert measured(Count(magnitude), values)[0] == (N, N)


@pytest.mark.parametrize("room", [1 << 20, LEAF // 8])
def test_what_is_drawn_for_a_sum_is_known_afterwards_as_far_as_there_is_room(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "DRAWN_BYTES", room)
    random = np.random.default_rng(9)
    raws = [raw_of(normal(random)) for _ in range(2)]
    merge = find("dare_linear").bind({"density": [0.3, 0.6]}, 2)
    job = dataclasses.replace(job_of(N, models=2), merge=merge)
    draws = measure.kept_draws(job, 1, Arena(0))
    level = measure.LevelMeasurement(merge.levels()[0], KernelContext(job, 7, {}, draws=draws))
    for start in range(0, N, LEAF):
        stop = min(start + LEAF, N)
        level.fold(start, stop, Block([r[4 * start : 4 * stop] for r in raws], np.empty(0, np.uint8)))
    assert not any(d.are_known for d in draws.values())
    level.turn()
    (kept,) = draws.values()
    expected = [
        uniform(noise_key(7, "w", i), 0, N) < np.float32(chance) for i, chance in enumerate((0.3, 0.6))
    ]
    bits = np.unpackbits(kept.words.view(np.uint8), axis=1, bitorder="little")
    known = min(N, 8 * room)
    np.testing.assert_array_equal(bits[:, :known], np.array(expected)[:, :known])
    assert (kept.have(known), kept.have(known + 64)) == (True, False)
    assert draws.keys() == {a for a in merge.arguments if isinstance(a, Bernoulli)}


def test_rows_whose_draws_are_known_are_not_ranked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    ranks = row_ranks.ranks
    monkeypatch.setattr(
        row_ranks, "ranks", lambda job, rows, *rest: (calls.append(rows), ranks(job, rows, *rest))[1]
    )
    random = np.random.default_rng(3)
    shape = (5, LEAF)
    base = {"w": random.standard_normal(shape).astype(np.float32)}
    tuned = [{"w": base["w"] + random.standard_normal(shape).astype(np.float32)} for _ in range(2)]
    options = {"base": base, "method": "della", "density": 0.5, "threads": 1}
    merged = alnico.merge_state_dicts(tuned, **options)
    assert len(calls) == 2  # 5 leaves are two blocks
    calls.clear()
    monkeypatch.setattr(measure, "DRAWN_BYTES", 0)
    assert alnico.merge_state_dicts(tuned, **options)["w"].tobytes() == merged["w"].tobytes()
    assert len(calls) == 4
