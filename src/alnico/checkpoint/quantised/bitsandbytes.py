"""Finds weights that bitsandbytes quantised: nf4 and fp4 in blocks, and int8 by row.

``X`` in 4 bits is a column of bytes, of which the high half comes first, in row-major order. ``X.quant_map`` has the values of the
codes, ``X.absmax`` the factor of each block. With double quantisation the factors are codes, too:
``X.nested_quant_map[absmax] * X.nested_absmax[block] + offset``. ``X.quant_state.bitsandbytes__nf4`` is JSON with the shape, the
sizes of blocks and the offset. ``X.weight`` in I8 with ``X.SCB`` (rows) means ``W = q * SCB / 127``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.json_files import parse_json
from alnico.checkpoint.quantised.coded_rows import INT8_VALUES, CodedRows, ScaleGrid
from alnico.checkpoint.quantised.stored_tensors import QuantisedTensor, StoredTensors
from alnico.numerics.dtypes import Shape

STATE = ".quant_state.bitsandbytes__"
FOUR_BIT = ("nf4", "fp4")
LARGEST_BLOCK = 1 << 16
BYTE_LIMIT = 127
ROW_MAJOR = 0
"""The one ``weight_format`` of int8 that is not laid out for one GPU."""


def find_bitsandbytes(stored: StoredTensors) -> Iterator[tuple[str, QuantisedTensor]]:
    """Yield the tensors of bitsandbytes. Errors: ModelError for other forms, parts that are missing or do not fit.

    Shapes are in the files, so those of a model on the hub are downloaded when it is opened.
    """
    for name, tensor in stored.tensors.items():
        stem, _, kind = name.partition(STATE)
        if kind:
            yield stem, _four_bit(stored, stem, name, kind)
        elif tensor.dtype == "I8" and f"{name.removesuffix('.weight')}.SCB" in stored.tensors:
            yield name, _int8(stored, name)


def _int8(stored: StoredTensors, name: str) -> CodedRows:
    stem, shape = name.removesuffix(".weight"), stored.tensors[name].shape
    scales, form = f"{stem}.SCB", f"{stem}.weight_format"
    stored.part(scales, name, ("F32",), *([shape[:1]] if len(shape) == 2 else []))
    if form in stored.tensors:
        stored.part(form, name, ("U8",), (), (1,))
        if (code := stored.read_note(form)[0]) != ROW_MAJOR:
            raise stored.refuse_form(form, int(code), "0, rows one after the other")
    rows, columns = shape
    grid = ScaleGrid(scales, rows, (rows, 1), (1, columns), times=1 / BYTE_LIMIT)
    return CodedRows(
        "int8 tensors of bitsandbytes",
        shape,
        name,
        "byte",
        INT8_VALUES,
        grid,
        None,
        columns,
        columns,
        (scales,),
    )


def _four_bit(stored: StoredTensors, name: str, state: str, kind: str) -> CodedRows:
    stored.part(
        name,
        state,
        tuple({stored.tensors[name].dtype}) if name in stored.tensors else (),
        *_shape_of(stored, name),
    )
    stored.part(state, name, ("U8",), *_shape_of(stored, state))
    keys = parse_json(stored.read_note(state), Path(f"{stored.label}: {state}"))
    shape: Any = keys.get("shape")
    block: Any = keys.get("blocksize")
    nested: Any = keys.get("nested_blocksize") if f"{name}.nested_absmax" in stored.tensors else None
    offset: Any = keys.get("nested_offset", 0.0)
    bytes_stored = stored.tensors[name].byte_size
    if (
        kind not in FOUR_BIT
        or not _is_shape(shape)
        or -(-math.prod(shape) // 2) != bytes_stored
        or not _is_block(block)
        or not (nested is None or _is_block(nested))
        or not isinstance(offset, (int, float))
        or not math.isfinite(offset)
    ):
        stated = {key: keys.get(key) for key in ("shape", "blocksize", "nested_blocksize", "nested_offset")}
        raise stored.refuse_form(
            state,
            f"{kind} {stated}",
            f"nf4 or fp4, sizes of blocks, and the shape of the {2 * bytes_stored} codes of {name}",
        )
    elements = math.prod(shape)
    blocks = -(-elements // block)
    absmax, values = f"{name}.absmax", f"{name}.quant_map"
    stored.part(values, name, ("F32",), (16,))
    parts = [absmax, values]
    scales: ScaleGrid | _NestedScales = ScaleGrid(absmax, 1, (1, blocks), (1, block))
    if nested is None:
        stored.part(absmax, name, ("F32",), (blocks,))
    else:
        of_absmax, map_of_absmax = f"{name}.nested_absmax", f"{name}.nested_quant_map"
        stored.part(absmax, name, ("U8",), (blocks,))
        stored.part(of_absmax, name, ("F32",), (-(-blocks // nested),))
        stored.part(map_of_absmax, name, ("F32",), (256,))
        parts += [of_absmax, map_of_absmax]
        scales = _NestedScales(absmax, of_absmax, map_of_absmax, block, nested, float(offset))
    table = np.frombuffer(stored.read_note(values), "<f4")
    stored.check_finite(values, table)
    return CodedRows(
        f"{kind} tensors of bitsandbytes", tuple(shape), name, "high half first", table, scales, None, elements, bytes_stored,
        (*parts, state), may_be_zero=True,
    )  # fmt: skip


def _shape_of(stored: StoredTensors, name: str) -> list[Shape]:
    return [stored.tensors[name].shape] if name in stored.tensors else []


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, list)
        and 0 < len(shape) <= 8
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape)
    )


def _is_block(size: Any) -> bool:
    return (
        isinstance(size, int) and not isinstance(size, bool) and 0 < size <= LARGEST_BLOCK and size % 2 == 0
    )


@dataclass(frozen=True)
class _NestedScales:
    """The factors of blocks under double quantisation: codes with a map, a factor for each of their blocks, and an offset."""

    name: str
    of_codes: str
    map_of_codes: str
    group: int
    nested: int
    offset: float

    def part(self, stored: StoredTensors, row: int, rows: int, first: int, last: int) -> np.ndarray:
        codes = stored.integers(self.name, first, last - first)
        begin = first // self.nested
        factors = stored.scales(self.of_codes, begin, -(-last // self.nested) - begin)
        values = stored.scales(self.map_of_codes)[codes]
        values *= factors[np.arange(first, last) // self.nested - begin]
        values += np.float32(self.offset)
        of_blocks: np.ndarray = values[None]
        return of_blocks
