"""Holds one tensor of a fine-tune and of its base, read once, and measures how they differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from alnico.checkpoint.source import Tensor
from alnico.errors import NonFiniteError
from alnico.numerics.dtypes import DTYPES, MERGEABLE, decode
from alnico.store.sketch import Sketching, TensorSketch
from alnico.store.spool import Spool

BLOCK = 1 << 18
"""Entries computed at a time: a multiple of what sketches, groups of 4 bits and packed signs must not cut."""

PROBES = 8
"""Random vectors that estimate the effective rank."""


class KeptBytes:
    """The bytes of a tensor, in memory or in a spool. They are written once, in order."""

    def __init__(self, size: int, spool: Spool | None) -> None:
        self.size = size
        self._spool = spool
        self._raw = np.empty(size if spool is None else 0, np.uint8)
        self._place = spool.reserve(size) if spool is not None else 0

    def write(self, offset: int, data: np.ndarray) -> None:
        if self._spool is None:
            self._raw[offset : offset + data.size] = data
        else:
            self._spool.write(self._place + offset, data)

    def read(self, offset: int, size: int) -> np.ndarray:
        if self._spool is None:
            return self._raw[offset : offset + size]
        return self._spool.read(self._place + offset, size)


@dataclass(frozen=True)
class ChangeFacts:
    """What was measured of a change.

    ``changed`` counts entries whose bits differ; it is the number of entries where dtypes or shapes do. ``norm`` is ``|D|`` and
    ``largest`` its largest magnitude; both are 0 where there is no difference of numbers. ``means`` are the mean magnitudes of
    rows. ``rank`` is the effective rank, ``|D|_F^4 / |D^T D|_F^2``, estimated; None for what is no matrix.
    """

    elements: int
    changed: int
    norm: float = 0.0
    largest: float = 0.0
    means: np.ndarray | None = None
    sketch: tuple[TensorSketch, TensorSketch] | None = None
    rank: float | None = None

    @property
    def is_equal(self) -> bool:
        return self.changed == 0


class TensorChange:
    """A tensor of a fine-tune next to that of its base, if the base has it.

    ``stack`` are the matrices of the tensor (number, rows, columns), None for what is no matrix. ``has_bits`` is false where the
    fine-tune is a sum that has no values of its own: only differences are meant.
    """

    def __init__(
        self,
        name: str,
        finetuned: Tensor,
        base: Tensor | None,
        *,
        kept: tuple[KeptBytes, KeptBytes | None],
        stack: tuple[int, int, int] | None = None,
        has_bits: bool = True,
    ) -> None:
        self.name = name
        self.finetuned = finetuned
        self.base = base
        self.own_bytes, self.base_bytes = kept
        self.stack = stack
        self.has_bits = has_bits
        self.facts = ChangeFacts(finetuned.elements, finetuned.elements)

    @property
    def elements(self) -> int:
        return self.finetuned.elements

    @property
    def width(self) -> int:
        """Bytes of an entry of the fine-tune."""
        return DTYPES[self.finetuned.dtype].bytes

    @property
    def is_comparable(self) -> bool:
        """Have both tensors one dtype and shape, so that their bits can be compared?"""
        base = self.base
        return (
            base is not None
            and base.dtype == self.finetuned.dtype
            and base.shape == self.finetuned.shape
            and self.has_bits
        )

    @property
    def has_difference(self) -> bool:
        """Is there a difference of numbers?"""
        base = self.base
        return (
            base is not None
            and base.shape == self.finetuned.shape
            and base.dtype in MERGEABLE
            and self.finetuned.dtype in MERGEABLE
            and self.elements > 0
        )

    @property
    def is_wide(self) -> bool:
        """Is the difference one of float64?"""
        return (
            "F64" in (self.finetuned.dtype, self.base.dtype if self.base is not None else "")
            and self.has_bits
        )

    @property
    def row(self) -> int:
        """Entries of a row: of all but the first dimension."""
        shape = self.finetuned.shape
        return max(math.prod(shape[1:]), 1) if len(shape) > 1 else max(self.elements, 1)

    def spans(self) -> Iterator[tuple[int, int]]:
        """The first and the last entry of each block."""
        for first in range(0, self.elements, BLOCK):
            yield first, min(first + BLOCK, self.elements)

    def own_raw(self, first: int, last: int) -> np.ndarray:
        """Return bytes of the fine-tune's entries."""
        return self.own_bytes.read(first * self.width, (last - first) * self.width)

    def changed_at(self, first: int, last: int) -> np.ndarray:
        """Return the places, from ``first`` on, of the entries whose bits differ."""
        assert self.base_bytes is not None
        kind = f"u{self.width}" if self.width in (1, 2, 4, 8) else f"V{self.width}"
        own = self.own_raw(first, last).view(kind)
        base = self.base_bytes.read(first * self.width, (last - first) * self.width).view(kind)
        return np.flatnonzero(own != base)

    def difference(self, first: int, last: int) -> np.ndarray:
        """Return entries of ``D``, the fine-tune minus the base, in float64."""
        assert self.base is not None
        assert self.base_bytes is not None
        own = decode(self.own_raw(first, last), self.finetuned.dtype).astype(np.float64)
        width = DTYPES[self.base.dtype].bytes
        raw = self.base_bytes.read(first * width, (last - first) * width)
        own -= decode(raw, self.base.dtype)
        return own

    def measure(self) -> None:
        """Measure the facts. Errors: NonFiniteError for a NaN or an infinity in what changed."""
        changed = self._count_changed() if self.is_comparable else self.elements
        if not changed or not self.has_difference:
            self.facts = ChangeFacts(self.elements, changed)
            return
        sketching = Sketching()
        columns = self.row
        sums = np.zeros(-(-self.elements // columns))
        largest = 0.0
        for first, last in self.spans():
            with np.errstate(all="ignore"):
                values = self.difference(first, last)
            if not np.isfinite(values).all():
                raise self._not_finite(first + int(np.argmin(np.isfinite(values))))
            sketching.add(first, values)
            np.abs(values, out=values)
            largest = max(largest, float(values.max()))
            row = first // columns
            starts = np.maximum(np.arange(row, -(-last // columns)) * columns - first, 0)
            sums[row : row + len(starts)] += np.add.reduceat(values, starts)
        sketch = sketching.result()
        self.facts = ChangeFacts(
            self.elements,
            changed,
            sketch[0].norm,
            largest,
            sums / columns,
            sketch,
            self._effective_rank(sketch[0].norm),
        )

    def _count_changed(self) -> int:
        if self.width == 0:  # several entries share a byte
            assert self.base_bytes is not None
            own, base, size = self.own_bytes, self.base_bytes, self.finetuned.byte_size
            parts = ((at, min(BLOCK, size - at)) for at in range(0, size, BLOCK))
            is_equal = all(np.array_equal(own.read(*part), base.read(*part)) for part in parts)
            return 0 if is_equal else self.elements
        return sum(len(self.changed_at(first, last)) for first, last in self.spans())

    def _effective_rank(self, norm: float) -> float | None:
        """Estimate ``|D|_F^4 / |D^T D|_F^2``, the number of directions that the squares are spread over."""
        if self.stack is None or not norm:
            return None
        count, rows, columns = self.stack
        draw = np.random.default_rng(0).standard_normal((columns, PROBES))
        height = max(BLOCK // columns, 1)
        squares = 0.0
        for matrix in range(count):
            image = np.zeros((columns, PROBES))
            for row in range(0, rows, height):
                end = min(row + height, rows)
                first = (matrix * rows + row) * columns
                part = self.difference(first, first + (end - row) * columns) / norm
                part = part.reshape(-1, columns)
                image += part.T @ (part @ draw)
            squares += float((image * image).sum()) / PROBES
        return 1.0 / squares if squares else None

    def _not_finite(self, at: int) -> NonFiniteError:
        index = [int(i) for i in np.unravel_index(at, self.finetuned.shape)] if self.finetuned.shape else ""
        return NonFiniteError(
            f"{self.name}{index} is a NaN or an infinity in the fine-tune or in the base; expected finite numbers. Correct the "
            "model, or leave it out."
        )


def mean_rank(changes: Sequence[ChangeFacts]) -> float | None:
    """Return the mean effective rank of the matrices that changed; None without one."""
    ranks = [facts.rank for facts in changes if facts.rank is not None]
    return float(np.mean(ranks)) if ranks else None


__all__ = ["BLOCK", "ChangeFacts", "KeptBytes", "TensorChange", "mean_rank"]
