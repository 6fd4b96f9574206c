"""What is done of an unfinished merge: a line a finished tensor, written after its bytes are on the disk, and a line a fact
over the whole model.

The first line is the fingerprint: what decides the output's bits. A background thread writes lines in batches, so that
bringing data to the disk overlaps with merging.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alnico.errors import OutputError, RunError

NAME = "journal.jsonl"
BATCH_SECONDS = 0.5


@dataclass(frozen=True)
class Record:
    """One finished tensor: its digest, and the digests of the inputs read for it ([model, name, digest])."""

    tensor: str
    digest: str
    inputs: tuple[tuple[int, str, str], ...]


@dataclass(frozen=True)
class Done:
    """What an interrupted merge has done: finished tensors, the facts over the model by their number in the plan, and norms."""

    records: list[Record] = field(default_factory=list)
    facts: dict[int, tuple[float, ...]] = field(default_factory=dict)
    norms: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """Of the plan's weighings, by their position."""

    def __bool__(self) -> bool:
        return bool(self.records or self.facts or self.norms)


class Journal:
    """The open journal of a running merge. ``sync`` brings all written tensor bytes to the disk."""

    wants_digests = True

    def __init__(self, directory: Path, fingerprint: Mapping[str, Any], sync: Callable[[], None], done: Done) -> None:
        self._sync = sync
        self._pending: list[str] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self.failure: BaseException | None = None
        self.path = directory / NAME
        lines = [json.dumps({"fingerprint": fingerprint}), *(_numbers("fact", *f) for f in done.facts.items())]
        lines += [*(_numbers("norms", *n) for n in done.norms.items()), *map(_line, done.records)]
        temporary = directory / (NAME + ".tmp")
        try:
            temporary.write_text("".join(line + "\n" for line in lines), "utf-8")
            os.replace(temporary, self.path)  # a line cut off by a crash goes with the old file
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}). Make room or check the disk.") from None
        self._thread = threading.Thread(target=self._write, name="alnico-journal", daemon=True)
        self._thread.start()

    def finished(self, record: Record) -> None:
        """Note a tensor whose bytes are all written. Safe for threads."""
        with self._lock:
            self._pending.append(_line(record))

    def measured(self, fact: int, value: tuple[float, ...]) -> None:
        """Note a fact over the model, by its number in the plan."""
        with self._lock:
            self._pending.append(_numbers("fact", fact, value))

    def weighed(self, norms: Mapping[int, tuple[float, ...]]) -> None:
        """Note the norms of weighings, by their position in the plan."""
        with self._lock:
            self._pending += [_numbers("norms", *found) for found in norms.items()]

    def close(self) -> None:
        """Write what is pending and stop. Errors: whatever failed while writing."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        self._file.close()
        if self.failure is not None:
            raise self.failure

    def _write(self) -> None:
        while True:
            closing = self._closing
            with self._lock:
                batch, self._pending = self._pending, []
            if batch and self.failure is None:
                try:
                    self._sync()
                    self._file.write("".join(line + "\n" for line in batch))
                    self._file.flush()
                    os.fsync(self._file.fileno())
                except OSError as error:
                    self.failure = RunError(f"{self.path}: cannot be written ({error.strerror}). Make room or check the disk.")
                except RunError as error:
                    self.failure = error
            if closing:
                return
            self._wake.wait(BATCH_SECONDS)


def read_journal(directory: Path, fingerprint: Mapping[str, Any]) -> Done:
    """Return what an interrupted merge has done; nothing if there is no journal.

    Errors: OutputError, naming what changed, if the journal belongs to another merge.
    """
    path = directory / NAME
    if not path.exists():
        return Done()
    try:
        lines = path.read_text("utf-8", "replace").split("\n")
        before = json.loads(lines[0])["fingerprint"]
        loaded = [json.loads(line) for line in lines[1:-1]]
        done = Done([_record(x) for x in loaded if "tensor" in x], _found("fact", loaded), _found("norms", loaded))
        if not isinstance(before, dict):
            raise ValueError("no fingerprint")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
        raise OutputError(
            f"{path}: is damaged; expected the journal of an unfinished merge. Say --restart to begin anew."
        ) from None
    changed = [_words(key) for key in fingerprint if before.get(key) != json.loads(json.dumps(fingerprint[key]))]
    if changed:
        raise OutputError(
            f"{directory}: an unfinished merge stands here, and since then changed: {', '.join(changed)}. "
            "Undo the change to take it up, or say --restart to begin anew."
        )
    return done


def _words(key: str) -> str:
    return {
        "recipe": "the recipe",
        "arithmetic": "the version of alnico's arithmetic",
        "plan": "the plan (tensors or shard sizes)",
        "inputs": "an input file (size, time or header)",
        "norms": "the analysis that weights are made from",
    }.get(key, key)


def _line(record: Record) -> str:
    return json.dumps({"tensor": record.tensor, "digest": record.digest, "inputs": record.inputs})


def _numbers(kind: str, number: int, value: tuple[float, ...]) -> str:
    return json.dumps({kind: number, "value": value})


def _found(kind: str, loaded: list[dict[str, Any]]) -> dict[int, tuple[float, ...]]:
    return {int(line[kind]): tuple(float(x) for x in line["value"]) for line in loaded if kind in line}


def _record(loaded: dict[str, Any]) -> Record:
    return Record(loaded["tensor"], loaded["digest"], tuple((int(m), str(n), str(d)) for m, n, d in loaded["inputs"]))
