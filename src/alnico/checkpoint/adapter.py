"""A base with a LoRA adapter applied while it is read: ``W + s B A`` by blocks of rows, never a merged copy on the disk.

What an adapter's files mean is PEFT's format, LoRA of Hu et al. 2021 (https://arxiv.org/abs/2106.09685) with the scale of rsLoRA
(https://arxiv.org/abs/2312.03732) and the magnitudes of DoRA (https://arxiv.org/abs/2402.09353).
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.checkpoint.files import check_inside
from alnico.checkpoint.model import (
    Described,
    FileModel,
    Model,
    Shard,
    Source,
    Tensor,
    is_hub_reference,
    open_model,
    open_shard,
    read_json,
    read_tensor,
)
from alnico.errors import ModelError
from alnico.numerics import dtypes

if TYPE_CHECKING:
    from alnico.checkpoint.hub import Repository

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PART = re.compile(r"\.lora_(embedding_A|embedding_B|A|B|magnitude_vector)(?:\.default)?(?:\.(weight|bias))?$")
WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save(\.default)?)(?=\.)")
"""What PEFT puts between a module and its tensors."""

CHUNK = 32_768
"""Elements computed at a time: values, sum and product stay in the second-level cache."""

READ = frozenset((
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "bias", "lora_bias",
    "init_lora_weights",
))  # fmt: skip
HARMLESS = frozenset((
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode", "target_modules",
    "exclude_modules", "modules_to_save", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
))  # fmt: skip
"""Keys of the config that say how an adapter was trained, or what its tensors say too."""

KEEPS_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base's weights as they are; pissa, olora, corda, loftq and the like change them."""


@dataclass
class _Change:
    """What an adapter does to one tensor of the base; names are those of the adapter's tensors."""

    left: str = ""
    right: str = ""
    is_turned: bool = False
    """The factors make the transpose of what is stored: embeddings, and GPT-2's linear layers."""
    magnitude: str = ""
    added: str = ""
    replaced: str = ""
    scale: float = 0.0


@dataclass(frozen=True)
class _Factors:
    """What is held of a changed tensor: ``left`` (rows, r) and ``right`` (r, columns), or what is ``added`` to a bias."""

    left: np.ndarray
    right: np.ndarray
    added: np.ndarray | None = None
    by_row: np.ndarray | None = None
    by_column: np.ndarray | None = None
    """DoRA's factors, magnitude / norm, on rows or on columns."""


NOTHING = np.empty((0, 0), np.float32)


