"""A clock that jumps: durations are of a clock that only goes on, and no decision depends on the order of times."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import alnico
from alnico.output.staging import PartDirectory
from made import family, model_bytes

Run = Callable[..., tuple[int, str, str]]
WALL = re.compile(
    r"\b(?:time\.time|time_ns|utcnow|ctime|localtime|gmtime|strftime|(?:date|datetime)\.(?:now|today))\b\("
)
TIMES = (0, -1, -(10**18), 2**31 * 10**9, 10**19)
"""Of files, in nanoseconds: the epoch, before it, 1938, 2038, and beyond 64 bits of nanoseconds."""


def test_nothing_asks_what_time_it_is() -> None:
    sources = Path(alnico.__file__).parent.rglob("*.py")
    asked = [f"{path.name}: {found}" for path in sources for found in WALL.findall(path.read_text("utf-8"))]
    assert asked == []


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day goes back, and forth, and beyond what dates can say, each time that it is asked for."""
    times = itertools.cycle((2e9, 1e9, 0.0, -5.0, 4e9, 1e18))
    monkeypatch.setattr(time, "time", lambda: next(times))
    monkeypatch.setattr(time, "time_ns", lambda: int(next(times) * 1e9))


def set_time(path: Path, moment: int) -> None:
    try:
        os.utime(path, ns=(moment, moment))
    except (OSError, OverflowError):
        pytest.skip(f"this disk keeps no time of {moment} ns")


@pytest.mark.usefixtures("jumping")
@pytest.mark.parametrize(
    "moment",
    [
        -1,
        pytest.param(0, marks=pytest.mark.slow),
        *(pytest.param(t, marks=pytest.mark.slow) for t in TIMES[2:]),
    ],
)
def test_a_merge_is_taken_up_whatever_the_times_are(
    tmp_path: Path, run: Run, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base, tuned = family(Path(), 2)
    for path in tmp_path.rglob("*"):
        set_time(path, moment)
    Path("r.yml").write_text(f"merge_method: ties\nbase_model: {base}\nmodels: [{tuned[0]}, {tuned[1]}]\n")
    assert run("merge", "r.yml", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(PartDirectory, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("merge", "r.yml", "out")[0] == 130
    for path in Path(".out.alnico-part").rglob("*"):
        set_time(path, TIMES[0] if moment else TIMES[-2])
    code, stdout, _ = run("merge", "r.yml", "out", "--json")
    assert code == 0
    found = json.loads(stdout)
    assert found["seconds"] >= 0
    assert model_bytes(Path("out")) == model_bytes(Path("whole"))
    for path in Path("out").iterdir():
        set_time(path, moment)
    assert run("verify", "out", "--against-inputs")[0] == 0
    assert run("merge", "r.yml", "out", "--overwrite")[0] == 0
    assert run("analyze", str(tuned[0]), "--base", str(base), "--out", "found")[0] == 0
    assert json.loads(Path("found/summary.json").read_text())["seconds"] >= 0
