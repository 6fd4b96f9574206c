"""Records the progress of a merge: one line per tensor, or batch of small ones, and per fact of the whole model.

The line of a tensor is written after its bytes are on the disk. The first line is the fingerprint of
everything that decides the output's bits. A background thread writes lines in batches, so that flushing
overlaps with merging. Every line carries a checksum; lines after a damaged one are ignored.
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

from alnico.checkpoint.durable import replace_file, write_all, write_error
from alnico.checkpoint.files import open_binary
from alnico.errors import OutputError, RunError
from alnico.folders import Folder, open_to_write

NAME = "journal.jsonl"
FORM = 3
"""Version of the journal's format."""
UPLOAD = "upload"
"""The key that lines about uploads have."""
BATCH_SECONDS = 0.5
ABANDON_SECONDS = 1.0
"""How long an interrupted run waits for the last finished tensors to reach the disk."""


@dataclass(frozen=True)
class Record:
    """One finished tensor: its digest, and the digests of the inputs read for it ([model, name, digest])."""

    tensor: str
    digest: str
    inputs: tuple[tuple[int, str, str], ...]


@dataclass(frozen=True)
class JournalState:
    """The progress of an interrupted merge: finished tensors, facts of the whole model by their number in the
    plan, and norms."""

    records: list[Record] = field(default_factory=list)
    facts: dict[int, tuple[float, ...]] = field(default_factory=dict)
    norms: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """By the position of their group in ``Plan.norm_weight_groups``."""
    uploads: list[dict[str, Any]] = field(default_factory=list)
    """Lines about parts of the output that were sent to a URL; see :mod:`alnico.output.shard_uploads`."""

    def __bool__(self) -> bool:
        return bool(self.records or self.facts or self.norms)


class JournalLines:
    """An open file of lines with checksums. A background thread writes each line after ``sync`` has flushed
    the data that it is about.

    It starts with a ``fingerprint`` and the ``known`` lines, written at once.
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
        self._after: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self.failure: BaseException | None = None
        lines = [
            format_line({"journal": FORM, "made": _place_id(path), "fingerprint": fingerprint}),
            *map(format_line, known),
        ]
        replace_file(path, "".join(lines), inside)  # drops a line that a crash cut off
        try:
            self._descriptor = open_to_write(path, inside, flags=os.O_APPEND)
        except OSError as error:
            raise write_error(path, error) from None
        self._thread = threading.Thread(target=self._write, name="alnico-journal", daemon=True)
        self._thread.start()

    def add(self, *lines: Mapping[str, Any], then: Callable[[], None] | None = None) -> None:
        """Add lines. ``then`` is called in the background thread when they are on the disk, where they are at once. Safe for
        threads."""
        texts = [format_line(line) for line in lines]
        with self._lock:
            self._pending += texts
            self._after += [then] if then is not None else []
        if then is not None:
            self._wake.set()

    def close(self, is_interrupted: bool = False) -> bool:
        """Write pending lines and stop. Returns whether the thread has ended: an interrupted run does not
        wait long for a slow disk.

        Errors: the first failure to write.
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
                    after, self._after = self._after, []
                if batch and self.failure is None:
                    try:
                        if self._sync is not None:
                            self._sync()
                        write_all(self._descriptor, "".join(batch).encode())
                        os.fsync(self._descriptor)
                        for call in after:
                            call()
                    except OSError as error:
                        self.failure = write_error(self.path, error)
                    except BaseException as error:  # nobody waits for this thread: the next worker raises it
                        self.failure = error
                if closing:
                    return
                self._wake.wait(BATCH_SECONDS)
                self._wake.clear()
        finally:
            os.close(self._descriptor)


