"""Threads that work on one thing."""

from __future__ import annotations

import threading

import pytest

from alnico.threads import Crew, Stopped


def test_the_cause_is_reported_and_not_that_others_stopped() -> None:
    both = threading.Barrier(2)

    def waits() -> None:
        both.wait()
        while True:
            crew.check()

    def fails() -> None:
        both.wait()
        raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"), Crew(2) as crew:
        crew.run([(waits, ()), (fails, ())])


def test_what_has_not_begun_is_left_after_a_failure() -> None:
    begun: list[int] = []

    def fails() -> None:
        raise ValueError

    with pytest.raises(ValueError), Crew(1) as crew:
        crew.run([(fails, ()), (begun.append, (1,)), (begun.append, (2,))])
    assert begun == []
    with pytest.raises(Stopped):
        crew.check()


def test_events_come_one_at_a_time() -> None:
    events: list[int] = []
    inside = threading.Lock()

    def watch(event: int) -> None:
        assert inside.acquire(blocking=False)
        events.append(event)
        inside.release()

    with Crew(4, watch) as crew:
        crew.run([(crew.report, (number,)) for number in range(100)])
    assert sorted(events) == list(range(100))