@dataclass
class _Held:
    """Factors in memory, and the lock under which they are read."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    factors: _Factors | None = None


def _last_part(reference: str) -> str:
    return Path(reference.partition("@")[0]).name.lower()


class AdaptedModel:
    """A base and an adapter as one source. Made by :func:`open_adapted`.

    The arithmetic is float32 (float64 if the base or the adapter is), element by element, in the order of the rank: which part
    of a tensor is asked for changes no bit.
    """

    def __init__(self, label: str, base: Model, adapter: FileModel, config: Mapping[str, Any]) -> None:
        self.label = label
        self.base = base
        self.adapter = adapter
        self._changes = _changes(label, base, adapter, config)
        self._held = {name: _Held() for name in self._changes}
        self.tensors: Mapping[str, Tensor] = {name: self._tensor(name, tensor) for name, tensor in base.tensors.items()}
        self.notes = [*base.notes, *adapter.notes]
        named = str(config.get("base_model_name_or_path") or "")
        if named and _last_part(named) != _last_part(base.label):
            self.notes.append(
                f"{label}: the adapter was trained on {named}, here it changes {base.label}. Check that this is meant."
            )

    def _tensor(self, name: str, of_base: Tensor) -> Tensor:
        change = self._changes.get(name)
        if change is None:
            return of_base
        parts = [p for p in (change.left, change.right, change.magnitude, change.added) if p]
        begin = self.adapter.tensors[change.replaced] if change.replaced else of_base
        wide = "F64" in [begin.dtype, *(self.adapter.tensors[p].dtype for p in parts)]
        return Described(("F64" if wide else "F32") if parts else begin.dtype, of_base.shape, of_base.nominal)

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
        return [*self.base.shards, *self.adapter.shards]

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        names = list(tensors)
        of_adapter = list(self.adapter.tensors) if any(name in self._changes for name in names) else []
        needed = {f"{CONFIG}/{file}": size for file, size in self.adapter.absent(of_adapter, False).items()}
        return {**self.base.absent(names, side_files), **needed}

    def fetch(self, files: Iterable[str], tell: Callable[[int], None] | None = None) -> None:
        wanted = list(files)
        self.base.fetch([f for f in wanted if not f.startswith(f"{CONFIG}/")], tell)
        self.adapter.fetch([f.removeprefix(f"{CONFIG}/") for f in wanted if f.startswith(f"{CONFIG}/")], tell)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        change = self._changes.get(name)
        if change is None:
            self.base.read_into(name, offset, buffer)
            return
        if not (change.left or change.added):
            self.adapter.read_into(change.replaced, offset, buffer)
            return
        tensor = self.tensors[name]
        width = dtypes.DTYPES[tensor.dtype].bytes
        factors = self._factors(name)
        stop = offset + len(buffer)
        for first in range(offset // width, -(-stop // width), CHUNK):
            last = min(first + CHUNK, -(-stop // width))
            raw = self._values(name, factors, first, last).view(np.uint8)
            begin, end = max(first * width, offset), min(last * width, stop)
            buffer[begin - offset : end - offset] = memoryview(raw)[begin - first * width : end - first * width]

    def _values(self, name: str, factors: _Factors, first: int, last: int, *, plain: bool = False) -> np.ndarray:
        """Elements ``first`` to ``last`` of a changed tensor; ``plain`` leaves DoRA's factors out."""
        change, tensor = self._changes[name], self.tensors[name]
        source, stored = (self.adapter, change.replaced) if change.replaced else (self.base, name)
        dtype = source.tensors[stored].dtype
        width = dtypes.DTYPES[dtype].bytes
        raw = np.empty((last - first) * width, np.uint8)
        source.read_into(stored, first * width, memoryview(raw))
        values = np.array(dtypes.decode(raw, dtype), dtypes.DTYPES[tensor.dtype].storage)
        if factors.added is not None:
            values += factors.added[first:last]
            return values
        columns = factors.right.shape[1]
        with np.errstate(all="ignore"):  # what overflows is an infinity, which is refused where it is merged
            for row, rows, column, count in _rectangles(first, last, columns):
                at = row * columns + column - first
                part = values[at : at + rows * count].reshape(rows, count)
                left, right = factors.left[row : row + rows], factors.right[:, column : column + count]
                part += _product(left, right, values.dtype.type(change.scale))
                if not plain and factors.by_row is not None:
                    part *= factors.by_row[row : row + rows, None]
                if not plain and factors.by_column is not None:
                    part *= factors.by_column[column : column + count]
        return values

    def _factors(self, name: str) -> _Factors:
        """The factors of a tensor, read when they are first asked for."""
        held = self._held[name]
        with held.lock:
            if held.factors is None:
                held.factors = self._read_factors(name)
            return held.factors

    def _read_factors(self, name: str) -> _Factors:
        change, tensor = self._changes[name], self.tensors[name]
        real = np.dtype(dtypes.DTYPES[tensor.dtype].storage)

        def read(part: str) -> np.ndarray:
            values = read_tensor(self.adapter, part).astype(real)
            if not np.isfinite(values).all():
                raise ModelError(
                    f"{self.label}: {part} has a NaN or an infinity; expected finite numbers. Mend or leave out this adapter."
                )
            return values

        if change.added:
            return _Factors(NOTHING, NOTHING, read(change.added) * real.type(change.scale))
        left, right = read(change.left), read(change.right)
        left, right = left.reshape(left.shape[0], -1), right.reshape(right.shape[0], -1)
        if change.is_turned:
            left, right = right.T, left.T
        factors = _Factors(np.ascontiguousarray(left), np.ascontiguousarray(right))
        if not change.magnitude:
            return factors
        with np.errstate(all="ignore"):
            factor = (read(change.magnitude).reshape(-1).astype(np.float64) / self._norms(name, factors)).astype(real)
        if not np.isfinite(factor).all():
            raise ModelError(
                f"{self.label}: {name}: a row of the adapted weight is 0, so that DoRA has no direction for it. Check the adapter."
            )
        return _Factors(factors.left, factors.right, None, *((None, factor) if change.is_turned else (factor, None)))

    def _norms(self, name: str, factors: _Factors) -> np.ndarray:
        """The norm of each row of ``W + s B A``, or of each column if the tensor is turned: one pass, in float64."""
        rows, columns = len(factors.left), factors.right.shape[1]
        by_column = self._changes[name].is_turned
        squares = np.zeros(columns if by_column else rows)
        height, width = max(CHUNK // columns, 1), min(CHUNK, columns)  # blocks of the tensor, whatever is asked of it
        for row in range(0, rows, height):
            stop = min(row + height, rows)
            for first in range(0, columns, width):
                last = first + (stop - row) * min(width, columns - first)
                part = self._values(name, factors, row * columns + first, row * columns + last, plain=True)
                part = part.astype(np.float64).reshape(stop - row, -1) ** 2
                if by_column:
                    squares[first : first + part.shape[1]] += part.sum(0)
                else:
                    squares[row:stop] += part.sum(1)
        norms: np.ndarray = np.sqrt(squares)
        return norms

    def read(self, name: str) -> np.ndarray:
        return read_tensor(self, name)

    def identity(self) -> list[dict[str, Any]]:
        return [*self.base.identity(), *self.adapter.identity()]

    def paths(self) -> list[Path]:
        return [*self.base.paths(), *self.adapter.paths()]

    @property
    def held_bytes(self) -> int:
        factors = 0
        for name, change in self._changes.items():
            width = dtypes.DTYPES[self.tensors[name].dtype].bytes
            parts = [p for p in (change.left, change.right, change.magnitude, change.added) if p]
            factors += width * sum(self.adapter.tensors[p].elements for p in parts)
        return self.base.held_bytes + self.adapter.held_bytes + factors

    @property
    def reading_bytes(self) -> int:
        """The bytes of the base, the values, their sum, a product, and the norms of DoRA while they are summed."""
        return self.base.reading_bytes + 6 * 8 * CHUNK

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
    """Open a base with an adapter; reads headers only.

    Errors: ModelError for what is no adapter, for an option of its config that this version does not apply, for tensors that
    match none of the base and for shapes that do not fit; HubError; what :func:`open_model` raises for the base.
    """
    opened = open_model(base, offline=offline)
    try:
        files = _open_adapter(adapter, offline)
        try:
            return AdaptedModel(label, opened, files, _checked_config(files))
        except BaseException:
            files.close()
            raise
    except BaseException:
        opened.close()
        raise


def repositories(source: Source) -> list[Repository]:
    """The repositories on the hub that a model comes from: those of its base and of its adapter."""
    if isinstance(source, AdaptedModel):
        return [*repositories(source.base), *repositories(source.adapter)]
    return [source.origin] if source.origin is not None else []


def _open_adapter(reference: str, offline: bool) -> FileModel:
    location = Path(reference).expanduser()
    if location.is_dir():
        names = _adapter_names(reference, [p.name for p in location.iterdir()])
        for name in (CONFIG, *names):
            check_inside(location / name, location)
        return FileModel(reference, location, [open_shard(location / n) for n in names])
    if not location.exists() and is_hub_reference(reference):
        from alnico.checkpoint.hub import open_from_hub

        return open_from_hub(reference, offline=offline, choose=lambda where, names, *_: _adapter_names(where, names))
    raise ModelError(
        f"{reference}: is no directory, expected that of a LoRA adapter, with {CONFIG} and {WEIGHTS[0]}. Check the path."
    )


def _adapter_names(where: str, names: Collection[str]) -> list[str]:
    weights = [n for n in WEIGHTS if n in names]
    if CONFIG not in names or not weights:
        missing = CONFIG if CONFIG not in names else f"{WEIGHTS[0]} and no {WEIGHTS[1]}"
        raise ModelError(f"{where}: has no {missing}, expected a LoRA adapter as PEFT saves it. Check the path.")
    return weights[:1]


def _checked_config(adapter: FileModel) -> Mapping[str, Any]:
    """The adapter's config, if there is nothing in it that would make another result than ours."""
    config = read_json(adapter.location / CONFIG)
    where = f"{adapter.label}: {CONFIG}"
    kind, begin = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        raise ModelError(
            f"{where}: peft_type is {kind!r}, expected 'LORA'. Merge this adapter into its base with PEFT, and give that."
        )
    others = [key for key, value in config.items() if key not in READ | HARMLESS and value not in (None, False, 0, "", [], {})]
    if begin not in KEEPS_THE_BASE:
        others.append("init_lora_weights")
    if others:
        key = others[0]
        raise ModelError(
            f"{where}: {key} is {str(config[key])[:60]!r}, which changes what the adapter does; this version applies plain LoRA, rsLoRA "
            "and DoRA. Merge it into its base with PEFT, and give that."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ModelError(
                f"{where}: {key} is {str(config[key])[:60]!r}, expected a mapping from modules to numbers. Check the adapter."
            )
    return config


def _changes(label: str, base: Model, adapter: FileModel, config: Mapping[str, Any]) -> dict[str, _Change]:
    """What the adapter does to which tensors of the base. Errors: ModelError naming a tensor that fits nowhere."""
    find = _Names(label, base.tensors)
    changes: dict[str, _Change] = {}
    modules: dict[str, str] = {}
    for name in adapter.tensors:
        plain = name.removeprefix("base_model.model.")
        part = PART.search(plain)
        module = WRAPPED.sub("", plain[: part.start()] if part else plain)
        if part is None:
            changes.setdefault(find(name, module), _Change()).replaced = name
        elif part[2] == "bias":
            modules[name] = module
            changes.setdefault(find(name, f"{module}.bias"), _Change()).added = name
        else:
            target = find(name, f"{module}.weight")
            modules[target] = module
            change = changes.setdefault(target, _Change())
            if part[1] in ("B", "embedding_B"):
                change.left = name
            elif part[1] in ("A", "embedding_A"):
                change.right = name
            else:
                change.magnitude = name
            if part[1].startswith("embedding"):
                change.is_turned = True
    for target, change in changes.items():
        if change.left or change.right or change.magnitude:
            change.is_turned |= _is_turned(base.tensors[target].shape, adapter, change, config)
            change.scale = _scale(label, modules[target], adapter, change, config)
        elif change.added:
            change.scale = _scale_of(modules[change.added], config)[1]
        _check_shapes(label, target, change, base, adapter)
    return changes


class _Names:
    """Finds the base's tensor that a name of the adapter means: as it is, or with one component more or less at its begin."""

    def __init__(self, label: str, tensors: Mapping[str, Tensor]) -> None:
        self._label = label
        self._tensors = tensors
        self._firsts = sorted({name.split(".")[0] for name in tensors})

    def __call__(self, name: str, wanted: str) -> str:
        if wanted in self._tensors:
            return wanted
        candidates = [wanted.partition(".")[2], *(f"{first}.{wanted}" for first in self._firsts)]
        found = [c for c in candidates if c in self._tensors]
        if len(found) == 1:
            return found[0]
        many = f"; it could be {' or '.join(found)}" if found else ""
        raise ModelError(
            f"{self._label}: the adapter's {name} is for {wanted!r}, which the base does not have{many}. "
            "Use the base that the adapter was trained on."
        )


def _scale_of(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """The rank of a module and its scale: alpha / r, or alpha / sqrt(r) for rsLoRA; patterns end a module's name."""

    def of(patterns: Any, default: Any) -> Any:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    rank = of(config.get("rank_pattern"), config.get("r", 8))
    alpha = of(config.get("alpha_pattern"), config.get("lora_alpha", 8))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _scale(label: str, module: str, adapter: FileModel, change: _Change, config: Mapping[str, Any]) -> float:
    try:
        rank, scale = _scale_of(module, config)
    except (re.error, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{label}: {CONFIG}: the rank or alpha of {module} cannot be told ({error}). Check the adapter.") from None
    if not change.left or not change.right:
        held = change.left or change.right or change.magnitude
        raise ModelError(f"{label}: the adapter has {held} without its lora_A or lora_B. Complete the download.")
    found = adapter.tensors[change.right].shape[0] if adapter.tensors[change.right].shape else 0
    if found != rank:
        raise ModelError(
            f"{label}: {change.right} has rank {found}, {CONFIG} says {rank}; they must agree. Get the adapter from its source."
        )
    return scale


def _is_turned(shape: tuple[int, ...], adapter: FileModel, change: _Change, config: Mapping[str, Any]) -> bool:
    """Is a matrix stored (in, out)? Its shape says so, as in PEFT its layer's kind does; the config is asked where it is square."""
    if len(shape) != 2 or not (change.left and change.right):
        return False
    outs, ins = adapter.tensors[change.left].shape[:1], adapter.tensors[change.right].shape[1:]
    return shape == ins + outs and (shape != outs + ins or bool(config.get("fan_in_fan_out")))


def _check_shapes(label: str, target: str, change: _Change, base: Model, adapter: FileModel) -> None:
    shape = base.tensors[target].shape

    def refuse(part: str, expected: object) -> ModelError:
        return ModelError(
            f"{label}: {target} is {shape} in the base, and the adapter's {part} is {adapter.tensors[part].shape}, expected {expected}. "
            "Use the base that the adapter was trained on."
        )

    used = [p for p in (change.left, change.right, change.magnitude, change.added, change.replaced) if p]
    for part in (*used, *([] if change.replaced else [target])):
        tensor = adapter.tensors[part] if part in used else base.tensors[target]
        if tensor.dtype not in dtypes.MERGEABLE and part != change.replaced:
            raise ModelError(f"{label}: {part} is {tensor.dtype}, expected numbers in floating point. Use another adapter or base.")
    if change.replaced and adapter.tensors[change.replaced].shape != shape:
        raise refuse(change.replaced, "the same; a vocabulary that was extended must be extended in the base too")
    if change.added and adapter.tensors[change.added].shape != shape:
        raise refuse(change.added, "the same")
    if not change.left:
        return
    left, right = adapter.tensors[change.left], adapter.tensors[change.right]
    rank, rows, columns = right.shape[0], shape[0] if shape else 0, math.prod(shape[1:])
    if change.is_turned:
        rows, columns = columns, rows
    if len(left.shape) < 2 or left.shape[0] != rows or math.prod(left.shape[1:]) != rank:
        raise refuse(change.left, f"({rows}, {rank})")
    if math.prod(right.shape[1:]) != columns or len(shape) < 2:
        raise refuse(change.right, f"{columns} columns")
    if change.magnitude and adapter.tensors[change.magnitude].elements != rows:
        raise refuse(change.magnitude, f"{rows} numbers")


def _product(left: np.ndarray, right: np.ndarray, scale: np.floating[Any]) -> np.ndarray:
    """``scale * left @ right``, summed in the order of the rank. Not by BLAS, whose sums depend on the shape and on the CPU."""
    total = np.zeros((len(left), right.shape[1]), left.dtype)
    product = np.empty_like(total)
    for k in range(len(right)):
        np.multiply(left[:, k, None], right[k], out=product)
        total += product
    total *= scale
    return total


def _rectangles(first: int, last: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut elements of a matrix into (row, rows, column, columns): a row's rest, whole rows, a row's begin."""
    while first < last:
        row, column = divmod(first, columns)
        rows = (last - first) // columns if column == 0 else 0
        count = columns if rows else min(columns - column, last - first)
        rows = max(rows, 1)
        yield row, rows, column, count
        first += rows * count
