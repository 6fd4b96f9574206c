"""A base with a LoRA adapter applied while it is read: ``W + s B A`` by blocks, never a merged copy on the disk."""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.checkpoint.adapter import CONFIG, Adapter, Update, open_adapter
from alnico.checkpoint.computed import CHUNK, read_computed
from alnico.checkpoint.model import Described, Model, Shard, Source, Tensor, open_model, read_tensor, split_weight, unwrapped
from alnico.errors import ModelError
from alnico.kernels.build import compiled
from alnico.kernels.folding import FoldKernel
from alnico.kernels.shape import CODES
from alnico.numerics import dtypes

if TYPE_CHECKING:
    from alnico.checkpoint.hub import Repository

HELD = 4
"""Tensors whose factors stay in memory: those of the tensor being read, and of those that other threads are at."""

TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text")
"""Types of models that store experts as (experts, in, out). Asked only where the shape is square and does not tell."""

EXPERT_PARTS = {"gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")), "down_proj": (("down_proj", "w2"),)}
"""Of a fused parameter of experts, the matrices that checkpoints store one expert at a time, from its first output on."""


@dataclass(frozen=True)
class _Change:
    """What an adapter does to one tensor of the base."""

    update: Update | None = None
    is_turned: bool = False
    """The product is the transpose of what is stored: embeddings, and GPT-2's linear layers."""
    expert: int | None = None
    """The expert whose matrix this is, where the base stores them one by one."""
    rows: tuple[int, int] | None = None
    """The rows of the update that this is, where the base stores the parts of a fused matrix one by one."""
    added: Update | None = None
    """The update whose bias is added to this."""
    replaced: str = ""


@dataclass(frozen=True)
class _Factors:
    """What is held of a changed tensor: ``left`` (experts, rows, r) and ``right`` (experts, r, columns), or what is ``added`` to a bias."""

    left: np.ndarray
    right: np.ndarray
    added: np.ndarray | None = None
    by_row: np.ndarray | None = None
    by_column: np.ndarray | None = None
    """DoRA's factors, magnitude / norm, on rows or on columns."""


QUANTISED = re.compile(
    r"[-_.](unsloth-)?(bnb|gptq|awq|fp8|nf4|int[48]|[48]bit|quantized\.w\w+)([-_.](4bit|8bit|int[48]|dynamic|block))*$"
)
"""How the names of quantised models end, in lower case."""

NOTHING = np.empty((0, 0, 0), np.float32)

_compiling = threading.Lock()


