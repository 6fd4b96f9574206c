"""Handles the signals that end a command: at once while it starts, later as an exception."""

from __future__ import annotations

import _signal as signal  # signal itself imports enum, and Ctrl-C during that would print a traceback
import os
import sys
import time

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any, NoReturn

ENDING = [
    n for n in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")) if n is not None
]
"""Signals that end a command as Ctrl-C does: unfinished work is kept, and the exit code is 128 plus the signal's number."""

AT_ONCE = 1.0
"""Seconds after which a second signal ends the command without waiting.

One key press may send several signals: to the process and to its group.
"""

_received: list[tuple[int, float]] = []


class Interrupted(KeyboardInterrupt):
    """One of the signals of :data:`ENDING`."""


def guard() -> None:
    """Until :func:`ready`, let a signal end the process at once, as nothing has begun.

    A signal that is ignored (``nohup``) or that a program handles itself stays as it is.
    """
    for number in ENDING:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            try:
                signal.signal(number, _leave)
            except ValueError:  # not in the main thread
                return


def ready() -> None:
    """From now on, let a signal raise :class:`Interrupted` in the main thread, and a second one after :data:`AT_ONCE` end the process."""
    sys.unraisablehook = _unraisable
    for number in ENDING:
        if signal.getsignal(number) == _leave:
            signal.signal(number, _interrupt)


def ignore() -> None:
    """Ignore further signals, as the command is about to end."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def is_interrupted() -> bool:
    """Has a signal of :data:`ENDING` arrived?"""
    return bool(_received)


def code_of_signal() -> int:
    """The exit code after a signal; Ctrl-C's, if there was none."""
    return 128 + (_received[0][0] if _received else signal.SIGINT)


def _leave(number: int, _frame: Any = None) -> NoReturn:
    try:  # noqa: SIM105  (contextlib takes its time)
        os.write(2, b"alnico: interrupted.\n")
    except OSError:
        pass
    os._exit(128 + number)


def _interrupt(number: int, _frame: Any) -> None:
    now = time.monotonic()
    if not _received:
        _received.append((number, now))
        raise Interrupted
    if now - _received[0][1] > AT_ONCE:
        _leave(_received[0][0])


def _unraisable(error: Any) -> None:
    """Send a signal again that came where Python drops exceptions (a destructor, a callback), as it would be lost."""
    if not issubclass(error.exc_type, Interrupted) or not _received:
        sys.__unraisablehook__(error)
        return
    import threading

    number = _received.pop()[0]
    again = threading.Timer(0.01, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()
