"""Keeps the scores of finished points in a file, from which the same call resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alnico.checkpoint.files import open_binary
from alnico.errors import OutputError
from alnico.evaluation.scorecard import TaskScores
from alnico.evaluation.tasks import Score
from alnico.folders import open_to_write

KIND = "alnico curve"

DIFFERENCES = {
    "method": "are of another method, or have other options",
    "tasks": "are on other tasks",
    "models": "are of models with other contents",
    "device": "were scored on another kind of device, or in another dtype",
}
"""What other points are, by the part of the identity that differs."""

Key = tuple[str | float, ...]
"""A point: the kind of a curve and its scales, or ``model`` and its name."""


class PointFile:
    """Scores by point, one line of JSON per point; a line that a kill cut short is ignored. Use it in ``with``.

    ``identity`` says what the scores belong to, part by part. Without a ``path`` nothing is written.
    Errors: OutputError for points of another identity, unless ``restart`` discards them, and for a file that
    cannot be written.
    """

    def __init__(
        self, path: Path | None, identity: Mapping[str, str], tasks: Sequence[str], *, restart: bool = False
    ) -> None:
        self._path = path
        self._tasks = tuple(tasks)
        self._file: BinaryIO | None = None
        self.kept: dict[Key, TaskScores] = {}
        if path is None:
            return
        try:
            if os.path.lexists(path) and not restart:
                self._check(path, identity)
                self._file = os.fdopen(open_to_write(path, flags=os.O_RDWR), "r+b")
                self._resume(self._file)
            else:
                path.unlink(missing_ok=True)
                self._file = os.fdopen(open_to_write(path, flags=os.O_CREAT | os.O_EXCL), "wb")
                self._write({"kind": KIND, "identity": dict(identity)})
        except OSError as error:
            raise _unwritable(path, error) from None

    def add(self, key: Key, scores: TaskScores) -> None:
        """Keep the scores of a point. Errors: OutputError."""
        self.kept[key] = scores
        self._write({"point": list(key), "scores": {task: _plain(score) for task, score in scores.items()}})

    def _write(self, data: Mapping[str, Any]) -> None:
        if self._file is None or self._path is None:
            return
        try:
            self._file.write(json.dumps(data).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def _check(self, path: Path, identity: Mapping[str, str]) -> None:
        found = identity_of(path)
        for part in DIFFERENCES:
            if found is None or found.get(part) != identity.get(part):
                raise OutputError(
                    f"{path}: the points {DIFFERENCES[part]}; expected those of this curve. Choose another folder, or "
                    "discard the points with restart."
                )

    def _resume(self, file: BinaryIO) -> None:
        """Read the points of whole lines, and cut off what a kill left of the last one."""
        end = 0
        for line in file:
            if line.endswith(b"\n"):
                end += len(line)
                if (point := _point(line, self._tasks)) is not None:
                    self.kept.setdefault(*point)
        file.truncate(end)
        file.seek(end)

    def __enter__(self) -> PointFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def identity_of(path: Path) -> Mapping[str, Any] | None:
    """Return the identity in the first line of a file of points; None if it is another file."""
    try:
        with open_binary(path) as file:
            data = json.loads(file.readline(MOST_IDENTITY_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(data, dict) and data.get("kind") == KIND and isinstance(data.get("identity"), dict)
    return data["identity"] if is_ours else None


MOST_IDENTITY_BYTES = 10_000


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: cannot be written ({error.strerror}). Make room or choose another folder.")


def _plain(score: Score) -> dict[str, Any]:
    """Return a score as plain data; 0 and 1 of an accuracy without a point, as they are most of the file."""
    examples = None if score.examples is None else np.asarray(score.examples, np.float64).tolist()
    short = None if examples is None else [int(e) if e in (0.0, 1.0) else e for e in examples]
    return {"value": score.value, "examples": short, "link": score.link}


def _point(line: bytes, tasks: Sequence[str]) -> tuple[Key, TaskScores] | None:
    """Return the point of a line; None if it is not a whole one, which is then scored again."""
    try:
        data = json.loads(line)
        key = tuple(data["point"])
        scores = {task: _score(data["scores"][task]) for task in tasks}
        hash(key)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None
    return key, scores


def _score(data: Mapping[str, Any]) -> Score:
    examples = None if data["examples"] is None else np.array(data["examples"], np.float64)
    value = float(data["value"])
    is_sound = math.isfinite(value) and data["link"] in ("mean", "exp")
    if examples is not None:
        is_sound &= examples.ndim == 1 and len(examples) > 0 and bool(np.isfinite(examples).all())
    if not is_sound:
        raise ValueError("not a score")
    return Score(value, examples, data["link"])
