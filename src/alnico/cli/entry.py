"""Where the ``alnico`` command begins: signals, descriptors and streams are taken care of before anything slow is imported.

Imports little, so that Ctrl-C in the first moment ends the command as quietly as later.
"""

from __future__ import annotations

import _signal as signal  # signal itself imports enum, and Ctrl-C in the midst of that would print a traceback
import os
import sys
import time

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

ENDING = [
    n for n in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")) if n is not None
]
"""Signals that end a command as Ctrl-C does: what is unfinished is kept, and the exit code is 128 and the signal's number."""

AT_ONCE = 1.0
"""Seconds after which a second signal ends the command without waiting. One key press may send several: to the process and to its group."""

_received: list[tuple[int, float]] = []


class Interrupted(KeyboardInterrupt):
    """One of the signals of :data:`ENDING`."""


def guard() -> list[tuple[int, Any]]:
    """Until :func:`ready`: a signal ends the process at once, as nothing has begun. Returns what :func:`release` puts back.

    A signal that is ignored (``nohup``) or that a program looks after itself stays as it is.
    """
    before = [(number, signal.getsignal(number)) for number in ENDING]
    changed = [(number, was) for number, was in before if was in (signal.SIG_DFL, signal.default_int_handler)]
    try:
        for number, _ in changed:
            signal.signal(number, _leave)
    except ValueError:  # imported in another thread than the main one
        return []
    return changed


def release(changed: list[tuple[int, Any]]) -> None:
    """Put back what :func:`guard` changed."""
    for number, was in changed:
        signal.signal(number, was)


def ready() -> None:
    """From now on a signal raises :class:`Interrupted` in the main thread; a second one after :data:`AT_ONCE` ends the process."""
    sys.unraisablehook = _unraisable
    for number in ENDING:
        if signal.getsignal(number) == _leave:
            signal.signal(number, _interrupt)


def is_interrupted() -> bool:
    """Did a signal of :data:`ENDING` come?"""
    return bool(_received)


def code_of_signal() -> int:
    """The exit code after a signal; Ctrl-C's, if there was none."""
    return 128 + (_received[0][0] if _received else signal.SIGINT)


def command(main: Callable[[], None] | None = None) -> None:
    """The ``alnico`` command: ``main`` of :mod:`alnico.cli.main`, and out at once.

    Taking numba's compiled code down takes the interpreter 0.25 s, a fifth of a small merge. Nothing waits for it: files are closed and
    threads have ended when ``main`` returns, and both streams are flushed here.
    """
    try:
        code = _run(main)
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
    except KeyboardInterrupt:  # raised once at most, so that nothing below is interrupted
        code = code_of_signal()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _run(main: Callable[[], None] | None) -> int:
    guard()
    if sys.getfilesystemencoding() == "ascii":
        _again_with_names()
    from alnico.cli import streams

    streams.install()
    if main is None:
        from alnico.cli.main import main as of_command

        main = of_command
    ready()
    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, int):
            return ended.code
        if ended.code is not None:
            print(ended.code, file=sys.stderr)
        return int(ended.code is not None)
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _again_with_names() -> None:
    """Begin again in Python's UTF-8 mode where the locale (C, with that mode off) leaves no way to open what a recipe calls `modèle`.

    The encoding of the streams stays as it was.
    """
    encoding = getattr(sys.stdout or sys.stderr, "encoding", None) or "ascii"
    environment = {"PYTHONIOENCODING": encoding, **os.environ}
    try:  # noqa: SIM105  (contextlib takes its time)
        os.execve(sys.executable, [sys.orig_argv[0], "-X", "utf8", *sys.orig_argv[1:]], environment)
    except OSError:
        pass


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


def _unraisable(found: Any) -> None:
    """Send a signal again that came where Python drops exceptions (a destructor, a callback), as it would be lost."""
    if not issubclass(found.exc_type, Interrupted) or not _received:
        sys.__unraisablehook__(found)
        return
    import threading

    number = _received.pop()[0]
    again = threading.Timer(0.01, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()
