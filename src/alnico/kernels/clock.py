"""Counts the seconds that this process compiles kernels, and says when it begins to."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

SHORT = 0.05
"""Seconds of compiling that no text mentions."""


class CompileClock:
    """The compilations of this process. They happen one at a time, in any thread."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.is_kept = True
        """Can the next run load all that was compiled?"""
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Count the time in a block, and tell those who listen before it begins."""
        with self._lock:
            listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener()
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(time.perf_counter() - begin)

    def add(self, seconds: float) -> None:
        """Count seconds of another process that works for this one."""
        with self._lock:
            self.seconds += seconds

    @contextmanager
    def heard_by(self, listener: Callable[[], None]) -> Iterator[None]:
        """Call ``listener`` once, before the first compilation in a block."""
        with self._lock:
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners = [other for other in self._listeners if other is not listener]


CLOCK = CompileClock()


def counts_compiling(function: Callable[P, R]) -> Callable[P, R]:
    """Set ``compile_seconds`` of a function's result: the seconds of the call in which kernels were compiled.

    Results are frozen dataclasses with that field. Other results (paths, recipes) stay as they are.
    """

    @functools.wraps(function)
    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        begin = CLOCK.seconds
        result: Any = function(*args, **kwargs)
        spent = CLOCK.seconds - begin
        if spent and dataclasses.is_dataclass(result) and hasattr(result, "compile_seconds"):
            result = dataclasses.replace(result, compile_seconds=spent)  # type: ignore[type-var]
        return result  # type: ignore[no-any-return]

    counted.counts_compiling = True  # type: ignore[attr-defined]
    return counted


def time_text(seconds: float, compile_seconds: float) -> str:
    """The time of a run, with what compiling took of it named separately.

    >>> time_text(2.5, 0.0), time_text(49.7, 46.0)
    ('2.50 s', '3.70 s + 46 s compiling kernels (kept for the next run)')
    """
    rest = f"{max(seconds - compile_seconds, 0.0):.2f} s"
    if compile_seconds < SHORT:
        return rest
    kept = "kept for the next run" if CLOCK.is_kept else "not kept: ALNICO_CACHE_DIR names no private folder"
    return f"{rest} + {compile_seconds:.{0 if compile_seconds >= 10 else 1}f} s compiling kernels ({kept})"
