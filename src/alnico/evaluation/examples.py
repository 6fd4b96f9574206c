"""Examples of a task as files hold them: JSONL, CSV and npz."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.files import is_text, open_binary
from alnico.errors import EvaluationError

ENDINGS = (".jsonl", ".csv", ".npz")

MOST_TEXT = 1 << 30
"""Bytes of a text that is scored."""

MOST_LINE = 1 << 24
"""Characters of one example in a JSONL file."""

MOST_UNPACKED = 100
"""How many times larger than in the file an array of an npz may be: pictures pack less, and what packs more may fill the memory."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs in the order of the file: texts, or images (n, channels, height, width) float32; their labels; their lines, for messages."""

    inputs: Sequence[str] | np.ndarray
    labels: tuple[str, ...] | None
    places: tuple[str, ...]


def read_examples(
    path: str | os.PathLike[str], text: str = "text", label: str | None = "label", limit: int | None = None
) -> Examples:
    """Read labelled examples: JSONL (an object a line), CSV (with a header), or npz (arrays ``images`` and ``labels``).

    ``text`` and ``label`` are the names of fields or columns; without ``label`` no labels are read. ``limit`` takes the first
    examples. Labels of numbers become text. Errors: EvaluationError with file and line.
    """
    file = Path(path)
    try:
        _check_regular(file)
        if file.suffix == ".npz":
            found = _images(file, label, limit)
        elif file.suffix == ".csv":
            found = _texts(file, _csv_rows(file), text, label, limit)
        elif file.suffix == ".jsonl":
            found = _texts(file, _json_rows(file), text, label, limit)
        else:
            raise EvaluationError(
                f"{file}: ends in {file.suffix!r}; expected {', '.join(ENDINGS)}. Bring the examples into such a file."
            )
    except OSError as error:
        raise EvaluationError(
            f"{file}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from None
    except UnicodeDecodeError:
        raise EvaluationError(
            f"{file}: is not UTF-8 text; expected {file.suffix[1:].upper()}. Check the file."
        ) from None
    if not len(found.inputs):
        raise EvaluationError(f"{file}: holds no examples; expected one at least. Check the file.")
    return found


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text of UTF-8. Errors: EvaluationError."""
    try:
        _check_regular(Path(path))
        with open_binary(path) as file:
            data = file.read(MOST_TEXT + 1)
        if len(data) > MOST_TEXT:
            raise EvaluationError(
                f"{path}: is larger than {MOST_TEXT} bytes; expected a text. Give a part of it."
            )
        return data.decode("utf-8")
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from None
    except UnicodeDecodeError:
        raise EvaluationError(f"{path}: is not UTF-8 text; expected a text. Check the file.") from None


def _check_regular(file: Path) -> None:
    """Refuse what would be waited for, or never ends. Errors: EvaluationError, OSError."""
    if not stat.S_ISREG(file.stat().st_mode) and not file.is_dir():
        raise EvaluationError(f"{file}: is a pipe or a device; expected a regular file. Check the path.")


def _texts(
    file: Path, rows: Iterator[tuple[int, Mapping[str, Any]]], text: str, label: str | None, limit: int | None
) -> Examples:
    texts: list[str] = []
    labels: list[str] = []
    places: list[str] = []
    fields = {"text": text} | ({"label": label} if label is not None else {})
    for line, row in rows:
        if len(texts) == limit:
            break
        for role, field in fields.items():
            if field not in row:
                raise EvaluationError(
                    f"{file}:{line}: has no field {field!r}; found {', '.join(map(repr, row)) or 'none'}. "
                    f"Say which field is the {role}, as in `{role}: {next(iter(row), 'name')}`."
                )
        if any(
            isinstance(value, str) and not is_text(value)
            for value in (row[text], row.get(label) if label is not None else "")
        ):
            raise EvaluationError(
                f"{file}:{line}: holds half of a character, expected Unicode text. Mend the line, or leave it out."
            )
        if not isinstance(row[text], str):
            raise EvaluationError(
                f"{file}:{line}: {text} is {_kind(row[text])}; expected text. Mend the line, or leave it out."
            )
        if label is not None:
            if not isinstance(row[label], str | int):
                raise EvaluationError(
                    f"{file}:{line}: {label} is {_kind(row[label])}; expected text or a whole number. Mend the line, or leave it out."
                )
            labels.append(str(row[label]))
        texts.append(row[text])
        places.append(f"{file}:{line}")
    return Examples(texts, tuple(labels) if label is not None else None, tuple(places))


def _json_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with io.TextIOWrapper(open_binary(file), "utf-8-sig") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MOST_LINE), ""), 1):
            if len(line) == MOST_LINE:
                raise EvaluationError(
                    f"{file}:{number}: is longer than {MOST_LINE} characters; expected an example. Check the file."
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise EvaluationError(
                    f"{file}:{number}: is not JSON ({str(error)[:80]}); expected an object on each line. Bring the file into that form."
                ) from None
            if not isinstance(row, dict):
                raise EvaluationError(
                    f"{file}:{number}: is {_kind(row)}; expected an object on each line. Bring the file into that form."
                )
            yield number, row


def _csv_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with io.TextIOWrapper(open_binary(file), "utf-8-sig", newline="") as lines:
        reader = csv.reader(lines)
        try:
            header = next(reader, [])
            if (
                twice := next((name for i, name in enumerate(header) if name in header[:i]), None)
            ) is not None:
                raise EvaluationError(
                    f"{file}:1: the header has {twice!r} twice; expected each name once. Rename one of the columns."
                )
            for row in reader:
                if row and len(row) != len(header):
                    raise EvaluationError(
                        f"{file}:{reader.line_num}: has {len(row)} values, the header {len(header)}; expected as many. Mend the line."
                    )
                if row:
                    yield reader.line_num, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise EvaluationError(
                f"{file}:{reader.line_num}: is not CSV ({error}). Check the file."
            ) from None


def _images(file: Path, label: str | None, limit: int | None) -> Examples:
    try:
        _check_packed(file)
        with open_binary(file) as packed, np.load(packed, allow_pickle=False) as arrays:
            held = {name: arrays[name] for name in arrays.files if name in ("images", "labels")}
            names = list(arrays.files)
    except (
        ValueError,
        zipfile.BadZipFile,
        EOFError,
        MemoryError,
        NotImplementedError,
        RuntimeError,
        KeyError,
        zlib.error,
    ) as error:
        raise EvaluationError(
            f"{file}: is no npz file of plain arrays ({str(error)[:80]}). Write it with numpy.savez."
        ) from None
    for wanted in ("images", "labels") if label is not None else ("images",):
        if wanted not in held:
            raise EvaluationError(
                f"{file}: has no array {wanted!r}; found {', '.join(map(repr, names)) or 'none'}. Write it with numpy.savez(file, images=..., labels=...)."
            )
    images, labels = held["images"][:limit], held["labels"][:limit] if label is not None else None
    if images.ndim != 4 or images.dtype.kind != "f":
        raise EvaluationError(
            f"{file}: images are {images.dtype} of shape {images.shape}; expected floating-point pixels as the model takes them, "
            "(n, channels, height, width). Run the model's image processor on them first."
        )
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iuU"):
        raise EvaluationError(
            f"{file}: labels are {labels.dtype} of shape {labels.shape}; expected ({len(images)},) whole numbers or text. Write one for each image."
        )
    places = tuple(f"{file}: images[{i}]" for i in range(len(images)))
    return Examples(
        images.astype(np.float32, copy=False), None if labels is None else tuple(map(str, labels)), places
    )


def _check_packed(file: Path) -> None:
    """Refuse arrays that claim more than their part of the file holds. Errors: ValueError, BadZipFile, EvaluationError."""
    with open_binary(file) as packed, zipfile.ZipFile(packed) as archive:
        for part in archive.infolist():
            if part.filename in ("images", "labels"):
                raise ValueError(f"{part.filename} is no array")
            if part.filename not in ("images.npy", "labels.npy"):
                continue
            if part.file_size > max(MOST_UNPACKED * part.compress_size, 1 << 20):
                raise EvaluationError(
                    f"{file}: {part.filename} is {part.compress_size} bytes in the file and {part.file_size} outside of it; expected at most "
                    f"{MOST_UNPACKED} times as many. Write it with numpy.savez, which does not pack."
                )
            with archive.open(part) as stream:
                version = np.lib.format.read_magic(stream)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(stream)
                if math.prod(shape) * dtype.itemsize > part.file_size:
                    raise ValueError(
                        f"{part.filename} claims the shape {shape} of {dtype}, and holds {part.file_size} bytes"
                    )


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }[type(value)]
