"""Timed processes: a program by itself, several in turn, and the limits, which read the inputs and write the output.

A merge has two limits. Both `cat` the inputs to /dev/null and `dd` as many zeros as the output has bytes into a new file; the second
also waits until the disk has them, as alnico does before it calls a merge finished.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
LIMITS = ("limit", "synced limit")


@dataclass(frozen=True)
class Run:
    """One process: wall and CPU seconds, peak resident bytes, and the bytes that it read from disks."""

    wall: float
    cpu: float
    peak: int
    disk_read: int = 0


class Failed(Exception):
    """A program that did not end well, with the end of what it printed."""


def measured(command: list[str], source: Path | None = None) -> Run:
    """Run a command to its end; ``source`` is the folder that Python imports alnico from. Errors: Failed."""
    environment = os.environ if source is None else {**os.environ, "PYTHONPATH": str(source)}
    begin = time.perf_counter()
    with open(os.devnull, "wb") as nothing:
        process = subprocess.Popen(command, stdout=nothing, stderr=subprocess.PIPE, env=environment)
        assert process.stderr is not None
        text = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Failed(f"{' '.join(command)}: {text.decode()[-2000:]}")
    seconds = time.perf_counter() - begin
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, usage.ru_inblock * 512)


TOUCHED_BYTES = 3 << 30
TOUCH = f"""
import mmap
mmap.mmap(-1, {TOUCHED_BYTES}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
"""


def alternating(programs: Mapping[str, Callable[[], Run]], runs: int) -> dict[str, list[Run]]:
    """Run programs in turn, so many times each, after one round that is not counted: it fills caches and compiles kernels.

    Before each, a process writes to some memory and ends. A virtual machine gives memory that is free for seconds to its host, and
    writing a file to such memory takes up to five times as long: whoever came after a large file was deleted would be the fastest.
    """
    found: dict[str, list[Run]] = {name: [] for name in programs}
    for turn in range(runs + 1):
        for name, program in programs.items():
            subprocess.run([sys.executable, "-c", TOUCH], check=True)
            run = program()
            found[name] += [run] if turn else []
    return found


def limits(files: Iterable[Path], byte_size: int, place: Path) -> dict[str, Callable[[], Run]]:
    """The programs of both limits. They write ``byte_size`` bytes to ``place`` and remove them."""
    read = f"cat {' '.join(map(str, files))} > /dev/null"
    write = f"dd if=/dev/zero of={place} bs=4M count={-(-byte_size // (4 << 20))}"

    def program(words: str) -> Callable[[], Run]:
        def run() -> Run:
            place.unlink(missing_ok=True)
            try:
                return measured(["sh", "-c", f"{read}; {write} {words} 2> /dev/null"])
            finally:
                place.unlink(missing_ok=True)

        return run

    return dict(zip(LIMITS, (program(""), program("conv=fsync")), strict=True))


def beside(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a process of its own: Linux counts a parent's memory into the peak of the programs it starts."""
    with ProcessPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def wall(runs: list[Run]) -> float:
    """The median of wall seconds."""
    return statistics.median(r.wall for r in runs)


def cpu(runs: list[Run]) -> float:
    """The median of CPU seconds."""
    return statistics.median(r.cpu for r in runs)


def seconds(runs: list[Run]) -> str:
    """The median of wall seconds, with the smallest and the largest."""
    walls = [r.wall for r in runs]
    return f"{statistics.median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f})"
