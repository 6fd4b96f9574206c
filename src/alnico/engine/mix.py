"""Computes blocks of one output tensor, and says where a NaN or an infinity is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alnico.checkpoint.model import Source
from alnico.engine.arguments import Known, codes_of, in_place, keeps_equal, kind_of, working_precision
from alnico.engine.blocks import Block
from alnico.errors import NonFiniteError
from alnico.kernels.build import compiled
from alnico.kernels.mixing import MixKernel
from alnico.kernels.shape import CODES
from alnico.numerics.dtypes import decode
from alnico.plan.job import Input, Job

NOTHING = np.empty(0, np.uint8)


def mix_kernel(job: Job) -> MixKernel:
    """Describe the kernel a job needs."""
    assert job.merge is not None
    kinds = tuple(kind_of(a) for a in job.merge.arguments)
    return MixKernel(job.merge.mix, len(job.inputs), job.base is not None, kinds, working_precision(job))


class Mixer:
    """One job with its facts: call it for each block, from any thread."""

    def __init__(self, known: Known, sources: Sequence[Source]) -> None:
        job = self.job = known.job
        assert job.merge is not None
        self.sources = sources
        self.run = compiled(mix_kernel(job))
        self.codes, self.base_code = codes_of(job)
        self.arguments = known.flat(job.merge.arguments)
        self.keeps_equal = keeps_equal(job, known)

    def __call__(self, start: int, block: Block, out: np.ndarray) -> None:
        """Fill ``out`` from a block that begins at element ``start``. Errors: NonFiniteError, naming tensor and index."""
        arguments = in_place(self.arguments, block.ranks)
        dtypes = (self.base_code, out, CODES[self.job.dtype])
        bad = self.run(tuple(block.raws), self.codes, block.base, *dtypes, start, self.keeps_equal, *arguments)
        if bad >= 0:
            self._refuse(start, block, out)

    def _refuse(self, start: int, block: Block, out: np.ndarray) -> None:
        refuse_inputs(self.job, self.sources, start, block)
        found = _first_bad(out, self.job.dtype)
        place, value = found if found is not None else (0, "a value that is not finite")
        raise NonFiniteError(
            f"{self.job.name}{_index(start + place, self.job.shape)}: the merge gives {value} in {self.job.dtype}; expected a finite "
            "number. Choose an output dtype with a larger range, or smaller weights."
        )


def refuse_inputs(job: Job, sources: Sequence[Source], start: int, block: Block) -> None:
    """Name the first NaN or infinity in a block that begins at element ``start``, if there is one. Errors: NonFiniteError."""
    inputs: list[tuple[Input, np.ndarray]] = list(zip(job.inputs, block.raws, strict=True))
    if job.base is not None:
        inputs.append((job.base, block.base))
    for tensor, raw in inputs:
        found = _first_bad(raw, tensor.dtype)
        if found is not None:
            raise NonFiniteError(
                f"{tensor.name}{_index(start + found[0], job.shape)}: {sources[tensor.model].label} has {found[1]}; "
                "expected finite numbers. Mend or leave out this model."
            )


def _first_bad(raw: np.ndarray, dtype: str) -> tuple[int, str] | None:
    values = decode(raw, dtype)
    bad = np.flatnonzero(~np.isfinite(values))
    if not bad.size:
        return None
    return int(bad[0]), "NaN" if np.isnan(values[bad[0]]) else "an infinity"


def _index(flat: int, shape: tuple[int, ...]) -> str:
    return str([int(i) for i in np.unravel_index(flat, shape)]) if shape else ""
