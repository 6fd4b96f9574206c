"""Threads that work on one thing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from alnico.threads import Stopped, check, do_all


def test_the_cause_is_reported_and_not_that_others_stopped() -> None:
    stop, both = threading.Event(), threading.Barrier(2)

    def waits() -> None:
        both.wait()
        stop.wait()
        check(stop)

    def fails() -> None:
        both.wait()
        raise ValueError("the cause")

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="the cause"):
        do_all(pool, stop, [(waits, ()), (fails, ())])


def test_what_has_not_begun_is_left_after_a_failure() -> None:
    stop = threading.Event()
    begun: list[int] = []

    def fails() -> None:
        raise ValueError

    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError):
        do_all(pool, stop, [(fails, ()), (begun.append, (1,)), (begun.append, (2,))])
    assert begun == []
    with pytest.raises(Stopped):
        check(stop)
