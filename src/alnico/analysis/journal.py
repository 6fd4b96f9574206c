"""What an unfinished analysis has measured, beside the folder of its report: a line a tensor. The same command takes it up."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from alnico._version import __version__
from alnico.analysis.common_tensors import CommonTensor
from alnico.analysis.histogram import PAGE, Histogram
from alnico.analysis.results import Subspace
from alnico.analysis.tally import Tally
from alnico.checkpoint.durable import replace_file
from alnico.checkpoint.source import Source
from alnico.errors import AlnicoError, OutputError, RunError
from alnico.kernels.constants import ARITHMETIC
from alnico.output.journal import NAME, JournalLines, read_lines
from alnico.output.staging import Hold

WRITING = "writing"


@dataclasses.dataclass(frozen=True)
class MeasuredTensor:
    """What is kept of one tensor: its tally, and a histogram of each of its models."""

    tally: Tally
    histograms: list[Histogram]


class AnalysisJournal(Hold):
    """``.NAME.alnico-analysis`` beside the folder of a report, held by one process; use it in ``with``.

    It is there until the report is: ``with`` removes it when its block ends, or when an input is wrong; a kill, an interrupt, a full
    disk and a failing one keep it. ``restart`` forgets what is in it. Errors: OutputError if another process holds it.
    """

    def __init__(self, folder: Path, restart: bool = False) -> None:
        super().__init__(folder.parent / f".{folder.name}.alnico-analysis", folder)
        self._restart = restart
        self._lines: JournalLines | None = None

    def __enter__(self) -> AnalysisJournal:
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_wrong = isinstance(error, AlnicoError) and not isinstance(error, (OutputError, RunError))
        try:
            self.close(is_interrupted=isinstance(error, KeyboardInterrupt), is_over=error is not None)
            if error is None or (is_wrong and self._lines is not None) or not (self.path / NAME).exists():
                self.remove()
        finally:
            super().__exit__(kind, error, trace)

    def begin(
        self, base: Source, models: Sequence[Source], subjects: Sequence[CommonTensor], **options: Any
    ) -> dict[str, Mapping[str, Any]]:
        """Open the journal; returns what an interrupted analysis has measured of these subjects, by the name of the tensor: lines
        for :func:`measured`, which take less memory than what they say.

        Errors: OutputError, naming what changed, if the journal belongs to another analysis; RunError.
        """
        told = [[s.job.name, s.job.dtype, list(s.job.shape), list(s.models)] for s in subjects]
        fingerprint = {
            "alnico": __version__,
            "arithmetic": ARITHMETIC,
            "inputs": [{"model": s.label, "files": s.identity()} for s in (*models, base)],
            "tensors": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
            **options,
        }
        lines = [] if self._restart else read_lines(self.path / NAME, fingerprint, "analysis")
        self._lines = JournalLines(self.path / NAME, fingerprint, lines, inside=self.folder)
        return {line["tensor"]: line for line in lines}

    def keep(self, name: str, found: MeasuredTensor) -> None:
        """Note a tensor that is measured. Safe for threads. Errors: RunError if an earlier one could not be noted."""
        assert self._lines is not None
        if self._lines.failure is not None:
            raise self._lines.failure
        self._lines.add(_line(name, found))

    def close(self, is_interrupted: bool = False, is_over: bool = False) -> None:
        """Write what is pending. Errors: RunError, but where another error ``is_over`` it."""
        if self._lines is not None:
            with suppress(*((RunError,) if is_over else ())):
                self._lines.close(is_interrupted)

    def begin_writing(self) -> None:
        """Note that the folder of the report holds half of it from now on. Errors: RunError."""
        replace_file(self.path / WRITING, "", self.folder)


def is_half_written(folder: Path) -> bool:
    """Was an analysis killed while it wrote its report into this folder? Errors: OutputError for unfinished work of another user."""
    unfinished = AnalysisJournal(folder)
    unfinished.check()
    return os.path.lexists(unfinished.path / WRITING)


def _line(name: str, found: MeasuredTensor) -> dict[str, Any]:
    return {
        "tensor": name,
        "tally": dataclasses.asdict(found.tally),
        "histograms": [*map(_packed, found.histograms)],
    }


def measured(line: Mapping[str, Any]) -> MeasuredTensor:
    """What a line says of a tensor."""
    given = {key: _tupled(value) for key, value in line["tally"].items() if key != "subspaces"}
    subspaces = tuple(None if s is None else Subspace(**s) for s in line["tally"]["subspaces"])
    return MeasuredTensor(Tally(**given, subspaces=subspaces), [*map(_unpacked, line["histograms"])])


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _packed(histogram: Histogram) -> dict[str, Any]:
    pages = sorted(histogram.pages)
    counts = b"".join(histogram.pages[page].astype("<i8").tobytes() for page in pages)
    # The counts of a page are small or 0: packed, a histogram takes a twentieth, in a third of a millisecond.
    return {"pages": pages, "counts": base64.b85encode(zlib.compress(counts, 1)).decode("ascii")}


def _unpacked(packed: Mapping[str, Any]) -> Histogram:
    counts = np.frombuffer(zlib.decompress(base64.b85decode(packed["counts"])), "<i8").reshape(
        len(packed["pages"]), PAGE
    )
    found = Histogram()
    found.pages = {int(page): row.astype(np.int64) for page, row in zip(packed["pages"], counts, strict=True)}
    return found
