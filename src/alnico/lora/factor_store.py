"""The factors of finished matrices on the disk, until all are known and ranks are given out: what a killed extraction keeps."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from alnico.checkpoint.files import read_fully, write_fully
from alnico.errors import ModelError, RunError
from alnico.folders import open_to_write
from alnico.numerics.randomized import LowRankFactors
from alnico.output.journal import Journal, JournalState, Record, read_journal
from alnico.output.staging import PartDirectory

NAME = "factors.spool"


class Spool:
    """Finished factors, one after the other in a file of a part directory, with a journal line after they are on the disk.

    One file, since bringing one to the disk takes as long as bringing hundreds. Safe for threads; close it.
    Errors: OutputError, naming what changed, where an extraction with other inputs or options stands; RunError.
    """

    def __init__(self, part: PartDirectory, fingerprint: Mapping[str, Any], restart: bool) -> None:
        self._path = part.path / NAME
        self._lock = threading.Lock()
        found = JournalState() if restart else read_journal(part.path, fingerprint, "extraction")
        if not found:
            part.clear()
        try:
            self._descriptor = open_to_write(
                self._path, part.folder, flags=os.O_RDWR | os.O_CREAT | (0 if found else os.O_TRUNC)
            )
        except OSError as error:
            raise RunError(
                f"{self._path}: cannot be made ({error.strerror}). Choose another output."
            ) from None
        self._held: dict[str, tuple[int, dict[str, Any]]] = {r.tensor: _place(r) for r in found.records}
        kept = [record for record in found.records if self._is_whole(record)]
        self._held = {r.tensor: self._held[r.tensor] for r in kept}
        self._end = max((at + sum(entry["bytes"]) for at, entry in self._held.values()), default=0)
        self.done = frozenset(self._held)
        self._journal = Journal(part.path, fingerprint, self._sync, JournalState(kept), part.folder)

    def _is_whole(self, record: Record) -> bool:
        """Are the factors of a finished matrix what the journal says?"""
        try:
            return _digest(self.read(record.tensor)) == record.digest
        except (ModelError, RunError):
            return False

    def put(self, name: str, factors: LowRankFactors) -> None:
        if self._journal.failure is not None:
            raise self._journal.failure
        parts = [np.ascontiguousarray(x) for x in (factors.left, factors.right)]
        entry = {
            "shapes": [list(x.shape) for x in parts],
            "bytes": [x.nbytes for x in parts],
            "dtype": parts[0].dtype.str,
            "values": factors.values.tolist(),
            "squares": factors.squares,
        }
        with self._lock:
            begin, self._end = self._end, self._end + sum(entry["bytes"])
        at = begin
        for values in parts:
            if values.nbytes:
                write_fully(self._descriptor, memoryview(values).cast("B"), at, self._path, name)
            at += values.nbytes
        with self._lock:
            self._held[name] = begin, entry
        self._journal.finished(Record(name, _digest(factors), ((begin, json.dumps(entry), ""),)))

    def read(self, name: str, rank: int | None = None) -> LowRankFactors:
        """The factors of a finished matrix, of all its rank or of a smaller one. Errors: RunError."""
        at, entry = self._held[name]
        parts = []
        for shape, size in zip(entry["shapes"], entry["bytes"], strict=True):
            values = np.empty(shape, np.dtype(entry["dtype"]))
            if size:
                read_fully(self._descriptor, memoryview(values).cast("B"), at, str(self._path))
            parts.append(values)
            at += size
        values, squares = self.spectrum(name)
        return LowRankFactors(parts[0][:, :rank], parts[1][:rank], values[:rank], squares)

    def spectrum(self, name: str) -> tuple[np.ndarray, float]:
        """The singular values and the sum of squares of a finished matrix, without its factors."""
        _, entry = self._held[name]
        return np.array(entry["values"], np.float64), float(entry["squares"])

    def _sync(self) -> None:
        os.fsync(self._descriptor)

    def stop(self) -> None:
        """End the journal: all is known. Errors: whatever failed while writing."""
        self._journal.close()

    def close(self) -> None:
        os.close(self._descriptor)


def _place(record: Record) -> tuple[int, dict[str, Any]]:
    """Where in the file the factors of a record begin, and what they are."""
    begin, entry, _ = record.inputs[0]
    return begin, json.loads(entry)


def _digest(factors: LowRankFactors) -> str:
    state = xxhash.xxh3_128()
    for values in (factors.left, factors.right, factors.values, np.array([factors.squares])):
        state.update(str((values.dtype, values.shape)).encode())
        state.update(memoryview(np.ascontiguousarray(values)).cast("B") if values.size else b"")
    return state.hexdigest()