class Journal:
    """The open journal of a running merge. ``sync`` flushes all tensor bytes that were written."""

    wants_digests = True

    def __init__(
        self,
        directory: Path,
        fingerprint: Mapping[str, Any],
        sync: Callable[[], None],
        state: JournalState,
        inside: Folder | None = None,
    ) -> None:
        known = [
            *(_numbers("fact", *f) for f in state.facts.items()),
            *(_numbers("norms", *n) for n in state.norms.items()),
        ]
        self._lines = JournalLines(
            directory / NAME,
            fingerprint,
            [*known, *map(_line, state.records), *state.uploads],
            sync,
            inside,
        )
        self.path = self._lines.path

    @property
    def failure(self) -> BaseException | None:
        return self._lines.failure

    def finished(self, *records: Record) -> None:
        """Record tensors whose bytes are all written, in one line. Safe for threads."""
        self._lines.add(_line(*records))

    def measured(self, fact: int, value: tuple[float, ...]) -> None:
        """Record a fact of the whole model, by its number in the plan."""
        self._lines.add(_numbers("fact", fact, value))

    def measured_norms(self, norms: Mapping[int, tuple[float, ...]]) -> None:
        """Record norms, by the position of their group in ``Plan.norm_weight_groups``."""
        self._lines.add(*(_numbers("norms", *entry) for entry in norms.items()))

    def uploaded(self, line: Mapping[str, Any], then: Callable[[], None] | None = None) -> None:
        """Record what was sent to a URL; ``then`` is called when the line is on the disk. Safe for threads."""
        self._lines.add({UPLOAD: True, **line}, then=then)

    def close(self, is_interrupted: bool = False) -> bool:
        """Write pending lines and stop; see :meth:`JournalLines.close`."""
        return self._lines.close(is_interrupted)


