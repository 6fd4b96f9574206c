"""Reads a base with a LoRA adapter applied, ``W + s B A``, block by block and without a copy."""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.adapter_changes import AdapterEffect, TensorUpdate, adapter_effect, short_name
from alnico.checkpoint.lora_adapter import CONFIG, Adapter, Rows, Update
from alnico.checkpoint.memory_model import MemoryModel
from alnico.checkpoint.quantised.dequantised_model import DequantisedModel
from alnico.checkpoint.source import Model, Origin, Shard, Source, Tensor, TensorSpec, read_tensor, unwrap
from alnico.checkpoint.virtual_read import CHUNK, read_computed
from alnico.errors import ModelError, NonFiniteError, RecipeError
from alnico.kernels.choice import kernel_for
from alnico.kernels.constants import CODES
from alnico.kernels.low_rank_kernel import FoldKernel
from alnico.numerics import dtypes

MAX_CACHED_FACTORS = 4
"""Tensors whose factors stay in memory: the one being read, and those that other threads are reading."""


@dataclass(frozen=True)
class _LoadedFactors:
    """The factors of a changed tensor: ``left`` (experts, rows, r) and ``right`` (experts, r, columns), or
    what is ``added`` to a bias."""

    left: np.ndarray
    right: np.ndarray
    added: np.ndarray | None = None
    by_row: np.ndarray | None = None
    by_column: np.ndarray | None = None
    """DoRA's factors, magnitude / norm, for rows or for columns."""
    rows: np.ndarray | None = None
    """Rows that replace those of an embedding."""


QUANTISED = re.compile(
    r"[-_.](unsloth-)?(bnb|gptq|awq|fp8|nf4|int[48]|[48]bit|quantized\.w\w+)([-_.](4bit|8bit|int[48]|dynamic|block))*$"
)
"""Ends of the names of quantised models, in lower case."""

NO_FACTOR = np.empty((0, 0, 0), np.float32)


