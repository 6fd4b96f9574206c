"""One display for the events of every command: lines where there is no terminal, a bar on one."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import get_args

import pytest

from alnico import events
from alnico.cli import progress
from alnico.kernels.clock import CLOCK

SHARDS = (SimpleNamespace(byte_size=110, start=b"x" * 10),)
SOUP = SimpleNamespace(counts={"a": 1, "b": 1}, best=0.5, score=0.75, is_kept=True, tried="b")
TRIAL = SimpleNamespace(number=3, state="complete", values=(0.5, 2), seconds=1.5)
STEP = SimpleNamespace(number=5, loss=0.25, losses={"pets": 0.125})

EVENTS = [
    events.Fetching(("owner/m",), 2, 1000),
    events.Fetched(500),
    events.Started(SimpleNamespace(jobs=(), shards=SHARDS, bytes_to_read=300), 2, 50),
    events.Compiling(3),
    events.Measuring(4),
    events.Reading(4, 1000),
    events.Advanced("w", 10),
    events.Noted("w", "{} and {} agree (cosine {:.2f})", ("a", "b", 0.5)),
    events.TensorDone("w", "0123"),
    events.Finished("out", 1.0),
    events.Counted("updates", 3, 9),
    events.Scored("m", "pets", SimpleNamespace(value=0.875), "accuracy"),
    events.BatchHalved("pets", "m", "examples", 32, 16),
    events.SoupTried(SOUP),
    events.TrialDone(TRIAL),
    events.TrialDone(SimpleNamespace(number=4, state="pruned", rungs=[0.25], seconds=None)),
    events.TrialDone(SimpleNamespace(number=5, state="failed", reason="no memory", seconds=None)),
    events.PointScored("scale 0.5", {"pets": SimpleNamespace(value=0.625)}, 3, 7),
    events.Learned(STEP, 10),
]
RESULTS = [
    "m  pets: accuracy 0.875",
    "note: pets: m: the memory was too small for batches of 32 examples; they have 16 now.",
    "+ b: 0.7500  +0.2500  of 2",
    "trial    3  0.5  2  1.5 s",
    "trial    4  stopped early at 0.25",
    "trial    5  failed: no memory",
    "3/7  scale 0.5: pets 0.625",
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, verbose: int = 0) -> list[str]:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "200")
    with progress.bar(False, verbose) as watch:
        assert watch is not None
        for event in EVENTS:
            watch(event)
    return stream.getvalue().splitlines()


def test_every_event_of_a_command_is_here() -> None:
    assert {type(e) for e in EVENTS} == set(get_args(events.Event)) - {events.ScaleTried}


def test_lines_are_results_and_some_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    head = ["fetching 2 files of owner/m, 1.0 kB", "resuming an unfinished merge: 2 tensors done"]
    step = "step 5/10  entropy 0.250 nats: pets 0.125"
    assert drawn(io.StringIO(), monkeypatch) == [*head, *RESULTS, step]
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    lines = drawn(io.StringIO(), monkeypatch, verbose=1)
    assert lines == [*head, "w: a and b agree (cosine 0.50)", "0123  w", "updates 3/9", *RESULTS, step]


def test_a_terminal_has_a_bar_and_the_lines_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(drawn(Terminal(), monkeypatch))
    for line in RESULTS:
        assert line in text
    assert "step 5/10  entropy 0.250 nats: pets 0.125" in text


def test_the_rate_of_a_bar_leaves_compiling_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, rates = [100.0], list[object]()
    monkeypatch.setattr(progress.time, "perf_counter", lambda: seconds[0])
    monkeypatch.setattr(CLOCK, "seconds", 7.0)
    bar = progress.ProgressBar(lambda **fields: rates.append(fields.get("rate")), lambda _: None)
    seconds[0] += 51.0
    CLOCK.add(50.0)
    bar.watch(events.Advanced("w", 2_000_000_000))
    assert rates == ["2.00 GB/s"]


def test_a_quiet_command_watches_nothing() -> None:
    with progress.bar(True, 1) as watch:
        assert watch is None


def test_a_line_of_a_step_says_how_long_the_others_take() -> None:
    seconds = iter([10.0 + 2 * step for step in range(100)])
    lines = progress.StepLines(lambda: next(seconds))
    said = [
        lines.line(events.Learned(SimpleNamespace(number=n, loss=0.5, losses={"pets": 0.5}), 100))
        for n in range(1, 101)
    ]
    told = {n: line for n, line in enumerate(said, 1) if line is not None}
    assert list(told) == [1, *range(5, 101, 5)]
    assert told[1] == "step 1/100  entropy 0.500 nats: pets 0.500"
    assert told[5] == "step 5/100  entropy 0.500 nats: pets 0.500, about 3 min left"
    assert told[95] == "step 95/100  entropy 0.500 nats: pets 0.500, about 10 s left"
    assert told[100] == "step 100/100  entropy 0.500 nats: pets 0.500"


def test_slow_steps_have_a_line_at_least_twice_a_minute() -> None:
    seconds = iter([14.0 * step for step in range(500)])
    lines = progress.StepLines(lambda: next(seconds))
    step = SimpleNamespace(number=0, loss=0.5, losses={"pets": 0.5})
    told = []
    for number in range(1, 25):
        step.number = number
        if lines.line(events.Learned(step, 500)) is not None:
            told.append(number)
    assert told == [1, 4, 7, 10, 13, 16, 19, 22]


def test_a_merge_of_matrices_says_once_a_minute_how_far_it_is() -> None:
    seconds = iter([0.0, 30.0, 61.0, 61.0, 90.0, 122.0, 122.0])
    lines = progress.MatrixLines(lambda: next(seconds))
    plan = SimpleNamespace(jobs=(SimpleNamespace(kind="matrix"),), shards=SHARDS)
    lines.begin(events.Started(plan, 1, 20))
    said = [lines.line(events.Advanced("w", 10)) for _ in range(4)]
    assert said == [None, " 40 %  w", None, " 60 %  w"]
    lines = progress.MatrixLines(lambda: 1000.0)
    lines.begin(events.Started(SimpleNamespace(jobs=(), shards=SHARDS), 0, 0))
    assert lines.line(events.Advanced("w", 10)) is None
