"""Reads the examples of tasks from JSONL, CSV and npz files."""

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

from alnico.checkpoint.file_kinds import HTML, LFS, SNIFFED_BYTES, kind_of
from alnico.checkpoint.files import is_text, open_binary
from alnico.checkpoint.near_paths import suggestion
from alnico.errors import EvaluationError

ENDINGS = (".jsonl", ".csv", ".npz")

MOST_TEXT = 1 << 30
"""The largest text that is scored, in bytes."""

MOST_LINE = 1 << 24
"""The longest example in a JSONL file, in characters."""

MOST_UNPACKED = 100
"""The largest compression ratio of an array in an npz file: images compress less, and more could exhaust the memory."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs in file order (texts, or images (n, channels, height, width) float32), labels, and places for messages."""

    inputs: Sequence[str] | np.ndarray
    labels: tuple[str, ...] | None
    places: tuple[str, ...]


def read_examples(
    path: str | os.PathLike[str], text: str = "text", label: str | None = "label", limit: int | None = None
) -> Examples:
    """Read labelled examples: JSONL (one object per line), CSV (with a header), or npz (arrays ``images`` and ``labels``).

    ``text`` and ``label`` are names of fields or columns; without ``label`` no labels are read. ``limit`` keeps only the
    first examples. Numeric labels become text. Errors: EvaluationError with file and line.
    """
    file = Path(path)
    try:
        _check_regular(file)
        with open_binary(file) as opened:
            _refuse_stand_in(opened.read(SNIFFED_BYTES), file)
        if file.suffix == ".npz":
            examples = _images(file, label, limit)
        elif file.suffix == ".csv":
            examples = _texts(file, _csv_rows(file), text, label, limit)
        elif file.suffix == ".jsonl":
            examples = _texts(file, _json_rows(file), text, label, limit)
        else:
            raise EvaluationError(
                f"{file}: ends in {file.suffix!r}; expected {', '.join(ENDINGS)}. Convert the examples to one of these."
            )
    except OSError as error:
        raise EvaluationError(
            f"{file}: cannot be read ({error.strerror}). "
            f"{suggestion(file, 'Check the path and its permissions.', accepts=Path.is_file)}"
        ) from None
    except UnicodeDecodeError:
        raise EvaluationError(
            f"{file}: is not UTF-8 text; expected {file.suffix[1:].upper()}. Check the file."
        ) from None
    if not len(examples.inputs):
        raise EvaluationError(f"{file}: contains no examples; expected at least one. Check the file.")
    return examples


def read_text(path: str | os.PathLike[str]) -> str:
    """Read UTF-8 text. Errors: EvaluationError."""
    try:
        _check_regular(Path(path))
        with open_binary(path) as file:
            data = file.read(MOST_TEXT + 1)
        if len(data) > MOST_TEXT:
            raise EvaluationError(
                f"{path}: is larger than {MOST_TEXT} bytes; expected a text. Give a part of it."
            )
        if data.startswith(LFS):
            _refuse_stand_in(data[:SNIFFED_BYTES], path)
        return data.decode("utf-8")
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be read ({error.strerror}). "
            f"{suggestion(path, 'Check the path and its permissions.', accepts=Path.is_file)}"
        ) from None
    except UnicodeDecodeError:
        raise EvaluationError(f"{path}: is not UTF-8 text; expected a text. Check the file.") from None


def _refuse_stand_in(start: bytes, file: str | os.PathLike[str]) -> None:
    """Refuse a git-lfs pointer or a page in the place of examples. Errors: EvaluationError."""
    kind = kind_of(start)
    if kind is not None and (kind is HTML or start.startswith(LFS)):
        raise EvaluationError(f"{file}: is {kind.name}; expected examples. {kind.advice}")


def _check_regular(file: Path) -> None:
    """Refuse files that could block or never end. Errors: EvaluationError, OSError."""
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
                    f"Name the field of the {role}, for example `{role}: {next(iter(row), 'name')}`."
                )
        if any(
            isinstance(value, str) and not is_text(value)
            for value in (row[text], row.get(label) if label is not None else "")
        ):
            raise EvaluationError(
                f"{file}:{line}: contains half of a surrogate pair, expected Unicode text. Correct the line, or remove it."
            )
        if not isinstance(row[text], str):
            raise EvaluationError(
                f"{file}:{line}: {text} is {_kind(row[text])}; expected text. Correct the line, or remove it."
            )
        if label is not None:
            if not isinstance(row[label], str | int):
                raise EvaluationError(
                    f"{file}:{line}: {label} is {_kind(row[label])}; expected text or a whole number. Correct the line, or remove it."
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
                    f"{file}:{number}: is not JSON ({str(error)[:80]}); expected an object on each line. Convert the file."
                ) from None
            if not isinstance(row, dict):
                raise EvaluationError(
                    f"{file}:{number}: is {_kind(row)}; expected an object on each line. Convert the file."
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
                        f"{file}:{reader.line_num}: has {len(row)} values, but the header has {len(header)}; expected the same number. Correct the line."
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
            stored = {name: arrays[name] for name in arrays.files if name in ("images", "labels")}
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
            f"{file}: is not an npz file of plain arrays ({str(error)[:80]}). Write it with numpy.savez."
        ) from None
    for required in ("images", "labels") if label is not None else ("images",):
        if required not in stored:
            raise EvaluationError(
                f"{file}: has no array {required!r}; found {', '.join(map(repr, names)) or 'none'}. Write it with numpy.savez(file, images=..., labels=...)."
            )
    images, labels = stored["images"][:limit], stored["labels"][:limit] if label is not None else None
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
    """Refuse arrays that claim more data than the file has. Errors: ValueError, BadZipFile, EvaluationError."""
    with open_binary(file) as packed, zipfile.ZipFile(packed) as archive:
        for part in archive.infolist():
            if part.filename in ("images", "labels"):
                raise ValueError(f"{part.filename} is not an array")
            if part.filename not in ("images.npy", "labels.npy"):
                continue
            if part.file_size > max(MOST_UNPACKED * part.compress_size, 1 << 20):
                raise EvaluationError(
                    f"{file}: {part.filename} is {part.compress_size} bytes compressed and {part.file_size} bytes uncompressed; expected at most "
                    f"{MOST_UNPACKED} times as many. Write it with numpy.savez, which does not compress."
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
                        f"{part.filename} claims the shape {shape} of {dtype}, but has {part.file_size} bytes"
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
