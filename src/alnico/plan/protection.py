"""Protects tensors of a plan: what is merged changes nothing that a model gives on its own inputs.

For a matrix M that is merged, the matrix A of the protected model, and the leading eigenvectors V of the Gram matrix of A's
inputs: ``out = A + (M - A)(I - V V^T)``. On inputs in the span of V the output is A's, on inputs at a right angle to it M's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from alnico.errors import MismatchError
from alnico.methods.base import MatrixMethod, Merge, combine
from alnico.numerics import null_space
from alnico.numerics.arrays import AnyArray
from alnico.numerics.dtypes import DTYPES, MERGEABLE
from alnico.numerics.sizes import count_of
from alnico.plan.job import Input, Job, Protection
from alnico.plan.sections import ModelPart
from alnico.plan.statistics_inputs import StatisticsInputs
from alnico.recipe.schema import Protect

WHOLE = combine((1.0,), fixes_equal_inputs=True, is_wide=True)
"""Reads a tensor of one model as float64."""


class ProtectedJobs:
    """Makes protected jobs of jobs. One for a plan: jobs of one method share a kernel."""

    def __init__(self, setting: Protect, statistics: StatisticsInputs, anchor: ModelPart) -> None:
        """``anchor``: the protected model."""
        self.setting = setting
        self.anchor = anchor
        self.label = statistics.sources[anchor.model].label
        self._statistics = statistics
        self._wide: dict[int, tuple[Merge, Merge]] = {}
        self.protected: set[str] = set()
        """Names of the tensors that are protected."""
        self.kept: set[str] = set()
        """Names of the tensors without a Gram matrix that stay as in the protected model."""
        self.merged: set[str] = set()
        """Names of the tensors without a Gram matrix that are merged all the same."""

    def protect(self, job: Job) -> Job:
        """Return a job that protects the model. Errors: MismatchError for a tensor of another shape than the protected model's, and
        for Gram matrices that are not of it; ModelError."""
        anchor = self.anchor
        if job.dtype not in MERGEABLE or self._is_copy_of_it(job):
            return job
        own = anchor.names.get(job.name)
        tensor = self._statistics.sources[anchor.model].tensors[own] if own is not None else None
        if own is None or tensor is None or tensor.shape != job.shape:
            found = f"has the shape {tensor.shape}" if tensor is not None else "is missing"
            raise MismatchError(
                f"{job.name}: {found} in {self.label}, which protect keeps, and the merge makes it {job.shape}; expected a tensor of one shape. "
                "Protect a model that has it, or leave out protect."
            )
        gram = self._statistics.gram_of(job.name, anchor, self.setting.gram, tensor.shape)
        if gram is None:
            if self.setting.others == "merge":
                self.merged.add(job.name)
                return job
            self.kept.add(job.name)
            return self._kept(job, Input(anchor.model, own, tensor.dtype, tensor.byte_size))
        kept = Input(anchor.model, own, tensor.dtype, tensor.byte_size, gram.digest)
        self.protected.add(job.name)
        return self._protected(job, kept, gram.gram, is_transposed=gram.is_transposed)

    def _is_copy_of_it(self, job: Job) -> bool:
        """Does a job write the tensor of the protected model?"""
        return len(job.inputs) == 1 and job.inputs[0].model == self.anchor.model and _is_copy(job)

    def _kept(self, job: Job, anchor: Input) -> Job:
        """Return the job that writes the protected model's tensor."""
        same = anchor.dtype == job.dtype
        return dataclasses.replace(
            job,
            kind="copy" if same else "mix",
            inputs=(anchor,),
            base=None,
            sides=(),
            merge=None if same else WHOLE,
            matrix=None,
            why="protect keeps it",
        )

    def _protected(self, job: Job, anchor: Input, gram: Input, *, is_transposed: bool) -> Job:
        inner = _as_mix(job)
        if inner.merge is not None:
            inner = dataclasses.replace(inner, merge=self._widened(inner.merge))
        base = anchor if _are_same(inner.base, anchor) else inner.base
        return dataclasses.replace(
            inner,
            kind="matrix",
            dtype=job.dtype,
            byte_size=job.elements * DTYPES[job.dtype].bytes,
            inputs=tuple(anchor if _are_same(i, anchor) and not i.digest else i for i in inner.inputs),
            base=base,
            sides=(*inner.sides, gram),
            matrix=_method_of(inner, is_transposed=is_transposed),
            protection=Protection(inner, anchor, gram, self.setting.energy, is_transposed),
        )

    def _widened(self, merge: Merge) -> Merge:
        """The same in float64, which whole matrices are computed in."""
        if id(merge) not in self._wide:
            self._wide[id(merge)] = merge, dataclasses.replace(merge, is_wide=True)
        return self._wide[id(merge)][1]

    def notes(self) -> list[str]:
        """Say what is protected, and what is not."""
        count, energy = len(self.protected), self.setting.energy
        what = "1 matrix keeps" if count == 1 else f"{count:,} matrices keep"
        stay = f"; {count_of(len(self.kept), 'tensor')} without a Gram matrix stay whole" if self.kept else ""
        found = [f"protect: {what} what {self.label} gives on {energy:g} of its inputs' squares{stay}."]
        if self.merged:
            tensors = count_of(len(self.merged), "tensor")
            found.append(
                f"protect: {tensors} without a Gram matrix {'is' if len(self.merged) == 1 else 'are'} merged as without it."
            )
        return found


def _is_copy(job: Job) -> bool:
    """Does a job write one tensor as it is, if in another dtype?"""
    return job.kind == "copy" or (
        job.kind == "mix" and job.merge is not None and job.base is None and _is_whole(job.merge)
    )


def _is_whole(merge: Merge) -> bool:
    return merge.arguments == ((1.0,),) and merge.fixes_equal_inputs


def _as_mix(job: Job) -> Job:
    """Return the job that computes a tensor in float64: of a mix and of a copy, a mix."""
    if job.kind == "matrix":
        return job
    merge = job.merge if job.kind == "mix" else WHOLE
    return dataclasses.replace(job, kind="mix", dtype="F64", byte_size=8 * job.elements, merge=merge)


def _are_same(one: Input | None, other: Input) -> bool:
    return one is not None and (one.model, one.name) == (other.model, other.name)


def _method_of(inner: Job, *, is_transposed: bool) -> MatrixMethod:
    """Return how the matrix is made before it is protected, with the memory of both."""

    def count_numbers(rows: int, columns: int, models: int, *arguments: Any) -> int:
        own = (
            inner.matrix.numbers(rows, columns, models, *arguments)
            if inner.matrix is not None
            else rows * columns
        )
        return max(own, null_space.count_numbers(rows, columns, rows if is_transposed else columns))

    def count_operations(rows: int, columns: int, models: int, *arguments: Any) -> float:
        own = (
            inner.matrix.operations(rows, columns, models, *arguments)
            if inner.matrix is not None and inner.matrix.operations is not None
            else 0.0
        )
        return own + null_space.count_operations(rows, columns, rows if is_transposed else columns)

    if inner.matrix is None:
        assert inner.merge is not None
        return MatrixMethod(_mixed, count_numbers, inner.merge, operations=count_operations)
    is_counted = inner.matrix.operations is not None
    return dataclasses.replace(
        inner.matrix,
        numbers=count_numbers,
        operations=count_operations if is_counted else None,
        runs_on_gpu=False,
    )


def _mixed(matrices: Any) -> AnyArray:
    """The matrix that is mixed element by element."""
    return matrices.mixed()


__all__ = ["ProtectedJobs"]
