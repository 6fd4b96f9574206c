"""Reads the task vector of one tensor by blocks of rows, and plans the memory of an extraction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.checkpoint.source import Source
from alnico.errors import MismatchError, NonFiniteError, ResourceError
from alnico.lora.extract_targets import ExtractTarget
from alnico.numerics.dtypes import DTYPES, decode, decode_into
from alnico.numerics.randomized import BLOCK_ELEMENTS, ITERATIONS, is_whole, row_blocks, width_of
from alnico.numerics.sizes import format_size
from alnico.plan.memory import BASELINE_BYTES, BLAS_BYTES, BYTES_A_TENSOR
from alnico.run_options import RunOptions

CHECKED_ELEMENTS = 1 << 17
"""Elements compared at a time when an adapter is verified."""


def real_of(tuned: Source, base: Source, name: str) -> np.dtype[Any]:
    """Return the working precision: float64 if one of the two tensors is float64, else float32."""
    return np.dtype(
        np.float64 if "F64" in (tuned.tensors[name].dtype, base.tensors[name].dtype) else np.float32
    )


class Delta:
    """Fine-tune minus base of one tensor, as a matrix.

    ``memory`` is a buffer of the matrix's size that caches it; with None it is read again for each pass.
    """

    def __init__(
        self, tuned: Source, base: Source, target: ExtractTarget, memory: np.ndarray | None = None
    ) -> None:
        self.target = target
        self._sources = tuned, base
        self._real = real_of(tuned, base, target.name)
        self._cached = None if memory is None else memory.view(self._real).reshape(target.matrix)
        self._is_filled = False

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield its rows in order, in blocks. A block is valid until the next one is requested."""
        rows, columns = self.target.matrix
        if self._cached is None or not self._is_filled:
            yield from self._read(rows, columns)
            self._is_filled = self._cached is not None
        else:
            for first, last in row_blocks(rows, columns):
                yield self._cached[first:last]

    def _read(self, rows: int, columns: int) -> Iterator[np.ndarray]:
        cuts = row_blocks(rows, columns)
        most = max(last - first for first, last in cuts) * columns
        dtypes = [source.tensors[self.target.name].dtype for source in self._sources]
        raws = [np.empty(most * DTYPES[dtype].bytes, np.uint8) for dtype in dtypes]
        values = np.empty((2, most), self._real)
        for first, last in cuts:
            count = (last - first) * columns
            tuned_values = values[0, :count] if self._cached is None else self._cached[first:last].reshape(-1)
            for source, dtype, raw, into in zip(
                self._sources, dtypes, raws, (tuned_values, values[1, :count]), strict=True
            ):
                width = DTYPES[dtype].bytes
                source.read_into(self.target.name, first * columns * width, memoryview(raw)[: count * width])
                if self._real == np.float32:
                    decode_into(raw[: count * width], dtype, into)
                else:
                    into[:] = decode(raw[: count * width], dtype)
            with np.errstate(all="ignore"):  # the sum of squares detects values that are not finite
                tuned_values -= values[1, :count]
            yield tuned_values.reshape(last - first, columns)

    def squares(self) -> float:
        """Return the sum of its squares, in float64."""
        total = 0.0
        for block in self.blocks():
            wide = block.astype(np.float64).reshape(-1)
            total += float(wide @ wide)
        return total

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
    return max(room.held_bytes, 32 * CHECKED_ELEMENTS)


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
    factors = sorted((4 * sum(s.matrix) * cap for s, cap in zip(targets, caps, strict=True)), reverse=True)
    fixed += sum(factors[:4])  # while the adapter is verified
    reading = tuned.reading_bytes + base.reading_bytes
    most = max(needs, default=0)
    worker = max(most, 12 * 8 * CHECKED_ELEMENTS + 3 * max(factors, default=0)) + reading + BLAS_BYTES
    largest = max((s.elements * real_of(tuned, base, s.name).itemsize for s in targets), default=0)
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
    reading = block * (widths + 2 * item + 8)
    if target.treatment != "factors" or not cap:
        return reading + 8 * block
    work = svd_bytes((rows, columns), cap, item)
    return 2 * reading + 16 * block + work if is_whole((rows, columns), cap) else reading + work


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
