"""Reads a GGUF model as the Hugging Face model it was converted from: blocks are decoded while they are read."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.gguf.families import IN_CONFIG, StoredPart, family_of, file_rows, parts_of
from alnico.checkpoint.gguf.file_header import GgufHeader, GgufTensor
from alnico.checkpoint.gguf.metadata import Metadata
from alnico.checkpoint.gguf.model_config import make_config
from alnico.checkpoint.gguf.tokenizer_files import check_vocabulary, tokenizer_files, tokenizer_problem
from alnico.checkpoint.source import Origin, Shard, Tensor, TensorSpec, read_tensor
from alnico.checkpoint.virtual_read import CHUNK, read_computed
from alnico.errors import ModelError
from alnico.folders import temporary_files
from alnico.numerics import dtypes

PLAIN_FLOATS = ("F32", "F16", "BF16", "F64")
NAMED_TYPES = 6
"""Types of tensors that a note names at most."""
HEADER_COST = 8
"""Bytes in memory for each byte of a header: Python's strings of a vocabulary."""


class GgufModel:
    """A GGUF model under Hugging Face's names; its config and tokenizer files are made of the keys of its header.

    ``files`` has the stored tensors of all ``headers``, blocks as bytes. Tensors of blocks are F32 and have the ``nominal`` dtype
    BF16: what is decoded has more digits, but float32 would take many times the bytes of the input. Vectors, which GGUF mostly stores
    as F32, have the nominal dtype of the matrices.
    """

    def __init__(self, files: FileModel, headers: Sequence[GgufHeader]) -> None:
        self.label = files.label
        self.location = files.location
        self._files = files
        self._header_bytes = sum(len(header.start) for header in headers)
        self._metadata = Metadata(headers[0].metadata, str(files.location))
        stored = [tensor for header in headers for tensor in header.tensors]
        _check_kind(self._metadata, stored)
        family = family_of(self._metadata)
        self._parts = parts_of(stored, family, self._metadata)
        check_vocabulary(self._metadata, self._metadata.texts("tokenizer.ggml.tokens"))
        problem = tokenizer_problem(self._metadata)
        self._nominal = _nominal(stored)
        self.tensors: Mapping[str, Tensor] = {n: self._spec(part) for n, part in self._parts.items()}
        self.config: Mapping[str, Any] = make_config(
            self._metadata, family, self._parts, self._nominal, self._small_tensor
        )
        self._lock = threading.Lock()
        self._directory: Path | None = None
        self._remove: Callable[[], Any] | None = None
        self.notes = [*_notes(self.label, stored, self._nominal)]
        if problem is not None:
            self.notes.append(_without_tokenizer(self.label, problem))

    def _spec(self, part: StoredPart) -> TensorSpec:
        kind = part.stored.type
        is_kept = bool(kind.dtype) and not part.shift
        dtype = kind.dtype if is_kept else "F32"
        is_vector = len(part.shape) < 2 and dtype == "F32"
        return TensorSpec(dtype, part.shape, self._nominal if is_vector or not is_kept else dtype)

    def _small_tensor(self, name: str) -> np.ndarray:
        """The values of a tensor that the config is made of; none if there is no such tensor."""
        if name not in self._files.tensors:
            return np.empty(0, np.float32)
        tensor = self._files.tensors[name]
        if tensor.dtype != "F32" or len(tensor.shape) != 1:
            raise ModelError(
                f"{self.location}: tensor {name!r} is {tensor.dtype} {tensor.shape}; expected a vector of F32. The file is damaged; convert "
                "the model again."
            )
        return self._files.read(name)

    @property
    def directory(self) -> Path:
        """A private folder of the config and the tokenizer files, made when it is first asked for and removed with the model.

        Errors: RunError; ModelError for a vocabulary that contradicts itself.
        """
        with self._lock:
            if self._directory is None:
                made = tokenizer_files(self._metadata)
                with temporary_files():
                    folder = Path(tempfile.mkdtemp(prefix="alnico-"))
                    self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                    for name, data in (made | side_files(self._metadata, self.config)).items():
                        (folder / name).write_bytes(data)
                self._directory = folder
            return self._directory

    @property
    def origin(self) -> Origin | None:
        return None

    @property
    def shards(self) -> Sequence[Shard]:
        return self._files.shards

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return self._files.absent([self._parts[name].stored.name for name in tensors], False)

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Nothing is fetched: weights at a URL are read by ranges."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        part = self._parts[name]
        dtype = self.tensors[name].dtype
        storage = np.dtype(dtypes.DTYPES[dtype].storage)
        if part.stored.type.dtype == dtype and not part.heads and not part.shift:
            self._files.read_into(part.stored.name, part.first * storage.itemsize + offset, buffer)
            return
        if not offset:
            part.stored.type.prepare(part.elements)
        fill = self._fill_rows if part.heads else self._fill
        read_computed(offset, buffer, storage, lambda first, out: fill(part, first, out))

    def _fill(self, part: StoredPart, first: int, out: np.ndarray) -> None:
        """Fill ``out`` with elements of a tensor from ``first`` on."""
        kind = part.stored.type
        begin = (part.first + first) // kind.elements
        end = -(-(part.first + first + out.size) // kind.elements)
        raw = np.empty((end - begin, kind.byte_size), np.uint8)
        self._files.read_into(part.stored.name, begin * kind.byte_size, memoryview(raw.reshape(-1)))
        skipped = part.first + first - begin * kind.elements
        _decode_part(part, raw, skipped, out)
        if part.shift:
            out -= out.dtype.type(part.shift)

    def _fill_rows(self, part: StoredPart, first: int, out: np.ndarray) -> None:
        """Fill ``out`` with elements of a tensor whose rows are reordered in each head."""
        kind, rows = part.stored.type, part.shape[0]
        width = part.elements // rows
        if width == 1:  # a bias: too many rows to be read one by one
            values = np.empty(rows, out.dtype)
            self._fill(part, 0, values)
            out[:] = values[file_rows(np.arange(first, first + out.size), rows // part.heads)]
            return
        begin, end = first // width, -(-(first + out.size) // width)
        row_bytes = width // kind.elements * kind.byte_size
        raw = np.empty(((end - begin) * (width // kind.elements), kind.byte_size), np.uint8)
        places = file_rows(np.arange(begin, end), rows // part.heads)
        spans = [(int(row) * row_bytes, (int(row) + 1) * row_bytes) for row in places]
        self._files.read_spans(part.stored.name, spans, memoryview(raw.reshape(-1)))
        _decode_part(part, raw, first - begin * width, out)

    def read(self, name: str) -> np.ndarray:
        return read_tensor(self, name)

    def identity(self) -> list[dict[str, Any]]:
        return self._files.identity()

    def paths(self) -> list[Path]:
        return self._files.paths()

    @property
    def held_bytes(self) -> int:
        return HEADER_COST * self._header_bytes

    @property
    def reading_bytes(self) -> int:
        """Blocks, codes and values of a chunk, and its ends."""
        return 16 * CHUNK

    def close(self) -> None:
        self._files.close()
        if self._remove is not None:
            self._remove()

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<model {self.label}: {len(self.tensors)} tensors of GGUF>"


def _decode_part(part: StoredPart, raw: np.ndarray, skipped: int, out: np.ndarray) -> None:
    """Decode blocks into ``out``, without the first ``skipped`` elements."""
    kind = part.stored.type
    if kind.dtype:
        stored = raw.reshape(-1)[
            skipped * kind.byte_size : skipped * kind.byte_size + out.size * kind.byte_size
        ]
        if np.dtype(dtypes.DTYPES[kind.dtype].storage) == out.dtype:
            out.view(np.uint8)[:] = stored
        else:
            out[:] = dtypes.decode(stored, kind.dtype)
        return
    if out.size == len(raw) * kind.elements:
        kind.decode(raw, out.reshape(len(raw), kind.elements))
        return
    values = np.empty((len(raw), kind.elements), np.float32)
    kind.decode(raw, values)
    out[:] = values.reshape(-1)[skipped : skipped + out.size]


def _check_kind(metadata: Metadata, stored: Sequence[GgufTensor]) -> None:
    """Refuse GGUF files that are no models. Errors: ModelError."""
    kind = metadata.text("general.type", "model")
    if kind != "model":
        advice = (
            "Use the adapter that it was converted from."
            if kind == "adapter"
            else "Give the file of the model."
        )
        raise ModelError(
            f"{metadata.where}: is a GGUF file of the type {kind[:40]!r}; expected a whole model. {advice}"
        )
    if not stored:
        raise ModelError(
            f"{metadata.where}: holds no tensors; expected a model. It may be a vocabulary: give the file of the model."
        )


def _nominal(stored: Iterable[GgufTensor]) -> str:
    """The dtype that most of the matrices' bytes are of; BF16 for blocks."""
    sizes: dict[str, int] = {}
    for tensor in stored:
        if len(tensor.shape) > 1:
            dtype = tensor.type.dtype if tensor.type.dtype in PLAIN_FLOATS else "BF16"
            sizes[dtype] = sizes.get(dtype, 0) + tensor.end - tensor.begin
    return max(sizes, key=lambda dtype: sizes[dtype], default="F32")


def _notes(label: str, stored: Sequence[GgufTensor], nominal: str) -> Iterator[str]:
    types = sorted({t.type.name for t in stored if not t.type.dtype})
    count = sum(not t.type.dtype for t in stored)
    if types:
        shown = ", ".join(types[:NAMED_TYPES]) + (", ..." if len(types) > NAMED_TYPES else "")
        yield (
            f"{label}: {count} tensors of GGUF ({shown}) are decoded; the output is {dtypes.CONFIG_NAMES[nominal]}, unless the recipe names "
            "a dtype."
        )
    left = [t.name for t in stored if t.name.endswith(tuple(IN_CONFIG))]
    if left:
        yield f"{label}: {left[0]} is in the config, as the scaling of rotary embeddings ({len(left)} such tensors)."


def _without_tokenizer(label: str, problem: str) -> str:
    return (
        f"{label}: its tokenizer is not carried: {problem}. Copy the tokenizer files of the model that it was converted from into the "
        "output."
    )


def side_files(metadata: Metadata, config: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the config, and a card with the licence that the file states."""
    files = {"config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
    licence = metadata.values.get("general.license")
    if isinstance(licence, str):
        files["README.md"] = f"---\nlicense: {json.dumps(licence[:200])}\n---\n".encode()
    return files
