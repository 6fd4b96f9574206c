"""Threads that work on one thing: the first failure, or an interrupt, ends the others, and is what is reported."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

Call = tuple[Callable[..., None], tuple[Any, ...]]
"""What to call, and with what."""


class Stopped(Exception):
    """Another thread has failed, or the user interrupts; its cause is what is reported."""


def check(stop: threading.Event) -> None:
    """Leave what a thread is doing, if it should. Call it between blocks. Errors: Stopped."""
    if stop.is_set():
        raise Stopped


def do_all(pool: ThreadPoolExecutor, stop: threading.Event, calls: Sequence[Call]) -> None:
    """Make calls in the threads of a pool, and wait for them. Errors: the first of theirs, after which ``stop`` is set."""

    def guarded(call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        check(stop)
        try:
            call(*arguments)
        except BaseException:
            stop.set()
            raise

    futures: list[Future[None]] = [pool.submit(guarded, call, arguments) for call, arguments in calls]
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failures = [error for future in done if (error := future.exception()) is not None]
        for error in sorted(failures, key=lambda error: isinstance(error, Stopped)):
            raise error
    except BaseException:
        stop.set()
        for future in futures:
            future.cancel()
        raise