def read_journal(directory: Path, fingerprint: Mapping[str, Any], what: str = "merge") -> JournalState:
    """Return the progress of an interrupted merge; empty without a journal. ``what`` is its name in messages.

    Errors: OutputError, naming what changed, if the journal belongs to another merge; RunError.
    """
    path = directory / NAME
    lines = read_lines(path, fingerprint, what)
    try:
        return JournalState(
            [record for line in lines for record in _records(line)],
            _parse("fact", lines),
            _parse("norms", lines),
            [x for x in lines if UPLOAD in x],
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
        raise _damaged(path, what) from None


def read_lines(path: Path, fingerprint: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    """Return the lines after the fingerprint up to the first damaged one; none without a file.

    ``what`` is the name of the unfinished work in messages, such as "merge". Errors: OutputError if the file
    is damaged in its first line, of another form, or of another fingerprint; RunError if it cannot be read.
    """
    try:
        with open_binary(path) as file:
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read ({error.strerror}). Check the disk, or pass --restart to start over."
        ) from None
    first, *rest = text.split("\n")
    head = _loaded(first)
    form = head.get("journal", 1) if head is not None and "fingerprint" in head else None
    if form is not None and form != FORM:
        raise OutputError(
            f"{path}: is a journal of form {form}, this version of alnico writes form {FORM}. "
            "Finish with the version that began it, or pass --restart to start over."
        )
    start = _parse_line(first)
    if start is None or not isinstance(start.get("fingerprint"), dict):
        raise _damaged(path, what)
    if not _is_from_here(start.get("made"), path):
        raise OutputError(
            f"{path.parent}: holds an unfinished {what} that was not started here: it was copied or unpacked, and may be someone else's. "
            "Pass --restart to start over."
        )
    before = with_device(start["fingerprint"])
    now = with_device(json.loads(json.dumps(fingerprint)))
    changed = fingerprint_changes(before, now)
    if changed == [_WORDS["device"]]:
        raise OutputError(
            f"{path.parent}: holds an unfinished {what} that was begun on {before['device']}, and this run is on {now['device']}, whose "
            f"last bits may differ. Continue with --device {before['device']}, or pass --restart to start over."
        )
    if changed:
        raise OutputError(
            f"{path.parent}: holds an unfinished {what}; changed since it began: {', '.join(changed)}. "
            "Undo the change to resume it, or pass --restart to start over."
        )
    lines: list[dict[str, Any]] = []
    for line in rest:
        if (fields := _parse_line(line)) is None:
            break
        lines.append(fields)
    return lines


def upload_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines about uploads in any journal, also one of another merge; none where it cannot be read."""
    try:
        with open_binary(path) as file:
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = map(_parse_line, text.split("\n"))
    return [line for line in lines if line is not None and UPLOAD in line]


def _place_id(path: Path) -> list[int]:
    """Return what differs between the lock next to a journal and a copy of it: the inode, and the time of the
    last change, which nobody can set. Unpacking an archive gives files new ones. Some disks renumber files
    when they are mounted, and a new mode or time is a change, so one of the two suffices."""
    try:
        status = os.lstat(path.with_name("lock"))
    except OSError:
        return []
    return [status.st_ino, status.st_ctime_ns]


def _is_from_here(recorded: Any, path: Path) -> bool:
    now = _place_id(path)
    return recorded == now or (
        isinstance(recorded, list) and any(a == b != 0 for a, b in zip(recorded, now, strict=False))
    )


def format_line(fields: Mapping[str, Any]) -> str:
    """Return a line of a journal: its fields as JSON, and their checksum as the last one.

    >>> format_line({"fact": 1})
    '{"fact": 1, "check": "7d96212a865af081"}\\n'
    """
    text = json.dumps(fields)
    return f'{text[:-1]}, "check": "{_check_of(text)}"}}\n'


def _parse_line(line: str) -> dict[str, Any] | None:
    """Return the fields of a line; None if it is damaged."""
    fields = _loaded(line)
    check = fields.pop("check", None) if fields is not None else None
    return fields if fields is not None and check == _check_of(json.dumps(fields)) else None


def _check_of(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def _loaded(line: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _damaged(path: Path, what: str) -> OutputError:
    return OutputError(
        f"{path}: is damaged; expected the journal of an unfinished {what}. Pass --restart to start over."
    )


def with_device(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint with its device: those from before alnico used GPUs do not name the processor."""
    return {"device": "cpu", **fingerprint}


def fingerprint_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the changes between two fingerprints."""
    changes: list[str] = []
    for key in dict.fromkeys((*now, *before)):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "recipe" and isinstance(old, dict) and isinstance(new, dict):
            if {**old, "seed": 0} != {**new, "seed": 0}:
                changes.append("the recipe")
            if old.get("seed") != new.get("seed"):
                changes.append(f"the seed (it was {old.get('seed')}, now it is {new.get('seed')})")
        elif key == "alnico":
            changes.append(f"the version of alnico ({old} began it, this is {new})")
        elif key == "inputs" and (files := _changed_files(old, new)):
            changes.append(f"an input file ({', '.join(files[:3])}; its size, time, commit or header)")
        else:
            changes.append(_WORDS.get(key, key))
    return changes


_WORDS = {
    "recipe": "the recipe",
    "arithmetic": "the version of alnico's arithmetic",
    "plan": "the plan (tensors or shard sizes)",
    "device": "the device",
    "inputs": "an input file (size, time or header)",
    "norms": "the analysis that weights are made from",
    "top_share": "the share of top parameters",
    "subspace_side": "the largest side of matrices whose singular vectors are compared",
    "tensors": "the tensors that are compared",
}


def _changed_files(before: Any, now: Any) -> list[str]:
    """Name the files of models that changed; none if the models are others."""
    try:
        if [m["model"] for m in before] != [m["model"] for m in now]:
            return []
        old = [(m["model"], file) for m in before for file in m["files"]]
        new = [(m["model"], file) for m in now for file in m["files"]]
        others = [entry for entry in new if entry not in old] + [entry for entry in old if entry not in new]
        names = [f"{model}: {file.get('file', 'the rows of its vocabulary')}" for model, file in others]
    except (KeyError, TypeError, AttributeError):
        return []
    return list(dict.fromkeys(names))


def _line(*records: Record) -> dict[str, Any]:
    entries = [{"tensor": r.tensor, "digest": r.digest, "inputs": r.inputs} for r in records]
    return entries[0] if len(entries) == 1 else {"tensors": entries}


def _numbers(kind: str, number: int, value: Sequence[float]) -> dict[str, Any]:
    return {kind: number, "value": value}


def _parse(kind: str, loaded: list[dict[str, Any]]) -> dict[int, tuple[float, ...]]:
    return {int(line[kind]): tuple(float(x) for x in line["value"]) for line in loaded if kind in line}


def _records(line: dict[str, Any]) -> list[Record]:
    """The tensors of a line: one, or those of a batch."""
    entries = line.get("tensors", [line] if "tensor" in line else [])
    return [
        Record(x["tensor"], x["digest"], tuple((int(m), str(n), str(d)) for m, n, d in x["inputs"]))
        for x in entries
    ]
