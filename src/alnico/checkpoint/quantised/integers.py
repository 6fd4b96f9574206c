"""Finds integers of 4 and 8 bits as compressed-tensors stores them: ``W = (q - zero) * scale``.

``X.weight_packed`` (rows, words) holds the codes of consecutive columns in words of 32 bits, the first in the lowest bits, each plus
half of the range; ``X.weight`` is one in I8. ``X.weight_scale`` is one number, (rows, 1) or (rows, groups); ``X.weight_zero_point``
in I8 has that shape, and packed along rows it is (rows x bits / 32, groups). ``X.weight_shape`` says the rows and columns of a packed
matrix, ``X.weight_g_idx`` (columns) the group of each column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.checkpoint.quantised.coded_rows import (
    INT4_VALUES,
    INT8_VALUES,
    UINT8_VALUES,
    CodedRows,
    GroupNumbers,
    ScaleGrid,
)
from alnico.checkpoint.quantised.fp8 import fit_grid
from alnico.checkpoint.quantised.stored_tensors import FLOATS, QuantisedTensor, StoredTensors

PACKED, SCALE, ZERO = "_packed", "_scale", "_zero_point"
WORD_BITS = 32


def find_integers(stored: StoredTensors) -> Iterator[tuple[str, QuantisedTensor]]:
    """Yield the packed integers, and those in I8. Errors: ModelError for other widths, parts that are missing or do not fit."""
    for name, tensor in stored.tensors.items():
        if name.endswith(f".weight{PACKED}") and tensor.dtype == "I32":
            yield name.removesuffix(PACKED), _packed(stored, name)
        elif tensor.dtype == "I8" and name.endswith(".weight") and f"{name}{SCALE}" in stored.tensors:
            yield name, _bytes(stored, name)


def _bytes(stored: StoredTensors, name: str) -> CodedRows:
    shape, of_scale = stored.tensors[name].shape, stored.tensors[f"{name}{SCALE}"].shape
    fitted = fit_grid(shape, of_scale)
    stored.part(f"{name}{SCALE}", name, FLOATS, *([of_scale] if fitted is not None else []))
    assert fitted is not None
    height, grid, block, columns = fitted
    zeros = None
    if f"{name}{ZERO}" in stored.tensors:
        stored.part(f"{name}{ZERO}", name, ("I8",), of_scale)
        zeros = ScaleGrid(f"{name}{ZERO}", height, grid, block)
    scales = ScaleGrid(f"{name}{SCALE}", height, grid, block)
    return _rows("int8", shape, name, INT8_VALUES, scales, zeros, columns)


def _packed(stored: StoredTensors, name: str) -> CodedRows:
    stem, codes = name.removesuffix(PACKED), stored.tensors[name]
    stored.part(name, name, ("I32",), codes.shape[:2] if all(codes.shape[:2]) else (1, 1))
    rows, words = codes.shape
    columns, bits = _columns(stored, name)
    if bits not in (4, 8):
        raise stored.refuse_form(f"the width of {name}", f"{bits or 'unknown'} bits", "4 or 8 bits")
    of_scale = stored.tensors[f"{stem}{SCALE}"].shape if f"{stem}{SCALE}" in stored.tensors else ()
    fitted = fit_grid((rows, columns), of_scale)
    fits = fitted is not None and (fitted[2][1] % 2 == 0 or fitted[1][1] == 1)
    stored.part(f"{stem}{SCALE}", name, FLOATS, *([of_scale] if fits else [(), (rows, 1)]))
    assert fitted is not None
    height, grid, block, _ = fitted
    zeros: GroupNumbers | None = None
    per_word, half = WORD_BITS // bits, 1 << bits - 1
    if f"{stem}{ZERO}" in stored.tensors:
        packed = (-(-rows // per_word), grid[1])
        point = stored.part(f"{stem}{ZERO}", name, ("I32", "I8"), packed, of_scale)
        if point.dtype == "I32":
            zeros = _PackedZeros(f"{stem}{ZERO}", bits, grid[1], block[1])
        else:
            zeros = ScaleGrid(f"{stem}{ZERO}", height, grid, block)
    index = f"{stem}_g_idx" if f"{stem}_g_idx" in stored.tensors else ""
    if index:
        stored.part(index, name, ("I32", "I64"), (columns,))
    scales = ScaleGrid(f"{stem}{SCALE}", height, grid, block)
    unsigned = INT4_VALUES if bits == 4 else UINT8_VALUES
    table = unsigned if isinstance(zeros, _PackedZeros) else unsigned - half
    stated = f"{stem}_shape" if f"{stem}_shape" in stored.tensors else ""
    return _rows(
        f"int{bits}",
        (rows, columns),
        name,
        table,
        scales,
        zeros,
        columns,
        words * 4,
        index,
        bits == 4,
        stated,
    )


def _rows(
    title: str,
    shape: tuple[int, ...],
    name: str,
    table: np.ndarray,
    scales: ScaleGrid,
    zeros: Any,
    columns: int,
    row_bytes: int | None = None,
    index: str = "",
    is_halved: bool = False,
    stated: str = "",
) -> CodedRows:
    return CodedRows(
        f"{title} tensors",
        shape,
        name,
        "low half first" if is_halved else "byte",
        table,
        scales,
        zeros,
        columns,
        columns if row_bytes is None else row_bytes,
        tuple(part for part in (scales.name, zeros.name if zeros is not None else "", stated) if part),
        index=index,
    )


def _columns(stored: StoredTensors, name: str) -> tuple[int, int]:
    """Return the columns of a packed matrix and the bits of a code; 0 bits where nothing says them."""
    rows, words = stored.tensors[name].shape
    stated = f"{name.removesuffix(PACKED)}_shape"
    bits = _configured_bits(stored.config)
    if stated in stored.tensors and (bits is None or stored.is_here(stated)):
        tensor = stored.part(stated, name, ("I64", "I32"), (2,))
        shape = np.frombuffer(stored.read_note(stated), "<i8" if tensor.dtype == "I64" else "<i4")
        columns = int(shape[1])
        for width in (bits,) if bits is not None else (4, 8):
            if int(shape[0]) == rows and columns > 0 and -(-columns * width // WORD_BITS) == words:
                return columns, width
        raise stored.refuse_form(
            f"{stated}",
            (int(shape[0]), columns),
            f"{rows} rows in {words} words of 4-bit or 8-bit codes each",
        )
    return (words * WORD_BITS // bits, bits) if bits else (words, 0)


def _configured_bits(config: Mapping[str, Any]) -> int | None:
    """Return the bits of weights in all groups of a config; None if it does not say them, or says different ones."""
    groups = config.get("config_groups")
    weights = (
        [g.get("weights") for g in groups.values() if isinstance(g, Mapping)]
        if isinstance(groups, Mapping)
        else []
    )
    stated = [w.get("num_bits") for w in weights if isinstance(w, Mapping)]
    bits = stated[0] if stated and all(one == stated[0] for one in stated) else None
    return bits if isinstance(bits, int) and not isinstance(bits, bool) and 0 < bits <= WORD_BITS else None


@dataclass(frozen=True)
class _PackedZeros:
    """Zero points of groups that are packed along rows: (rows x bits / 32, groups) words."""

    name: str
    bits: int
    groups: int
    group: int

    def part(self, stored: StoredTensors, row: int, rows: int, first: int, last: int) -> np.ndarray:
        per_word = WORD_BITS // self.bits
        index = np.arange(row, row + rows)
        low, high = row // per_word, (row + rows - 1) // per_word + 1
        words = stored.integers(self.name, low * self.groups, (high - low) * self.groups).view("<u4")
        of_rows = words.reshape(-1, self.groups)[index // per_word - low, first:last]
        shifts = (index % per_word * self.bits).astype(np.uint32)
        zeros: np.ndarray = (of_rows >> shifts[:, None]) & np.uint32((1 << self.bits) - 1)
        return zeros.astype(np.float32)
