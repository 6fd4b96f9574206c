"""The factors of finished matrices on the disk, until all are known and ranks are given out: what a killed extraction keeps."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from alnico.engine.journal import Done, Journal, Record, read_journal
from alnico.engine.output import PartDirectory
from alnico.errors import RunError
from alnico.numerics.randomized import Factors

FOLDER = "factors"


class Spool:
    """Finished factors in a part directory, with a journal line after they are on the disk. Safe for threads; close it.

    Errors: OutputError, naming what changed, where an extraction with other inputs or options stands; RunError.
    """

    def __init__(self, part: PartDirectory, fingerprint: Mapping[str, Any], restart: bool) -> None:
        self._folder = part.path / FOLDER
        self._lock = threading.Lock()
        self._unsynced: list[Path] = []
        found = Done() if restart else read_journal(part.path, fingerprint, "extraction")
        if not found:
            part.clear()
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{self._folder}: cannot be made ({error.strerror}). Choose another output.") from None
        kept = [record for record in found.records if self._is_whole(record)]
        self.done = {record.tensor for record in kept}
        self._journal = Journal(part.path, fingerprint, self._sync, Done(kept))

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"

    def _is_whole(self, record: Record) -> bool:
        """Are the factors of a finished matrix what the journal says?"""
        try:
            return _digest(self.read(record.tensor)) == record.digest
        except (RunError, ValueError, KeyError, EOFError):
            return False

    def put(self, name: str, factors: Factors) -> None:
        path = self._path(name)
        squares = np.array([factors.squares])
        try:
            with open(path, "wb") as file:
                np.savez(file, left=factors.left, right=factors.right, values=factors.values, squares=squares)
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror}). Make room or check the disk.") from None
        with self._lock:
            self._unsynced.append(path)
        if self._journal.failure is not None:
            raise self._journal.failure
        self._journal.finished(Record(name, _digest(factors), ()))

    def read(self, name: str) -> Factors:
        try:
            with np.load(self._path(name), allow_pickle=False) as held:
                return Factors(held["left"], held["right"], held["values"], float(held["squares"][0]))
        except OSError as error:
            raise RunError(f"{self._path(name)}: cannot be read ({error}). Run the same command again.") from None

    def spectrum(self, name: str) -> tuple[np.ndarray, float]:
        """The singular values and the sum of squares of a finished matrix, without its factors."""
        try:
            with np.load(self._path(name), allow_pickle=False) as held:
                return held["values"], float(held["squares"][0])
        except OSError as error:
            raise RunError(f"{self._path(name)}: cannot be read ({error}). Run the same command again.") from None

    def _sync(self) -> None:
        with self._lock:
            paths, self._unsynced = self._unsynced, []
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        self._journal.close()


def _digest(factors: Factors) -> str:
    state = xxhash.xxh3_128()
    for values in (factors.left, factors.right, factors.values, np.array([factors.squares])):
        state.update(str((values.dtype, values.shape)).encode())
        state.update(memoryview(np.ascontiguousarray(values)).cast("B") if values.size else b"")
    return state.hexdigest()
