"""Reads safetensors headers and checks every claim in them; builds headers of new files.

A file is ``u64 little-endian length N | N bytes of JSON | data``. The JSON maps each tensor's name to its
dtype, shape and ``data_offsets`` [begin, end) within the data; ``__metadata__`` maps strings to strings. The
data is covered without gap or overlap. Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from alnico.errors import ModelError
from alnico.numerics.dtypes import DTYPES

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a longer header is refused before it is read."""

KEYS = frozenset(("dtype", "shape", "data_offsets"))
"""The keys of a tensor's entry."""
MAX_DIMENSIONS = 64
ALIGNMENT = 8
"""The data begins at a multiple of this; the JSON is padded with spaces, as other writers do."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor is: ``begin`` and ``end`` are byte offsets in the file, not in its data part.

    ``strides``, in elements, are those of a pickled view whose elements are not in row-major order.
    ``is_negated`` and ``is_conjugated`` are torch's lazy bits: the values are the negative, or the complex
    conjugate, of what is stored.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    strides: tuple[int, ...] | None = None
    is_negated: bool = False
    is_conjugated: bool = False

    @property
    def is_stored_as_is(self) -> bool:
        """Are the bytes of the file the tensor's bytes, in row-major order?"""
        return self.strides is None and not self.is_negated and not self.is_conjugated

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def byte_size(self) -> int:
        return self.end - self.begin if self.strides is None else self.elements * DTYPES[self.dtype].bytes

    @property
    def nominal(self) -> str:
        return self.dtype


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: tensors in the order of their bytes, and the metadata."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    data_begin: int


def add_prefix(header: Header, prefix: str) -> Header:
    """Return a header with a prefix before the names of its tensors."""
    tensors = tuple(replace(tensor, name=prefix + tensor.name) for tensor in header.tensors)
    return replace(header, tensors=tensors)


def parse_length(prefix: bytes, file_size: int, where: str) -> int:
    """Read the header's length from the first 8 bytes and check it against the file. Returns bytes of
    JSON."""
    if len(prefix) < 8:
        raise ModelError(
            f"{where}: the file has {file_size} bytes; a safetensors file begins with an 8-byte header "
            "length. The file is truncated or not safetensors; download it again."
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise ModelError(
            f"{where}: the header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed. "
            "The file is damaged or not safetensors; download it again."
        )
    if 8 + length > file_size:
        raise ModelError(
            f"{where}: the header claims {length} bytes, the file has {file_size}. The file is truncated; "
            "download it again."
        )
    return length


def parse(text: bytes, file_size: int, where: str) -> Header:
    """Parse and check the JSON of a header. ``where`` names the file in messages.

    Errors: ModelError naming the tensor, for JSON that is not a header, a duplicate name, an unknown dtype, a
    shape that is not a list of sizes, offsets outside the file, a size that is not shape x dtype, an overlap
    or a gap.
    """
    data_begin = 8 + len(text)
    entries, metadata = _entries(text, where)
    tensors = sorted(
        (_tensor(name, entry, data_begin, file_size, where) for name, entry in entries),
        key=lambda t: (t.begin, t.end, t.name),
    )
    position, previous = data_begin, None
    for tensor in tensors:
        if tensor.begin < position:
            raise ModelError(
                f"{where}: tensors {previous!r} and {tensor.name!r} overlap at byte "
                f"{tensor.begin - data_begin} of the data; each byte must belong to one tensor. The header "
                "is wrong; get the file from its source."
            )
        if tensor.begin > position:
            raise ModelError(
                f"{where}: bytes {position - data_begin} to {tensor.begin - data_begin} of the data, before "
                f"{tensor.name!r}, belong to no tensor; gaps are not allowed. The header is wrong; get the "
                "file from its source."
            )
        position, previous = tensor.end, tensor.name
    if position != file_size:
        raise ModelError(
            f"{where}: the tensors end at byte {position}, the file at byte {file_size}; they must end "
            "together. The file is damaged; download it again."
        )
    return Header(tuple(tensors), metadata, data_begin)


def _entries(text: bytes, where: str) -> tuple[list[tuple[str, Any]], dict[str, str]]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = Counter(key for key, _ in pairs)
            raise ModelError(
                f"{where}: the header names {next(n for n in names if names[n] > 1)!r} twice; names must be unique. "
                "The header is wrong; get the file from its source."
            )
        return found

    if not text.startswith(b"{"):
        raise ModelError(
            f"{where}: the header begins with {text[:1]!r}, expected '{{'. The file is not safetensors."
        )
    try:
        loaded = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except ModelError:
        raise
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{where}: the header is not JSON ({type(error).__name__}: {str(error)[:120]}). The file is "
            "damaged or not safetensors."
        ) from None
    metadata = loaded.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelError(f"{where}: __metadata__ must map strings to strings. Get the file from its source.")
    if b"\\u" in text:
        for key in (*loaded, *metadata, *metadata.values()):
            if any("\ud800" <= c <= "\udfff" for c in key):
                raise ModelError(
                    f"{where}: {key!r} is an unpaired surrogate; expected Unicode text. Get the file from "
                    "its source."
                )
    return list(loaded.items()), metadata


