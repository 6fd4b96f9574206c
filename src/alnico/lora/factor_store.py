"""Stores factors of finished matrices on disk, so that an extraction can resume."""

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


class FactorStore:
    """Finished factors, appended to one file of a part directory; a journal line follows each once it is on
    disk.

    There is one file because syncing one takes as long as syncing hundreds. Thread-safe; close it.
    Errors: OutputError, naming what changed, if the folder has an extraction of other inputs or options;
    RunError.
    """

    def __init__(self, part: PartDirectory, fingerprint: Mapping[str, Any], restart: bool) -> None:
        self._path = part.path / NAME
        self._lock = threading.Lock()
        state = JournalState() if restart else read_journal(part.path, fingerprint, "extraction")
        if not state:
            part.clear()
        try:
            self._descriptor = open_to_write(
                self._path, part.folder, flags=os.O_RDWR | os.O_CREAT | (0 if state else os.O_TRUNC)
            )
        except OSError as error:
            raise RunError(
                f"{self._path}: cannot be created ({error.strerror}). Choose another output."
            ) from None
        self._entries: dict[str, tuple[int, dict[str, Any]]] = {r.tensor: _place(r) for r in state.records}
        whole = [record for record in state.records if self._is_whole(record)]
        self._entries = {r.tensor: self._entries[r.tensor] for r in whole}
        self._end = max((at + sum(entry["bytes"]) for at, entry in self._entries.values()), default=0)
        self.done = frozenset(self._entries)
        self._journal = Journal(part.path, fingerprint, self._sync, JournalState(whole), part.folder)

    def _is_whole(self, record: Record) -> bool:
        """Check the factors of a finished matrix against the journal."""
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
            self._entries[name] = begin, entry
        self._journal.finished(Record(name, _digest(factors), ((begin, json.dumps(entry), ""),)))

    def read(self, name: str, rank: int | None = None) -> LowRankFactors:
        """Return the factors of a finished matrix, cut to ``rank`` if given. Errors: RunError."""
        at, entry = self._entries[name]
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
        """Return the singular values and the sum of squares of a finished matrix, without its factors."""
        _, entry = self._entries[name]
        return np.array(entry["values"], np.float64), float(entry["squares"])

    def _sync(self) -> None:
        os.fsync(self._descriptor)

    def stop(self, is_interrupted: bool = False) -> bool:
        """Close the journal, and return whether its thread has ended. Errors: the first failure to write."""
        return self._journal.close(is_interrupted)

    def close(self) -> None:
        os.close(self._descriptor)


def _place(record: Record) -> tuple[int, dict[str, Any]]:
    """Return where the factors of a record begin in the file, and their description."""
    begin, entry, _ = record.inputs[0]
    return begin, json.loads(entry)


def _digest(factors: LowRankFactors) -> str:
    state = xxhash.xxh3_128()
    for values in (factors.left, factors.right, factors.values, np.array([factors.squares])):
        state.update(str((values.dtype, values.shape)).encode())
        state.update(memoryview(np.ascontiguousarray(values)).cast("B") if values.size else b"")
    return state.hexdigest()
