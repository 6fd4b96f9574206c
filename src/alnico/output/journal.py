"""What is done of an unfinished merge: a line a finished tensor, written after its bytes are on the disk, and a line a fact
over the whole model.

The first line is the fingerprint: what decides the output's bits. A background thread writes lines in batches, so that
bringing data to the disk overlaps with merging. Every line carries a check of itself: a line that was cut off or overwritten ends
what is known.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from alnico.checkpoint.durable import cannot_be_written, replace_file, write_on
from alnico.checkpoint.files import reading
from alnico.errors import OutputError, RunError
from alnico.folders import Folder, open_to_write

NAME = "journal.jsonl"
FORM = 3
"""Of the journal; raised when its lines change their meaning."""
BATCH_SECONDS = 0.5
ABANDON_SECONDS = 1.0
"""How long an interrupted run waits for the disk to take in what was finished last."""


@dataclass(frozen=True)
class Record:
    """One finished tensor: its digest, and the digests of the inputs read for it ([model, name, digest])."""

    tensor: str
    digest: str
    inputs: tuple[tuple[int, str, str], ...]


@dataclass(frozen=True)
class JournalState:
    """What an interrupted merge has done: finished tensors, the facts over the model by their number in the plan, and norms."""

    records: list[Record] = field(default_factory=list)
    facts: dict[int, tuple[float, ...]] = field(default_factory=dict)
    norms: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """Of the plan's weighings, by their position."""

    def __bool__(self) -> bool:
        return bool(self.records or self.facts or self.norms)


class JournalLines:
    """An open file of checked lines that a background thread writes, each after ``sync`` has brought what it is about to the disk.

    It begins with a ``fingerprint`` and the lines that are ``known``, all at once.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: Mapping[str, Any],
        known: Iterable[Mapping[str, Any]] = (),
        sync: Callable[[], None] | None = None,
        inside: Folder | None = None,
    ) -> None:
        self.path = path
        self._sync = sync
        self._pending: list[str] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self.failure: BaseException | None = None
        lines = [
            checked({"journal": FORM, "made": _made(path), "fingerprint": fingerprint}),
            *map(checked, known),
        ]
        replace_file(path, "".join(lines), inside)  # a line cut off by a crash goes with the old file
        try:
            self._descriptor = open_to_write(path, inside, flags=os.O_APPEND)
        except OSError as error:
            raise cannot_be_written(path, error) from None
        self._thread = threading.Thread(target=self._write, name="alnico-journal", daemon=True)
        self._thread.start()

    def add(self, *lines: Mapping[str, Any]) -> None:
        """Note lines. Safe for threads."""
        written = [checked(line) for line in lines]
        with self._lock:
            self._pending += written

    def close(self, is_interrupted: bool = False) -> bool:
        """Write what is pending and stop; an interrupted run does not wait long for a slow disk. Returns whether all has ended.

        Errors: whatever failed while writing.
        """
        self._closing = True
        self._wake.set()
        self._thread.join(ABANDON_SECONDS if is_interrupted else None)
        if self._thread.is_alive():
            return False
        if self.failure is not None:
            raise self.failure
        return True

    def _write(self) -> None:
        try:
            while True:
                closing = self._closing
                with self._lock:
                    batch, self._pending = self._pending, []
                if batch and self.failure is None:
                    try:
                        if self._sync is not None:
                            self._sync()
                        write_on(self._descriptor, "".join(batch).encode())
                        os.fsync(self._descriptor)
                    except OSError as error:
                        self.failure = cannot_be_written(self.path, error)
                    except (
                        BaseException
                    ) as error:  # of a thread that nobody waits for: whoever works next raises it
                        self.failure = error
                if closing:
                    return
                self._wake.wait(BATCH_SECONDS)
        finally:
            os.close(self._descriptor)


class Journal:
    """The open journal of a running merge. ``sync`` brings all written tensor bytes to the disk."""

    wants_digests = True

    def __init__(
        self,
        directory: Path,
        fingerprint: Mapping[str, Any],
        sync: Callable[[], None],
        done: JournalState,
        inside: Folder | None = None,
    ) -> None:
        known = [
            *(_numbers("fact", *f) for f in done.facts.items()),
            *(_numbers("norms", *n) for n in done.norms.items()),
        ]
        self._lines = JournalLines(
            directory / NAME, fingerprint, [*known, *map(_line, done.records)], sync, inside
        )
        self.path = self._lines.path

    @property
    def failure(self) -> BaseException | None:
        return self._lines.failure

    def finished(self, record: Record) -> None:
        """Note a tensor whose bytes are all written. Safe for threads."""
        self._lines.add(_line(record))

    def measured(self, fact: int, value: tuple[float, ...]) -> None:
        """Note a fact over the model, by its number in the plan."""
        self._lines.add(_numbers("fact", fact, value))

    def weighed(self, norms: Mapping[int, tuple[float, ...]]) -> None:
        """Note the norms of weighings, by their position in the plan."""
        self._lines.add(*(_numbers("norms", *found) for found in norms.items()))

    def close(self, is_interrupted: bool = False) -> bool:
        """Write what is pending and stop; see :meth:`Lines.close`."""
        return self._lines.close(is_interrupted)


def read_journal(directory: Path, fingerprint: Mapping[str, Any], what: str = "merge") -> JournalState:
    """Return what an interrupted merge has done; nothing if there is no journal. ``what`` it is called in messages.

    Errors: OutputError, naming what changed, if the journal belongs to another merge; RunError.
    """
    path = directory / NAME
    lines = read_lines(path, fingerprint, what)
    try:
        return JournalState(
            [_record(x) for x in lines if "tensor" in x], _found("fact", lines), _found("norms", lines)
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
        raise _damaged(path, what) from None


def read_lines(path: Path, fingerprint: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    """Return the lines after the fingerprint up to the first that is cut off or damaged; none if there is no such file.

    ``what`` is unfinished: a "merge", say. Errors: OutputError if the file is damaged in its first line, of another form, or of
    another fingerprint; RunError if it cannot be read.
    """
    try:
        with reading(path) as file:
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read ({error.strerror}). Check the disk, or say --restart to begin anew."
        ) from None
    first, *rest = text.split("\n")
    head = _loaded(first)
    form = head.get("journal", 1) if head is not None and "fingerprint" in head else None
    if form is not None and form != FORM:
        raise OutputError(
            f"{path}: is a journal of form {form}, this version of alnico writes form {FORM}. "
            "Finish with the version that began it, or say --restart to begin anew."
        )
    begun = _unchecked(first)
    if begun is None or not isinstance(begun.get("fingerprint"), dict):
        raise _damaged(path, what)
    if not _is_made_here(begun.get("made"), path):
        raise OutputError(
            f"{path.parent}: holds an unfinished {what} that was not begun in this place: it was copied or unpacked, and may be anybody's. "
            "Say --restart to begin anew."
        )
    changed = _changes(begun["fingerprint"], json.loads(json.dumps(fingerprint)))
    if changed:
        raise OutputError(
            f"{path.parent}: an unfinished {what} stands here, and since then changed: {', '.join(changed)}. "
            "Undo the change to take it up, or say --restart to begin anew."
        )
    found: list[dict[str, Any]] = []
    for line in rest:
        if (fields := _unchecked(line)) is None:
            break
        found.append(fields)
    return found


def _made(path: Path) -> list[int]:
    """What tells the lock beside a journal from a copy of it: its inode, and the time of its last change, which nobody can set. What is
    unpacked from an archive has others, as files get anew wherever they are made. Some disks number files anew when they are mounted,
    and a new mode or time is a change: so one of the two is enough."""
    try:
        status = os.lstat(path.with_name("lock"))
    except OSError:
        return []
    return [status.st_ino, status.st_ctime_ns]


def _is_made_here(noted: Any, path: Path) -> bool:
    made = _made(path)
    return noted == made or (
        isinstance(noted, list) and any(a == b != 0 for a, b in zip(noted, made, strict=False))
    )


def checked(fields: Mapping[str, Any]) -> str:
    """A line of a journal: its fields as JSON, with a check of them as the last.

    >>> checked({"fact": 1})
    '{"fact": 1, "check": "7d96212a865af081"}\\n'
    """
    text = json.dumps(fields)
    return f'{text[:-1]}, "check": "{_check_of(text)}"}}\n'


def _unchecked(line: str) -> dict[str, Any] | None:
    """The fields of a line; None if it is not what was written."""
    fields = _loaded(line)
    check = fields.pop("check", None) if fields is not None else None
    return fields if fields is not None and check == _check_of(json.dumps(fields)) else None


def _check_of(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def _loaded(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _damaged(path: Path, what: str) -> OutputError:
    return OutputError(
        f"{path}: is damaged; expected the journal of an unfinished {what}. Say --restart to begin anew."
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of a fingerprint is not what it was, in words."""
    found: list[str] = []
    for key in dict.fromkeys((*now, *before)):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "recipe" and isinstance(old, dict) and isinstance(new, dict):
            if {**old, "seed": 0} != {**new, "seed": 0}:
                found.append("the recipe")
            if old.get("seed") != new.get("seed"):
                found.append(f"the seed (it was {old.get('seed')}, now it is {new.get('seed')})")
        elif key == "alnico":
            found.append(f"the version of alnico ({old} began it, this is {new})")
        elif key == "inputs" and (files := _changed_files(old, new)):
            found.append(f"an input file ({', '.join(files[:3])}; its size, time, commit or header)")
        else:
            found.append(_WORDS.get(key, key))
    return found


