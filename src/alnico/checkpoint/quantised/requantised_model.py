"""Reads a model in the fp8 of its base: scales computed again, codes rounded to the nearest.

``scale = max |W| / 448`` over what shares a scale in the base: a tensor, a row, or a block. ``code = W / scale`` in F8_E4M3, to the
nearest, ties to even. A tensor of which every value is the base's decoded one keeps the base's codes and scales.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.quantised.coded_rows import FLOAT8_VALUES, CodedRows, ScaleGrid
from alnico.checkpoint.quantised.dequantised_model import DequantisedModel
from alnico.checkpoint.quantised.stored_tensors import with_quantisation
from alnico.checkpoint.source import Origin, Shard, Source, Tensor, TensorSpec
from alnico.checkpoint.virtual_read import CHUNK, read_computed
from alnico.errors import MismatchError, NonFiniteError
from alnico.numerics import dtypes

LARGEST = 448.0
"""The largest number of F8_E4M3."""
CODES = "F8_E4M3"
MOSTLY_GONE = 0.5
"""Share of a change's energy below which a warning names the tensor."""
SHOWN = 3


@dataclass(frozen=True)
class Requantised:
    """What is known of a tensor when its scales are: the numbers of its ``grid``, or that it is the base's (None)."""

    scales: np.ndarray | None
    kept: float
    """The share of the energy of its change that survives rounding: ``1 - |written - exact|^2 / |exact - base|^2``, at least 0;
    1 for a tensor that does not change."""


