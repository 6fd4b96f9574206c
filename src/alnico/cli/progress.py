"""The progress of every command on stderr: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from alnico.cli.printing import is_terminal, say
from alnico.cli.streams import Canvas
from alnico.errors import visible
from alnico.events import (
    Advanced,
    BatchHalved,
    Compiling,
    Counted,
    Event,
    Fetched,
    Fetching,
    Learned,
    Measuring,
    Noted,
    PointScored,
    Reading,
    Scored,
    SoupTried,
    Started,
    TensorDone,
    TrialDone,
    Watcher,
)
from alnico.kernels.clock import CLOCK
from alnico.numerics.sizes import count_of, format_size

if TYPE_CHECKING:
    from alnico.engine.matrix_time import MatrixForecast

PATIENCE = 2.0
"""Seconds before the first line that counts parts."""

FORETOLD = 20.0
"""Seconds of whole matrices from which a merge says how long they will take."""

SILENCE = 30.0
"""The most seconds without a line while steps are learned."""


@contextmanager
def bar(quiet: bool, verbose: int) -> Iterator[Watcher | None]:
    """Lend a watcher that draws a bar on a terminal, or prints lines; with ``verbose`` a line for each tensor."""
    if quiet:
        yield None
    elif verbose or not is_terminal(sys.stderr):
        yield _lines(verbose)
    else:
        with _drawn() as watch:
            yield _until_it_fails(watch)


def _until_it_fails(watch: Watcher) -> Watcher:
    """The watcher until it raises: a terminal that is gone, or that cannot show a character, ends the bar and not the merge."""
    is_alive = [True]

    def guarded(event: Event) -> None:
        if is_alive[0]:
            try:
                watch(event)
            except Exception:
                is_alive[0] = False

    return guarded


def _lines(verbose: int) -> Watcher:
    begin = time.monotonic()
    steps = StepLines()
    matrices = MatrixLines()

    def watch(event: Event) -> None:
        line = _result_line(event)
        if line is not None:
            say(line)
        elif isinstance(event, Fetching):
            say(_fetching(event))
        elif isinstance(event, Started):
            if event.resumed:
                say(f"resuming an unfinished merge: {count_of(event.resumed, 'tensor')} done")
            matrices.begin(event)
            if (foretold := _foretold(event)) is not None:
                say(foretold)
        elif isinstance(event, Advanced):
            if (line := matrices.line(event)) is not None:
                say(line)
        elif verbose and isinstance(event, Noted):
            say(f"{event.tensor}: {event}")
        elif verbose and isinstance(event, TensorDone):
            say(f"{event.digest}  {event.tensor}")
        elif isinstance(event, Learned):
            if (step := steps.line(event)) is not None:
                say(step)
        elif isinstance(event, Counted) and time.monotonic() - begin >= PATIENCE:
            say(_counted(event), quiet=not _is_shown(event.done, event.total, 10))

    return watch


class MatrixLines:
    """Says how far a merge of whole matrices is, once a minute: it may take hours."""

    EVERY = 60.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total = self._done = 0
        self._shown = 0.0

    def begin(self, event: Started) -> None:
        has_matrices = any(job.kind == "matrix" for job in event.plan.jobs)
        self._total = sum(s.byte_size - len(s.start) for s in event.plan.shards) if has_matrices else 0
        self._done = event.resumed_bytes
        self._shown = self._clock()

    def line(self, event: Advanced) -> str | None:
        """Return the line of an event, or None."""
        self._done = self._done + event.bytes_done if self._total else 0
        if not self._total or self._clock() - self._shown < self.EVERY:
            return None
        self._shown = self._clock()
        return f"{100 * self._done / self._total:3.0f} %  {event.tensor}"


class StepLines:
    """Chooses the steps of a learning that have a line: about 20, and one after a silence; each has the time left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._shown = 0.0

    def line(self, event: Learned) -> str | None:
        """Return the line of a step, or None. The first step says nothing about time: it reads the models."""
        done, now = event.step.number, self._clock()
        if self._first is None:
            self._first = done, now
        elif not _is_shown(done, event.total, 20) and now - self._shown < SILENCE:
            return None
        self._shown = now
        steps, seconds = done - self._first[0], now - self._first[1]
        if not steps or done == event.total:
            return _learned(event)
        return f"{_learned(event)}, about {_duration(seconds / steps * (event.total - done))} left"


def _duration(seconds: float) -> str:
    """Return a time for people.

    >>> [_duration(s) for s in (0.2, 59.4, 100, 4000, 100_000)]
    ['1 s', '60 s', '2 min', '1 h 7 min', '27 h 47 min']
    """
    if seconds < 90:
        return f"{max(1, math.ceil(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def matrices_line(forecast: MatrixForecast) -> str:
    """One line about the whole matrices of a plan.

    >>> from alnico.engine.matrix_time import MatrixForecast
    >>> matrices_line(MatrixForecast(224, 1_900_000_000, 2, 6000.0))
    '224 tensors as whole matrices, at most 1.9 GB each, 2 at a time: about 1 h 40 min'
    """
    return (
        f"{count_of(forecast.tensors, 'tensor')} as whole matrices, at most {format_size(forecast.largest_bytes)} each, "
        f"{forecast.at_once} at a time: about {_duration(forecast.seconds)}"
    )


