"""Makes standard output and standard error that never end a command: they drop what they cannot write.

A stream that is closed, on a full disk, at a terminal that is gone or read by nobody must not end a merge, whoever writes to it:
alnico, a warning, a library, a failing thread. :mod:`alnico.cli.printing` takes care of what must be printed.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any

from alnico.errors import visible


class Descriptor(io.FileIO):
    """A descriptor that is written to until a write fails. ``failure`` is the reason; later writes are dropped."""

    failure: OSError | None = None
    is_closed_outside = False
    """Was it closed when the process began?"""

    def write(self, data: Any) -> int:
        if self.is_closed_outside:
            self.failure = self.failure or OSError(errno.EBADF, "it is closed")
        try:
            while self.failure is None:
                written = super().write(data)
                if written is not None:
                    return written
                select.select([], [self], [])  # another program made the terminal non-blocking
        except OSError as error:
            self.fail(error)
        return len(data)

    def fail(self, error: OSError) -> None:
        """Keep a reason, and open the descriptor on the null device, so that child processes meet no failure either."""
        self.failure = error
        nothing = os.open(os.devnull, os.O_WRONLY)
        if nothing != self.fileno():
            os.dup2(nothing, self.fileno())
            os.close(nothing)


class Text(io.TextIOWrapper):
    """Text on a :class:`Descriptor`. Control characters except newlines are escaped, and so is what the encoding lacks.

    alnico and all libraries print with ``write``. :meth:`draw` escapes nothing: a progress bar moves the cursor.
    """

    def __init__(self, number: int, before: Any) -> None:
        self.descriptor = Descriptor(number, "wb", closefd=False)
        super().__init__(
            io.BufferedWriter(self.descriptor),
            encoding=getattr(before, "encoding", None) or "utf-8",
            errors="backslashreplace",
            newline=None,
            line_buffering=number == 2 or bool(getattr(before, "line_buffering", False)),
            write_through=bool(getattr(before, "write_through", False)),
        )

    def write(self, text: str) -> int:
        super().write(_escaped(text))
        return len(text)

    def draw(self, text: str) -> int:
        return super().write(text)


class Canvas:
    """Any stream as a file to draw on; it drops everything after a failed write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._write = getattr(stream, "draw", stream.write)
        self._is_gone = False
        self.encoding = getattr(stream, "encoding", None) or "ascii"

    def write(self, text: str) -> int:
        if not self._is_gone:
            try:
                self._write(text)
            except (OSError, ValueError):
                self._is_gone = True
        return len(text)

    def flush(self) -> None:
        if not self._is_gone:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._is_gone = True

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    def fileno(self) -> int:
        return int(self._stream.fileno())


def install() -> None:
    """Replace the process's streams. Descriptors 0, 1 and 2 are opened if they are closed.

    Otherwise the next file to be opened, a model, would get the free number, and what is printed would go into it.
    """
    closed = []
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            closed.append(number)
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, so this one
            os.set_inheritable(opened, True)
    if 0 in closed or sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (it stays open as long as the process)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = Text(number, getattr(sys, name))
        stream.descriptor.is_closed_outside = number in closed
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _escaped(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    if not text.strip("\r\n") or not text.replace("\n", "").replace("\x1b[A", ""):  # how tqdm moves its bars
        return text
    begin = "\r" if text.startswith("\r") else ""
    return begin + "\n".join(map(visible, text.removeprefix("\r").split("\n")))
