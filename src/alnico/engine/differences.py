"""Reads stored task vectors on one base as differences: the base is read once for all of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from alnico.checkpoint.source import Source
from alnico.checkpoint.task_vectors.equipped_model import EquippedModel
from alnico.plan.job import Input, Job


def source_of(tensor: Input, sources: Sequence[Source]) -> Source:
    """Return the source that an input is read from: the model, or what it adds to its base."""
    source = sources[tensor.model]
    if tensor.is_difference:
        assert isinstance(source, EquippedModel)
        assert source.differences is not None
        return source.differences
    return source


def as_differences(jobs: Iterable[Job], sources: Sequence[Source]) -> list[Job]:
    """Return jobs that read the differences of their models in place of the models, where all of these are the job's base plus
    a stored task vector; other jobs stay as they are. Both give the same bits.

    Methods that measure the tensors first read the models.
    """

    @functools.cache
    def is_base(model: int, base: int) -> bool:
        source = sources[model]
        return isinstance(source, EquippedModel) and _is_base_of(source, sources[base])

    return [_as_differences(job, sources, is_base) for job in jobs]


def _as_differences(job: Job, sources: Sequence[Source], is_base: Callable[[int, int], bool]) -> Job:
    if job.kind != "mix" or job.base is None or job.merge is None or job.real != "float32" or job.sides:
        return job
    if job.merge.levels() or job.merge.of_model or job.merge.uses_ranks:
        return job
    least = min(tensor.width for tensor in job.read)  # wider ones leave the chunks of the job as they are
    inputs = []
    for tensor in job.inputs:
        difference = _difference(tensor, job.base, sources) if is_base(tensor.model, job.base.model) else None
        if difference is None or difference.width < least:
            return job
        inputs.append(difference)
    return dataclasses.replace(job, inputs=tuple(inputs))


def _difference(tensor: Input, base: Input, sources: Sequence[Source]) -> Input | None:
    source = sources[tensor.model]
    assert isinstance(source, EquippedModel)
    if tensor.name != base.name or tensor.digest or source.differences is None:
        return None
    found = source.differences.tensors.get(tensor.name)
    if found is None or source.base.tensors[tensor.name].dtype != base.dtype:
        return None
    return Input(tensor.model, tensor.name, found.dtype, found.byte_size, is_difference=True)


def _is_base_of(model: EquippedModel, base: Source) -> bool:
    """Is a source the base of a model: the same object, or the same files?"""
    if model.base is base:
        return True
    own: list[dict[str, Any]] = model.base.identity()
    return bool(own) and type(model.base) is type(base) and own == base.identity()
