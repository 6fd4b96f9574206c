"""Merges killed at every call of the system, and at random moments: nothing is lost, nothing is read again, nothing differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KILLING = Path(__file__).parents[1] / "killing.py"
MEMORY = Path("/dev/shm")
"""A file system that waits for no disk: a kill loses nothing of it, and hundreds of merges take a third of the time."""


def figures(*arguments: str) -> dict[str, Any]:
    folder = ["--folder", str(MEMORY)] if os.access(MEMORY, os.W_OK) else []
    ended = subprocess.run(
        [sys.executable, str(KILLING), *arguments, *folder], capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    print(" ".join(arguments), ended.stdout)  # for docs/reliability.md; shown with -s
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@pytest.mark.slow
def test_a_merge_killed_at_any_call_is_taken_up_and_gives_the_same_bytes() -> None:
    found = figures("calls")
    assert found["killed"] >= found["calls"] - 5, "a batch of the journal more or less"
    assert found["after_the_first_tensor"] > 50
    assert found["output_complete"] > 0, "none was killed between the output and the end"
    assert found["differences"] == found["read_again"] == found["visible"] == 0


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(4, marks=[pytest.mark.slow, pytest.mark.before_each_merge]),
        pytest.param(50, marks=pytest.mark.nightly),
    ],
)
def test_a_merge_killed_at_random_moments_is_taken_up_and_gives_the_same_bytes(moments: int) -> None:
    found = figures("moments", "--moments", str(moments))
    assert found["killed"] == moments
    assert found["after_the_first_tensor"] >= 0.8 * moments
    assert found["differences"] == found["read_again"] == found["visible"] == 0


@pytest.mark.slow
def test_stages_killed_anywhere_are_taken_up_and_give_the_same_bytes() -> None:
    found = figures("stages", "--every", "9")
    assert found["killed"] > 30
    assert found["differences"] == found["visible"] == 0
