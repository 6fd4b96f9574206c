"""What was drawn is kept from merge to merge of a search, has the bits of a merge to files, and stays inside the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.resident_model import SharedBudget
from alnico.engine import row_ranks
from alnico.engine.draw_store import DrawStore
from alnico.engine.fact_cache import FactStore
from alnico.engine.merge_session import Resident
from alnico.kernels.constants import LEAF
from alnico.numerics.noise import noise_key, uniform
from alnico.recipe.load import load_recipe
from alnico.run_options import RunOptions
from made import read_file, save_model

SHAPES = {"large": (9, LEAF), "odd": (77, 31), "norm": (65,)}
BIT_BYTES = 2 * 8 * sum(-(-int(np.prod(shape)) // 64) for shape in SHAPES.values())
"""A bit for each element of two models, in words of 64."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, random = tmp_path_factory.mktemp("drawn"), np.random.default_rng(0)
    base = {n: random.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    tuned = [
        {n: v + 0.1 * random.standard_normal(v.shape).astype(np.float32) for n, v in base.items()}
        for _ in range(2)
    ]
    return [
        str(save_model(folder / f"m{i}", {n: ("F32", v) for n, v in of.items()}))
        for i, of in enumerate((base, *tuned))
    ]


def recipe(models: list[str], method: str, *, seed: int = 0, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": models[0],
        "models": models[1:],
        "seed": seed,
        "parameters": parameters,
    }


def on_disk(of: dict[str, Any], out: Path) -> dict[str, bytes]:
    alnico.merge(of, out)
    return {n: v.tobytes() for file in out.glob("*.safetensors") for n, (_, v) in read_file(file).items()}


def in_memory(resident: Resident, of: dict[str, Any]) -> dict[str, bytes]:
    return {n: raw.tobytes() for n, raw in resident.merge(resident.plan(load_recipe(of))).items()}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("room", [0, BIT_BYTES // 2, 1 << 30])
def test_draws_that_are_kept_across_trials_give_the_bits_of_a_fresh_merge(
    models: list[str], tmp_path: Path, threads: int, room: int
) -> None:
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("dare_ties", {}),
        ("dare_linear", {"rescale": "inverse"}),  # measures nothing
        ("dare_ties", {"trim": 0.4}),
        ("della", {"epsilon": 0.2}),
    ]
    for kind, (method, options) in enumerate(kinds):
        trials = [
            recipe(models, method, density=density, seed=seed, weight=weight, **options)
            for density, seed in ((0.5, 0), (0.5, 1), (0.7, 0), (0.5, 0))
            for weight in (1.0, 0.7, 0.4)
        ]
        with Resident(open_model, run=RunOptions(threads=threads)) as resident:
            resident._store = FactStore(SharedBudget(room))
            for n, trial in enumerate(trials):
                assert in_memory(resident, trial) == on_disk(trial, tmp_path / f"{kind}-{n}"), trial


def test_the_draws_of_the_second_merge_are_read_by_the_third(
    models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked: list[str] = []
    ranks = row_ranks.ranks
    monkeypatch.setattr(
        row_ranks, "ranks", lambda job, *rest: (ranked.append(job.name), ranks(job, *rest))[1]
    )
    with Resident(open_model, run=RunOptions(threads=1)) as resident:
        room = resident._room.free_bytes
        counts, taken = [], []
        for weight in (1.0, 0.7, 0.4):
            ranked.clear()
            in_memory(resident, recipe(models, "della", density=0.5, epsilon=0.2, weight=weight))
            counts.append(ranked.count("large"))
            taken.append(room - resident._room.free_bytes)
        assert counts[1] > 0
        assert counts[2] == 0
        assert taken == [0, BIT_BYTES, BIT_BYTES]


def test_kept_draws_are_those_of_the_noise(models: list[str]) -> None:
    with Resident(open_model, run=RunOptions(threads=2)) as resident:
        for weight in (1.0, 0.7):
            in_memory(resident, recipe(models, "dare_ties", density=0.25, seed=4, weight=weight))
        (kept,) = (draws for key, draws in resident._store.draws._kept.items() if "large" in key)
        assert kept.are_known
        bits = np.unpackbits(kept.words.view(np.uint8), axis=1, bitorder="little")
    expected = [uniform(noise_key(4, "large", i), 0, 9 * LEAF) < np.float32(0.25) for i in range(2)]
    np.testing.assert_array_equal(bits, np.array(expected))


def test_draws_take_no_more_than_the_budget_and_leave_for_those_of_later_merges() -> None:
    size = 8 * 2 * 10
    room = SharedBudget(2 * size + 1)
    store = DrawStore(room)

    def merge(*keys: str) -> list[bool]:
        store.begin()
        found = [store.draws(key, 2, 10) is not None for key in keys]
        kept = sum(draws.words.nbytes for draws in store._kept.values())
        assert kept + room.free_bytes == 2 * size + 1
        assert kept <= 2 * size
        return found

    assert merge("a", "b", "c") == [False, False, False]
    assert merge("a", "b", "c") == [True, True, False]  # no draws leave for those of the same merge
    assert merge("a", "b", "c") == [True, True, False]
    assert merge("d", "e") == [False, False]
    assert merge("d", "e") == [True, True]
    assert merge("a", "b") == [False, False]  # those of the merge before stay


def test_the_draws_of_a_merge_that_failed_are_drawn_again() -> None:
    store = DrawStore(SharedBudget(1 << 20))
    store.draws("a", 1, 4)
    begun = store.draws("a", 1, 4)
    assert begun is not None
    assert not begun.are_known
    assert store.draws("a", 1, 4) is begun