def _tensor(name: str, entry: Any, data_begin: int, file_size: int, where: str) -> TensorInfo:
    def refuse(actual: str, expected: str) -> ModelError:
        return ModelError(
            f"{where}: tensor {name!r} has {actual}; expected {expected}. The header is wrong; get the file "
            "from its source."
        )

    if not isinstance(entry, dict) or entry.keys() != KEYS:
        actual = (
            f"the keys {sorted(entry)}"
            if isinstance(entry, dict)
            else f"a {type(entry).__name__} as its entry"
        )
        raise refuse(actual, "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(
            f"{where}: tensor {name!r} has the unknown dtype {dtype!r}; known are {', '.join(DTYPES)}. A "
            "newer alnico may know it."
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not _are_sizes(shape):
        raise refuse(
            f"the shape {str(shape)[:80]}", f"a list of at most {MAX_DIMENSIONS} sizes, none negative"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_sizes(offsets):
        raise refuse(f"the data_offsets {str(offsets)[:80]}", "two byte positions, none negative")
    begin, end = offsets
    if end < begin:
        raise refuse(f"the data_offsets {offsets}", "an end not before the begin")
    if data_begin + end > file_size:
        raise ModelError(
            f"{where}: tensor {name!r} ends at byte {data_begin + end}, the file has {file_size}. "
            "The file is truncated; download it again."
        )
    bits = math.prod(shape) * DTYPES[dtype].bits
    if bits % 8 or bits // 8 != end - begin:
        expected = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits, which are not whole bytes,"
        raise refuse(f"{end - begin} bytes", f"{expected[:80]} for shape {str(tuple(shape))[:80]} of {dtype}")
    return TensorInfo(name, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _are_sizes(values: list[Any]) -> bool:
    for value in values:  # noqa: SIM110  (a generator takes twice as long, for each tensor of a model)
        if type(value) is not int or not 0 <= value < 1 << 63:
            return False
    return True


def build(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, Header]:
    """Lay out tensors (name, dtype, shape) in the given order; return the file's first bytes and the header.

    >>> start, header = build([("w", "F32", (2, 2))], {"format": "pt"})
    >>> len(start) % 8, header.tensors[0].begin == len(start), header.tensors[0].byte_size
    (0, True, 16)
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    placed = []
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * DTYPES[dtype].bits // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        placed.append((name, dtype, shape, position, end))
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    data_begin = 8 + len(text)
    infos = tuple(TensorInfo(n, d, tuple(s), data_begin + b, data_begin + e) for n, d, s, b, e in placed)
    return len(text).to_bytes(8, "little") + text, Header(infos, dict(metadata), data_begin)
