"""All values of a tensor in order: any kth largest of them without another look at the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.engine.kernel_arguments import KernelContext, codes_of
from alnico.engine.measure import values_kernel
from alnico.engine.mix import NOTHING
from alnico.kernels.build import compile_kernel
from alnico.kernels.facts import KthLargest

MOST_ELEMENTS = 1 << 26
"""Of a tensor that is put in order: it takes 256 MiB while that is done."""


@dataclass(frozen=True)
class SortedValues:
    """The values of (n,) elements: ``values`` rise, and ``upto`` counts the elements up to each; None where no two are equal enough to
    be worth it, and ``values`` are all of them."""

    values: np.ndarray
    upto: np.ndarray | None
    elements: int

    @property
    def byte_size(self) -> int:
        return self.values.nbytes + (self.upto.nbytes if self.upto is not None else 0)

    def largest(self, place: int) -> float:
        """The value at a place, counted from the largest, which is 1."""
        position = self.elements - place
        if self.upto is not None:
            position = int(np.searchsorted(self.upto, position, side="right"))
        return float(self.values[position])


def order(
    fact: KthLargest, model: int, known: KernelContext, raws: Sequence[np.ndarray], base: np.ndarray | None
) -> SortedValues:
    """Put what ``fact`` compares of one model's tensor in order. ``raws`` are the bytes of all inputs of the job.

    Task vectors of models in 16 bits have few different values, some thousands in a tensor of millions: those are kept once.
    """
    job = known.job
    codes, base_code = codes_of(job)
    found = np.empty((1, job.elements), known.real)
    chosen: Any = np.array([model], np.int64)
    compile_kernel(values_kernel(fact, job))(
        tuple(raws), codes, NOTHING if base is None else base, base_code, 0, chosen, found
    )
    values = found[0]
    values.sort()
    last = np.flatnonzero(values[1:] != values[:-1])
    if 8 * (last.size + 1) < values.nbytes:
        upto = np.append(last + 1, values.size).astype(np.uint32)
        return SortedValues(values[upto - 1], upto, job.elements)
    return SortedValues(values, None, job.elements)
