"""Reads and writes statistics of a model on data, so that merges can use them without the data.

A directory of two files. ``statistics.safetensors`` holds float32 tensors. ``statistics.json`` describes
them: the kind, the model (its reference, the headers of its files, the hash of each tensor), how they were
measured, and the name under which a tensor's statistics are stored: layers that share an input share a Gram
matrix. ``left_out`` names every other tensor of the model with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np

from alnico.checkpoint.file_model import FileModel, open_shard
from alnico.checkpoint.files import check_inside, read_small
from alnico.checkpoint.json_files import MAX_JSON_BYTES, read_json
from alnico.checkpoint.near_paths import suggestion
from alnico.checkpoint.output_path import Replace, check_inputs, check_target_folder
from alnico.checkpoint.overwrite import holds_statistics
from alnico.checkpoint.shards import split_into_shards
from alnico.checkpoint.source import Origin, Source, Tensor
from alnico.checkpoint.writer import UNFINISHED, OutputFiles
from alnico.errors import ModelError, NonFiniteError, OutputError, RunError
from alnico.folders import write_new
from alnico.numerics.digest import HASH, PIECE, piece_digest, tensor_digest

SUMMARY = "statistics.json"
TENSORS = "statistics.safetensors"
SCHEMA = 1

StatisticsKind = Literal["fisher", "gram", "gates"]
"""``fisher``: for each tensor, the mean over examples of its squared gradients (the diagonal of the Fisher
information), in its shape. ``gram``: for each matrix applied to rows x, the sum of the outer products of x,
(inputs, inputs), and their ``sum``, (inputs,); if measured, for each scale and bias the sums of the squares of what its
entries multiply, in its shape. ``gates``: for the norm at the start of each layer, what prompts of
each expert have there, (experts, hidden)."""


@dataclass(frozen=True)
class StatisticsEntry:
    """The statistics of one tensor: the name they are ``stored`` under, the ``digest`` of the model's tensor
    that they were measured on, and numbers about them. ``parts`` are the names of further tensors about it."""

    stored: str
    digest: str
    numbers: Mapping[str, float]
    parts: Mapping[str, str] = field(default_factory=dict)


class StatisticsSource:
    """Open statistics of one model: a source of their tensors, under the names they are stored under."""

    config: Mapping[str, Any] = MappingProxyType({})
    directory: Path | None = None
    origin: Origin | None = None
    held_bytes = 0
    reading_bytes = 0

    def __init__(
        self,
        files: FileModel,
        kind: str,
        entries: Mapping[str, StatisticsEntry],
        numbers: Mapping[str, float],
        digest: str,
        left_out: Mapping[str, str] | None = None,
        reference: str = "",
    ) -> None:
        self.label = files.label
        self.kind = kind
        self.entries = entries
        self.numbers = numbers
        self.reference = reference
        """The model that was measured, as it was named then."""
        self.left_out = left_out
        """The model's tensors without statistics, with the reason; None in files of older versions, which
        lack it."""
        self.tensors: Mapping[str, Tensor] = files.tensors
        self._files = files
        self._digest = digest

    def number(self, tensor: str, key: str) -> float:
        """A number about one tensor, or about all. Errors: ModelError if the files lack it."""
        number = self.entries[tensor].numbers.get(key, self.numbers.get(key))
        if number is None:
            raise ModelError(
                f"{self._files.location / SUMMARY}: has no {key} of {tensor}; expected what `alnico "
                f"statistics {self.kind}` writes. Measure the model again."
            )
        return number

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Nothing is ever absent."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self._files.read_into(name, offset, buffer)

    def identity(self) -> list[dict[str, Any]]:
        return [*self._files.identity(), {"file": SUMMARY, "sha256": self._digest}]

    def paths(self) -> list[Path]:
        return [*self._files.paths(), self._files.location / SUMMARY]

    def close(self) -> None:
        self._files.close()


def open_statistics(path: str, label: str = "") -> StatisticsSource:
    """Open a directory of statistics; reads headers only. ``label`` is its name in messages, as written in
    the recipe.

    Errors: ModelError for a missing path, and for files that are not statistics or do not match each other.
    """
    folder = Path(os.path.expanduser(path))
    summary = folder / SUMMARY
    if not folder.is_dir():
        problem = "is not a directory" if folder.exists() else "does not exist"
        raise ModelError(
            f"statistics {label or path!r}: {problem}; expected a directory written by `alnico statistics`. "
            f"{suggestion(path, 'Check the path.', accepts=Path.is_dir)}"
        )
    data = read_json(summary)
    if data.get("schema") != SCHEMA or data.get("kind") not in get_args(StatisticsKind):
        raise ModelError(
            f"{summary}: does not hold statistics of schema {SCHEMA}; expected a file written by `alnico "
            "statistics`. Measure again."
        )
    check_inside(folder / TENSORS, folder)
    files = FileModel(label or path, folder, [open_shard(folder / TENSORS)])
    try:
        entries = {
            str(name): StatisticsEntry(
                str(entry.get("stored", name)),
                str(entry["digest"]),
                {k: float(v) for k, v in entry.items() if _is_number(v)},
                {str(k): str(v) for k, v in entry.get("parts", {}).items()},
            )
            for name, entry in data["tensors"].items()
        }
        numbers = {k: float(v) for k, v in data.items() if _is_number(v)}
        left_out = {str(n): str(why) for n, why in data["left_out"].items()} if "left_out" in data else None
        reference = str(data.get("model", {}).get("reference", ""))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        files.close()
        raise ModelError(f"{summary}: is damaged ({error}). Measure the model again.") from None
    named = (n for e in entries.values() for n in (e.stored, *e.parts.values()))
    missing = next((n for n in named if n not in files.tensors), None)
    if missing is not None:
        raise ModelError(
            f"{summary}: names {missing!r}, which {TENSORS} does not hold; the two are from different "
            "measurements. Measure the model again."
        )
    return StatisticsSource(
        files,
        data["kind"],
        entries,
        numbers,
        hashlib.sha256(read_small(summary, MAX_JSON_BYTES, "statistics")).hexdigest(),
        left_out,
        reference,
    )


def _is_number(value: object) -> bool:
    """Is it a finite float64? A JSON number may be larger."""
    return isinstance(value, (bool, int, float)) and abs(value) <= sys.float_info.max


def statistics_folder(model: str) -> str:
    """Return the name of the directory of a model's statistics beside those of others: the last part of its path or id.

    >>> statistics_folder("models/coder/"), statistics_folder("owner/name@main")
    ('coder', 'name@main')
    """
    name = Path(model).name
    return name if name not in ("", ".", "..") else Path(model).resolve().name


def compute_digest(source: Source, name: str) -> str:
    """Compute the hash of one tensor of a model, as the lock of a merge has it."""
    tensor = source.tensors[name]
    buffer = memoryview(bytearray(min(PIECE, tensor.byte_size)))
    pieces = []
    for offset in range(0, tensor.byte_size, PIECE):
        part = buffer[: min(PIECE, tensor.byte_size - offset)]
        source.read_into(name, offset, part)
        pieces.append(piece_digest(part))
    return tensor_digest(tensor.dtype, tensor.shape, pieces)


def write_statistics(
    out: Path,
    kind: StatisticsKind,
    model: Source,
    tensors: Mapping[str, np.ndarray],
    entries: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    reference: str = "",
    overwrite: Replace = False,
) -> None:
    """Write the statistics of a model into the new directory ``out``.

    ``tensors`` are stored as float32 under their names; ``entries`` describe the statistics of each of the
    model's tensors (``stored``, if under another name, and numbers); ``settings`` apply to all: how they were
    measured. ``reference`` is the model's name, if it differs from that of its files.

    Errors: OutputError if ``out`` holds something; RunError for a disk that fails; NonFiniteError for numbers
    that are not finite.
    """
    check_statistics_folder(out, overwrite, model.paths())
    bad_name = next((name for name, values in tensors.items() if not np.isfinite(values).all()), None)
    if bad_name is not None:
        index = [int(i) for i in np.argwhere(~np.isfinite(tensors[bad_name]))[0]]
        raise NonFiniteError(
            f"{model.label}: the {kind} of {bad_name} has a NaN or an infinity at {index}; expected finite "
            "numbers. Check the model."
        )
    summary_data = {
        "schema": SCHEMA,
        "kind": kind,
        "model": {
            "reference": reference or model.label,
            "files": [{k: v for k, v in f.items() if k != "mtime_ns"} for f in model.identity()],
        },
        **settings,
        "hash": HASH,
    }
    model.fetch(model.absent(entries, False))
    entries_with_digest = {
        name: {**entry, "digest": compute_digest(model, name)} for name, entry in entries.items()
    }
    summary = json.dumps(summary_data, ensure_ascii=False, indent=1).removesuffix("\n}")
    lines = ",\n".join(
        f"  {json.dumps(n, ensure_ascii=False)}: {json.dumps(e, ensure_ascii=False)}"
        for n, e in entries_with_digest.items()
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (
            SUMMARY,
            TENSORS,
            TENSORS + UNFINISHED,
        ):  # created again: an existing one may be a link, or in use
            (out / name).unlink(missing_ok=True)
        files = OutputFiles(
            out, split_into_shards([(n, "F32", v.shape) for n, v in tensors.items()], 1, TENSORS)
        )
        try:
            for name, values in tensors.items():
                raw = np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8)
                files.write(name, 0, memoryview(raw))
            files.finish()
        finally:
            files.close()
        write_new(out / SUMMARY, f'{summary},\n "tensors": {{\n{lines}\n }}\n}}\n')
    except OSError as error:
        raise RunError(
            f"{out}: cannot be written ({error.strerror}). Free some space or check the disk."
        ) from None


def check_statistics_folder(out: Path, overwrite: Replace, needed: Iterable[Path] = ()) -> None:
    """Refuse a folder that statistics cannot be written into, or that holds something else. Errors:
    OutputError.

    ``overwrite`` allows replacing older statistics; other files are never removed. Files of a killed
    measurement do not count. ``needed`` are files that the folder must not contain, regardless of
    ``overwrite``.
    """
    check_target_folder(out)
    names = os.listdir(out) if out.is_dir() else []
    if not names or set(names) == {TENSORS + UNFINISHED}:
        return
    if overwrite == "anything":
        check_inputs(out, needed)
        return
    is_older = holds_statistics(out)
    if not overwrite or not is_older:
        how = (
            "or use --overwrite (in Python overwrite=True)"
            if is_older
            else "or use --overwrite-anything (in Python overwrite_anything=True) to write into it"
            if overwrite
            else ""
        )
        raise OutputError(
            f"{out}: exists and is not empty; expected a new or empty directory. Choose another "
            f"output{', ' if how else ''}{how}."
        )
