"""Combines the updates of one parameter and reduces the result to factors of a chosen rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from alnico.checkpoint.lora_adapter import Adapter
from alnico.devices import CPU
from alnico.engine.matrix_gpu import MatrixGpu
from alnico.lora.basis import Basis, SharedBases
from alnico.lora.combine_options import CombineOptions
from alnico.lora.core_matrices import coefficients_of, merge_cores
from alnico.lora.core_space import core_space
from alnico.lora.gpu_blocks import GpuBlocks
from alnico.lora.knots import knots
from alnico.lora.matching import ExpertFactors, SharedModule, read_biases, read_factors
from alnico.lora.merge_updates import Merged, UpdateMerge
from alnico.lora.updates import BIAS, SmallMatrices, Zeros, whole_tensors, whole_updates
from alnico.methods import find
from alnico.methods.base import MatrixMethod
from alnico.numerics.arrays import AnyArray, as_is
from alnico.numerics.low_rank import (
    Decomposed,
    choose_rank,
    decompose_matrix,
    decompose_product,
    stack_factors,
)
from alnico.numerics.randomized import Blocks, exact_svd, randomized_svd, row_blocks
from alnico.output.staging import PartDirectory
from alnico.run_options import RunOptions

EXACT_ELEMENTS = 1 << 18
"""Up to this size, all singular vectors of a matrix are computed (0.1 s); above it, the leading ones."""


@dataclass(frozen=True)
class ReducedUpdate:
    """The combined update of one parameter: ``left`` (experts, m, rank), ``right`` (experts, rank, n) and
    their ``scale``.

    ``total`` is the sum of squares of the method's result, ``left_out`` that of the part these factors drop.
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
class RankChoice:
    """The requested rank and share of energy, if any."""

    rank: int | None
    energy: float | None

    def most(self, default: int) -> int | None:
        """Return the largest rank: the requested one, or the default unless a share of energy decides."""
        return self.rank if self.rank is not None else default if self.energy is None else None

    def reduce(self, experts: Sequence[Decomposed], bias: np.ndarray, default: int) -> ReducedUpdate:
        """Cut all experts to one rank: the least, but at least 1, that keeps the share of energy of each."""
        rank = max(1, *(choose_rank(expert, self.most(default), self.energy) for expert in experts))
        cut = [expert.factors(rank) for expert in experts]
        return ReducedUpdate(
            np.stack([left for left, _ in cut]),
            np.stack([right for _, right in cut]),
            1.0,
            bias,
            sum(expert.total for expert in experts),
            sum(expert.left_out(rank) for expert in experts),
        )


Combine = Callable[[SharedModule], ReducedUpdate]


def of_cat(adapters: Sequence[Adapter], options: CombineOptions) -> Combine:
    """Concatenate the factors, exactly; the ranks add up.

    A scale that all factors share is not multiplied into them, so they keep their bits.
    """

    def combine(module: SharedModule) -> ReducedUpdate:
        factors = read_factors(adapters, module)
        scales = {
            c * u.scale
            for c, u in zip(options.coefficients, module.updates, strict=True)
            if u is not None and c * u.scale
        }
        # Two parameters of one module cannot have different alphas: see `SharedModule.target`.
        common = scales.pop() if len(scales) == 1 and module.kind != "parameter" else 1.0
        lefts, rights = [], []
        for of_expert in factors:
            parts = [
                (c * f.scale / common, f.left, f.right)
                for c, f in zip(options.coefficients, of_expert, strict=True)
                if f is not None and c * f.scale
            ]
            left, right = stack_factors(
                parts or [(0.0, np.zeros((module.rows, 1)), np.zeros((1, module.columns)))], 0, 0
            )
            lefts.append(left)
            rights.append(right)
        return ReducedUpdate(
            np.stack(lefts), np.stack(rights), common, _summed_bias(adapters, module, options.coefficients)
        )

    return combine


def of_sum(
    adapters: Sequence[Adapter], options: CombineOptions, choice: RankChoice, gpu: MatrixGpu | None = None
) -> Combine:
    """Approximate a weighted sum."""

    def combine(module: SharedModule) -> ReducedUpdate:
        experts = []
        for of_expert in read_factors(adapters, module):
            pairs = zip(options.coefficients, of_expert, strict=True)
            parts = [(c * f.scale, f.left, f.right) for c, f in pairs if f is not None]
            experts.append(_decomposed_product(*stack_factors(parts, module.rows, module.columns), gpu))
        bias = _summed_bias(adapters, module, options.coefficients)
        return choice.reduce(experts, bias, max(module.ranks))

    return combine


def of_matrices(
    adapters: Sequence[Adapter],
    options: CombineOptions,
    choice: RankChoice,
    note: Callable[[str, str, tuple[int | float, ...]], None],
    gpu: MatrixGpu | None = None,
) -> Combine:
    """Apply a method over whole matrices to the core matrices. ``note`` receives an update and what is said of it."""
    bound = find(options.method).bind(options.options, len(adapters))
    others = bound.otherwise if isinstance(bound, MatrixMethod) else bound
    coefficients = coefficients_of(others, len(adapters))
    place = _place_of(gpu if not isinstance(bound, MatrixMethod) or bound.runs_on_gpu else None)

    def combine(module: SharedModule) -> ReducedUpdate:
        experts = []
        for of_expert in read_factors(adapters, module):
            space = core_space(of_expert, module.rows, module.columns, place)
            merged = merge_cores(space, bound, lambda text, values: note(module.name, text, values))
            experts.append(decompose_product(*space.factors(merged)).to_numpy())
        return choice.reduce(experts, _summed_bias(adapters, module, coefficients), sum(module.ranks))

    return combine


