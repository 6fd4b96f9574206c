"""Sets IEEE 754 arithmetic for a block of code: keeps subnormal numbers, rounds to nearest.

The processor has this mode for each thread, and a new thread takes it from the one that starts it.
``torch.set_flush_denormal(True)``, a shared library that was compiled with ``-ffast-math``, or ``fesetround``
set another one, and the bits of a merge would follow.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from alnico.errors import AlnicoError

SMALLEST, SMALLEST_NORMAL, LITTLE, HALF = 5e-324, 2.2250738585072014e-308, 2.0**-60, 0.5
"""Operands of :func:`is_ieee`: names, as the compiler of Python would compute with literals."""

_ENVIRONMENT = ctypes.c_ulonglong * 32
"""Larger than ``fenv_t`` on any system: it has 8 to 32 bytes."""


class _Library(NamedTuple):
    get: Callable[[Any], int]
    set: Callable[[Any], int]
    default: ctypes.c_void_p
    """FE_DFL_ENV."""


class _Outside(threading.local):
    """The settings of the caller of the outermost block in this thread."""

    environment: Any = None
    errors: Any = None
    depth = 0


_outside = _Outside()


@functools.cache
def _library() -> _Library | None:
    """C's functions for the mode of the calling thread; None on systems whose FE_DFL_ENV is not known
    here."""
    is_known = platform.machine().lower() in (
        "x86_64",
        "amd64",
        "i386",
        "i686",
        "aarch64",
        "arm64",
        "armv7l",
        "riscv64",
    )
    if sys.platform not in ("linux", "darwin") or not is_known:
        return None
    for name in (None, "libm.so.6"):
        try:
            library = ctypes.PyDLL(name)  # keeps the GIL: releasing it takes longer than the call
            get, put = library.fegetenv, library.fesetenv
            if sys.platform == "darwin":
                default = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.in_dll(library, "_FE_DFL_ENV")))
            else:
                default = ctypes.c_void_p(-1)
        except (OSError, AttributeError, ValueError):
            continue
        return _Library(get, put, default)
    return None


def is_ieee() -> bool:
    """Whether this thread keeps subnormal numbers and rounds to nearest."""
    keeps = SMALLEST * 2.0 > 0 and SMALLEST_NORMAL * HALF > 0
    return keeps and LITTLE + 1.0 == 1.0 and 1.0 - LITTLE == 1.0


def set_ieee() -> None:
    """Set IEEE arithmetic in the calling thread and leave it set, for worker threads. Errors: AlnicoError if
    it cannot be set."""
    library = _library()
    if library is not None:
        library.set(library.default)
    if not is_ieee():
        raise AlnicoError(
            "this process flushes small numbers to zero, or does not round to nearest, and alnico cannot change that on this system; "
            "expected IEEE 754 arithmetic. Call torch.set_flush_denormal(False), or run alnico in its own process."
        )


@contextmanager
def ieee_arithmetic() -> Iterator[None]:
    """Use IEEE 754 arithmetic until the end of the block (or of the decorated function), then the caller's
    settings.

    ``numpy.seterr`` is suspended, too: results are checked for values that are not finite, so warnings are
    not needed. Flags and mode of the caller's thread are as before at the end, also after an error.
    """
    library, outside = _library(), _outside
    environment = _ENVIRONMENT()
    if library is not None:
        library.get(environment)
    outside.depth += 1
    if outside.depth == 1:
        outside.environment, outside.errors = environment, np.geterr()
    try:
        set_ieee()
        with np.errstate(all="ignore"):
            yield
    finally:
        outside.depth -= 1
        if library is not None:
            library.set(environment)


@contextmanager
def callers_arithmetic() -> Iterator[None]:
    """Run a caller's function with the caller's settings, those from outside of :func:`ieee_arithmetic`."""
    library, outside = _library(), _outside
    if outside.depth == 0:
        yield
        return
    if library is not None:
        library.set(outside.environment)
    try:
        with np.errstate(**(outside.errors or {})):
            yield
    finally:
        set_ieee()


def ieee_threads(threads: int, name: str = "alnico") -> ThreadPoolExecutor:
    """Return a pool of threads that use IEEE 754 arithmetic."""
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=_begin)


def _begin() -> None:
    set_ieee()
    np.seterr(all="ignore")
