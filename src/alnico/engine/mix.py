"""Computes blocks of one output tensor, and names the place of a NaN or an infinity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from alnico.checkpoint.source import Source
from alnico.engine.blocks import Block, on_host
from alnico.engine.kernel_arguments import KernelContext, codes_of, in_place, keeps_equal, kind_of
from alnico.errors import NonFiniteError
from alnico.kernels.choice import kernel_for
from alnico.kernels.constants import CODES, WIDE_CODES
from alnico.kernels.mix_kernel import MixKernel
from alnico.numerics.dtypes import decode
from alnico.plan.job import Input, Job

NOTHING = np.empty(0, np.uint8)


def mix_kernel(job: Job) -> MixKernel:
    """Describe the kernel a job needs."""
    assert job.merge is not None
    kinds = tuple(kind_of(a) for a in job.merge.arguments)
    are_differences = any(tensor.is_difference for tensor in job.inputs)
    return MixKernel(
        job.merge.mix, len(job.inputs), job.base is not None, kinds, job.real, differences=are_differences
    )


class Mixer:
    """Mixes the blocks of one job with measured facts. Safe for threads."""

    def __init__(self, context: KernelContext, sources: Sequence[Source]) -> None:
        job = self.job = context.job
        assert job.merge is not None
        self.sources = sources
        self.run = kernel_for(mix_kernel(job), gpu=context.gpu)
        codes, self.base_code = codes_of(job)
        self.codes = np.concatenate([codes, np.array([CODES[i.dtype] for i in job.sides], np.int64)])
        self.arguments = context.flat(job.merge.arguments)
        self.keeps_equal = keeps_equal(job, context)

    def __call__(self, start: int, block: Block, out: Any) -> None:
        """Fill ``out``, in the memory of the block's device, from a block that begins at element ``start``.

        Errors: NonFiniteError, naming tensor and index.
        """
        if not self.is_finite(start, block, out):
            self._refuse(start, block, out)

    def is_finite(self, start: int, block: Block, out: Any) -> bool:
        """Fill ``out``, as a call does, and return whether all values read and made are finite."""
        arguments = in_place(self.arguments, block.ranks)
        codes = WIDE_CODES if self.job.is_wide else CODES
        dtypes = (self.base_code, out, codes[self.job.dtype])
        bad = self.run(
            tuple(block.raws), self.codes, block.base, *dtypes, start, self.keeps_equal, *arguments
        )
        return bad < 0

    def _refuse(self, start: int, block: Block, out: Any) -> None:
        refuse_inputs(self.job, self.sources, start, block)
        refuse_output(self.job, start, on_host(out, block.gpu))


def refuse_output(job: Job, start: int, out: np.ndarray) -> None:
    """Name the first NaN or infinity in the output of a merge from element ``start`` on. Errors:
    NonFiniteError."""
    place, value = _first_bad(out, "F32" if job.is_wide else job.dtype) or (0, "a value that is not finite")
    raise NonFiniteError(
        f"{job.name}{_index(start + place, job.shape)}: the merge gives {value} in {job.dtype}; expected a finite "
        "number. Choose an output dtype with a larger range, or smaller weights."
    )


def refuse_inputs(job: Job, sources: Sequence[Source], start: int, block: Block) -> None:
    """Name the first NaN or infinity in a block that begins at element ``start``, if there is one. Errors:
    NonFiniteError."""
    for tensor, raw in zip(job.read, block.bytes_read(job.base is not None), strict=True):
        refuse_tensor(tensor, sources[tensor.model].label, job.shape, start, raw)


def refuse_tensor(tensor: Input, label: str, shape: tuple[int, ...], start: int, raw: np.ndarray) -> None:
    """Name the first NaN or infinity in the raw bytes of a tensor from element ``start`` on, if there is one."""
    if (first := _first_bad(raw, tensor.dtype)) is not None:
        raise NonFiniteError(
            f"{tensor.name}{_index(start + first[0], shape)}: {label} has {first[1]}; "
            "expected finite numbers. Repair or exclude this model."
        )


def _first_bad(raw: np.ndarray, dtype: str) -> tuple[int, str] | None:
    values = decode(raw, dtype)
    bad = np.flatnonzero(~np.isfinite(values))
    if not bad.size:
        return None
    return int(bad[0]), "NaN" if np.isnan(values[bad[0]]) else "an infinity"


def _index(flat: int, shape: tuple[int, ...]) -> str:
    """Return the index of an element, for messages; nothing for a tensor of no dimensions.

    >>> _index(5, (2, 3))
    '[1, 2]'
    """
    return str([int(i) for i in np.unravel_index(flat, shape)]) if shape else ""
