"""The task vector of one tensor, fine-tune minus base: by blocks of rows, held or read anew for each pass; and what all of it takes."""

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

CHECKED_ELEMENTS = 1 << 17
"""Elements compared at a time when an adapter is verified."""


def real_of(tuned: Source, base: Source, name: str) -> np.dtype[Any]:
    """float64 where one of the two is, else float32."""
    return np.dtype(
        np.float64 if "F64" in (tuned.tensors[name].dtype, base.tensors[name].dtype) else np.float32
    )


class Delta:
    """Fine-tune minus base of one tensor, as a matrix. ``memory`` is where it is held as a whole, of its size; None: it is not."""

    def __init__(
        self, tuned: Source, base: Source, subject: ExtractTarget, memory: np.ndarray | None = None
    ) -> None:
        self.subject = subject
        self._sources = tuned, base
        self._real = real_of(tuned, base, subject.name)
        self._held = None if memory is None else memory.view(self._real).reshape(subject.matrix)
        self._is_filled = False

    def blocks(self) -> Iterator[np.ndarray]:
        """Its rows in order. A block is valid until the next one is asked for."""
        rows, columns = self.subject.matrix
        if self._held is None or not self._is_filled:
            yield from self._read(rows, columns)
            self._is_filled = self._held is not None
        else:
            for first, last in row_blocks(rows, columns):
                yield self._held[first:last]

    def _read(self, rows: int, columns: int) -> Iterator[np.ndarray]:
        cuts = row_blocks(rows, columns)
        most = max(last - first for first, last in cuts) * columns
        dtypes = [source.tensors[self.subject.name].dtype for source in self._sources]
        raws = [np.empty(most * DTYPES[dtype].bytes, np.uint8) for dtype in dtypes]
        values = np.empty((2, most), self._real)
        for first, last in cuts:
            count = (last - first) * columns
            mine = values[0, :count] if self._held is None else self._held[first:last].reshape(-1)
            for source, dtype, raw, into in zip(
                self._sources, dtypes, raws, (mine, values[1, :count]), strict=True
            ):
                width = DTYPES[dtype].bytes
                source.read_into(self.subject.name, first * columns * width, memoryview(raw)[: count * width])
                if self._real == np.float32:
                    decode_into(raw[: count * width], dtype, into)
                else:
                    into[:] = decode(raw[: count * width], dtype)
            with np.errstate(all="ignore"):  # what is not finite is found by the sum of squares, and named
                mine -= values[1, :count]
            yield mine.reshape(last - first, columns)

    def squares(self) -> float:
        """The sum of its squares, in float64."""
        total = 0.0
        for block in self.blocks():
            wide = block.astype(np.float64).reshape(-1)
            total += float(wide @ wide)
        return total

    def refuse_tiny(self) -> None:
        """Errors: MismatchError for a change whose squares are 0, though it is none."""
        most = max((float(np.abs(block).max(initial=0.0)) for block in self.blocks()), default=0.0)
        if most:
            raise MismatchError(
                f"{self.subject.name}: the difference of {self._sources[0].label} and {self._sources[1].label} is {most:.1e} at most, whose "
                "square is 0 in float64; expected a larger one, or none. Leave the tensor out (exclude), or multiply both models by a number."
            )

    def refuse(self) -> None:
        """Name the first entry that is no number. Errors: NonFiniteError."""
        name = self.subject.name
        shape = self.subject.shape or (1,)
        for source in self._sources:
            dtype = source.tensors[name].dtype
            width = DTYPES[dtype].bytes
            for first in range(0, self.subject.elements, BLOCK_ELEMENTS):
                raw = np.empty(min(BLOCK_ELEMENTS, self.subject.elements - first) * width, np.uint8)
                source.read_into(name, first * width, memoryview(raw))
                values = decode(raw, dtype)
                wrong = np.flatnonzero(~np.isfinite(values))
                if len(wrong):
                    index = tuple(int(i) for i in np.unravel_index(first + int(wrong[0]), shape))
                    raise NonFiniteError(
                        f"{name}[{', '.join(map(str, index))}] is {values[wrong[0]]} in {source.label}; expected finite numbers. "
                        "Mend the model it is in."
                    )
        raise NonFiniteError(
            f"{name}: the difference of {self._sources[0].label} and {self._sources[1].label} is too large for {self._real.name}; expected "
            "a fine-tune and its base. Check both models."
        )


