"""Decides by recorded times which tests are slow, and starts the longest first.

``./check --record`` runs the tests of ``./check --all`` and writes tests/durations.json again. A test that takes ``slow_from`` seconds of
processor time or more is marked slow, so that the rest, which ./check runs, takes FAST_BUDGET seconds in all. Of a test with many
cases, those that take NIGHTLY_FROM seconds or more are run each night, and the cheapest of all in each run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

RECORD = Path(__file__).with_name("durations.json")
FOLDER = os.environ.get("ALNICO_TEST_DURATIONS")
"""Where each worker writes the times of its tests; not set in ordinary runs."""

FAST_BUDGET = 110
"""Seconds of processor time for the tests of ./check; two workers need as much again to import what they test."""

STEPS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)

NIGHTLY_FROM = 4.0
"""Seconds of processor time. A test with the mark `each_case` runs all its cases nevertheless."""

ALWAYS = "test_house.py"
"""The tests of this file are never slow: each ./check runs all of them."""

TIERS: dict[str, str] = {}
"""The tier that the source gives each test, before recorded times are looked at: a test that became quick is fast again."""


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    recorded = json.loads(RECORD.read_text())
    seconds: dict[str, float] = recorded["seconds"]
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        TIERS[item.nodeid] = next((tier for tier in ("nightly", "slow") if tier in marks), "fast")
        if seconds.get(item.nodeid, 0.0) >= recorded["slow_from"] and item.path.name != ALWAYS:
            item.add_marker(pytest.mark.slow)
    for item in _costly_cases(items, seconds):
        item.add_marker(pytest.mark.nightly)
    # The sort is stable: all other tests stay in the order of their files, and share what their files set up.
    items.sort(key=lambda item: -seconds.get(item.nodeid, 0.0) if seconds.get(item.nodeid, 0.0) > 1 else 0.0)


def _costly_cases(items: Sequence[pytest.Item], seconds: Mapping[str, float]) -> Iterator[pytest.Item]:
    """The cases that are left to the night."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not any(item.iter_markers("nightly")) and not any(item.iter_markers("each_case")):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for of_one in cases.values():
        cheapest = min(of_one, key=lambda item: seconds.get(item.nodeid, 0.0))
        for item in of_one:
            if item is not cheapest and seconds.get(item.nodeid, 0.0) >= NIGHTLY_FROM:
                yield item


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if FOLDER is None:
        yield
        return
    start = _processor_seconds()
    yield
    with Path(FOLDER, f"{os.getpid()}.jsonl").open("a") as out:
        out.write(
            json.dumps([item.nodeid, TIERS[item.nodeid], round(_processor_seconds() - start, 3)]) + "\n"
        )


def _processor_seconds() -> float:
    """Of this process, its threads, and the processes that it started and that ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def main(folder: str) -> None:
    """Write the record from what the workers of one run wrote, and print the tiers. Costly cases that were not run keep their times."""
    times = [
        json.loads(line) for path in Path(folder).glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    fast = sorted((seconds, name) for name, tier, seconds in times if tier == "fast")
    slow_from = max(
        (step for step in STEPS if sum(s for s, _ in fast if s < step) <= FAST_BUDGET), default=STEPS[0]
    )
    seconds = {name: s for name, tier, s in times if s >= (slow_from if tier == "fast" else 1)}
    run = {name for name, _, _ in times}
    for name, s in json.loads(RECORD.read_text())["seconds"].items():
        if s >= NIGHTLY_FROM and name not in run and (RECORD.parents[1] / name.partition("::")[0]).is_file():
            seconds[name] = s
    seconds = dict(sorted(seconds.items()))
    RECORD.write_text(json.dumps({"slow_from": slow_from, "seconds": seconds}, indent=0) + "\n")
    for step in STEPS:
        below = [s for s, _ in fast if s < step]
        print(f"below {step:4} s: {len(below):5} tests, {sum(below):6.0f} s of processor time")
    rooms = Counter(name.split("::")[0].split("/")[-2:][0] for s, name in fast if s < slow_from)
    print(f"slow from {slow_from} s; fast tests: {dict(sorted(rooms.items()))}")
    print(f"all: {len(times)} tests, {sum(s for _, _, s in times):.0f} s of processor time")
    for name, _, s in sorted(times, key=lambda entry: -entry[2])[:20]:
        print(f"{s:7.1f} {name}")


if __name__ == "__main__":
    main(sys.argv[1])
