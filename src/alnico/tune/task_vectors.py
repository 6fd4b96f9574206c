"""Computes task vectors of a plan and writes their weighted sums into modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.checkpoint.memory_model import import_torch
from alnico.checkpoint.source import read_tensor
from alnico.errors import MismatchError
from alnico.evaluation.module_names import PlacedElements, place, sum_of
from alnico.kernels.facts import KthLargest
from alnico.methods.shared.sparsify import Scope
from alnico.numerics.dtypes import CONFIG_NAMES
from alnico.plan.job import Job, Plan

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 16
"""Elements per block of a sum, so that a sum of many models stays in the processor's cache."""


class TaskVectors:
    """The task vectors (k, n) and the base's values (n,) of each tensor that a plan mixes.

    They are float32 (float64 where the engine uses it). As many as fit ``memory_bytes`` stay in memory; the
    others are read at every use. With ``density`` they are trimmed, and entries against the elected sign are
    set to 0, as ``ties`` does with ``elect: mass`` and ``divide: none``. Neither the threshold nor the vote
    depends on the weights, so the same entries are kept for all weights.
    """

    def __init__(
        self, plan: Plan, *, density: float | None = None, scope: Scope = "model", memory_bytes: int
    ) -> None:
        self.jobs = tuple(job for job in plan.jobs if job.kind == "mix" and job.base is not None)
        self._torch = import_torch("learning coefficients")
        self._plan = plan
        self._room = memory_bytes
        self._held: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._density = density
        self._limits = self._limits_of_models() if density is not None and scope == "model" else None

    @cached_property
    def changing(self) -> tuple[Job, ...]:
        """The tensors in which at least one model differs from the base."""
        return tuple(job for job in self.jobs if bool(self.of(job)[1].any()))

    def of(self, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the base's values (n,) and the task vectors (k, n) of a tensor."""
        if job.name in self._held:
            return self._held[job.name]
        base, vectors = self._read(job)
        if self._density is not None:
            self._elect(
                vectors,
                self._limits if self._limits is not None else [self._limit([v.abs()]) for v in vectors],
            )
        taken = (base.numel() + vectors.numel()) * base.element_size()
        if taken <= self._room:
            self._room -= taken
            self._held[job.name] = base, vectors
        return base, vectors

    def merged(self, job: Job, weight: np.ndarray) -> torch.Tensor:
        """Return ``base + sum_i weight_i * vector_i`` in the output's dtype: the bits that a merge writes.

        Models are summed in their order; each product and each sum is rounded on its own. Where the sum is 0,
        the base's value stays.
        """
        base, vectors = self.of(job)
        result = self._torch.empty_like(base)
        total, product = (self._torch.empty(min(CHUNK, base.numel()), dtype=base.dtype) for _ in range(2))
        for start in range(0, base.numel(), CHUNK):
            part = base[start : start + CHUNK]
            summed, term = total[: part.numel()].zero_(), product[: part.numel()]
            for vector, factor in zip(vectors, weight.tolist(), strict=True):
                summed.add_(self._torch.mul(vector[start : start + CHUNK], factor, out=term))
            result[start : start + CHUNK] = self._torch.where(summed == 0, part, part + summed)
        dtype: torch.dtype = getattr(self._torch, CONFIG_NAMES[job.dtype])
        rounded: torch.Tensor = result.to(dtype)
        return rounded.reshape(job.shape)

    def slope(self, job: Job, gradient: torch.Tensor) -> np.ndarray:
        """Return the derivatives by the weights (k,): inner products of gradient and task vectors."""
        _, vectors = self.of(job)
        slopes: np.ndarray = (
            (vectors @ gradient.reshape(-1).to("cpu", vectors.dtype)).to(self._torch.float64).numpy()
        )
        return slopes

    def _read(self, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
        assert job.base is not None
        real = np.dtype(job.real)
        sources = self._plan.sources
        base = read_tensor(sources[job.base.model], job.base.name).astype(real, copy=False).reshape(-1)
        vectors = np.empty((len(job.inputs), base.size), real)
        for row, tensor in zip(vectors, job.inputs, strict=True):
            np.subtract(
                read_tensor(sources[tensor.model], tensor.name).astype(real, copy=False).reshape(-1),
                base,
                out=row,
            )
        return self._torch.from_numpy(base), self._torch.from_numpy(vectors)

    def _limits_of_models(self) -> list[float]:
        """Return the threshold of each model over all tensors, reading one model at a time."""
        models = len(self.jobs[0].inputs) if self.jobs else 0
        return [self._limit([self._read(job)[1][i].abs() for job in self.jobs]) for i in range(models)]

    def _limit(self, magnitudes: Sequence[torch.Tensor]) -> float:
        """Return the kth largest of magnitudes, with the engine's k."""
        assert self._density is not None
        values = np.concatenate([m.numpy() for m in magnitudes])
        if self._density >= 1 or not values.size:
            return 0.0
        place = values.size - KthLargest((self._density,)).place(0, values.size)
        return float(np.partition(values, place)[place])

    def _elect(self, vectors: torch.Tensor, limits: Sequence[float]) -> None:
        """Set to 0 values below the threshold, then values against the sign of the sum (plus if 0)."""
        balance = self._torch.zeros_like(vectors[0])
        for vector, limit in zip(vectors, limits, strict=True):
            vector[vector.abs() < limit] = 0
            balance += vector
        for vector in vectors:
            vector[self._torch.where(balance >= 0, vector < 0, vector > 0)] = 0


class MergedModules:
    """Modules whose parameters and buffers hold a weighted sum of task vectors.

    ``modules`` maps the kind that a module was loaded as to the module; each must hold the base's values.
    Gradients are recorded only for parameters that a task vector changes; ``close`` restores the modules'
    settings. ``absent`` lists the changed tensors that no module has. ``copies`` maps the second copy of a
    tied tensor, if the files store both, to the first.
    Errors: MismatchError for modules that have none of the merged tensors, one in another shape, or one that
    is in no file.
    """

    def __init__(self, vectors: TaskVectors, modules: Mapping[str, Any], plan: Plan) -> None:
        self.vectors = vectors
        self.places: dict[str, list[PlacedElements]] = {job.name: [] for job in vectors.jobs}
        self.copies: dict[str, str] = {}
        jobs = {job.name: job for job in plan.jobs}
        shapes = {name: job.shape for name, job in jobs.items()}

        def read(name: str) -> np.ndarray:
            tensor = jobs[name].base or jobs[name].inputs[0]
            return read_tensor(plan.sources[tensor.model], tensor.name)

        for kind, module in modules.items():
            placement = place(module, shapes, read, plan.sources[plan.donor].label, kind)
            for name, places in placement.of.items():
                self.places.setdefault(name, []).extend(places)
                first = next((n for p in places if p.is_whole for n in placement.files_of[id(p.own)]), name)
                if first != name:
                    self.copies[name] = first
        if modules and not any(self.places[job.name] for job in vectors.jobs):
            kinds = " and ".join(type(m).__name__ for m in modules.values())
            raise MismatchError(
                f"{vectors.jobs[0].name if vectors.jobs else 'the merge'}: the modules ({kinds}) have none "
                "of the tensors that the merge changes; expected the tensor names of the models. Give tasks "
                "for models of this architecture."
            )
        for name, first in self.copies.items():
            self._check_copy(jobs[name], jobs[first])
        self.absent = tuple(job.name for job in vectors.changing if not self.places[job.name])
        trained = {id(place.own) for job in vectors.changing for place in self.places[job.name]}
        self._before = [(p, p.requires_grad) for module in modules.values() for p in module.parameters()]
        for parameter, _ in self._before:
            parameter.requires_grad_(id(parameter) in trained)

    def _check_copy(self, job: Job, first: Job) -> None:
        """Check that both stored copies of a tied tensor change equally. Errors: MismatchError."""
        mixed = [tensor in self.vectors.jobs for tensor in (job, first)]
        if any(mixed) and not (
            all(mixed) and bool((self.vectors.of(job)[1] == self.vectors.of(first)[1]).all())
        ):
            raise MismatchError(
                f"{job.name}: the module ties it to {first.name}, but a model has different values for the "
                "two; expected equal values. Remove one of them from the files, or set tie_word_embeddings "
                "to false in the base's config.json."
            )

    def write(self, weights: Mapping[str, np.ndarray]) -> None:
        """Write the merge into the modules; ``weights`` has one weight per model for each tensor's name."""
        for job in self.vectors.jobs:
            if places := self.places[job.name]:
                merged = self.vectors.merged(job, weights[job.name])
                for place in places:
                    place.put(merged)

    def slopes(self) -> Iterator[tuple[Job, np.ndarray]]:
        """Yield the derivatives by the weights (k,) of changing tensors with gradients; then clear those."""
        for job in self.vectors.changing:
            gradient = sum_of(self.places[job.name], job.elements, lambda own: own.grad)
            if gradient is not None:
                yield job, self.vectors.slope(job, gradient)
        for parameter, _ in self._before:
            parameter.grad = None

    def close(self) -> None:
        for parameter, requires_grad in self._before:
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
