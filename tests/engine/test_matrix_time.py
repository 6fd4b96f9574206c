"""What whole matrices will take is said before a merge, from their operations and the speed of the machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import alnico
from alnico.cli import progress
from alnico.cli.commands.plan import plan_data, plan_text
from alnico.devices import Device, devices_for, made_gpus
from alnico.engine import matrix_time
from alnico.engine.matrix_time import forecast_matrices, measure_rate
from alnico.events import Started
from engine.test_matrix_store import models, recipe


def test_the_forecast_has_the_operations_of_all_matrices_at_the_rate_of_the_machine(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    plan = alnico.plan(recipe(base, tuned), threads=1)
    found = forecast_matrices(plan, 1e9)
    assert found is not None
    assert (found.tensors, found.at_once) == (3, 1)
    # A decomposition of 80 x 80: at least its product and its eigenvectors, for each of three models.
    least = 3 * (2 * 80**3 + 9 * 80**3)
    assert 3 * least / 1e9 * 0.3 < found.seconds < 20 * least / 1e9
    assert found.largest_bytes > 8 * 4 * 80 * 80
    twice = forecast_matrices(alnico.plan(recipe(base, tuned), threads=2), 1e9)
    assert twice is not None
    assert twice.at_once == 2
    assert found.seconds / 2 <= twice.seconds < found.seconds


def test_a_method_without_matrices_has_no_forecast(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    assert forecast_matrices(alnico.plan({**recipe(base, tuned), "merge_method": "ties"})) is None


def test_a_long_merge_says_how_long_it_will_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = models(tmp_path)
    plan = alnico.plan(recipe(base, tuned), threads=1)
    assert progress._foretold(Started(plan, 0, 0)) is None
    monkeypatch.setattr(matrix_time, "measure_rate", lambda: 1e4)
    line = progress._foretold(Started(plan, 0, 0))
    assert line is not None
    assert re.fullmatch(
        r"3 tensors as whole matrices, at most [\d.]+ MB each, 1 at a time: about .+ (min|s)", line
    )
    resumed = progress._foretold(Started(plan, 1, 10))
    assert resumed == f"{line}, less what is done"


def test_the_plan_says_what_matrices_take(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    plan = alnico.plan(recipe(base, tuned), threads=1)
    text = str(plan_text(plan, 0, None))
    assert re.search(
        r"matrices  3 tensors as whole matrices, at most [\d.]+ MB each, 1 at a time: about 1 s", text
    )
    assert plan_data(plan)["matrices"].keys() == {"tensors", "largest_bytes", "at_once", "seconds"}
    assert "matrices" not in plan.summary()


def test_the_machine_is_measured() -> None:
    assert 1e7 < measure_rate() < 1e13


def test_on_gpus_the_forecast_has_their_memory_and_their_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = models(tmp_path)
    measured: list[str] = []
    monkeypatch.setattr(matrix_time, "measure_rate", lambda: 1e9)
    monkeypatch.setattr(matrix_time, "measure_gpu_rate", lambda device: measured.append(device.name) or 4e9)
    with made_gpus([Device(f"cuda:{i}", "Made", 8 << 30) for i in range(3)]):
        plans = {
            d: alnico.plan(recipe(base, tuned), threads=1, device=d) for d in ("cpu", "cuda:2", "cuda:all")
        }
        found = {device: forecast_matrices(plan) for device, plan in plans.items()}
    assert measured == ["cuda:2", "cuda:0"]
    here, one, all_three = found["cpu"], found["cuda:2"], found["cuda:all"]
    assert here is not None
    assert one is not None
    assert all_three is not None
    assert one.seconds == pytest.approx(here.seconds / 4)
    assert one.seconds / 3 <= all_three.seconds < one.seconds
    assert one.largest_bytes == here.largest_bytes - (32 << 20) + (256 << 20)


def test_the_rate_of_a_gpu_is_that_of_eigenvectors_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_time, "GPU_PROBE_SIDE", 128)
    with made_gpus([Device("cuda:0", "Made", 8 << 30)]):
        (device,) = devices_for("merging", "cuda")
        assert 1e7 < matrix_time.measure_gpu_rate(device) < 1e12