_WORDS = {
    "recipe": "the recipe",
    "arithmetic": "the version of alnico's arithmetic",
    "plan": "the plan (tensors or shard sizes)",
    "inputs": "an input file (size, time or header)",
    "norms": "the analysis that weights are made from",
    "top_share": "the share of top parameters",
    "subspace_side": "the largest side of matrices whose singular vectors are compared",
    "tensors": "the tensors that are compared",
}


def _changed_files(before: Any, now: Any) -> list[str]:
    """Name the files of the models that are not what they were; none if the models are others."""
    try:
        if [m["model"] for m in before] != [m["model"] for m in now]:
            return []
        old = [(m["model"], file) for m in before for file in m["files"]]
        new = [(m["model"], file) for m in now for file in m["files"]]
        others = [one for one in new if one not in old] + [one for one in old if one not in new]
        names = [f"{model}: {file.get('file', 'the rows of its vocabulary')}" for model, file in others]
    except (KeyError, TypeError, AttributeError):
        return []
    return list(dict.fromkeys(names))


def _line(record: Record) -> dict[str, Any]:
    return {"tensor": record.tensor, "digest": record.digest, "inputs": record.inputs}


def _numbers(kind: str, number: int, value: Sequence[float]) -> dict[str, Any]:
    return {kind: number, "value": value}


def _found(kind: str, loaded: list[dict[str, Any]]) -> dict[int, tuple[float, ...]]:
    return {int(line[kind]): tuple(float(x) for x in line["value"]) for line in loaded if kind in line}


def _record(loaded: dict[str, Any]) -> Record:
    return Record(
        loaded["tensor"], loaded["digest"], tuple((int(m), str(n), str(d)) for m, n, d in loaded["inputs"])
    )
