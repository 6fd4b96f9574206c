"""Records how much processor time each test takes, and starts the longest tests first.

``./check --all --durations`` writes tests/durations.json again. Only tests above one second are listed. The numbers order tests, and nothing else.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

RECORD = Path(__file__).with_name("durations.json")
FOLDER = os.environ.get("ALNICO_TEST_DURATIONS")
"""Where each worker writes the times of its tests; not set in ordinary runs."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seconds = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    # The sort is stable: all other tests stay in the order of their files.
    items.sort(key=lambda item: -seconds.get(item.nodeid, 0.0))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if FOLDER is None:
        yield
        return
    start = _processor_seconds()
    yield
    with Path(FOLDER, f"{os.getpid()}.txt").open("a") as out:
        out.write(json.dumps([item.nodeid, round(_processor_seconds() - start, 3)]) + "\n")


def _processor_seconds() -> float:
    """Of this process, its threads, and the processes that it started and that ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system
