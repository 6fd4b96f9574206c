"""What becomes of one parameter: the methods' results, as factors or as the singular vectors of which these are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from alnico.checkpoint.lora_adapter import Adapter
from alnico.lora.basis import Frames
from alnico.lora.combine_options import CombineOptions
from alnico.lora.core_space import core_space
from alnico.lora.knots import knots
from alnico.lora.matching import SharedModule, read_biases, read_factors
from alnico.lora.merge_updates import Merged, Merging
from alnico.lora.spectral import SPECTRAL
from alnico.lora.updates import BIAS, SmallMatrices, Zeros, whole_tensors, whole_updates
from alnico.numerics.low_rank import Decomposed, of_matrix, of_product, rank_of, stacked
from alnico.numerics.randomized import exact_svd, randomized_svd, row_blocks
from alnico.output.staging import PartDirectory

EXACT_ELEMENTS = 1 << 18
"""Up to this size all singular vectors of a merged matrix are computed, in a tenth of a second; of larger ones the leading ones."""


@dataclass(frozen=True)
class ReducedUpdate:
    """The combined update of one parameter: ``left`` (experts, m, rank), ``right`` (experts, rank, n) and their ``scale``.

    ``total`` and ``left_out`` are sums of squares, of the result of the method and of what these factors lack of it.
    """

    left: np.ndarray
    right: np.ndarray
    scale: float = 1.0
    bias: np.ndarray = field(default_factory=lambda: np.zeros(0))
    total: float = 0.0
    left_out: float = 0.0

    @property
    def rank(self) -> int:
        return int(self.left.shape[2])


@dataclass(frozen=True)
class Limits:
    """The rank that is asked for, if any, and the share of energy."""

    rank: int | None
    energy: float | None

    def most(self, default: int) -> int | None:
        """The largest rank, if there is one: that which is asked for, or the default where no share of energy decides."""
        return self.rank if self.rank is not None else default if self.energy is None else None

    def piece(self, found: Sequence[Decomposed], bias: np.ndarray, default: int) -> ReducedUpdate:
        """Cut what was found of each expert to one rank for all: the least that gives each its share, 1 at least."""
        rank = max(1, *(rank_of(one, self.most(default), self.energy) for one in found))
        cut = [one.factors(rank) for one in found]
        return ReducedUpdate(
            np.stack([left for left, _ in cut]),
            np.stack([right for _, right in cut]),
            1.0,
            bias,
            sum(one.total for one in found),
            sum(one.left_out(rank) for one in found),
        )


Combine = Callable[[SharedModule], ReducedUpdate]


def of_cat(adapters: Sequence[Adapter], asked: CombineOptions) -> Combine:
    """Stack the factors: exact, and the ranks add. One scale that all share stays out of the factors, which then keep their bits."""

    def combine(module: SharedModule) -> ReducedUpdate:
        factors = read_factors(adapters, module)
        scales = {
            c * u.scale
            for c, u in zip(asked.coefficients, module.updates, strict=True)
            if u is not None and c * u.scale
        }
        # Two parameters of one module cannot have an alpha each: see `Module.target`.
        common = scales.pop() if len(scales) == 1 and module.kind != "parameter" else 1.0
        lefts, rights = [], []
        for of_expert in factors:
            parts = [
                (c * f.scale / common, f.left, f.right)
                for c, f in zip(asked.coefficients, of_expert, strict=True)
                if f is not None and c * f.scale
            ]
            left, right = stacked(
                parts or [(0.0, np.zeros((module.rows, 1)), np.zeros((1, module.columns)))], 0, 0
            )
            lefts.append(left)
            rights.append(right)
        return ReducedUpdate(
            np.stack(lefts), np.stack(rights), common, _summed_bias(adapters, module, asked.coefficients)
        )

    return combine


def of_sum(adapters: Sequence[Adapter], asked: CombineOptions, limits: Limits) -> Combine:
    """The best approximation of a weighted sum."""

    def combine(module: SharedModule) -> ReducedUpdate:
        found = []
        for of_expert in read_factors(adapters, module):
            pairs = zip(asked.coefficients, of_expert, strict=True)
            parts = [(c * f.scale, f.left, f.right) for c, f in pairs if f is not None]
            found.append(of_product(*stacked(parts, module.rows, module.columns)))
        bias = _summed_bias(adapters, module, asked.coefficients)
        return limits.piece(found, bias, max(module.ranks))

    return combine


def of_spectral(adapters: Sequence[Adapter], asked: CombineOptions, limits: Limits) -> Combine:
    """A spectral method on the core matrices."""
    make = SPECTRAL[asked.method].make
    mean = tuple(float(asked.options["scale"]) * w / len(adapters) for w in asked.weights)

    def combine(module: SharedModule) -> ReducedUpdate:
        side = min(module.rows, module.columns)
        found = []
        for of_expert in read_factors(adapters, module):
            space = core_space(of_expert, module.rows, module.columns)
            merged = make(space.values, asked.weights, side, **asked.options)
            found.append(of_product(*space.factors(merged)))
        return limits.piece(found, _summed_bias(adapters, module, mean), sum(module.ranks))

    return combine


def of_small(
    adapters: Sequence[Adapter],
    modules: Sequence[SharedModule],
    asked: CombineOptions,
    limits: Limits,
    *,
    seed: int,
    memory_bytes: int,
) -> Combine:
    """A method of the registry on the small matrices of a space."""
    frames = Frames(adapters, modules, core_space if asked.space == "core" else knots)
    sources = [SmallMatrices(a.label, frames.tensors, frames.values, i) for i, a in enumerate(adapters)]
    base = Zeros(frames.tensors)
    merging = Merging(
        sources,
        base,
        asked.method,
        asked.options,
        dtype="F64",
        seed=seed,
        memory_bytes=memory_bytes,
        threads=1,
    )

    def combine(module: SharedModule) -> ReducedUpdate:
        found = []
        for expert in range(module.experts):
            merged = merging.in_memory(frames.name(module, expert))
            found.append(of_product(*frames.frame(module, expert).factors(merged)))
        bias = merging.in_memory(module.module + BIAS) if module.has_bias else np.zeros(0)
        return limits.piece(found, bias, sum(module.ranks))

    return combine


def of_whole(
    adapters: Sequence[Adapter],
    modules: Sequence[SharedModule],
    asked: CombineOptions,
    limits: Limits,
    part: PartDirectory,
    *,
    seed: int,
    memory_bytes: int,
    threads: int | None,
) -> Combine:
    """A method of the registry on the whole matrices, by rows; then the best approximation of what it made."""
    dtype = "F64" if any(t.dtype == "F64" for a in adapters for t in a.files.tensors.values()) else "F32"
    base = Zeros(whole_tensors(modules, dtype))
    merging = Merging(
        whole_updates(adapters, modules, base),
        base,
        asked.method,
        asked.options,
        dtype=dtype,
        seed=seed,
        memory_bytes=memory_bytes,
        threads=threads,
    )

    def combine(module: SharedModule) -> ReducedUpdate:
        rows, columns = (module.columns, module.rows) if module.is_turned else (module.rows, module.columns)
        with merging.on_disk(module.name, part) as merged:
            most = limits.most(sum(module.ranks))
            found = [_decomposed(merged, expert, rows, columns, most) for expert in range(module.experts)]
        if module.is_turned:
            found = [one.turned() for one in found]
        bias = merging.in_memory(module.module + BIAS) if module.has_bias else np.zeros(0)
        return limits.piece(found, bias, sum(module.ranks))

    return combine


def _decomposed(merged: Merged, expert: int, rows: int, columns: int, most: int | None) -> Decomposed:
    """Decompose one matrix of a merged tensor: its ``most`` largest singular values, or all."""
    if rows * columns <= EXACT_ELEMENTS:
        return of_matrix(merged.rows(expert, rows, columns, 0, rows).astype(np.float64))

    def blocks() -> Iterator[np.ndarray]:
        for first, stop in row_blocks(rows, columns):
            yield merged.rows(expert, rows, columns, first, stop)

    shape = rows, columns
    found = exact_svd(blocks, shape) if most is None else randomized_svd(blocks, shape, most)
    root = np.sqrt(found.values)
    rest = max(found.squares - float(np.sum(found.values**2)), 0.0)
    return Decomposed(found.left / root, found.values, found.right / root[:, None], rest)


def _summed_bias(
    adapters: Sequence[Adapter], module: SharedModule, coefficients: Sequence[float]
) -> np.ndarray:
    """The weighted sum of what adapters add to a module's bias; empty where none adds anything."""
    if not module.has_bias:
        return np.zeros(0)
    total: np.ndarray = np.sum(
        [c * b for c, b in zip(coefficients, read_biases(adapters, module), strict=True)], axis=0
    )
    return total
