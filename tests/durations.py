"""Decides by recorded times when a test runs, and starts the longest first.

``./check --record`` runs every test that the source does not leave to the night, and writes tests/durations.json. Its times are
seconds of processor time. A test that takes ``slow_from`` or more is marked slow, so that the rest, which ./check runs, takes
FAST_BUDGET in all. A test that takes ``costly_from`` or more is marked costly and left to the night, so that what ./check --all runs
takes ALL_BUDGET in all. Of a test with many cases, the cheapest is held to ``costly_from`` and all others to a CASES-th of it: another
claim is worth more than another case. Tests with the mark ``before_each_merge`` are never costly; they take KEPT_BUDGET at most.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

RECORD = Path(__file__).with_name("durations.json")
FOLDER = os.environ.get("ALNICO_TEST_DURATIONS")
"""Where each worker writes the times of its tests; not set in ordinary runs."""

FAST_BUDGET = 110
"""Seconds of processor time for the tests of ./check; two workers need as much again to import what they test."""

ALL_BUDGET = 450
"""Seconds of processor time for the tests of ./check --all."""

KEPT_BUDGET = 100
"""The part of ALL_BUDGET that tests with the mark ``before_each_merge`` may take."""

KEPT = "before_each_merge"

CASES = 4

SLOW_STEPS = (0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
COSTLY_STEPS = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)

ALWAYS = "test_house.py"
"""The tests of this file are neither slow nor costly: each ./check runs all of them."""


class Known(NamedTuple):
    """What the source says of a test."""

    name: str
    tier: str
    """``fast``, ``slow`` or ``nightly``, before recorded times are looked at: a test that became quick is fast again."""
    is_kept: bool


def known(item: pytest.Item) -> Known:
    marks = {mark.name for mark in item.iter_markers()}
    tier = "nightly" if "costly" in marks else next((t for t in ("nightly", "slow") if t in marks), "fast")
    return Known(item.nodeid, tier, KEPT in marks or item.path.name == ALWAYS)


def costly(tests: Iterable[Known], seconds: Mapping[str, float], costly_from: float) -> set[str]:
    """The tests that are left to the night."""
    cases: dict[str, list[Known]] = {}
    for test in tests:
        if test.tier != "nightly":
            cases.setdefault(test.name.partition("[")[0], []).append(test)
    found = set()
    for of_one in cases.values():
        cheapest = min(of_one, key=lambda test: seconds.get(test.name, 0.0))
        for test in of_one:
            limit = costly_from if test is cheapest else costly_from / CASES
            if seconds.get(test.name, 0.0) >= limit and not test.is_kept:
                found.add(test.name)
    return found


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    recorded = json.loads(RECORD.read_text())
    seconds: dict[str, float] = recorded["seconds"]
    tests = [known(item) for item in items]  # before marks are added
    if FOLDER is None:
        left = costly(tests, seconds, recorded["costly_from"])
    else:
        left = set()
        Path(FOLDER, f"{os.getpid()}.tests").write_text("".join(json.dumps(test) + "\n" for test in tests))
    for item in items:
        if seconds.get(item.nodeid, 0.0) >= recorded["slow_from"] and item.path.name != ALWAYS:
            item.add_marker(pytest.mark.slow)
        if item.nodeid in left:
            item.add_marker(pytest.mark.costly)
    # The sort is stable: all other tests stay in the order of their files, and share what their files set up.
    items.sort(key=lambda item: -seconds.get(item.nodeid, 0.0) if seconds.get(item.nodeid, 0.0) > 1 else 0.0)


def pytest_configure(config: pytest.Config) -> None:
    if FOLDER is not None:
        config.pluginmanager.register(Recorder(Path(FOLDER, str(os.getpid()))))


SHARED = (
    "torch", "transformers.modeling_utils", "transformers.models.bert.modeling_bert", "peft", "diffusers", "lm_eval", "optuna",
    "pandas", "sklearn", "matplotlib.pyplot", "plotly", "moto.server", "numba",
)  # fmt: skip
"""What a worker that records imports at first. Otherwise the first test that needs a package has the import in its time."""


class Recorder:
    """Writes the time of each test, and apart from it that of each fixture of a file or a session, with the tests that use it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._item = ""
        self._shared = 0.0
        self._is_sharing = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for name in SHARED if session.config.rootpath == RECORD.parents[1] else ():
            with contextlib.suppress(ImportError):
                importlib.import_module(name)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        if fixturedef.scope == "function" or self._is_sharing:
            yield
            return
        self._is_sharing = True
        start = processor_seconds()
        yield
        seconds = processor_seconds() - start
        self._is_sharing = False
        self._shared += seconds
        self._write("fixtures", _name_of(fixturedef), seconds, [self._item])

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._item = item.nodeid
        start = processor_seconds() - self._shared
        yield
        uses = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
        shared = [_name_of(f) for found in uses.values() for f in found[-1:] if f.scope != "function"]
        self._write("seconds", item.nodeid, max(processor_seconds() - self._shared - start, 0.0), shared)

    def _write(self, kind: str, name: str, seconds: float, names: list[str]) -> None:
        with self._path.with_suffix(f".{kind}").open("a") as out:
            out.write(json.dumps([name, round(seconds, 3), names]) + "\n")


