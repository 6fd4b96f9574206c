"""Threads that work on one thing: the first failure, or an interrupt, ends the others, and is what is reported."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from alnico.numerics.arithmetic import ieee_threads, set_ieee

LOOK_SECONDS = 0.2
GRACE_SECONDS = 0.5
"""How long an interrupt waits for threads to leave their block; a whole matrix may take minutes."""

WorkItem = tuple[Callable[..., None], tuple[Any, ...]]
"""What to call, and with what."""


class Stopped(Exception):
    """Another thread has failed, or the user interrupts; its cause is what is reported."""


class Abandoned(KeyboardInterrupt):
    """The user interrupts, and a thread is in the midst of something long. It is left to end by itself; it touches no file any
    more once it looks at what it should do, but what it has open must stay open: a closed descriptor's number is soon another file's.
    """


@contextmanager
def workers(threads: int, name: str = "alnico") -> Iterator[ThreadPoolExecutor]:
    """A pool for :func:`do_all`; its threads have ended when the block has, unless they are abandoned."""
    pool = ieee_threads(threads, name)
    try:
        yield pool
    except Abandoned:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def check(stop: threading.Event) -> None:
    """Leave what a thread is doing, if it should. Call it between blocks. Errors: Stopped."""
    if stop.is_set():
        raise Stopped


def do_all(pool: ThreadPoolExecutor, stop: threading.Event, calls: Sequence[WorkItem]) -> None:
    """Make calls in the threads of a pool, and wait for them.

    Errors: the first of theirs, after which ``stop`` is set and all have left; Abandoned if an interrupt finds one that does not.
    """

    # Counted here, not by the pool: an interrupt while a call is handed over leaves one that the pool does not know of.
    idle, running = threading.Condition(), 0

    def guarded(call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        nonlocal running
        with idle:
            check(stop)
            running += 1
        try:
            set_ieee()  # whoever watches may have set another mode in this thread
            call(*arguments)
        except BaseException:
            stop.set()
            raise
        finally:
            with idle:
                running -= 1
                idle.notify_all()

    futures: list[Future[None]] = []
    try:
        for call, arguments in calls:  # an interrupt may come here already
            futures.append(pool.submit(guarded, call, arguments))
        missing: Collection[Future[None]] = futures
        failures: list[BaseException] = []
        while missing and not failures:
            # Not for ever: a signal that comes just before Python begins to wait is looked at when the wait ends.
            done, missing = wait(missing, LOOK_SECONDS, FIRST_EXCEPTION)
            failures = [error for future in done if (error := future.exception()) is not None]
        for error in sorted(failures, key=lambda error: isinstance(error, Stopped)):
            raise error
    except BaseException as error:
        stop.set()
        for future in futures:
            future.cancel()
        seconds = GRACE_SECONDS if isinstance(error, KeyboardInterrupt) else None
        try:
            with idle:
                has_left = idle.wait_for(lambda: running == 0, seconds)
        except KeyboardInterrupt:
            has_left = False
        if not has_left:
            raise Abandoned from None
        raise
