"""Runs ``alnico`` in forks of one process that has imported it: a command costs no start-up, and its descriptors are as it is told.

Reads a JSON object a line: ``words``; ``fds``, what each descriptor is opened on, ``null`` where it is closed; ``encoding`` of the
streams; ``signal``, sent to it at an event of the named kind; and if given ``folder`` to run in, its whole ``environment``,
``line_buffering`` of standard output, as at a terminal, and the number of ``processors`` that it sees. Answers with the exit status
of the fork. Its own words are modules that it imports first, besides alnico.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numba  # noqa: F401  (threads begin after the fork)

import alnico
from alnico.cli import entry, progress


def becomes(order: dict[str, Any]) -> None:
    """Be the command of an order, as if the interpreter had just begun with these descriptors."""
    os.chdir(order.get("folder", "."))
    if "environment" in order:
        os.environ.clear()
        os.environ.update(order["environment"])
    if "processors" in order:
        os.cpu_count = lambda: int(order["processors"])  # type: ignore[assignment]
    for number, path in enumerate(order["fds"]):
        os.close(number)
        if path is not None:
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            opened = os.open(path, flags, 0o666)
            os.dup2(opened, number)
            if opened != number:
                os.close(opened)
    for number, name in ((1, "stdout"), (2, "stderr")):
        is_open = order["fds"][number] is not None
        raw = io.FileIO(number, "w", closefd=False) if is_open else None
        lines = number == 1 and order.get("line_buffering", False)
        stream = (
            io.TextIOWrapper(io.BufferedWriter(raw), order["encoding"], "strict", line_buffering=lines)
            if raw
            else None
        )
        setattr(sys, name, stream)
    sys.stdin = open(0, closefd=False) if order["fds"][0] is not None else None  # type: ignore[assignment]  # noqa: SIM115
    if order["signal"]:
        number, kind, times = order["signal"]
        lend = progress.bar

        def bar(*words: Any) -> Any:
            with lend(*words) as watch:

                def told(event: object) -> None:
                    if watch is not None:
                        watch(event)
                    if type(event).__name__ == kind:
                        for _ in range(times):
                            os.kill(os.getpid(), number)

                yield told

        from contextlib import contextmanager

        progress.bar = contextmanager(bar)
    sys.argv = ["alnico", *order["words"]]
    entry.command()


def import_all() -> None:
    """What commands import when they need it."""
    for package in ("cli", "cli/commands", "engine", "analysis", "lora", "plan", "recipe"):
        folder = Path(alnico.__file__).parent / package
        for path in folder.glob("*.py"):
            importlib.import_module(
                f"alnico.{package.replace('/', '.')}.{path.stem}".removesuffix(".__init__")
            )
    importlib.import_module("alnico.api")
    alnico.methods()


if __name__ == "__main__":
    import_all()
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                becomes(json.loads(line))
            finally:
                os._exit(99)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