class _FactorCache:
    """Keeps the factors of the tensors read last; each is computed once, by the first thread that needs
    it."""

    def __init__(self, make: Callable[[str], _LoadedFactors]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._held: OrderedDict[str, tuple[threading.Lock, list[_LoadedFactors]]] = OrderedDict()

    def __call__(self, name: str) -> _LoadedFactors:
        with self._lock:
            entry = self._held.setdefault(name, (threading.Lock(), []))
            self._held.move_to_end(name)
            if len(self._held) > MAX_CACHED_FACTORS:
                self._held.popitem(last=False)
        lock, factors = entry
        with lock:
            if not factors:
                factors.append(self._make(name))
            return factors[0]


def _effect_of(label: str, base: Model | MemoryModel, adapter: Adapter) -> AdapterEffect:
    """What an adapter changes of a base. Names without a config are matched by code that is imported for them."""
    if adapter.dialect is None:
        return adapter_effect(label, base, adapter)
    from alnico.checkpoint.lora_dialects.base_modules import dialect_effect

    return dialect_effect(label, base, adapter)


class AdaptedModel:
    """A base and an adapter as one source: ``W + weight * (the adapted W - W)``. Made by
    :func:`open_adapted`.

    The arithmetic is float32 (float64 if the base or the adapter is), element by element, in the order of the
    rank: the part of a tensor that is read changes no bit. The base may itself be adapted; this adapter then
    changes its result.
    """

    def __init__(
        self,
        label: str,
        base: Model | MemoryModel,
        adapter: Adapter,
        weight: float = 1.0,
        effect: AdapterEffect | None = None,
    ) -> None:
        self.label = label
        self.base = base
        self.adapter = adapter
        self.weight = weight
        self._effect: AdapterEffect = effect or _effect_of(label, base, adapter)
        self._changes = self._effect.changes
        self._scratch = threading.local()
        self._factors = _FactorCache(self._read_factors)
        self._dora: dict[str, np.ndarray] = {}
        from_base = [name for name in base.tensors if name not in self._effect.removed]
        added = [name for name in self._changes if name not in base.tensors]
        self.tensors: Mapping[str, Tensor] = {name: self._describe(name) for name in (*from_base, *added)}
        self._check_weight()
        self.notes = [*base.notes, *adapter.files.notes, *self._effect.notes]
        if note := _note_on_base(label, adapter.trained_on, getattr(base, "innermost", base)):
            self.notes.append(note)

    def _check_weight(self) -> None:
        """Errors: RecipeError for a weight that becomes 0 or infinity in float32."""
        limits = np.finfo(np.float32)
        smallest, largest = float(limits.smallest_normal), float(limits.max)
        is_narrow = any(self.tensors[name].dtype == "F32" for name in self._changes)
        if is_narrow and self.weight and not smallest <= abs(self.weight) <= largest:
            raise RecipeError(
                f"{self.label}: is computed in float32 with the weight {self.weight:g}; expected 0, or a "
                f"magnitude from {smallest:.1e} to {largest:.1e}. Choose a "
                f"{'smaller' if abs(self.weight) > 1 else 'larger'} one."
            )

    def weighted(self, name: str) -> str:
        """Write the adapter with its weight and the strengths of its blocks as a reference does, under the given name."""
        blocks = f"[{self.adapter.blocks}]" if self.adapter.blocks else ""
        return f"{self.weight!r}{blocks}*{name}" if blocks or self.weight != 1 else name

    @property
    def unties(self) -> bool:
        """Does an adapter untie a tensor that the base ties?"""
        return self._effect.is_untied or bool(getattr(self.base, "unties", False))

    @property
    def innermost(self) -> Model | MemoryModel:
        """The base without any adapter."""
        inner: Model | MemoryModel = getattr(self.base, "innermost", self.base)
        return inner

    @property
    def parts(self) -> tuple[Source, ...]:
        """The sources that it is made of: its base, and the adapter's tensors."""
        return (self.base, self.adapter.files)

    def _describe(self, name: str) -> Tensor:
        change = self._changes.get(name)
        if change is None:
            return self.base.tensors[name]
        parts = self._parts(change)
        source, stored = self._start(name)
        begin = source.tensors[stored]
        of_base = self.base.tensors.get(change.origin or name, begin)
        if self._is_copied(name):
            return TensorSpec(begin.dtype, begin.shape, of_base.nominal)
        wide = "F64" in [of_base.dtype, begin.dtype, *(self.adapter.files.tensors[p].dtype for p in parts)]
        return TensorSpec("F64" if wide else "F32", of_base.shape, of_base.nominal)

    def _start(self, name: str) -> tuple[Source, str]:
        """The tensor that a change starts from: the adapter's or the base's."""
        change = self._changes[name]
        return (
            (self.adapter.files, change.replaced) if change.replaced else (self.base, change.origin or name)
        )

    def _is_copied(self, name: str) -> bool:
        """Is a changed tensor a copy of another one, with nothing to compute?"""
        change = self._changes[name]
        is_new = (change.origin or name) not in self.base.tensors
        return not self._parts(change) and (self.weight == 1 or not change.replaced or is_new)

    @staticmethod
    def _parts(change: TensorUpdate) -> list[str]:
        """The tensors of the adapter that a change computes with."""
        update = change.update
        factors = (
            []
            if update is None
            else [update.difference]
            if update.difference
            else [update.left, update.right]
        )
        of_update = [*factors, update.magnitude] if update is not None else []
        of_update += [name for part, _ in change.joined for name in (part.left, part.right)]
        others = [
            change.added.bias if change.added is not None else "",
            change.rows.name if change.rows is not None else "",
        ]
        return [p for p in (*of_update, *others) if p]

    @property
    def config(self) -> Mapping[str, Any]:
        """The base's config, corrected for the adapted model: an untied head, or another class with a new
        head."""
        return self._effect.config

    @property
    def directory(self) -> Path | None:
        return self.base.directory

    @property
    def origin(self) -> Origin | None:
        """None: it is two models, see :func:`repositories`."""
        return None

    @property
    def shards(self) -> Sequence[Shard]:
        return [*self.base.shards, *self.adapter.files.shards]

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        names, files = list(tensors), self.adapter.files
        of_base = [c.origin if (c := self._changes.get(n)) is not None and c.origin else n for n in names]
        of_base = [n for n in dict.fromkeys(of_base) if n in self.base.tensors]
        of_adapter = list(files.tensors) if any(name in self._changes for name in names) else []
        needed = {f"{CONFIG}/{file}": size for file, size in files.absent(of_adapter, False).items()}
        return {
            **{f"base/{file}": size for file, size in self.base.absent(of_base, side_files).items()},
            **needed,
        }

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        names = list(files)
        self.base.fetch([f.removeprefix("base/") for f in names if f.startswith("base/")], report)
        self.adapter.files.fetch(
            [f.removeprefix(f"{CONFIG}/") for f in names if f.startswith(f"{CONFIG}/")], report
        )

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        change = self._changes.get(name)
        if change is None:
            self.base.read_into(name, offset, buffer)
            return
        if change.twin:
            self._check_twin(change, offset, len(buffer), self.tensors[name])
        if self._is_copied(name):
            source, stored = self._start(name)
            source.read_into(stored, offset, buffer)
            return
        dtype = np.dtype(dtypes.DTYPES[self.tensors[name].dtype].storage)
        factors = self._factors(name)
        read_computed(
            offset, buffer, dtype, lambda first, out: self._compute_checked(name, factors, first, out)
        )

    def _compute_checked(self, name: str, factors: _LoadedFactors, first: int, out: np.ndarray) -> None:
        """Fill ``out`` with a changed tensor's elements from ``first`` on. Errors: NonFiniteError, naming the
        first non-finite one."""
        if self._compute(name, factors, first, out):
            return
        with np.errstate(all="ignore"):
            if np.isfinite(out.sum()):  # quicker than checking each element
                return
        wrong = np.flatnonzero(~np.isfinite(out))
        if len(wrong):
            index = ", ".join(
                str(int(i)) for i in np.unravel_index(first + int(wrong[0]), self.tensors[name].shape)
            )
            raise NonFiniteError(
                f"{name}[{index}]: is {out[wrong[0]]} in {self.label}; expected finite numbers. Choose a "
                "smaller weight for the adapter, or fix the model that has this value."
            )

    def _compute(
        self, name: str, factors: _LoadedFactors, first: int, out: np.ndarray, *, plain: bool = False
    ) -> bool:
        """Fill ``out`` with a changed tensor's elements from ``first`` on; ``plain`` leaves out DoRA's
        factors and the weight. Returns whether they are known to be finite."""
        is_finite = False
        change = self._changes[name]
        source, stored = self._start(name)
        origin = change.origin or name
        code = source.tensors[stored].dtype
        raw = self._read_raw(source, stored, first, out.size, 0)
        update = change.update
        is_plain = update is None or not update.magnitude
        if update is None and not change.joined:
            out[:] = dtypes.decode(raw, code)
            if factors.added is not None:
                out += factors.added[first : first + out.size]
            if change.rows is not None:
                self._replace_rows(change.rows, factors, self.tensors[name].shape[1], first, out)
        elif update is not None and update.difference:
            out[:] = dtypes.decode(raw, code)
            self._add_difference(change, update, factors.right.shape[2], first, out, is_weighted=is_plain)
        else:
            rows, columns = factors.left.shape[1], factors.right.shape[2]
            width = dtypes.DTYPES[code].bytes
            scale = (update.scale if update is not None else 1.0) * (
                self.weight if is_plain and not change.replaced else 1.0
            )
            is_finite = True
            for expert, begin, at, count in _by_expert(first, out.size, rows * columns):
                place = _kernel(out.dtype, count * factors.right.shape[1])(
                    raw[at * width : (at + count) * width],
                    CODES[code],
                    factors.left[expert],
                    factors.right[expert],
                    scale,
                    begin,
                    out[at : at + count],
                )
                is_finite &= place < 0
        if plain:
            return is_finite
        if factors.by_row is not None or factors.by_column is not None:
            self._apply_dora(factors, first, out)
            is_finite = False
        if self.weight != 1 and (change.replaced or change.rows is not None or not is_plain):
            original = np.empty_like(out)
            original[:] = dtypes.decode(
                self._read_raw(self.base, origin, first, out.size, 1), self.base.tensors[origin].dtype
            )
            with np.errstate(all="ignore"):  # an overflow gives an infinity, which is refused
                out -= original
                out *= out.dtype.type(self.weight)
                out += original
            is_finite = False
        return is_finite

    def _add_difference(
        self,
        change: TensorUpdate,
        update: Update,
        columns: int,
        first: int,
        out: np.ndarray,
        *,
        is_weighted: bool,
    ) -> None:
        """Add to ``out`` elements from ``first`` on of a difference that the adapter holds, or computes, as a whole."""
        files = self.adapter.files
        start = first + (change.part[0] * columns if change.part is not None else 0)
        half = files.tensors[update.difference].elements // 2 if change.is_swapped else 0
        for begin, at, count in _in_halves(start, out.size, half):
            raw = self._read_raw(files, update.difference, begin, count, 2)
            added = dtypes.decode(raw, files.tensors[update.difference].dtype).astype(out.dtype)
            with np.errstate(all="ignore"):  # an overflow gives an infinity, which is refused
                added *= out.dtype.type(update.scale * (self.weight if is_weighted else 1.0))
                out[at : at + count] += added

    @staticmethod
    def _replace_rows(rows: Rows, factors: _LoadedFactors, columns: int, first: int, out: np.ndarray) -> None:
        """Replace rows of the base in ``out``, which holds elements from ``first`` on, by the adapter's."""
        assert factors.rows is not None
        for i, row in enumerate(rows.indices):
            begin, end = max(row * columns, first), min((row + 1) * columns, first + out.size)
            if begin < end:
                out[begin - first : end - first] = factors.rows[
                    i, begin - row * columns : end - row * columns
                ]

    def _check_twin(self, change: TensorUpdate, offset: int, size: int, tensor: Tensor) -> None:
        """Compare the two copies that an adapter stores of a tied tensor. Errors: ModelError."""
        width, twin_width = (
            dtypes.DTYPES[tensor.dtype].bytes,
            dtypes.DTYPES[self.adapter.files.tensors[change.twin].dtype].bytes,
        )
        for first in range(offset // width, -(-(offset + size) // width), CHUNK):
            count = min(CHUNK, -(-(offset + size) // width) - first)
            left, right = bytearray(count * twin_width), bytearray(count * twin_width)
            self.adapter.files.read_into(change.replaced, first * twin_width, memoryview(left))
            self.adapter.files.read_into(change.twin, first * twin_width, memoryview(right))
            if left != right:
                raise ModelError(
                    f"{self.label}: the adapter's {change.replaced} and {change.twin} differ, but replace "
                    "tensors that are tied; expected equal values. Remove the one that is not meant."
                )

    @staticmethod
    def _apply_dora(factors: _LoadedFactors, first: int, out: np.ndarray) -> None:
        """Multiply by DoRA's factors."""
        columns = factors.right.shape[2]
        with np.errstate(all="ignore"):
            for row, rows, column, count in _rectangles(first, first + out.size, columns):
                at = row * columns + column - first
                part = out[at : at + rows * count].reshape(rows, count)
                if factors.by_row is not None:
                    part *= factors.by_row[row : row + rows, None]
                if factors.by_column is not None:
                    part *= factors.by_column[column : column + count]

    def _read_raw(self, source: Source, name: str, first: int, count: int, slot: int) -> np.ndarray:
        """Read the bytes of some elements into this thread's buffer, which is reused: fresh pages are
        slow."""
        width = dtypes.DTYPES[source.tensors[name].dtype].bytes
        buffers: dict[Any, np.ndarray] = self._scratch.__dict__
        if slot not in buffers or buffers[slot].nbytes < count * width:
            buffers[slot] = np.empty(min(CHUNK, max(count, 4096)) * 8, np.uint8)
        raw = buffers[slot][: count * width]
        source.read_into(name, first * width, memoryview(raw))
        return raw

    def _read_factors(self, name: str) -> _LoadedFactors:
        change, tensor = self._changes[name], self.tensors[name]
        dtype = np.dtype(dtypes.DTYPES[tensor.dtype].storage)
        added = None
        if change.added is not None:
            scale = change.added.scale * (self.weight if not change.replaced else 1.0)
            added = self.adapter.read(change.added.bias, dtype).reshape(-1) * dtype.type(scale)
            if change.is_swapped:
                added = np.roll(added, added.size // 2)
        if change.joined:
            return self._join_factors(change, tensor.shape[0], dtype)
        if change.update is None:
            rows = self.adapter.read(change.rows.name, dtype) if change.rows is not None else None
            return _LoadedFactors(NO_FACTOR, NO_FACTOR, added, rows=rows)
        if change.update.difference:
            return self._with_norms(name, self._shape_alone(tensor.shape, dtype), dtype)
        left, right = self.adapter.matrices(change.update, dtype)
        if change.twin_update is not None:
            other = self.adapter.matrices(change.twin_update, dtype)
            if not np.array_equal(other[0], right.transpose(0, 2, 1)) or not np.array_equal(
                other[1], left.transpose(0, 2, 1)
            ):
                raise ModelError(
                    f"{self.label}: the adapter's {change.update.left} and {change.twin_update.right} "
                    "differ, but are factors of one tied tensor; expected one to be the other's transpose. "
                    "Remove the one that is not meant."
                )
        if change.expert is not None:
            left, right = left[change.expert : change.expert + 1], right[change.expert : change.expert + 1]
        if change.part is not None:
            left = left[:, slice(*change.part)]
        if change.is_swapped:
            left = np.roll(left, left.shape[1] // 2, axis=1)
        if change.is_transposed:
            left, right = right.transpose(0, 2, 1), left.transpose(0, 2, 1)
        factors = _LoadedFactors(np.ascontiguousarray(left), np.ascontiguousarray(right))
        return self._with_norms(name, factors, dtype)

    @staticmethod
    def _shape_alone(shape: tuple[int, ...], dtype: np.dtype[Any]) -> _LoadedFactors:
        """Factors of rank 0 of a tensor whose difference is read by blocks."""
        rows, columns = shape[0], math.prod(shape[1:])
        return _LoadedFactors(np.empty((1, rows, 0), dtype), np.empty((1, 0, columns), dtype))

    def _with_norms(self, name: str, factors: _LoadedFactors, dtype: np.dtype[Any]) -> _LoadedFactors:
        """Add DoRA's factors, magnitude / norm, if the update has magnitudes. Errors: ModelError for a norm of 0."""
        change = self._changes[name]
        update = change.update
        assert update is not None
        if not update.magnitude:
            return factors
        if name not in self._dora:
            with np.errstate(all="ignore"):
                magnitude = self.adapter.read(update.magnitude, dtype).reshape(-1).astype(np.float64)
                if change.part is not None:
                    magnitude = magnitude[slice(*change.part)]
                if change.is_swapped and not update.is_magnitude_by_input:
                    magnitude = np.roll(magnitude, magnitude.size // 2)
                factor = (magnitude / self._norms(name, factors)).astype(dtype)
            if not np.isfinite(factor).all():
                raise ModelError(
                    f"{self.label}: {name}: a row of the adapted weight is 0; DoRA needs a direction for it. "
                    "Check the adapter."
                )
            self._dora[name] = factor
        factor = self._dora[name]
        if update.is_magnitude_by_input:
            factor = np.repeat(factor, factors.right.shape[2] // factor.size)
        is_by_column = change.is_transposed or update.is_magnitude_by_input
        return _LoadedFactors(
            factors.left, factors.right, None, *((None, factor) if is_by_column else (factor, None))
        )

    def _join_factors(self, change: TensorUpdate, rows: int, dtype: np.dtype[Any]) -> _LoadedFactors:
        """Join several updates into one: their right factors stacked, each left factor, with its scale, at
        its rows."""
        pairs = [(update, first, *self.adapter.matrices(update, dtype)) for update, first in change.joined]
        ranks = sum(right.shape[1] for *_, right in pairs)
        left_factor = np.zeros((1, rows, ranks), dtype)
        at = 0
        for update, first, left, right in pairs:
            left_factor[0, first : first + left.shape[1], at : at + left.shape[2]] = left[0] * dtype.type(
                update.scale
            )
            at += right.shape[1]
        return _LoadedFactors(
            left_factor, np.ascontiguousarray(np.concatenate([right for *_, right in pairs], 1))
        )

    def _norms(self, name: str, factors: _LoadedFactors) -> np.ndarray:
        """The norm of each row of ``W + s B A``, of each column if the tensor is transposed, or of all columns of
        each input: one pass, in float64."""
        rows, columns = factors.left.shape[1], factors.right.shape[2]
        change = self._changes[name]
        by_input = change.update is not None and change.update.is_magnitude_by_input
        by_column = change.is_transposed or by_input
        squares = np.zeros(columns if by_column else rows)
        # Fixed blocks: the sums do not depend on which part of the tensor is read.
        height, width = max(CHUNK // columns, 1), min(CHUNK, columns)
        values = np.empty(height * width, factors.left.dtype)
        for row in range(0, rows, height):
            stop = min(row + height, rows)
            for first in range(0, columns, width):
                count = (stop - row) * min(width, columns - first)
                self._compute(name, factors, row * columns + first, values[:count], plain=True)
                part = values[:count].astype(np.float64).reshape(stop - row, -1) ** 2
                if by_column:
                    squares[first : first + part.shape[1]] += part.sum(0)
                else:
                    squares[row:stop] += part.sum(1)
        if by_input:
            squares = squares.reshape(self.tensors[name].shape[1], -1).sum(1)
        norms: np.ndarray = np.sqrt(squares)
        return norms

    def read(self, name: str) -> np.ndarray:
        return read_tensor(self, name)

    def identity(self) -> list[dict[str, Any]]:
        return [*self.base.identity(), *self.adapter.files.identity()]

    def paths(self) -> list[Path]:
        return [*self.base.paths(), *self.adapter.files.paths()]

    def _factor_bytes(self) -> list[int]:
        """The bytes of each changed tensor's factors, the largest first."""
        sizes = []
        for name, change in self._changes.items():
            width = dtypes.DTYPES[self.tensors[name].dtype].bytes
            by_blocks = change.update.difference if change.update is not None else ""
            held = [p for p in self._parts(change) if p != by_blocks]
            sizes.append(
                width
                * max(len(change.joined), 1) ** 2
                * sum(self.adapter.files.tensors[p].elements for p in held)
            )
        return sorted(sizes, reverse=True)

    @property
    def held_bytes(self) -> int:
        magnitudes = [
            c.update.magnitude for c in self._changes.values() if c.update is not None and c.update.magnitude
        ]
        norms = 8 * sum(self.adapter.files.tensors[m].elements for m in magnitudes)
        return (
            self.base.held_bytes
            + self.adapter.files.held_bytes
            + sum(self._factor_bytes()[:MAX_CACHED_FACTORS])
            + norms
        )

    @property
    def reading_bytes(self) -> int:
        """The bytes of the base (twice, where a weight needs them) and values that cannot be computed in
        place; the factors of a tensor that is no longer cached, with their sources; and DoRA's norms while
        they are summed."""
        largest = max([0, *self._factor_bytes()])
        norms = (
            8 * CHUNK + 2 * 8 * CHUNK
            if any(c.update and c.update.magnitude for c in self._changes.values())
            else 0
        )
        blocks = 2 * 8 * CHUNK if any(c.update and c.update.difference for c in self._changes.values()) else 0
        factors = self.adapter.files.reading_bytes
        return self.base.reading_bytes + factors + 3 * 8 * CHUNK + 2 * largest + norms + blocks

    def close(self) -> None:
        self.base.close()
        self.adapter.close()

    def __enter__(self) -> AdaptedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<model {self.label}: {len(self.tensors)} tensors, {len(self._changes)} of them adapted>"


def repositories(source: Source) -> list[Origin]:
    """The hub repositories that a model comes from: those of its base, and of its adapter or task vector."""
    source = unwrap(source)
    if parts := getattr(source, "parts", ()):
        return [place for part in parts for place in repositories(part)]
    return [source.origin] if source.origin is not None else []


def _kernel(dtype: np.dtype[Any], terms: int) -> Callable[..., int]:
    """The kernel that adds a product to a matrix, of which ``terms`` products of two numbers are still to be added."""
    return kernel_for(FoldKernel("float64" if dtype == np.float64 else "float32"), terms)


def _note_on_base(label: str, named: str, base: Source) -> str:
    """Say whether an adapter is applied to the model that it names as its base; empty if it is, or names none."""
    of_adapter, of_base = short_name(named), short_name(base.label)
    is_decoded = isinstance(base, DequantisedModel)
    if not named or (of_adapter == of_base and not is_decoded):
        return ""
    if of_adapter == of_base:
        return (
            f"{label}: the adapter was trained on {named}, whose decoded weights it is applied to: the result is the "
            "model that was trained. On the full-precision model the result is another one."
        )
    if is_decoded and QUANTISED.sub("", of_base) == of_adapter:
        return (
            f"{label}: the adapter was trained on {named}, here it is applied to {Path(base.label).name}, which is "
            "quantised: the error of quantisation stays in the result. Use the model that it was trained on, unless "
            "that was quantised while it was trained (QLoRA)."
        )
    if QUANTISED.sub("", of_adapter) == of_base and not is_decoded:
        return (
            f"{label}: the adapter was trained on {named}, a quantised model; here it is applied to the "
            f"full-precision {base.label}, as is usual. What it learned to correct of the quantisation "
            "error stays in it."
        )
    return (
        f"{label}: the adapter was trained on {named}, here it is applied to {base.label}. Check that "
        "this is intended."
    )


def _by_expert(first: int, count: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Split elements of experts of ``size`` each into (expert, first element in it, position, elements)."""
    at = 0
    while at < count:
        expert, begin = divmod(first + at, size)
        part = min(size - begin, count - at)
        yield expert, begin, at, part
        at += part


def _in_halves(first: int, count: int, half: int) -> Iterator[tuple[int, int, int]]:
    """Split elements from ``first`` on, of a tensor whose halves of ``half`` elements stand in the other order, into (first element as
    stored, position, elements); all at once where ``half`` is 0.

    >>> list(_in_halves(1, 6, 4)), list(_in_halves(1, 6, 0))
    ([(5, 0, 3), (0, 3, 3)], [(1, 0, 6)])
    """
    at = 0
    while at < count:
        place = first + at
        part = min(half - place % half, count - at) if half else count
        yield (place + half) % (2 * half) if half else place, at, part
        at += part


def _rectangles(first: int, last: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Split elements of a matrix into (row, rows, column, columns): the rest of a row, whole rows, the start
    of a row."""
    while first < last:
        row, column = divmod(first, columns)
        rows = (last - first) // columns if column == 0 else 0
        count = columns if rows else min(columns - column, last - first)
        rows = max(rows, 1)
        yield row, rows, column, count
        first += rows * count
