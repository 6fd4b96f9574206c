"""Scores of an equipped model beside its controls: no vector, and random vectors of the same norms and weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
import made
from alnico.errors import EvaluationError
from alnico.evaluation.tasks import Score
from alnico.store.random_model import RandomModel

SIDE, EXAMPLES = 64, 300
TENSOR = "m.q.weight"


@pytest.fixture
def world(tmp_path: Path) -> Mapping[str, Any]:
    """A base that knows nothing, an adapter that learned the direction of the labels, one that learned another, and the task:
    is the sum of ``W x`` above 0?"""
    random = np.random.default_rng(5)
    direction, other = np.linalg.qr(random.standard_normal((SIDE, 2)))[0].T
    inputs = random.standard_normal((EXAMPLES, SIDE))
    labels = inputs @ direction > 0
    base = made.save_file(
        tmp_path / "base.safetensors",
        {
            TENSOR: ("F32", 1e-3 * random.standard_normal((SIDE, SIDE)).astype(np.float32)),
            "other.weight": ("F32", random.standard_normal((8, 8)).astype(np.float32)),
        },
    )

    def right(model: Mapping[str, Any]) -> Score:
        weights = np.asarray(model[TENSOR], np.float64)
        correct = ((inputs @ weights.T).sum(1) > 0) == labels
        return Score(float(correct.mean()), correct.astype(np.float64))

    return {
        "base": base,
        "learned": _adapter(tmp_path / "learned", direction),
        "other": _adapter(tmp_path / "other", other),
        "task": right,
    }


def _adapter(folder: Path, direction: np.ndarray) -> Path:
    """An adapter whose change of the tensor is ``1 direction^T``: every row is the direction."""
    import json

    made.save_file(
        folder / "adapter_model.safetensors",
        {
            "base_model.model.m.q.lora_A.weight": ("F32", direction[None].astype(np.float32)),
            "base_model.model.m.q.lora_B.weight": ("F32", np.ones((SIDE, 1), np.float32)),
        },
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    return folder


def controls_of(
    world: Mapping[str, Any], vector: str, out: Path, task: Callable[..., Any] | None = None
) -> Any:
    equipped = alnico.equip(
        world["base"], {str(world[vector]): 0.5}, out, tasks={"right": task or world["task"]}
    )
    assert equipped.controls is not None
    return equipped.controls


def scores_of(controls: Any) -> dict[str, float]:
    return {model.reference: model.scores["right"].value for model in controls.card.models}


def test_a_vector_that_learned_the_task_beats_random_vectors_of_its_length(
    world: Any, tmp_path: Path
) -> None:
    controls = controls_of(world, "learned", tmp_path / "out.safetensors")
    scores = scores_of(controls)
    assert list(scores) == ["no vector", "equipped", *(f"random vectors {i}" for i in (1, 2, 3))]
    assert scores["equipped"] > 0.97
    assert abs(scores["no vector"] - 0.5) < 0.2
    drawn = [value for name, value in scores.items() if name.startswith("random")]
    assert max(drawn) < 0.9
    assert controls.random["right"].value == pytest.approx(sum(drawn) / 3, abs=1e-12)
    over_base, over_random = controls.differences
    assert (over_base.control, over_random.control) == ("no vector", "random vectors")
    assert over_base.scores["right"].value == pytest.approx(
        scores["equipped"] - scores["no vector"], abs=1e-12
    )
    assert over_random.mean.value == pytest.approx(scores["equipped"] - sum(drawn) / 3, abs=1e-12)
    assert over_random.mean.low > 0
    assert controls.beats_random is True


def test_a_vector_of_another_direction_does_not_beat_them(world: Any, tmp_path: Path) -> None:
    controls = controls_of(world, "other", tmp_path / "out.safetensors")
    difference = controls.differences[1].mean
    assert difference.low <= 0
    assert controls.beats_random is False
    assert controls.data()["beats_random"] is False


def test_random_vectors_have_the_norms_of_the_vector_in_each_tensor_times_the_weight(
    world: Any, tmp_path: Path
) -> None:
    seen: list[dict[str, np.ndarray]] = []

    def note(model: Mapping[str, Any]) -> float:
        seen.append({name: np.asarray(value, np.float64) for name, value in model.items()})
        return 1.0

    controls_of(world, "learned", tmp_path / "out.safetensors", note)
    base, equipped, *drawn = seen
    start = made.read_model(world["base"])
    length = 0.5 * math.sqrt(SIDE)  # every one of 64 rows is a direction of length 1
    assert all((base[name] == start[name]).all() for name in start)
    assert np.linalg.norm(equipped[TENSOR] - base[TENSOR]) == pytest.approx(length, rel=1e-6)
    assert len(drawn) == 3
    for model in drawn:
        change = model[TENSOR] - base[TENSOR]
        assert np.linalg.norm(change) == pytest.approx(length, rel=1e-5)
        assert abs(change.mean()) < 4 * length / SIDE / SIDE  # of no direction of its own
        assert (model["other.weight"] == base["other.weight"]).all()
    first, second = (model[TENSOR] - base[TENSOR] for model in drawn[:2])
    assert abs((first * second).sum()) / length**2 < 5 / SIDE


def test_the_same_call_draws_the_same_vectors_for_any_blocks(world: Any) -> None:
    source = alnico.open_model(world["base"])
    with source:
        model = RandomModel("r", source, {TENSOR: 3.0}, 1, 0)
        whole = bytearray(4 * SIDE * SIDE)
        model.read_into(TENSOR, 0, memoryview(whole))
        parts = bytearray(4 * SIDE * SIDE)
        for offset in range(0, len(parts), 1001):  # also across values
            model.read_into(TENSOR, offset, memoryview(parts)[offset : offset + 1001])
        assert parts == whole
        other = bytearray(len(whole))
        RandomModel("r", source, {TENSOR: 3.0}, 2, 0).read_into(TENSOR, 0, memoryview(other))
        assert other != whole


def test_scores_without_examples_leave_open_whether_the_vector_beats_them(world: Any, tmp_path: Path) -> None:
    controls = controls_of(
        world, "learned", tmp_path / "out.safetensors", lambda model: float(len(model) > 0)
    )
    assert controls.beats_random is None


def test_a_task_that_fails_on_the_base_writes_nothing(world: Any, tmp_path: Path) -> None:
    def broken(model: Any) -> float:
        raise ValueError("no" if model else "nothing")

    with pytest.raises(EvaluationError, match="broken of no vector: the evaluation raised ValueError: no"):
        alnico.equip(world["base"], [str(world["learned"])], tmp_path / "out", tasks=broken)
    assert not (tmp_path / "out").exists()


def test_the_controls_of_a_method_are_merged_by_it(world: Any, tmp_path: Path) -> None:
    """TIES keeps a tenth of each vector: also of the random ones."""
    changed: list[float] = []
    start = made.read_model(world["base"])[TENSOR]

    def note(model: Mapping[str, Any]) -> float:
        changed.append(float((np.asarray(model[TENSOR]) != start).mean()))
        return 1.0

    alnico.equip(
        world["base"], [str(world["learned"])], tmp_path / "out", method="ties", density=0.1, tasks=note
    )
    assert changed[0] == 0
    assert changed[2:] == [pytest.approx(0.1, abs=0.01)] * 3
