"""Recorded times choose what each run of the tests has, inside its budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import durations
from durations import KEPT_BUDGET, Known, costly, main, processor_seconds


def recorded(
    folder: Path, tests: list[Known], seconds: dict[str, float], *, old: Any = None
) -> dict[str, Any]:
    """The record that is written when a worker has found these tests and run those with a time."""
    record = folder / "durations.json"
    record.write_text(json.dumps({"slow_from": 1, "costly_from": 1, "seconds": old or {}}))
    (folder / "1.tests").write_text("".join(json.dumps(test) + "\n" for test in tests))
    (folder / "1.seconds").write_text("".join(json.dumps([*one, []]) + "\n" for one in seconds.items()))
    main(folder, record)
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def test_the_cheapest_case_stays_longest_and_a_marked_one_always() -> None:
    cases = {
        "a::one[x]": 1.9,
        "a::one[y]": 0.6,
        "a::one[z]": 0.4,
        "a::two": 1.9,
        "a::three": 2.0,
        "a::four[x]": 3.0,
    }
    tests = [Known(name, "slow", name == "a::four[x]") for name in cases]
    assert costly(tests, cases, 2.0) == {"a::one[x]", "a::one[y]", "a::three"}
    assert costly([Known(n, "nightly", False) for n in cases], cases, 2.0) == set()
    assert costly(tests, {}, 2.0) == set(), "a test without a time is run"


def test_each_run_fits_its_budget_and_no_smaller_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durations, "FAST_BUDGET", 110)
    monkeypatch.setattr(durations, "ALL_BUDGET", 250)
    times = {f"a::t{i}": 0.01 * (i + 1) for i in range(400)}
    tests = [Known(name, "fast", False) for name in times]
    found = recorded(tmp_path, tests, times)
    assert sum(s for s in times.values() if s < 1) <= 110 < sum(s for s in times.values() if s < 2)
    assert sum(s for s in times.values() if s < 2) <= 250 < sum(s for s in times.values() if s < 3)
    assert (found["slow_from"], found["costly_from"]) == (1, 2)
    kept = {f"a::k{i}": 9.9 for i in range(9)}
    less = recorded(tmp_path, [*tests, *(Known(name, "slow", True) for name in kept)], times | kept)
    assert (less["slow_from"], less["costly_from"]) == (1, 1.5)


def test_too_many_marked_tests_end_the_recording(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=f"before_each_merge take {KEPT_BUDGET + 1} s; expected {KEPT_BUDGET} s at most"
    ):
        recorded(tmp_path, [Known("a::k", "slow", True)], {"a::k": KEPT_BUDGET + 1})


def test_tests_that_were_not_run_keep_their_times_until_they_are_gone(tmp_path: Path) -> None:
    old = {"a::gone": 5.0, "a::left": 6.0, "a::run": 7.0, "b::other": 8.0}
    tests = [Known(name, "slow", False) for name in ("a::left", "a::run")]
    assert recorded(tmp_path, tests, {"a::run": 3.0}, old=old)["seconds"] == {
        "a::left": 6.0,
        "a::run": 3.0,
        "b::other": 8.0,
    }


def test_what_a_fixture_takes_is_divided_among_the_tests_that_use_it(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        """
import time
import pytest

def spend(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.fixture(scope="module")
def costs():
    spend(1)

def test_one(costs): ...
def test_two(costs): ...
def test_three(): spend(0.3)
"""
    )
    times = tmp_path / "times"
    times.mkdir()
    words = [sys.executable, "-m", "pytest", "-p", "durations", "-p", "no:cacheprovider", "test_it.py"]
    environment = {
        **os.environ,
        "ALNICO_TEST_DURATIONS": str(times),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    subprocess.run(words, cwd=tmp_path, env=environment, check=True)
    (path,) = times.glob("*.seconds")
    found = durations._of_worker(path)
    assert [name.partition("::")[2] for name in found] == ["test_one", "test_two", "test_three"]
    assert 0.5 <= found["test_it.py::test_one"] < 1
    assert 0.5 <= found["test_it.py::test_two"] < 1
    assert 0.3 <= found["test_it.py::test_three"] < 0.5


def test_a_process_that_still_runs_is_counted() -> None:
    before = processor_seconds()
    busy = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        running = processor_seconds() - before
        process.communicate(b"\n")
    assert 0.4 < running <= processor_seconds() - before + 0.05
