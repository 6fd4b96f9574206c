"""Sorts the values of a tensor, to look up any kth largest without reading the tensor again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.engine.kernel_arguments import KernelContext, codes_of
from alnico.engine.measure import values_kernel
from alnico.engine.mix import NOTHING
from alnico.kernels.choice import kernel_for
from alnico.kernels.facts import KthLargest

MOST_ELEMENTS = 1 << 26
"""Most elements of a tensor that is sorted; sorting so many takes 256 MiB."""


@dataclass(frozen=True)
class SortedValues:
    """The sorted values of (n,) elements. ``upto`` counts the elements up to each of the distinct ``values``;
    it is None if there are few duplicates, and ``values`` then holds all elements."""

    values: np.ndarray
    upto: np.ndarray | None
    elements: int

    @property
    def byte_size(self) -> int:
        return self.values.nbytes + (self.upto.nbytes if self.upto is not None else 0)

    def largest(self, place: int) -> float:
        """Return the value at a place; the largest value has place 1."""
        position = self.elements - place
        if self.upto is not None:
            position = int(np.searchsorted(self.upto, position, side="right"))
        return float(self.values[position])


def sort_values(
    fact: KthLargest, model: int, context: KernelContext, raws: Sequence[np.ndarray], base: np.ndarray | None
) -> SortedValues:
    """Sort the values that ``fact`` compares in one model's tensor. ``raws`` are the bytes of all inputs of
    the job.

    Task vectors of 16-bit models have few distinct values, some thousands in a tensor of millions; each is
    kept once.
    """
    job = context.job
    codes, base_code = codes_of(job)
    buffer = np.empty((1, job.elements), context.real)
    chosen: Any = np.array([model], np.int64)
    kernel_for(values_kernel(fact, job), job.elements)(
        tuple(raws), codes, NOTHING if base is None else base, base_code, 0, chosen, buffer
    )
    values = buffer[0]
    values.sort()
    last = np.flatnonzero(values[1:] != values[:-1])
    if 8 * (last.size + 1) < values.nbytes:
        upto = np.append(last + 1, values.size).astype(np.uint32)
        return SortedValues(values[upto - 1], upto, job.elements)
    return SortedValues(values, None, job.elements)