class RequantisedModel:
    """A model with the tensors, dtypes and scales of its fp8 base: what the base has in fp8 is rounded to it.

    Errors: MismatchError for a base without fp8 tensors of this kind, or a model with other shapes.
    """

    def __init__(self, exact: Source, base: DequantisedModel) -> None:
        self.label = exact.label
        self.exact, self.base = exact, base
        self.codes: dict[str, CodedRows] = {}
        self._scales_of: dict[str, str] = {}
        self._known: dict[str, Requantised] = {}
        self._locks: dict[str, threading.Lock] = {}
        tensors: dict[str, Tensor] = {}
        for name, tensor in exact.tensors.items():
            coded = base.decoded.get(name)
            if coded is None:
                of_base = base.tensors.get(name)
                nominal = of_base.nominal if of_base is not None else tensor.nominal
                tensors[name] = TensorSpec(tensor.dtype, tensor.shape, nominal)
                continue
            if not is_written(base, coded) or coded.shape != tensor.shape:
                raise MismatchError(
                    f"{name}: is {tensor.shape}, and {base.label} has it as {coded.shape} in {coded.title}; expected one shape, in fp8 "
                    "with scales. Leave out requantise: the output is bf16 then."
                )
            assert isinstance(coded, CodedRows)
            of_scales = base.stored.tensors[coded.scales.name]
            self.codes[name] = coded
            self._scales_of[coded.scales.name] = name
            self._locks[name] = threading.Lock()
            tensors[name] = TensorSpec(CODES, coded.shape, CODES)
            tensors[coded.scales.name] = TensorSpec(of_scales.dtype, of_scales.shape, of_scales.dtype)
        if not self.codes:
            raise MismatchError(
                f"{base.label}: holds no fp8 tensor that {exact.label} has; expected a base in fp8 with scales. Leave out requantise."
            )
        for name in base.left_out:
            tensors[name] = base.stored.tensors[name]
        self.tensors: Mapping[str, Tensor] = tensors
        self.notes = [
            *getattr(exact, "notes", ()),
            f"{base.label}: {len(self.codes)} tensors are written in its fp8 again, with new scales; scales of activations are the base's.",
        ]

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config, with what the base's says of its quantisation."""
        return with_quantisation(self.exact.config, self.base.stored_config)

    @property
    def directory(self) -> Path | None:
        return self.exact.directory

    @property
    def origin(self) -> Origin | None:
        return None

    @property
    def parts(self) -> tuple[Source, ...]:
        return (self.exact, self.base)

    @property
    def shards(self) -> Sequence[Shard]:
        return [*getattr(self.exact, "shards", ()), *self.base.shards]

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        names = [self._scales_of.get(name, name) for name in tensors]
        of_exact = dict.fromkeys(name for name in names if name in self.exact.tensors)
        of_base = dict.fromkeys(name for name in names if name in self.codes)
        found = {f"exact/{file}": size for file, size in self.exact.absent(of_exact, side_files).items()}
        return {**found, **{f"base/{file}": size for file, size in self.base.absent(of_base, False).items()}}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        names = list(files)
        for source, prefix in ((self.exact, "exact/"), (self.base, "base/")):
            source.fetch([f.removeprefix(prefix) for f in names if f.startswith(prefix)], report)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name in self.base.left_out:
            self.base.read_stored(name, offset, buffer)
        elif name in self._scales_of:
            self._read_scales(name, offset, buffer)
        elif name not in self.codes:
            self.exact.read_into(name, offset, buffer)
        elif (scales := self.known(name).scales) is None:
            self.base.read_stored(self.codes[name].codes, offset, buffer)
        else:
            read_computed(
                offset, buffer, np.dtype(np.uint8), lambda first, out: self._encode(name, scales, first, out)
            )

    def _read_scales(self, name: str, offset: int, buffer: memoryview) -> None:
        scales = self.known(self._scales_of[name]).scales
        if scales is None:
            self.base.read_stored(name, offset, buffer)
            return
        raw = encode_scales(scales.reshape(-1), self.tensors[name].dtype)
        buffer[:] = memoryview(raw)[offset : offset + len(buffer)]

    def known(self, name: str) -> Requantised:
        """Return the scales of a tensor, which the first call computes in two passes over it."""
        with self._locks[name]:
            if name not in self._known:
                self._known[name] = self._measure(name)
            return self._known[name]

    @property
    def kept(self) -> dict[str, float]:
        """By tensor, the share of the energy of its change that survived rounding."""
        return {name: self.known(name).kept for name in self.codes}

    def _measure(self, name: str) -> Requantised:
        largest = np.zeros(_numbers(self.codes[name]), np.float32)
        change = 0.0
        for first, values, before in self._blocks(name):
            change += float(((values - before).astype(np.float64) ** 2).sum())
            places = self._places(name, first, values.size)
            np.maximum.at(largest, places, np.abs(values))
        if not np.isfinite(largest).all():
            raise NonFiniteError(
                f"{name}: has a number that is not finite; expected finite ones to requantise. Check the merge."
            )
        if not change:
            return Requantised(None, 1.0)
        scales = rounded_scales(largest, self.base.stored.tensors[self.codes[name].scales.name].dtype)
        error = 0.0
        for first, values, _ in self._blocks(name):
            of_elements = scales[self._places(name, first, values.size)]
            written = FLOAT8_VALUES[CODES][encode_e4m3(values / of_elements)] * of_elements
            error += float(((written - values).astype(np.float64) ** 2).sum())
        return Requantised(scales, max(0.0, 1.0 - error / change))

    def _blocks(self, name: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield blocks of a tensor: the first element, the values, and the base's."""
        elements = math.prod(self.codes[name].shape)
        for first in range(0, elements, CHUNK):
            count = min(CHUNK, elements - first)
            before = np.empty(count, np.float32)
            self.base.read_into(name, 4 * first, memoryview(before.view(np.uint8)))
            yield first, self._values(name, first, count), before

    def _values(self, name: str, first: int, count: int) -> np.ndarray:
        kind = self.exact.tensors[name].dtype
        width = dtypes.DTYPES[kind].bytes
        raw = np.empty(count * width, np.uint8)
        self.exact.read_into(name, first * width, memoryview(raw))
        return dtypes.decode(raw, kind).astype(np.float32, copy=False)

    def _places(self, name: str, first: int, count: int) -> np.ndarray:
        """The place of the scale of each element."""
        grid = self.codes[name].scales
        assert isinstance(grid, ScaleGrid)
        rows, columns = np.divmod(np.arange(first, first + count), self.codes[name].columns)
        of_rows = rows // grid.height * grid.grid[0] + rows % grid.height // grid.block[0]
        places: np.ndarray = of_rows * grid.grid[1] + columns // grid.block[1]
        return places

    def _encode(self, name: str, scales: np.ndarray, first: int, out: np.ndarray) -> None:
        values = self._values(name, first, out.size)
        out[:] = encode_e4m3(values / scales[self._places(name, first, out.size)])

    def identity(self) -> list[dict[str, Any]]:
        return [*self.exact.identity(), *self.base.identity()]

    def paths(self) -> list[Path]:
        return [*self.exact.paths(), *self.base.paths()]

    @property
    def held_bytes(self) -> int:
        scales = sum(4 * _numbers(coded) for coded in self.codes.values())
        return self.exact.held_bytes + self.base.held_bytes + scales

    @property
    def reading_bytes(self) -> int:
        """Values of both models, places and scales of a chunk, and what rounding takes."""
        return self.exact.reading_bytes + self.base.reading_bytes + 64 * CHUNK

    def close(self) -> None:
        self.exact.close()


def is_written(base: DequantisedModel, coded: object) -> bool:
    """Are tensors of this kind written: F8_E4M3 with a grid of scales, and no order of columns?"""
    return (
        isinstance(coded, CodedRows)
        and isinstance(coded.scales, ScaleGrid)
        and base.stored.tensors[coded.codes].dtype == CODES
        and not coded.scales.factor
    )


def _numbers(coded: CodedRows) -> int:
    """The number of scales of a tensor."""
    grid = coded.scales
    assert isinstance(grid, ScaleGrid)
    rows = math.prod(coded.shape) // max(coded.columns, 1)
    return rows // max(grid.height, 1) * grid.grid[0] * grid.grid[1]


def rounded_scales(largest: np.ndarray, kind: str) -> np.ndarray:
    """Return the scales for largest magnitudes, as a file of dtype ``kind`` holds them; 1 where all is 0.

    Powers of two are rounded up, so that nothing is cut off.

    >>> rounded_scales(np.float32([448, 0, 100]), "F8_E8M0")
    array([1.  , 1.  , 0.25], dtype=float32)
    """
    scales = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1)).astype(np.float32)
    if kind in ("F8_E8M0", "U8"):
        fraction, exponent = np.frexp(scales)
        powers: np.ndarray = np.ldexp(
            np.float32(1), np.where(fraction == 0.5, exponent - 1, exponent)
        ).astype(np.float32)
        return powers
    return dtypes.decode(encode_scales(scales, kind), kind).astype(np.float32, copy=False)


