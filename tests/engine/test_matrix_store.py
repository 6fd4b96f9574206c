"""What methods compute from whole matrices is computed once in a search, and has the bits of a merge to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.resident_model import SharedBudget
from alnico.engine import matrix
from alnico.engine.matrix_store import KeptArrays, ResidentStore
from alnico.engine.merge_session import Resident
from alnico.events import Advanced, Noted
from alnico.recipe.load import load_recipe
from alnico.run_options import RunOptions
from made import read_file, save_model

SHAPES = {"tall": (90, 72), "wide": (40, 100), "square": (80, 80), "norm": (40,)}


def models(folder: Path, count: int = 3) -> tuple[Path, list[Path]]:
    random = np.random.default_rng(0)
    base = {n: random.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    made = [
        {n: v + 0.1 * random.standard_normal(v.shape).astype(np.float32) for n, v in base.items()}
        for _ in range(count)
    ]
    paths = [
        save_model(folder / name, {n: ("F32", v) for n, v in tensors.items()})
        for name, tensors in zip(("base", *(f"m{i}" for i in range(count))), (base, *made), strict=True)
    ]
    return paths[0], paths[1:]


def recipe(
    base: Path, tuned: list[Path], weights: tuple[float, ...] = (), **parameters: Any
) -> dict[str, Any]:
    entries = [
        {"model": str(t), "parameters": {"weight": w}}
        for t, w in zip(tuned, weights or (1.0,) * len(tuned), strict=True)
    ]
    return {"merge_method": "tsv", "base_model": str(base), "models": entries, "parameters": parameters}


def values(resident: Resident, of: dict[str, Any]) -> dict[str, bytes]:
    return {n: a.tobytes() for n, a in resident.merge(resident.plan(load_recipe(of))).items()}


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes of the matrices that are decomposed."""
    found: list[tuple[int, int]] = []
    real = matrix.leading_vectors

    def counting(value: np.ndarray, count: int) -> Any:
        found.append(value.shape)
        return real(value, count)

    monkeypatch.setattr(matrix, "leading_vectors", counting)
    return found


def test_trials_over_weights_and_scales_decompose_nothing_again(
    tmp_path: Path, decomposed: list[tuple[int, int]]
) -> None:
    base, tuned = models(tmp_path)
    trials = [
        recipe(base, tuned),
        recipe(base, tuned, (0.5, 2.0, -1.0)),
        recipe(base, tuned, (1.0, 0.3, 1.0), **{"lambda": 1.4}),
    ]
    with Resident(open_model, run=RunOptions(threads=2)) as resident:
        found = [values(resident, trials[0])]
        assert len(decomposed) == 3 * 3
        found += [values(resident, trial) for trial in trials[1:]]
        assert len(decomposed) == 3 * 3
        values(resident, recipe(base, tuned, calibrate="none"))  # another factor of the same vectors
        assert len(decomposed) == 3 * 3
        values(resident, recipe(base, tuned[:2]))  # more vectors of each: r / 2 in place of r / 3
        assert len(decomposed) == 3 * 3 + 3 * 2
    for i, trial in enumerate(trials):
        alnico.merge(trial, tmp_path / f"out-{i}.safetensors", threads=1)
        on_disk = read_file(tmp_path / f"out-{i}.safetensors")
        assert found[i] == {n: v.tobytes() for n, (_, v) in on_disk.items()}


def test_a_budget_for_some_of_the_arrays_keeps_the_same_ones_from_trial_to_trial(
    tmp_path: Path, decomposed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = models(tmp_path)
    expected: list[dict[str, bytes]] = []
    counts = []
    for room in (1 << 30, 200_000, 0):
        monkeypatch.setattr(SharedBudget, "__init__", lambda self, _, room=room: _budget(self, room))
        with Resident(open_model, run=RunOptions(threads=1)) as resident:
            for scale in (1.0, 0.5, 2.0, 1.0):
                decomposed.clear()
                found = values(resident, recipe(base, tuned, **{"lambda": scale}))
                counts.append(len(decomposed))
            expected.append(found)
    assert counts[:4] == [9, 0, 0, 0]
    assert 0 < counts[6] == counts[7] < 9
    assert counts[8:] == [9, 9, 9, 9]
    assert expected[0] == expected[1] == expected[2]


_made = SharedBudget.__init__


def _budget(budget: SharedBudget, room: int) -> None:
    _made(budget, room)


def test_arrays_that_no_merge_uses_any_more_make_room() -> None:
    array = np.ones(100)
    store = ResidentStore(SharedBudget(2 * array.nbytes))
    store.begin()
    store.put("a", KeptArrays((array,)))
    store.put("b", KeptArrays((array.copy(),)))
    store.put("c", KeptArrays((array.copy(),)))
    assert store.get("c") is None
    store.begin()
    assert store.get("b") is not None
    store.begin()
    store.put("c", KeptArrays((array.copy(),)))
    assert store.get("a") is None
    assert store.get("b") is not None
    assert store.get("c") is not None


def test_notes_are_said_in_every_merge_and_one_line_for_all_tensors(tmp_path: Path) -> None:
    base, tuned = models(tmp_path, 2)
    events: list[Any] = []
    given = recipe(base, [tuned[0], tuned[1], tuned[0]])
    result = alnico.merge(given, tmp_path / "out.safetensors", threads=2, watch=events.append)
    assert result.notes == (
        f"3 tensors, such as square: {tuned[0]} and {tuned[0]} change equally, and count as one model",
    )
    assert sum(isinstance(event, Noted) for event in events) == 3
    assert sum(e.bytes_done for e in events if isinstance(e, Advanced)) == result.plan.bytes_to_write - len(
        result.plan.shards[0].start
    )


def test_progress_comes_while_a_matrix_is_decomposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = models(tmp_path)
    seen: list[int] = []
    done = dict.fromkeys(SHAPES, 0)
    real = matrix.leading_vectors

    def watching(value: np.ndarray, count: int) -> Any:
        if value.shape == SHAPES["square"]:
            seen.append(done["square"])
        return real(value, count)

    def watch(event: Any) -> None:
        if isinstance(event, Advanced):
            done[event.tensor] += event.bytes_done

    monkeypatch.setattr(matrix, "leading_vectors", watching)
    alnico.merge(recipe(base, tuned), tmp_path / "out.safetensors", threads=1, watch=watch)
    size = 4 * 80 * 80
    assert seen == [0, int(size * 0.3), int(size * 0.6)]
    assert done["square"] == size