def of_small(
    adapters: Sequence[Adapter],
    modules: Sequence[SharedModule],
    options: CombineOptions,
    choice: RankChoice,
    *,
    seed: int,
    run: RunOptions,
    gpu: MatrixGpu | None = None,
) -> Combine:
    """Apply a method of the registry to small matrices in a shared basis. They are merged on the processor."""
    find_basis = core_space if options.space == "core" else knots

    def build(factors: Sequence[ExpertFactors | None], rows: int, columns: int) -> Basis:
        return find_basis(factors, rows, columns, _place_of(gpu)).to_numpy()

    bases = SharedBases(adapters, modules, build)
    sources = [SmallMatrices(a.label, bases.tensors, bases.values, i) for i, a in enumerate(adapters)]
    base = Zeros(bases.tensors)
    merge = UpdateMerge(
        sources,
        base,
        options.method,
        options.options,
        dtype="F64",
        seed=seed,
        run=replace(run, threads=1, device=CPU.name),
    )

    def combine(module: SharedModule) -> ReducedUpdate:
        experts = []
        for expert in range(module.experts):
            merged = merge.in_memory(bases.name(module, expert))
            experts.append(_decomposed_product(*bases.basis(module, expert).factors(merged), gpu))
        bias = merge.in_memory(module.module + BIAS) if module.has_bias else np.zeros(0)
        return choice.reduce(experts, bias, sum(module.ranks))

    return combine


def of_whole(
    adapters: Sequence[Adapter],
    modules: Sequence[SharedModule],
    options: CombineOptions,
    choice: RankChoice,
    part: PartDirectory,
    *,
    seed: int,
    run: RunOptions,
    gpu: MatrixGpu | None = None,
) -> Combine:
    """Apply a method of the registry to the whole matrices, by rows, and approximate the result."""
    dtype = "F64" if any(t.dtype == "F64" for a in adapters for t in a.files.tensors.values()) else "F32"
    base = Zeros(whole_tensors(modules, dtype))
    merge = UpdateMerge(
        whole_updates(adapters, modules, base),
        base,
        options.method,
        options.options,
        dtype=dtype,
        seed=seed,
        run=run,
    )

    def combine(module: SharedModule) -> ReducedUpdate:
        rows, columns = (module.columns, module.rows) if module.is_turned else (module.rows, module.columns)
        with merge.on_disk(module.name, part) as merged:
            most = choice.most(sum(module.ranks))
            experts = [
                _decomposed(merged, expert, rows, columns, most, gpu) for expert in range(module.experts)
            ]
        if module.is_turned:
            experts = [expert.turned() for expert in experts]
        bias = merge.in_memory(module.module + BIAS) if module.has_bias else np.zeros(0)
        return choice.reduce(experts, bias, sum(module.ranks))

    return combine


def _place_of(gpu: MatrixGpu | None) -> Callable[[np.ndarray], AnyArray]:
    return as_is if gpu is None else gpu.matrix


def _decomposed_product(left: np.ndarray, right: np.ndarray, gpu: MatrixGpu | None) -> Decomposed:
    """Decompose ``left @ right``, on the GPU if there is one."""
    place = _place_of(gpu)
    return decompose_product(place(left), place(right)).to_numpy()


def _decomposed(
    merged: Merged, expert: int, rows: int, columns: int, most: int | None, gpu: MatrixGpu | None = None
) -> Decomposed:
    """Decompose one matrix of a merged tensor into its ``most`` largest singular values, or all."""
    if rows * columns <= EXACT_ELEMENTS:
        whole = merged.rows(expert, rows, columns, 0, rows).astype(np.float64)
        return decompose_matrix(_place_of(gpu)(whole)).to_numpy()

    def blocks() -> Iterator[np.ndarray]:
        for first, stop in row_blocks(rows, columns):
            yield merged.rows(expert, rows, columns, first, stop)

    shape = rows, columns
    read: Blocks = blocks if gpu is None else GpuBlocks(gpu, blocks, shape, holds=True)
    svd = exact_svd(read, shape) if most is None else randomized_svd(read, shape, most)
    root = np.sqrt(svd.values)
    rest = max(svd.squares - float(np.sum(svd.values**2)), 0.0)
    return Decomposed(svd.left / root, svd.values, svd.right / root[:, None], rest)


def _summed_bias(
    adapters: Sequence[Adapter], module: SharedModule, coefficients: Sequence[float]
) -> np.ndarray:
    """Return the weighted sum of what adapters add to a module's bias; empty if none adds anything."""
    if not module.has_bias:
        return np.zeros(0)
    total: np.ndarray = np.sum(
        [c * b for c, b in zip(coefficients, read_biases(adapters, module), strict=True)], axis=0
    )
    return total