def encode_scales(scales: np.ndarray, kind: str) -> np.ndarray:
    """Return the bytes of scales in a dtype of files: the nearest number, ties to even."""
    if kind in ("F8_E8M0", "U8"):
        powers: np.ndarray = np.frexp(scales)[1] - 1 + 127
        return powers.astype(np.uint8)
    if kind == "BF16":
        bits = scales.view(np.uint32)
        rounded: np.ndarray = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.astype("<u2").view(np.uint8)
    return scales.astype(dtypes.DTYPES[kind].storage).view(np.uint8)


def encode_e4m3(values: np.ndarray) -> np.ndarray:
    """Round float32 to F8_E4M3, to the nearest, ties to even; what is larger becomes the largest number.

    >>> encode_e4m3(np.float32([1, -2, 500, 0.001])).tolist()
    [56, 192, 126, 1]
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    signs = (bits >> np.uint32(24) & np.uint32(0x80)).astype(np.uint8)
    magnitudes = np.minimum(np.abs(values), np.float32(LARGEST))
    bits = magnitudes.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFFF) + (bits >> np.uint32(20) & np.uint32(1))) >> np.uint32(20)
    normal = rounded.astype(np.int32) - (120 << 3)
    small = np.rint(magnitudes * np.float32(512)).astype(np.int32)
    codes = np.where(magnitudes < np.float32(2**-6), small, normal).astype(np.uint8)
    signed: np.ndarray = codes | signs
    return signed


def kept_note(base: str, kept: Mapping[str, float]) -> str:
    """Say how much of the change of each tensor survived rounding to fp8, and warn where most of it is gone."""
    changed = {name: share for name, share in kept.items() if share < 1}
    if not changed:
        return f"requantised like {base}: no tensor that is stored in fp8 changed."
    ordered = sorted(changed, key=lambda name: changed[name])
    gone = [name for name in ordered if changed[name] < MOSTLY_GONE]
    median = changed[ordered[len(ordered) // 2]]
    said = (
        f"requantised like {base}: of the energy of the change, {changed[ordered[0]]:.0%} to {changed[ordered[-1]]:.0%} survived rounding "
        f"to fp8 (median {median:.0%} of {len(changed)} tensors)."
    )
    if not gone:
        return said
    named = ", ".join(gone[:SHOWN]) + (f" and {len(gone) - SHOWN} more" if len(gone) > SHOWN else "")
    return f"{said} Most of it is gone in {len(gone)}: {named}. Write bf16 to keep it."
