"""The progress bar on stderr: download, tensor, GB/s and time left; where there is no terminal, a line about downloads."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from alnico.cli.printing import is_terminal, say
from alnico.cli.streams import Canvas
from alnico.errors import visible
from alnico.events import (
    Advanced,
    Compiling,
    Event,
    Fetched,
    Fetching,
    Measuring,
    Reading,
    Started,
    TensorDone,
    Watcher,
)
from alnico.numerics.sizes import format_size


@contextmanager
def bar(quiet: bool, verbose: int) -> Iterator[Watcher | None]:
    """Lend a watcher that draws a bar, or prints a line a tensor if ``verbose``."""
    if quiet:
        yield None
    elif verbose or not is_terminal(sys.stderr):
        yield _lines(verbose)
    else:
        with _drawn() as watch:
            yield _while_it_goes(watch)


def _while_it_goes(watch: Watcher) -> Watcher:
    """The watcher until it raises: a terminal that is gone, or that cannot show a sign, ends the bar and not the merge."""
    going = [True]

    def told(event: Event) -> None:
        if going[0]:
            try:
                watch(event)
            except Exception:
                going[0] = False

    return told


def _lines(verbose: int) -> Watcher:
    def watch(event: Event) -> None:
        if isinstance(event, Fetching):
            say(_fetching(event))
        elif isinstance(event, Started) and event.resumed:
            say(f"taking up an unfinished merge: {event.resumed} tensors are done")
        elif verbose and isinstance(event, TensorDone):
            say(f"{event.digest}  {event.tensor}")

    return watch


def _fetching(event: Fetching) -> str:
    return f"fetching {event.files} files of {', '.join(event.models)}, {format_size(event.total_bytes)}"


@contextmanager
def _drawn() -> Iterator[Watcher]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[rate]:>9}"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    file: Any = Canvas(sys.stderr)
    with Progress(*columns, console=Console(file=file), transient=True) as progress:
        task = progress.add_task("reading headers", total=None, rate="")
        state = {"done": 0, "before": 0, "begin": time.perf_counter(), "traffic": 1.0}

        def watch(event: Event) -> None:
            if isinstance(event, Fetching):
                state["begin"] = time.perf_counter()
                progress.update(
                    task, total=event.total_bytes, completed=0, description=visible(_fetching(event))
                )
            elif isinstance(event, Fetched):
                state["done"] += event.bytes_done
                rate = f"{state['done'] / max(time.perf_counter() - state['begin'], 1e-6) / 1e6:.0f} MB/s"
                progress.update(task, completed=state["done"], rate=rate)
            elif isinstance(event, Started):
                total = sum(s.byte_size - len(s.start) for s in event.plan.shards)
                # Rates count bytes read and written, as the demo and the benchmarks do.
                state["traffic"] = 1 + event.plan.bytes_to_read / max(total, 1)
                state["done"] = state["before"] = event.resumed_bytes
                progress.update(task, total=total, completed=event.resumed_bytes, description="", rate="")
            elif isinstance(event, Compiling):
                progress.update(task, description=f"compiling {event.kernels} kernels")
                state["begin"] = time.perf_counter()
            elif isinstance(event, Measuring):
                progress.update(task, description=f"measuring {event.tensors} tensors")
            elif isinstance(event, Reading):
                state["begin"], state["traffic"] = time.perf_counter(), 1.0
                state["done"] = state["before"] = 0
                progress.update(task, total=event.total_bytes, completed=0, description="", rate="")
            elif isinstance(event, Advanced):
                state["done"] += event.bytes_done
                seconds = max(time.perf_counter() - state["begin"], 1e-6)
                rate = f"{(state['done'] - state['before']) * state['traffic'] / seconds / 1e9:.2f} GB/s"
                progress.update(task, completed=state["done"], description=visible(event.tensor), rate=rate)

        yield watch
