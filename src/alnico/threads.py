"""Runs calls in threads that end together: at the first failure, or half a second after Ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from types import TracebackType
from typing import Any

from alnico.numerics.arithmetic import ieee_threads, set_ieee

POLL_SECONDS = 0.2
GRACE_SECONDS = 0.5
"""How long an interrupt waits for threads to leave their block; a whole matrix may take minutes."""

WorkItem = tuple[Callable[..., None], tuple[Any, ...]]
"""A function and its arguments."""


class Stopped(Exception):
    """Another thread has failed, or the user interrupts; the cause is reported instead of this."""


class Abandoned(KeyboardInterrupt):
    """The user interrupts, and a thread is in a long computation. It is left to end on its own. It touches no
    file after it next checks whether it must stop, but the files that it has open must stay open: a closed
    descriptor's number is soon another file's.
    """


class Crew:
    """Threads that work on one thing. Use it in ``with``: when the block ends, they have ended too, unless
    they are abandoned.

    ``watch`` gets the events that the threads report, one at a time. ``lock`` is for what the threads share.
    Call :meth:`check` between blocks.
    """

    def __init__(
        self, threads: int, watch: Callable[[Any], None] | None = None, name: str = "alnico"
    ) -> None:
        self.threads = threads
        self.lock = threading.Lock()
        self._watch = watch
        self._stop = threading.Event()
        self._pool = ieee_threads(threads, name)

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stop.set()
        self._pool.shutdown(wait=not isinstance(error, Abandoned), cancel_futures=error is not None)

    def report(self, event: Any) -> None:
        """Pass an event to ``watch``."""
        if self._watch is not None:
            with self.lock:
                self._watch(event)

    def check(self) -> None:
        """Leave a call if another one failed or the user interrupts. Errors: Stopped."""
        if self._stop.is_set():
            raise Stopped

    def run(self, calls: Sequence[WorkItem]) -> None:
        """Make calls in the threads, and wait for them.

        Errors: the first error of a call, after which the others have left; Abandoned if an interrupt finds a
        call that does not leave.
        """

        # Counted here, not by the pool: an interrupt while work is handed over leaves a thread that the pool does not know of.
        idle, running = threading.Condition(), 0
        left = iter(calls)
        failures: list[BaseException] = []

        def work() -> None:
            """Make calls until none is left: handing each of ten thousand over to the pool would take longer than some of them."""
            nonlocal running
            while True:
                with idle:
                    if self._stop.is_set() or (item := next(left, None)) is None:
                        return
                    running += 1
                try:
                    set_ieee()  # ``watch`` may have set another mode in this thread
                    item[0](*item[1])
                except BaseException as error:
                    failures.append(
                        error
                    )  # before others see that they must stop: the first one is the cause
                    self._stop.set()
                    raise
                finally:
                    with idle:
                        running -= 1
                        idle.notify_all()

        futures: list[Future[None]] = []
        try:
            for _ in range(min(self.threads, len(calls))):  # an interrupt may come here already
                futures.append(self._pool.submit(work))
            missing: Collection[Future[None]] = futures
            while missing and not failures:
                # With a timeout: Python handles a signal that comes just before the wait begins only when the wait ends.
                _, missing = wait(missing, POLL_SECONDS, FIRST_EXCEPTION)
            if failures:
                raise failures[0]
            self.check()
        except BaseException as error:
            self._stop.set()
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
