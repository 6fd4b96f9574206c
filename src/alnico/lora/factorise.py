"""Factorises task vectors of matrices with threads, each on its own: what a node of a cluster does, too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import xxhash

from alnico.checkpoint.source import Source
from alnico.devices import free_bytes
from alnico.engine.arena import Arena
from alnico.engine.matrix_gpu import GPU_SHARE, GpuTurns, MatrixGpu, MatrixRoom, whole_float32
from alnico.events import Advanced, Reading
from alnico.lora.extract_deltas import Delta, ExtractMemory, difference_kernel, real_of, svd_bytes
from alnico.lora.extract_options import Options
from alnico.lora.extract_targets import ExtractTarget
from alnico.lora.gpu_blocks import GpuBlocks, gpu_bytes
from alnico.lora.ranks import Spectrum, ranks_of_energy
from alnico.numerics.blas import one_blas_thread
from alnico.numerics.randomized import (
    Blocks,
    LowRankFactors,
    SquaresOf,
    exact_svd,
    randomized_svd,
    squares_of,
)
from alnico.plan.memory import GPU_LIBRARY_BYTES
from alnico.threads import Crew

FIRST_RANK = 32
"""First rank tried for a share of energy; it doubles until the share is reached."""


class FactorisingRun:
    """Factorises the task vectors of targets with the threads of ``crew``.

    ``put`` gets the name and the factors of each, in any order and any thread; those of a target without factors have rank 0.
    """

    def __init__(
        self,
        tuned: Source,
        base: Source,
        options: Options,
        room: ExtractMemory,
        crew: Crew,
        arena: Arena,
        put: Callable[[str, LowRankFactors], None],
        gpus: Sequence[MatrixGpu] = (),
    ) -> None:
        self.tuned = tuned
        self.base = base
        self.options = options
        self.room = room
        self._crew = crew
        self._arena = arena
        self._put = put
        self._gpus = GpuTurns(gpus)
        self._on_gpus = MatrixRoom()

    def factorise(self, targets: Sequence[ExtractTarget]) -> None:
        # The largest first: otherwise one thread would still work on a large one while the others are idle.
        todo = sorted(targets, key=lambda s: (s.treatment != "factors", -s.elements))
        self._crew.report(Reading(len(todo), sum(self._bytes(s) for s in todo)))
        for target in todo:
            difference_kernel(real_of(self.tuned, self.base, target.name), target.elements)
        with one_blas_thread(), whole_float32(self._gpus.all):
            self._crew.run([(self._decompose, (target,)) for target in todo])

    def _decompose(self, target: ExtractTarget) -> None:
        real = real_of(self.tuned, self.base, target.name)
        cap = self.options.cap(target) if target.treatment == "factors" else 0
        gpu = self._gpus.mine() if cap else None
        parts = [self._low_rank(matrix, cap, gpu, real) for matrix in target.matrices()]
        factors = parts[0] if len(parts) == 1 else _stacked(parts)
        if not math.isfinite(factors.squares):
            Delta(self.tuned, self.base, target, self._arena).refuse()
        self._crew.check()  # a later run may write to the same place
        self._put(target.name, factors)
        self._crew.report(Advanced(target.name, self._bytes(target)))

    def _low_rank(
        self, target: ExtractTarget, cap: int, gpu: MatrixGpu | None, real: np.dtype[Any]
    ) -> LowRankFactors:
        """Decompose the task vector of one matrix; only measure it if the largest rank, ``cap``, is 0."""
        is_held = cap > 0 and gpu is None and self.room.holds(target, real)
        delta = Delta(self.tuned, self.base, target, self._arena, is_held=is_held)
        if gpu is not None:
            factors = self._factors_on(gpu, delta, cap)
        elif cap:
            factors = self._factors(self._blocks(delta), target, cap, lambda _: delta.block_squares)
        else:
            rows, columns = target.matrix
            squares = delta.squares() if target.elements else 0.0
            factors = LowRankFactors(
                np.zeros((rows, 0), real), np.zeros((0, columns), real), np.zeros(0), squares
            )
        if not factors.squares and real == np.float64:
            delta.refuse_tiny()
        return factors

    def _blocks(self, delta: Delta) -> Blocks:
        def blocks() -> Iterator[np.ndarray]:
            for block in delta.blocks():
                self._crew.check()
                yield block

        return blocks

    def _factors_on(self, gpu: MatrixGpu, delta: Delta, cap: int) -> LowRankFactors:
        """Decompose a task vector on a GPU, which holds it if it has room for it."""
        target = delta.target
        item = real_of(self.tuned, self.base, target.name).itemsize
        work = GPU_LIBRARY_BYTES + svd_bytes(target.matrix, cap, item)
        most = gpu_bytes(target.matrix, item, work, holds=True)
        holds = most <= GPU_SHARE * free_bytes(gpu.device)
        needed = most if holds else gpu_bytes(target.matrix, item, work, holds=False)
        with self._on_gpus.taken(gpu.device, target.name, needed, self._crew.check):
            blocks = GpuBlocks(gpu, self._blocks(delta), target.matrix, holds=holds)
            return self._factors(blocks, target, cap)

    def _factors(
        self, blocks: Blocks, target: ExtractTarget, cap: int, squares_of: SquaresOf = squares_of
    ) -> LowRankFactors:
        shape = target.matrix
        if self.options.exact:
            return self._cut_to_energy(exact_svd(blocks, shape, cap, squares_of=squares_of))
        place = f"{target.name}[{target.first}]" if target.first else target.name
        seed = (self.options.seed % (1 << 64), xxhash.xxh3_64_intdigest(place.encode()))
        if self.options.energy is None:
            return randomized_svd(blocks, shape, cap, seed=seed, squares_of=squares_of)
        rank = min(FIRST_RANK, cap)
        while True:
            factors = randomized_svd(blocks, shape, rank, seed=seed, squares_of=squares_of)
            energy = float(np.sum(factors.values**2))
            if rank == cap or factors.rank < rank or not energy < self.options.energy * factors.squares:
                return self._cut_to_energy(factors)
            rank = min(2 * rank, cap)

    def _cut_to_energy(self, factors: LowRankFactors) -> LowRankFactors:
        """Cut factors to the rank that keeps the requested energy."""
        if self.options.energy is None or not factors.rank:
            return factors
        rank = ranks_of_energy([Spectrum(factors.values, factors.squares, 1)], self.options.energy)[0]
        return LowRankFactors(
            factors.left[:, :rank].copy(), factors.right[:rank].copy(), factors.values[:rank], factors.squares
        )

    def _bytes(self, target: ExtractTarget) -> int:
        return sum(model.tensors[target.name].byte_size for model in (self.tuned, self.base))


def _stacked(parts: Sequence[LowRankFactors]) -> LowRankFactors:
    """Join the factors of the matrices of a stack: left factors below one another, right ones side by side.

    All get the largest rank among them, with zeros. The values are those of the stack as a whole: the root of the sum of
    the squares at each position.
    """
    rank = max(part.rank for part in parts)
    left = [np.pad(part.left, ((0, 0), (0, rank - part.rank))) for part in parts]
    right = [np.pad(part.right, ((0, rank - part.rank), (0, 0))) for part in parts]
    values = np.zeros(rank)
    for part in parts:
        values[: part.rank] += part.values**2
    squares = math.fsum(part.squares for part in parts)
    return LowRankFactors(np.vstack(left), np.hstack(right), np.sqrt(values), squares)