@dataclass(frozen=True)
class ExtractMemory:
    """How an extraction fits its budget: its peak is known before it starts. ``held_bytes`` are each thread's for a whole task vector."""

    budget_bytes: int
    peak_bytes: int
    threads: int
    held_bytes: int

    def holds(self, subject: ExtractTarget, real: np.dtype[Any]) -> bool:
        return subject.elements * real.itemsize <= self.held_bytes


def fit(
    tuned: Source,
    base: Source,
    subjects: Sequence[ExtractTarget],
    caps: Sequence[int],
    budget_bytes: int,
    threads: int,
) -> ExtractMemory:
    """Choose threads and what they hold. ``caps`` are the largest ranks that may be asked for.

    Fewer threads and task vectors that are read anew for each pass make an extraction smaller.
    Errors: ResourceError if one thread that holds none does not fit, with the budget that would do.
    """
    fixed = (
        BASELINE_BYTES
        + BYTES_A_TENSOR * (len(tuned.tensors) + len(base.tensors))
        + tuned.held_bytes
        + base.held_bytes
    )
    needs = [_work_bytes(tuned, base, s, cap) for s, cap in zip(subjects, caps, strict=True)]
    factors = sorted((4 * sum(s.matrix) * cap for s, cap in zip(subjects, caps, strict=True)), reverse=True)
    fixed += sum(factors[:4])  # while the adapter is verified
    reading = tuned.reading_bytes + base.reading_bytes
    most = max(needs, default=0)
    worker = max(most, 12 * 8 * CHECKED_ELEMENTS + 3 * max(factors, default=0)) + reading + BLAS_BYTES
    largest = max((s.elements * real_of(tuned, base, s.name).itemsize for s in subjects), default=0)
    for workers in range(max(threads, 1), 0, -1):
        room = (budget_bytes - fixed) // workers - worker
        if room >= 0:
            held = min(room, largest)
            return ExtractMemory(budget_bytes, fixed + workers * (worker + held), workers, held)
    name = subjects[needs.index(most)].name if subjects else "a tensor"
    raise ResourceError(
        f"extract: {name} needs {format_size(worker)} beside {format_size(fixed)} for the rest, the budget is "
        f"{format_size(budget_bytes)}. Raise --memory to {-(-(fixed + worker) // (1 << 20))}MiB, or ask for a smaller rank."
    )


def _work_bytes(tuned: Source, base: Source, subject: ExtractTarget, cap: int) -> int:
    """What factorising a matrix takes beside its task vector, where nothing of that is held."""
    rows, columns = subject.matrix
    item = real_of(tuned, base, subject.name).itemsize
    widths = sum(DTYPES[s.tensors[subject.name].dtype].bytes for s in (tuned, base))
    block = min(max(BLOCK_ELEMENTS, columns), subject.elements)
    reading = block * (widths + 2 * item + 8)
    if subject.fate != "factors" or not cap:
        return reading + 8 * block
    side = min(rows, columns)
    if is_whole((rows, columns), cap):
        kept = min(cap, side)
        return 2 * reading + 16 * block + 5 * 8 * side * side + (rows + columns) * kept * (8 + 3 * item)
    width = width_of(cap)
    span = ITERATIONS * width
    powers = columns * width * item * (ITERATIONS + 3)
    spans = columns * span * (item + 3 * 8)  # numpy's qr is in float64 whatever it is given
    return reading + powers + spans + rows * span * (item + 8) // 2 + (rows + columns) * cap * 2 * item