def _name_of(fixture: pytest.FixtureDef[Any]) -> str:
    return f"{fixture.baseid}::{fixture.argname}"


def processor_seconds() -> float:
    """Of this process and its threads, and of all processes that it or they started, whether they ended or still serve."""
    times = os.times()
    own = time.process_time() + times.children_user + times.children_system
    return own + sum(_seconds_of(pid) for pid in _started_by(os.getpid()))


def _started_by(pid: int) -> Iterator[int]:
    for path in Path("/proc", str(pid), "task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has just ended
            for child in map(int, path.read_text().split()):
                yield child
                yield from _started_by(child)


def _seconds_of(pid: int) -> float:
    """With those of its children that ended."""
    with contextlib.suppress(OSError):
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def main(folder: Path, record: Path = RECORD) -> str:
    """Write the record from what the workers of one run wrote, and describe it. Tests that were not run keep their times."""
    tests = {test.name: test for line in _lines(folder, ".tests") for test in (Known(*json.loads(line)),)}
    files = {name.partition("::")[0] for name in tests}
    times = {
        name: seconds
        for name, seconds in json.loads(record.read_text())["seconds"].items()
        if name in tests or name.partition("::")[0] not in files
    }
    run: dict[str, float] = {}
    for path in folder.glob("*.seconds"):
        run |= _of_worker(path)
    times |= run

    def of_check(step: float) -> dict[str, float]:
        return {
            n: times.get(n, 0.0)
            for n, test in tests.items()
            if test.tier == "fast" and times.get(n, 0.0) < step
        }

    def of_all(step: float) -> dict[str, float]:
        left = costly(tests.values(), times, step)
        return {n: times.get(n, 0.0) for n, test in tests.items() if test.tier != "nightly" and n not in left}

    slow_from = _largest(SLOW_STEPS, FAST_BUDGET, of_check)
    costly_from = _largest(COSTLY_STEPS, ALL_BUDGET, of_all)
    kept = sum(times.get(test.name, 0.0) for test in tests.values() if test.is_kept)
    seconds = {
        name: round(s, 3) for name, s in sorted(times.items()) if s >= min(slow_from, costly_from / CASES)
    }
    found = {"slow_from": slow_from, "costly_from": costly_from, "seconds": seconds}
    record.write_text(json.dumps(found, indent=0) + "\n")
    told = [_row(f"./check, below {step}", of_check(step)) for step in SLOW_STEPS]
    told += [_row(f"./check --all, below {step}", of_all(step)) for step in COSTLY_STEPS]
    rooms = Counter(name.split("::")[0].split("/")[-2:][0] for name in of_check(slow_from))
    told.append(f"slow from {slow_from} s; fast tests: {dict(sorted(rooms.items()))}")
    told.append(f"costly from {costly_from} s, other cases of a test from {costly_from / CASES:g} s")
    told.append(_row("run", run))
    told += [f"{s:7.1f} {name}" for name, s in sorted(run.items(), key=lambda entry: -entry[1])[:20]]
    if kept > KEPT_BUDGET:
        told.append(
            f"tests with the mark {KEPT} take {kept:.0f} s; expected {KEPT_BUDGET} s at most. Mark fewer."
        )
        raise SystemExit("\n".join(told))
    return "\n".join(told)


def _of_worker(path: Path) -> dict[str, float]:
    """The time of each test that a worker ran, with its part of the fixtures that it shares with others."""
    tests = [json.loads(line) for line in path.read_text().splitlines()]
    found: dict[str, float] = {name: seconds for name, seconds, _ in tests}
    users: dict[str, list[str]] = {}
    for name, _, fixtures in tests:
        for fixture in fixtures:
            users.setdefault(fixture, []).append(name)
    for line in _lines(path.parent, f"{path.stem}.fixtures"):
        fixture, seconds, first = json.loads(line)
        for name in users.get(fixture, first):
            found[name] = found.get(name, 0.0) + seconds / len(users.get(fixture, first))
    return found


def _lines(folder: Path, kind: str) -> Iterator[str]:
    for path in folder.glob(f"*{kind}"):
        yield from path.read_text().splitlines()


def _largest(steps: Sequence[float], budget: float, runs: Callable[[float], Mapping[str, float]]) -> float:
    """The largest step whose tests take no more than the budget."""
    return max((step for step in steps if sum(runs(step).values()) <= budget), default=steps[0])


def _row(what: str, tests: Mapping[str, float]) -> str:
    return f"{what}: {len(tests)} tests, {sum(tests.values()):.0f} s of processor time"


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
