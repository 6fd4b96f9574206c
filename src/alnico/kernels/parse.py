"""Parses the source of methods, in one thread at a time."""

from __future__ import annotations

import ast
import threading

_LOCK = threading.Lock()


def parse(text: str) -> ast.Module:
    """Return the syntax tree of Python source. Errors: SyntaxError.

    Python 3.11 counts the depth of a tree once for all threads: two that parse at the same time may end in a SystemError.
    """
    with _LOCK:
        return ast.parse(text)