class _Recent:
    """The factors of the tensors that were read last; each is made once, by the thread that asks first."""

    def __init__(self, make: Callable[[str], _Factors]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._held: OrderedDict[str, tuple[threading.Lock, list[_Factors]]] = OrderedDict()

    def __call__(self, name: str) -> _Factors:
        with self._lock:
            entry = self._held.setdefault(name, (threading.Lock(), []))
            self._held.move_to_end(name)
            if len(self._held) > HELD:
                self._held.popitem(last=False)
        lock, made = entry
        with lock:
            if not made:
                made.append(self._make(name))
            return made[0]


def _last_part(reference: str) -> str:
    return Path(reference.partition("@")[0]).name.lower()


class AdaptedModel:
    """A base and an adapter as one source: ``W + weight * (the adapted W - W)``. Made by :func:`open_adapted`.

    The arithmetic is float32 (float64 if the base or the adapter is), element by element, in the order of the rank: which part
    of a tensor is asked for changes no bit. The base may be adapted itself: then this adapter changes what that one made.
    """

    def __init__(self, label: str, base: Model, adapter: Adapter, weight: float = 1.0) -> None:
        self.label = label
        self.base = base
        self.adapter = adapter
        self.weight = weight
        self._changes = _changes(label, base, adapter)
        self._scratch = threading.local()
        self._recent = _Recent(self._read_factors)
        self._dora: dict[str, np.ndarray] = {}
        self.tensors: Mapping[str, Tensor] = {name: self._tensor(name, tensor) for name, tensor in base.tensors.items()}
        self.notes = [*base.notes, *adapter.files.notes]
        named = adapter.trained_on
        of_base = base.label if not isinstance(base, AdaptedModel) else base.innermost.label
        if named and QUANTISED.sub("", _last_part(named)) == _last_part(of_base) != _last_part(named):
            self.notes.append(
                f"{label}: the adapter was trained on {named}, a quantised model; it is folded into the full precision of {of_base}, as is "
                "usual. What it made up for of the quantisation's error stays in it."
            )
        elif named and _last_part(named) != _last_part(of_base):
            self.notes.append(f"{label}: the adapter was trained on {named}, here it changes {of_base}. Check that this is meant.")

    def weighted(self, name: str) -> str:
        """How a reference writes the adapter, by a name for it: with its weight."""
        return name if self.weight == 1 else f"{self.weight!r}*{name}"

    @property
    def innermost(self) -> Model:
        """The base without any adapter."""
        return self.base.innermost if isinstance(self.base, AdaptedModel) else self.base

    def _tensor(self, name: str, of_base: Tensor) -> Tensor:
        change = self._changes.get(name)
        if change is None:
            return of_base
        parts = self._parts(change)
        begin = self.adapter.files.tensors[change.replaced] if change.replaced else of_base
        if not parts and self.weight == 1:
            return Described(begin.dtype, of_base.shape, of_base.nominal)
        wide = "F64" in [of_base.dtype, begin.dtype, *(self.adapter.files.tensors[p].dtype for p in parts)]
        return Described("F64" if wide else "F32", of_base.shape, of_base.nominal)

    @staticmethod
    def _parts(change: _Change) -> list[str]:
        """The tensors of the adapter that are computed with."""
        update = change.update
        of_update = [update.left, update.right, update.magnitude] if update is not None else []
        return [p for p in (*of_update, change.added.bias if change.added is not None else "") if p]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.base.config

    @property
    def directory(self) -> Path | None:
        return self.base.directory

    @property
    def origin(self) -> Repository | None:
        """None: it is two models, see :func:`repositories`."""
        return None

    @property
    def shards(self) -> Sequence[Shard]:
        return [*self.base.shards, *self.adapter.files.shards]

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        names, files = list(tensors), self.adapter.files
        of_adapter = list(files.tensors) if any(name in self._changes for name in names) else []
        needed = {f"{CONFIG}/{file}": size for file, size in files.absent(of_adapter, False).items()}
        return {**{f"base/{file}": size for file, size in self.base.absent(names, side_files).items()}, **needed}

    def fetch(self, files: Iterable[str], tell: Callable[[int], None] | None = None) -> None:
        wanted = list(files)
        self.base.fetch([f.removeprefix("base/") for f in wanted if f.startswith("base/")], tell)
        self.adapter.files.fetch([f.removeprefix(f"{CONFIG}/") for f in wanted if f.startswith(f"{CONFIG}/")], tell)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        change = self._changes.get(name)
        if change is None:
            self.base.read_into(name, offset, buffer)
            return
        if self.weight == 1 and not self._parts(change):
            self.adapter.files.read_into(change.replaced, offset, buffer)
            return
        real = np.dtype(dtypes.DTYPES[self.tensors[name].dtype].storage)
        factors = self._recent(name)
        read_computed(offset, buffer, real, lambda first, out: self._compute(name, factors, first, out))

    def _compute(self, name: str, factors: _Factors, first: int, out: np.ndarray, *, plain: bool = False) -> None:
        """Fill ``out`` with elements ``first`` on of a changed tensor; ``plain`` leaves DoRA's factors and the weight out."""
        change = self._changes[name]
        source: Source = self.adapter.files if change.replaced else self.base
        stored = change.replaced or name
        code = source.tensors[stored].dtype
        raw = self._raw(source, stored, first, out.size, 0)
        update = change.update
        is_plain = update is None or not update.magnitude
        if update is None:
            out[:] = dtypes.decode(raw, code)
            if factors.added is not None:
                out += factors.added[first : first + out.size]
        else:
            rows, columns = factors.left.shape[1], factors.right.shape[2]
            width = dtypes.DTYPES[code].bytes
            scale = update.scale * (self.weight if is_plain and not change.replaced else 1.0)
            for expert, begin, at, count in _by_expert(first, out.size, rows * columns):
                _kernel(out.dtype)(
                    raw[at * width : (at + count) * width],
                    CODES[code],
                    factors.left[expert],
                    factors.right[expert],
                    scale,
                    begin,
                    out[at : at + count],
                )
        if plain:
            return
        if factors.by_row is not None or factors.by_column is not None:
            self._turn(factors, first, out)
        if self.weight != 1 and (change.replaced or not is_plain):
            begun = np.empty_like(out)
            begun[:] = dtypes.decode(self._raw(self.base, name, first, out.size, 1), self.base.tensors[name].dtype)
            with np.errstate(all="ignore"):  # what overflows is an infinity, which is refused where it is merged
                out -= begun
                out *= out.dtype.type(self.weight)
                out += begun

    @staticmethod
    def _turn(factors: _Factors, first: int, out: np.ndarray) -> None:
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

    def _raw(self, source: Source, name: str, first: int, count: int, place: int) -> np.ndarray:
        """The bytes of some elements, in this thread's memory: it is used again, since fresh pages are slow."""
        width = dtypes.DTYPES[source.tensors[name].dtype].bytes
        held: dict[Any, np.ndarray] = self._scratch.__dict__
        if place not in held or held[place].nbytes < count * width:
            held[place] = np.empty(min(CHUNK, max(count, 4096)) * 8, np.uint8)
        raw = held[place][: count * width]
        source.read_into(name, first * width, memoryview(raw))
        return raw

    def _read_factors(self, name: str) -> _Factors:
        change, tensor = self._changes[name], self.tensors[name]
        real = np.dtype(dtypes.DTYPES[tensor.dtype].storage)
        added = None
        if change.added is not None:
            scale = change.added.scale * (self.weight if not change.replaced else 1.0)
            added = self.adapter.read(change.added.bias, real) * real.type(scale)
        if change.update is None:
            return _Factors(NOTHING, NOTHING, added)
        left, right = self.adapter.matrices(change.update, real)
        if change.expert is not None:
            left, right = left[change.expert : change.expert + 1], right[change.expert : change.expert + 1]
        if change.rows is not None:
            left = left[:, slice(*change.rows)]
        if change.is_turned:
            left, right = right.transpose(0, 2, 1), left.transpose(0, 2, 1)
        factors = _Factors(np.ascontiguousarray(left), np.ascontiguousarray(right))
        if not change.update.magnitude:
            return factors
        if name not in self._dora:
            with np.errstate(all="ignore"):
                magnitude = self.adapter.read(change.update.magnitude, real).reshape(-1).astype(np.float64)
                factor = (magnitude / self._norms(name, factors)).astype(real)
            if not np.isfinite(factor).all():
                raise ModelError(
                    f"{self.label}: {name}: a row of the adapted weight is 0, so that DoRA has no direction for it. Check the adapter."
                )
            self._dora[name] = factor
        factor = self._dora[name]
        return _Factors(factors.left, factors.right, None, *((None, factor) if change.is_turned else (factor, None)))

    def _norms(self, name: str, factors: _Factors) -> np.ndarray:
        """The norm of each row of ``W + s B A``, or of each column if the tensor is turned: one pass, in float64."""
        rows, columns = factors.left.shape[1], factors.right.shape[2]
        by_column = self._changes[name].is_turned
        squares = np.zeros(columns if by_column else rows)
        height, width = max(CHUNK // columns, 1), min(CHUNK, columns)  # blocks of the tensor, whatever is asked of it
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
        norms: np.ndarray = np.sqrt(squares)
        return norms

    def read(self, name: str) -> np.ndarray:
        return read_tensor(self, name)

    def identity(self) -> list[dict[str, Any]]:
        return [*self.base.identity(), *self.adapter.files.identity()]

    def paths(self) -> list[Path]:
        return [*self.base.paths(), *self.adapter.files.paths()]

    def _factor_bytes(self) -> list[int]:
        """What the factors of each changed tensor take, the largest first."""
        sizes = []
        for name, change in self._changes.items():
            width = dtypes.DTYPES[self.tensors[name].dtype].bytes
            sizes.append(width * sum(self.adapter.files.tensors[p].elements for p in self._parts(change)))
        return sorted(sizes, reverse=True)

    @property
    def held_bytes(self) -> int:
        magnitudes = [c.update.magnitude for c in self._changes.values() if c.update is not None and c.update.magnitude]
        norms = 8 * sum(self.adapter.files.tensors[m].elements for m in magnitudes)
        return self.base.held_bytes + self.adapter.files.held_bytes + sum(self._factor_bytes()[:HELD]) + norms

    @property
    def reading_bytes(self) -> int:
        """The bytes of the base (twice, where a weight needs them), values that cannot be made in place; the factors of a tensor that
        is no longer held, with what they are made from; and the norms of DoRA while they are summed."""
        largest = max([0, *self._factor_bytes()])
        norms = 8 * CHUNK + 2 * 8 * CHUNK if any(c.update and c.update.magnitude for c in self._changes.values()) else 0
        return self.base.reading_bytes + 3 * 8 * CHUNK + 2 * largest + norms

    def close(self) -> None:
        self.base.close()
        self.adapter.close()

    def __enter__(self) -> AdaptedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<model {self.label}: {len(self.tensors)} tensors, {len(self._changes)} of them adapted>"


def open_adapted(label: str, base: str, adapter: str, *, offline: bool = False) -> AdaptedModel:
    """Open a base with an adapter, which may have a weight before it (``0.5*adapter``); reads headers only.

    Errors: ModelError for what is no adapter, for an option of its config that this version does not apply, for tensors that
    match none of the base and for shapes that do not fit; HubError; what :func:`open_model` raises for the base.
    """
    weight, reference = split_weight(adapter)
    opened = open_model(base, offline=offline)
    try:
        files = open_adapter(reference, offline=offline)
        try:
            return AdaptedModel(label, opened, files, weight)
        except BaseException:
            files.close()
            raise
    except BaseException:
        opened.close()
        raise


def repositories(source: Source) -> list[Repository]:
    """The repositories on the hub that a model comes from: those of its base and of its adapter."""
    source = unwrapped(source)
    if isinstance(source, AdaptedModel):
        return [*repositories(source.base), *repositories(source.adapter.files)]
    return [source.origin] if source.origin is not None else []


def _kernel(real: np.dtype[Any]) -> Callable[..., int]:
    with _compiling:
        return compiled(FoldKernel("float64" if real == np.float64 else "float32"))


def _changes(label: str, base: Model, adapter: Adapter) -> dict[str, _Change]:
    """What the adapter does to which tensors of the base. Errors: ModelError naming a tensor that fits nowhere."""
    find = _Names(label, base.tensors)
    changes: dict[str, _Change] = {}
    for wanted, name in adapter.replaced.items():
        changes[find(name, wanted)] = _Change(replaced=name)
    for update in adapter.updates.values():
        for target, change in _targets(label, base, adapter, update, find):
            changes[target] = _Change(
                change.update, change.is_turned, change.expert, change.rows, None, changes.get(target, change).replaced
            )
        if update.bias:
            target = find(update.bias, f"{update.module}.bias")
            changes[target] = _Change(added=update, replaced=changes[target].replaced if target in changes else "")
    for target, change in changes.items():
        _check_shapes(label, target, change, base, adapter)
    return changes


def _targets(label: str, base: Model, adapter: Adapter, update: Update, find: _Names) -> list[tuple[str, _Change]]:
    """The tensors of the base that an update is for: one, or the matrices of experts that are stored one by one."""
    rows, columns = adapter.shape(update)
    if update.parameters == ("weight",):
        target = find(update.right, f"{update.module}.weight")
        is_turned = update.is_embedding or _is_turned(base.tensors[target].shape, adapter, update)
        return [(target, _Change(update, is_turned))]
    fitting: list[list[tuple[str, _Change]]] = []
    wanted: dict[str, tuple[int, ...]] = {}
    for parameter in update.parameters:
        name = find.found(f"{update.module}.{parameter}")
        if name is not None:
            shape = wanted[name] = base.tensors[name].shape
            matrix = shape if update.experts == 1 and len(shape) == 2 else shape[1:]
            if (
                len(shape) in (2, 3)
                and math.prod(shape) == update.experts * rows * columns
                and matrix in ((rows, columns), (columns, rows))
            ):
                is_square = rows == columns
                turned = matrix != (rows, columns) or (is_square and base.config.get("model_type") in TRANSPOSED_EXPERTS)
                fitting.append([(name, _Change(update, turned))])
        else:
            apart = _stored_apart(base, update, parameter, rows, columns)
            if apart:
                fitting.append(apart)
    if len(fitting) == 1:
        return fitting[0]
    if len(fitting) > 1:
        raise ModelError(
            f"{label}: {update.left} may be for {' or '.join(update.parameters)} of {update.module}, whose shapes are equal; the adapter "
            "does not say which. Merge it into its base with PEFT, and give that."
        )
    found = "; ".join(f"{name} is {shape}" for name, shape in wanted.items()) or "the base has no such tensor"
    raise ModelError(
        f"{label}: {update.left} is for {' or '.join(update.parameters)} of {update.module!r}, as {update.experts} matrices of "
        f"({rows}, {columns}); {found}. Use the base that the adapter was trained on."
    )


def _stored_apart(base: Model, update: Update, parameter: str, rows: int, columns: int) -> list[tuple[str, _Change]]:
    """The matrices of a fused parameter of experts, where the base stores each by itself: ``...experts.3.w1.weight``."""
    parts = EXPERT_PARTS.get(parameter, ())
    layer, _, block = update.module.removesuffix(".experts").rpartition(".")
    if not parts or not update.module.endswith(".experts") or rows % len(parts):
        return []
    height = rows // len(parts)
    for module in dict.fromkeys((f"{layer}.{block}", f"{layer}.block_sparse_moe", f"{layer}.mlp")):
        found = []
        for expert in range(update.experts):
            for i, names in enumerate(parts):
                for name in (f"{module}.experts.{expert}.{n}.weight" for n in names):
                    if name in base.tensors and base.tensors[name].shape == (height, columns):
                        found.append((name, _Change(update, False, expert, (i * height, (i + 1) * height))))
        if len(found) == update.experts * len(parts):
            return found
    return []


class _Names:
    """Finds the base's tensor that a name of the adapter means: as it is, or with one component more or less at its begin."""

    def __init__(self, label: str, tensors: Mapping[str, Tensor]) -> None:
        self._label = label
        self._tensors = tensors
        self._firsts = sorted({name.split(".")[0] for name in tensors})

    def candidates(self, wanted: str) -> list[str]:
        if wanted in self._tensors:
            return [wanted]
        named = [wanted.partition(".")[2], *(f"{first}.{wanted}" for first in self._firsts)]
        return [c for c in named if c in self._tensors]

    def found(self, wanted: str) -> str | None:
        """The one tensor that is meant; None if there is none, or several."""
        candidates = self.candidates(wanted)
        return candidates[0] if len(candidates) == 1 else None

    def __call__(self, name: str, wanted: str) -> str:
        found = self.candidates(wanted)
        if len(found) == 1:
            return found[0]
        many = f"; it could be {' or '.join(found)}" if found else ""
        raise ModelError(
            f"{self._label}: the adapter's {name} is for {wanted!r}, which the base does not have{many}. "
            "Use the base that the adapter was trained on."
        )


def _is_turned(shape: tuple[int, ...], adapter: Adapter, update: Update) -> bool:
    """Is a matrix stored (in, out)? Its shape says so, as in PEFT its layer's kind does; the config is asked where it is square."""
    if len(shape) != 2:
        return False
    rows, columns = adapter.shape(update)
    return shape == (columns, rows) and (rows != columns or bool(adapter.config.get("fan_in_fan_out")))


def _check_shapes(label: str, target: str, change: _Change, base: Model, adapter: Adapter) -> None:
    tensor: Tensor = base.tensors[target]
    tensors: Mapping[str, Tensor] = adapter.files.tensors
    shape, update = tensor.shape, change.update

    def refuse(part: str, expected: object) -> ModelError:
        return ModelError(
            f"{label}: {target} is {shape} in the base, and the adapter's {part} is {tensors[part].shape}, expected {expected}. "
            "Use the base that the adapter was trained on."
        )

    begin, name = (tensors[change.replaced], change.replaced) if change.replaced else (tensor, target)
    if (update is not None or change.added is not None) and begin.dtype not in dtypes.MERGEABLE:
        raise ModelError(f"{label}: {name} is {begin.dtype}, expected numbers in floating point. Use another adapter or base.")
    if change.replaced and tensors[change.replaced].shape != shape:
        raise refuse(change.replaced, "the same; a vocabulary that was extended must be extended in the base too")
    if change.added is not None and tensors[change.added.bias].shape != shape:
        raise refuse(change.added.bias, "the same")
    if update is None or update.parameters != ("weight",):
        return
    rows, columns = shape[0] if shape else 0, math.prod(shape[1:])
    if change.is_turned:
        rows, columns = columns, rows
    found = adapter.shape(update)
    if found[0] != rows:
        raise refuse(update.left, f"({rows}, {update.rank})")
    if found[1] != columns or len(shape) < 2:
        raise refuse(update.right, f"{columns} columns")
    if update.magnitude and tensors[update.magnitude].elements != rows:
        raise refuse(update.magnitude, f"{rows} numbers")


def _by_expert(first: int, count: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut elements of experts of ``size`` each into (expert, first element in it, place, elements)."""
    at = 0
    while at < count:
        expert, begin = divmod(first + at, size)
        part = min(size - begin, count - at)
        yield expert, begin, at, part
        at += part


def _rectangles(first: int, last: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut elements of a matrix into (row, rows, column, columns): a row's rest, whole rows, a row's begin."""
    while first < last:
        row, column = divmod(first, columns)
        rows = (last - first) // columns if column == 0 else 0
        count = columns if rows else min(columns - column, last - first)
        rows = max(rows, 1)
        yield row, rows, column, count
        first += rows * count
