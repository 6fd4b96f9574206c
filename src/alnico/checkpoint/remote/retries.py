"""Repeats requests to a server while that may help, for a limited time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from alnico.checkpoint.network import (
    TIMEOUT,
    TIMEOUT_SECONDS,
    WAIT,
    Pauses,
    SlowTransfer,
    TransferStopped,
    busy_error,
    is_cut_off,
    log_pause,
    read_seconds,
)
from alnico.errors import HubError

T = TypeVar("T")


class Again(Exception):
    """A request failed in a way that may pass. ``pause`` is the number of seconds that the server asks to wait; 0 if it
    does not say."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


def repeat(where: str, call: Callable[[], T], stop: threading.Event) -> T:
    """Make a call, again while it raises :class:`Again`, with the pauses of :class:`alnico.checkpoint.network.Pauses`.

    ``where`` names the object, ``stop`` ends a pause at once.
    Errors: HubError when the time is over; TransferStopped; what ``call`` raises.
    """
    pauses = Pauses()
    while True:
        try:
            return call()
        except Again as error:
            again = error
        waited = pauses.waited
        pause = pauses.after(again.pause)
        if pause is None:
            times = "once" if pauses.count == 1 else f"{pauses.count} times in {waited:.0f} s"
            asked = f", and asks to wait {again.pause:.0f} s" if 0 < again.pause < 1e9 else ""
            raise HubError(
                f"{where}: the server {again.reason} ({times}{asked}). Try again later; the same command resumes. To wait "
                f"longer, set the environment variable {WAIT} to more seconds (now {pauses.limit:g})."
            ) from None
        log_pause(where, f"the server {again.reason}", pause)
        if stop.wait(pause):
            raise TransferStopped


def again_after(error: BaseException, *, has_answered: bool) -> Again | None:
    """Return what to try again after an error of httpx or of the hooks of ``checkpoint/network.py``; None if that may not help.

    A connection that cannot be made is tried again if the server ``has_answered`` before: else its address is more
    likely to be wrong.
    """
    if isinstance(error, SlowTransfer):
        return Again("sends too slowly")
    busy = busy_error(error)
    if busy is not None:
        return Again(f"is busy (status {busy.status})", busy.pause)
    if is_cut_off(error):
        return Again(f"cut off the connection ({type(error).__name__})")
    kinds = httpx_kinds(error)
    if kinds & {"ReadTimeout", "WriteTimeout"}:
        return Again(f"sent nothing for {read_seconds(TIMEOUT, TIMEOUT_SECONDS):g} s")
    if has_answered and kinds & {"ConnectError", "TimeoutException"}:
        return Again(f"does not answer ({type(error).__name__})")
    return None


def httpx_kinds(error: BaseException) -> set[str]:
    """Return the names of the classes of an error of httpx; none for other errors."""
    return {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("httpx")}
