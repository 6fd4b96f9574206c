"""Keeps the measurements of an unfinished analysis, one line per tensor, so that it can resume."""

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
from alnico.checkpoint.memory_model import MemoryModel
from alnico.checkpoint.source import Source, unwrap
from alnico.errors import AlnicoError, OutputError, RunError
from alnico.kernels.constants import ARITHMETIC
from alnico.output.hashes import hash_tensors
from alnico.output.journal import NAME, JournalLines, read_lines
from alnico.output.staging import Hold
from alnico.threads import Crew

WRITING = "writing"


@dataclasses.dataclass(frozen=True)
class MeasuredTensor:
    """The measurements of one tensor: its tally, and a histogram for each model."""

    tally: Tally
    histograms: list[Histogram]


class AnalysisJournal(Hold):
    """``.NAME.alnico-analysis`` next to the folder of a report, locked by one process; use it in ``with``.

    It exists until the report is complete: ``with`` removes it at the end, or when an input is wrong. A kill,
    an interrupt, and a full or failing disk keep it. ``restart`` discards its contents. Errors: OutputError
    if another process has locked it.
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
        self,
        base: Source,
        models: Sequence[Source],
        subjects: Sequence[CommonTensor],
        threads: int = 1,
        **options: Any,
    ) -> dict[str, Mapping[str, Any]]:
        """Open the journal; returns the lines of an interrupted analysis by tensor name.

        :func:`decode_measurement` decodes a line; encoded lines need less memory. Models in memory are
        hashed, with ``threads``, because an object has no other identity in another process.

        Errors: OutputError, naming what changed, if the journal belongs to another analysis; RunError.
        """
        tensors = [[s.job.name, s.job.dtype, list(s.job.shape), list(s.models)] for s in subjects]
        fingerprint = {
            "alnico": __version__,
            "arithmetic": ARITHMETIC,
            "inputs": [{"model": s.label, "files": _identity(s, threads)} for s in (*models, base)],
            "tensors": hashlib.sha256(json.dumps(tensors).encode()).hexdigest(),
            **options,
        }
        lines = [] if self._restart else read_lines(self.path / NAME, fingerprint, "analysis")
        self._lines = JournalLines(self.path / NAME, fingerprint, lines, inside=self.folder)
        return {line["tensor"]: line for line in lines}

    def add(self, name: str, measurements: MeasuredTensor) -> None:
        """Record a measured tensor. Thread-safe. Errors: RunError if an earlier one could not be written."""
        assert self._lines is not None
        if self._lines.failure is not None:
            raise self._lines.failure
        self._lines.add(_line(name, measurements))

    def close(self, is_interrupted: bool = False, is_over: bool = False) -> None:
        """Write pending lines. Errors: RunError, unless another error is already raised (``is_over``)."""
        if self._lines is not None:
            with suppress(*((RunError,) if is_over else ())):
                self._lines.close(is_interrupted)

    def begin_writing(self) -> None:
        """Record that the folder of the report is incomplete from now on. Errors: RunError."""
        replace_file(self.path / WRITING, "", self.folder)


def _identity(source: Source, threads: int) -> list[dict[str, Any]]:
    """Return what identifies a model: its files, or the digests of its tensors in memory."""
    if not isinstance(unwrap(source), MemoryModel):
        return source.identity()
    with Crew(threads, name="alnico-hash") as crew:
        digests = hash_tensors(source, source.tensors, crew)
    return [
        {
            "file": "its values in memory",
            "tensors": hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest(),
        }
    ]


def is_half_written(folder: Path) -> bool:
    """Check whether an analysis was killed while it wrote this folder.

    Errors: OutputError for work of another user.
    """
    unfinished = AnalysisJournal(folder)
    unfinished.check()
    return os.path.lexists(unfinished.path / WRITING)


def _line(name: str, measurements: MeasuredTensor) -> dict[str, Any]:
    return {
        "tensor": name,
        "tally": dataclasses.asdict(measurements.tally),
        "histograms": [*map(_pack, measurements.histograms)],
    }


def decode_measurement(line: Mapping[str, Any]) -> MeasuredTensor:
    """Decode the line of a tensor."""
    fields = {key: _to_tuples(value) for key, value in line["tally"].items() if key != "subspaces"}
    subspaces = tuple(None if s is None else Subspace(**s) for s in line["tally"]["subspaces"])
    return MeasuredTensor(Tally(**fields, subspaces=subspaces), [*map(_unpack, line["histograms"])])


def _to_tuples(value: Any) -> Any:
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


def _pack(histogram: Histogram) -> dict[str, Any]:
    pages = sorted(histogram.pages)
    counts = b"".join(histogram.pages[page].astype("<i8").tobytes() for page in pages)
    # Counts are small or 0: compressed, a histogram takes 1/20 of the space, in 0.3 ms.
    return {"pages": pages, "counts": base64.b85encode(zlib.compress(counts, 1)).decode("ascii")}


def _unpack(packed: Mapping[str, Any]) -> Histogram:
    counts = np.frombuffer(zlib.decompress(base64.b85decode(packed["counts"])), "<i8").reshape(
        len(packed["pages"]), PAGE
    )
    histogram = Histogram()
    histogram.pages = {
        int(page): row.astype(np.int64) for page, row in zip(packed["pages"], counts, strict=True)
    }
    return histogram