def _foretold(event: Started) -> str | None:
    """The line about whole matrices of a merge that takes long, without what an earlier run has finished."""
    if not any(job.kind == "matrix" for job in event.plan.jobs):
        return None
    from alnico.engine.matrix_time import forecast_matrices  # with numpy, which most commands do without

    forecast = forecast_matrices(event.plan)
    if forecast is None or forecast.seconds < FORETOLD:
        return None
    line = matrices_line(forecast)
    return f"{line}, less what is done" if event.resumed else line


def _is_shown(done: int, total: int, lines: int) -> bool:
    """Is it one of about that many steps, evenly spread, or the last?"""
    return done % max(1, total // lines) == 0 or done == total


def _fetching(event: Fetching) -> str:
    names, size = ", ".join(event.models), format_size(event.total_bytes)
    if event.is_upload:
        return f"sending {count_of(event.files, 'file')} to {names}, {size}"
    return f"fetching {count_of(event.files, 'file')} of {names}, {size}"


def _counted(event: Counted) -> str:
    return f"{event.what} {event.done}/{event.total}"


def _learned(event: Learned) -> str:
    step = event.step
    losses = ", ".join(f"{task} {loss:.3f}" for task, loss in step.losses.items())
    return f"step {step.number}/{event.total}  entropy {step.loss:.3f} nats: {losses}"


def _result_line(event: Event) -> str | None:
    """The line of an event that is a result (a score, an average of a soup, a trial, a point of a curve) or a note on one."""
    if isinstance(event, Scored):
        return f"{event.model}  {event.task}: {event.metric} {event.score.value:.4g}"
    if isinstance(event, SoupTried):
        step, size = event.step, sum(event.step.counts.values())
        gain = "" if step.best is None else f"  {step.score - step.best:+.4f}"
        return f"{'+' if step.is_kept else ' '} {step.tried}: {step.score:.4f}{gain}{f'  of {size}' if size > 1 else ''}"
    if isinstance(event, PointScored):
        values = "  ".join(f"{task} {score.value:.4g}" for task, score in event.scores.items())
        return f"{event.done}/{event.total}  {event.place}: {values}"
    if isinstance(event, BatchHalved):
        return f"note: {event}"
    return _trial_line(event.trial) if isinstance(event, TrialDone) else None


def _trial_line(trial: Any) -> str:
    seconds = "" if trial.seconds is None else f"  {trial.seconds:.1f} s"
    if trial.state == "complete":
        return f"trial {trial.number:4}  {'  '.join(f'{v:.4g}' for v in trial.values)}{seconds}"
    if trial.state == "pruned":
        return f"trial {trial.number:4}  stopped early at {trial.rungs[-1]:.4g}{seconds}"
    return f"trial {trial.number:4}  failed: {trial.reason}"


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

        def update(**fields: Any) -> None:
            progress.update(task, **fields)

        def write(line: str) -> None:
            progress.console.print(visible(line), markup=False, highlight=False, soft_wrap=True)

        yield ProgressBar(update, write).watch


def _now() -> float:
    """Seconds, except those in which kernels were compiled."""
    return time.perf_counter() - CLOCK.seconds


class ProgressBar:
    """The state of a bar. Rates count bytes read and written, as the demo and the benchmarks do, without compiling."""

    def __init__(self, update: Callable[..., None], write: Callable[[str], None]) -> None:
        self._update = update
        self._write = write
        self._begin = _now()
        self._done = self._resumed = 0
        self._traffic = 1.0

    def watch(self, event: Event) -> None:
        line = _result_line(event)
        if line is not None:
            self._write(line)
        elif isinstance(event, Fetching):
            self._restart(event.total_bytes, description=visible(_fetching(event)))
        elif isinstance(event, Fetched):
            self._advance(event.bytes_done, 1e6, "0f} MB/s")
        elif isinstance(event, Started):
            total = sum(s.byte_size - len(s.start) for s in event.plan.shards)
            self._restart(total, event.resumed_bytes, 1 + event.plan.bytes_to_read / max(total, 1))
            if (foretold := _foretold(event)) is not None:
                self._write(foretold)
        elif isinstance(event, Compiling):
            self._update(description=f"compiling {event.kernels} kernel{'' if event.kernels == 1 else 's'}")
            self._begin = _now()
        elif isinstance(event, Measuring):
            self._update(description=f"measuring {event.tensors} tensors")
        elif isinstance(event, Reading):
            self._restart(event.total_bytes)
        elif isinstance(event, Advanced):
            self._advance(event.bytes_done, 1e9, "2f} GB/s", description=visible(event.tensor))
        elif isinstance(event, Learned):
            description = visible(_learned(event))
            self._update(total=event.total, completed=event.step.number, description=description, rate="")
        elif isinstance(event, Counted):
            self._update(total=event.total, completed=event.done, description=_counted(event), rate="")

    def _restart(self, total: int, resumed: int = 0, traffic: float = 1.0, *, description: str = "") -> None:
        self._begin = _now()
        self._done = self._resumed = resumed
        self._traffic = traffic
        self._update(total=total, completed=resumed, description=description, rate="")

    def _advance(self, more: int, unit: float, form: str, **fields: Any) -> None:
        self._done += more
        seconds = max(_now() - self._begin, 1e-6)
        rate = (self._done - self._resumed) * self._traffic / seconds / unit
        self._update(completed=self._done, rate=("{:." + form).format(rate), **fields)
