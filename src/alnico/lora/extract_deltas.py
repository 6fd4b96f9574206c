"""Reads the task vector of one tensor by blocks of rows, and plans the memory of an extraction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.checkpoint.source import Source
from alnico.engine.arena import Arena
from alnico.errors import MismatchError, NonFiniteError, ResourceError
from alnico.kernels.choice import kernel_for
from alnico.kernels.constants import CODES
from alnico.kernels.difference_kernel import DifferenceKernel
from alnico.lora.extract_targets import ExtractTarget
from alnico.numerics.dtypes import DTYPES, decode
from alnico.numerics.randomized import BLOCK_ELEMENTS, ITERATIONS, is_whole, row_blocks, width_of
from alnico.numerics.sizes import format_size
from alnico.plan.memory import BASELINE_BYTES, BLAS_BYTES, BYTES_A_TENSOR
from alnico.run_options import RunOptions

CHECKED_ELEMENTS = 1 << 17
"""Elements compared at a time when an adapter is verified."""

PIECE_ELEMENTS = 1 << 17
"""Elements of both models read at a time: their bytes and differences stay in the second-level cache."""


def real_of(tuned: Source, base: Source, name: str) -> np.dtype[Any]:
    """Return the working precision: float64 if one of the two tensors is float64, else float32."""
    return np.dtype(
        np.float64 if "F64" in (tuned.tensors[name].dtype, base.tensors[name].dtype) else np.float32
    )


def difference_kernel(real: np.dtype[Any], elements: int = 0) -> Any:
    """Return what subtracts tensors in a working precision. ``elements`` are those that it is about to be run on."""
    return kernel_for(DifferenceKernel("float64" if real == np.float64 else "float32"), elements)


class Delta:
    """Fine-tune minus base of one tensor, as a matrix.

    ``arena`` has this thread's buffer, which holds what is read, and with ``is_held`` also the whole matrix; without, it is read
    again for each pass. Nothing else may use the buffer meanwhile.
    """

    def __init__(
        self, tuned: Source, base: Source, target: ExtractTarget, arena: Arena, *, is_held: bool = False
    ) -> None:
        self.target = target
        self._sources = tuned, base
        self._real = real_of(tuned, base, target.name)
        self._arena = arena
        self._is_held = is_held
        self._held: np.ndarray | None = None
        self._squares: dict[int, float] = {}
        self.block_squares = 0.0
        """The sum of the squares of the block that was yielded last, in float64."""
        self._kernel = difference_kernel(self._real)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield its rows in order, in blocks. A block is valid until the next one is requested."""
        cuts = row_blocks(*self.target.matrix)
        if self._held is None:
            yield from self._read(cuts)
        else:
            for first, last in cuts:
                self.block_squares = self._squares[first]
                yield self._held[first:last]

    def _read(self, cuts: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
        rows, columns = self.target.matrix
        height = rows if self._is_held else max((last - first for first, last in cuts), default=0)
        dtypes = [source.tensors[self.target.name].dtype for source in self._sources]
        widths = [DTYPES[dtype].bytes for dtype in dtypes]
        piece = max(min(PIECE_ELEMENTS, self.target.elements), 1)
        *raws, space = self._arena.views(
            [piece * w for w in widths] + [height * columns * self._real.itemsize]
        )
        matrix = space.view(self._real).reshape(height, columns)
        for first, last in cuts:
            block = matrix[first:last] if self._is_held else matrix[: last - first]
            flat, sums, self.block_squares = block.reshape(-1), np.empty(1), 0.0
            for at in range(0, flat.size, piece):
                out = flat[at : at + piece]
                parts = [raw[: out.size * width] for raw, width in zip(raws, widths, strict=True)]
                for source, part, width in zip(self._sources, parts, widths, strict=True):
                    source.read_into(
                        self.target.name, (self.target.first + first * columns + at) * width, memoryview(part)
                    )
                self._kernel(parts[0], CODES[dtypes[0]], parts[1], CODES[dtypes[1]], out, sums)
                self.block_squares += float(sums[0])
            self._squares[first] = self.block_squares
            yield block
        self._held = matrix if self._is_held else None

    def squares(self) -> float:
        """Return the sum of its squares, in float64."""
        for _ in self.blocks():
            pass
        return sum(self._squares.values())

    def refuse_tiny(self) -> None:
        """Refuse a change that is not zero but whose squares are 0 in float64. Errors: MismatchError."""
        most = max((float(np.abs(block).max(initial=0.0)) for block in self.blocks()), default=0.0)
        if most:
            raise MismatchError(
                f"{self.target.name}: the difference of {self._sources[0].label} and "
                f"{self._sources[1].label} is at most {most:.1e}, and its square is 0 in float64; expected a "
                "larger difference, or none. Exclude the tensor (exclude), or multiply both models by a "
                "number."
            )

    def refuse(self) -> None:
        """Report the first entry that is not finite. Errors: NonFiniteError."""
        name = self.target.name
        shape = self.target.shape or (1,)
        for source in self._sources:
            dtype = source.tensors[name].dtype
            width = DTYPES[dtype].bytes
            for first in range(0, self.target.elements, BLOCK_ELEMENTS):
                raw = np.empty(min(BLOCK_ELEMENTS, self.target.elements - first) * width, np.uint8)
                source.read_into(name, first * width, memoryview(raw))
                values = decode(raw, dtype)
                wrong = np.flatnonzero(~np.isfinite(values))
                if len(wrong):
                    index = tuple(int(i) for i in np.unravel_index(first + int(wrong[0]), shape))
                    raise NonFiniteError(
                        f"{name}[{', '.join(map(str, index))}] is {values[wrong[0]]} in {source.label}; "
                        "expected finite numbers. Repair that model."
                    )
        raise NonFiniteError(
            f"{name}: the difference of {self._sources[0].label} and {self._sources[1].label} is too large "
            f"for {self._real.name}; expected a fine-tune and its base. Check both models."
        )


@dataclass(frozen=True)
class ExtractMemory:
    """How an extraction fits its budget. ``held_bytes`` is each thread's cache for a task vector."""

    budget_bytes: int
    peak_bytes: int
    threads: int
    held_bytes: int

    def holds(self, target: ExtractTarget, real: np.dtype[Any]) -> bool:
        return target.elements * real.itemsize <= self.held_bytes


def arena_bytes(room: ExtractMemory) -> int:
    """Return the bytes of each thread's buffer, for factorising and for verifying."""
    return max(room.held_bytes, 8 * BLOCK_ELEMENTS) + 16 * PIECE_ELEMENTS


def fit_extraction(
    tuned: Source,
    base: Source,
    targets: Sequence[ExtractTarget],
    caps: Sequence[int],
    run: RunOptions,
) -> ExtractMemory:
    """Choose the number of threads and how much each caches. ``caps`` are the largest ranks allowed.

    Fewer threads, and task vectors that are read again for each pass, need less memory.
    Errors: ResourceError, with the budget needed, if a single thread that caches nothing does not fit.
    """
    fixed = (
        BASELINE_BYTES
        + BYTES_A_TENSOR * (len(tuned.tensors) + len(base.tensors))
        + tuned.held_bytes
        + base.held_bytes
        + run.reserved_bytes
    )
    needs = [_work_bytes(tuned, base, s, cap) for s, cap in zip(targets, caps, strict=True)]
    factors = sorted((4 * sum(s.sides) * cap for s, cap in zip(targets, caps, strict=True)), reverse=True)
    fixed += sum(factors[:4])  # while the adapter is verified
    reading = tuned.reading_bytes + base.reading_bytes
    most = max(needs, default=0)
    worker = max(most, 16 * CHECKED_ELEMENTS + 3 * max(factors, default=0)) + reading + BLAS_BYTES
    largest = max(
        (s.elements // max(s.experts, 1) * real_of(tuned, base, s.name).itemsize for s in targets), default=0
    )
    for workers in range(run.threads, 0, -1):
        room = (run.memory_bytes - fixed) // workers - worker
        if room >= 0:
            held = min(room, largest)
            return ExtractMemory(run.memory_bytes, fixed + workers * (worker + held), workers, held)
    name = targets[needs.index(most)].name if targets else "a tensor"
    raise ResourceError(
        f"extract: {name} needs {format_size(worker)} in addition to {format_size(fixed)} for the rest; the "
        f"budget is {format_size(run.memory_bytes)}. Raise --memory to "
        f"{-(-(fixed + worker) // (1 << 20))}MiB, or choose a smaller rank."
    )


def _work_bytes(tuned: Source, base: Source, target: ExtractTarget, cap: int) -> int:
    """Return the bytes needed to factorise a matrix whose task vector is not cached."""
    rows, columns = target.matrix
    item = real_of(tuned, base, target.name).itemsize
    widths = sum(DTYPES[s.tensors[target.name].dtype].bytes for s in (tuned, base))
    block = min(max(BLOCK_ELEMENTS, columns), target.elements)
    reading = block * (item + 8) + min(PIECE_ELEMENTS, target.elements) * widths
    if target.treatment != "factors" or not cap:
        return reading
    work = svd_bytes((rows, columns), cap, item)
    stacked = (
        2 * item * cap * sum(target.sides) if target.experts > 1 else 0
    )  # the factors of all its matrices
    return reading + work + stacked + (16 * block if is_whole((rows, columns), cap) else 0)


def svd_bytes(shape: tuple[int, int], cap: int, item: int) -> int:
    """Return the bytes that a decomposition needs next to the blocks of its matrix, whose numbers have ``item`` bytes."""
    rows, columns = shape
    side = min(rows, columns)
    if is_whole(shape, cap):
        rank = min(cap, side)
        return 5 * 8 * side * side + (rows + columns) * rank * (8 + 3 * item)
    width = width_of(cap)
    span = ITERATIONS * width
    powers = columns * width * item * (ITERATIONS + 3)
    spans = columns * span * (item + 3 * 8)  # numpy's qr computes in float64 for any input
    return powers + spans + rows * span * (item + 8) // 2 + (rows + columns) * cap * 2 * item
