"""Computes task vectors of a plan and writes their weighted sums into modules."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from alnico.checkpoint.memory_model import import_torch
from alnico.checkpoint.source import read_tensor
from alnico.devices import CPU, Device
from alnico.engine.arena import Arena
from alnico.engine.matrix import JobMatrices
from alnico.errors import MismatchError, RunError
from alnico.evaluation.module_names import PlacedElements, place, sum_of
from alnico.kernels.facts import KthLargest
from alnico.methods.shared.sparsify import Scope
from alnico.numerics.dtypes import CONFIG_NAMES
from alnico.plan.job import Job, Plan

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 16
"""Elements per block of an exact sum, so that a sum of many models stays in the processor's cache."""

STEP_CHUNK = 1 << 18
"""Elements per block of a step's sum: large, since each operation starts all threads of torch, and 1 MiB, which a cache holds."""


GPU_CHUNK = 1 << 24
"""Elements per block of a sum on a GPU: enough for all of its cores, and 64 MiB."""


class TaskVectors:
    """The task vectors (k, n) and the base's values (n,) of each tensor that a plan mixes.

    Where the plan merges a whole matrix, the task vectors are the parts that its method adds up, one per model. ``weight`` is
    every model's in the plan; the parts are divided by it. They are computed on ``device``. ``factor`` multiplies the sum of the task vectors of other tensors.

    They are float32 (float64 where the engine uses it). As many as fit ``memory_bytes`` stay in memory, and before
    them as many as fit the GPU (see :meth:`hold_on`), which computes their products; the others are read at every use;
    parts of matrices, which take long, from a temporary file. With ``density`` they are trimmed, and entries against the elected sign are
    set to 0, as ``ties`` does with ``elect: mass`` and ``divide: none``. Neither the threshold nor the vote
    depends on the weights, so the same entries are kept for all weights.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        density: float | None = None,
        scope: Scope = "model",
        memory_bytes: int,
        weight: float = 1.0,
        factor: float = 1.0,
        device: Device = CPU,
    ) -> None:
        self.jobs = tuple(job for job in plan.jobs if job.is_computed and job.base is not None)
        self._torch = import_torch("learning coefficients")
        self._plan = plan
        self._room = memory_bytes
        self._held: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._homes: Mapping[str, torch.device] = {}
        self._gpu_room: dict[str, int] = {}
        self._weight = weight
        self._factor = factor
        self._device = device
        self._spool: BinaryIO | None = None
        self._spooled: dict[str, int] = {}
        self._arena = Arena(0)
        self._density = density
        self._limits = self._limits_of_models() if density is not None and scope == "model" else None

    def hold_on(self, homes: Mapping[str, torch.device], room: Mapping[str, int]) -> None:
        """Hold tensors from now on at ``homes``, the devices of the parameters by name, up to ``room`` bytes of each GPU."""
        self._homes = homes
        self._gpu_room = dict(room)

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
        home = self._homes.get(job.name)
        if home is not None and taken <= self._gpu_room.get(str(home), -1):
            self._gpu_room[str(home)] -= taken
            base, vectors = base.to(home), vectors.to(home)
            self._held[job.name] = base, vectors
        elif taken <= self._room:
            self._room -= taken
            self._held[job.name] = base, vectors
        elif job.kind == "matrix" and job.name not in self._spooled:
            self._put_aside(job, vectors)
        return base, vectors

    def close(self) -> None:
        """Remove the temporary file."""
        if self._spool is not None:
            self._spool.close()

    def _put_aside(self, job: Job, vectors: torch.Tensor) -> None:
        """Write parts of a matrix into the temporary file. Errors: RunError."""
        try:
            if self._spool is None:
                self._spool = tempfile.TemporaryFile(prefix="alnico-")  # noqa: SIM115  (it stays open as long as the object)
            self._spooled[job.name] = self._spool.seek(0, os.SEEK_END)
            self._spool.write(memoryview(vectors.numpy()).cast("B"))
            self._spool.flush()
        except OSError as error:
            raise RunError(
                f"{tempfile.gettempdir()}: the parts of {job.name} cannot be written ({error.strerror}). Make room there, "
                "set TMPDIR to another folder, or raise --memory, so that they stay in memory."
            ) from None

    def _parts(self, job: Job) -> np.ndarray:
        """Return the models' parts of a whole matrix (k, n). Errors: those of merging it."""
        real = np.dtype(job.real)
        if job.name in self._spooled:
            assert self._spool is not None
            self._spool.seek(self._spooled[job.name])
            kept = np.empty((len(job.inputs), job.elements), real)
            self._spool.readinto(memoryview(kept).cast("B"))  # type: ignore[attr-defined]
            return kept
        matrices = JobMatrices(
            job,
            self._plan.sources,
            (),
            self._arena,
            self._plan.memory.block_elements,
            lambda: None,
            device=self._device,
        )
        parts = np.empty((len(job.inputs), job.elements), real)
        for row, part in zip(parts, matrices.parts(), strict=True):
            np.divide(part.reshape(-1), self._weight, out=row, casting="same_kind")
        return parts

    def _factor_of(self, job: Job) -> float:
        """Return the factor on the sum of a tensor's task vectors."""
        return 1.0 if job.kind == "matrix" else self._factor

    def merged(self, job: Job, weight: np.ndarray) -> torch.Tensor:
        """Return ``base + factor * sum_i weight_i * vector_i`` in the output's dtype: the bits that a merge writes.

        Models are summed in their order; each product and each sum is rounded on its own. Where the sum is 0,
        the base's value stays. A whole matrix is the merge's to its rounding: that sums in float64.
        """
        base, vectors = self.of(job)
        whole = self._factor_of(job)
        result = self._torch.empty_like(base)
        size = _chunk(base, CHUNK)
        total, product = (self._torch.empty_like(base[:size]) for _ in range(2))
        for start in range(0, base.numel(), size):
            part = base[start : start + size]
            summed, term = total[: part.numel()].zero_(), product[: part.numel()]
            for vector, factor in zip(vectors, weight.tolist(), strict=True):
                summed.add_(self._torch.mul(vector[start : start + size], factor, out=term))
            if whole != 1:
                summed.mul_(whole)
            result[start : start + size] = self._torch.where(summed == 0, part, part + summed)
        dtype: torch.dtype = getattr(self._torch, CONFIG_NAMES[job.dtype])
        rounded: torch.Tensor = result.to(dtype)
        return rounded.reshape(job.shape)

    def is_held(self, job: Job) -> bool:
        """Whether the values of a tensor stay in memory."""
        return job.name in self._held

    def add_up(self, job: Job, weight: np.ndarray, out: torch.Tensor) -> None:
        """Write the merge into ``out`` (n,) with one operation per model; the last bit may differ from ``merged``."""
        base, vectors = self.of(job)
        dtype: torch.dtype = getattr(self._torch, CONFIG_NAMES[job.dtype])
        is_direct = out.dtype == dtype == base.dtype and out.device == base.device
        size = _chunk(base, STEP_CHUNK)
        for start in range(0, base.numel(), size):
            span = slice(start, start + size)
            total = out[span] if is_direct else self._torch.empty_like(base[span])
            first, *others = zip(vectors, (weight * self._factor_of(job)).tolist(), strict=True)
            self._torch.add(base[span], first[0][span], alpha=first[1], out=total)
            for vector, factor in others:
                total.add_(vector[span], alpha=factor)
            if not is_direct:
                out[span] = total.to(dtype).to(out.device, out.dtype)

    def rows(self, job: Job, weight: np.ndarray, chosen: torch.Tensor) -> torch.Tensor:
        """Return the chosen rows of the merge of a table, as ``add_up`` computes them."""
        base, vectors = self.of(job)
        chosen = chosen.to(base.device)
        total = base.reshape(job.shape)[chosen]
        for vector, factor in zip(vectors, (weight * self._factor_of(job)).tolist(), strict=True):
            total.add_(vector.reshape(job.shape)[chosen], alpha=factor)
        dtype: torch.dtype = getattr(self._torch, CONFIG_NAMES[job.dtype])
        return total.to(dtype)

    def slope(self, job: Job, gradient: torch.Tensor) -> np.ndarray:
        """Return the derivatives by the weights (k,): inner products of gradient and task vectors."""
        _, vectors = self.of(job)
        if gradient.is_sparse:
            rows, gradient = gradient._indices()[0].to(vectors.device), gradient._values()
            vectors = vectors.reshape(len(vectors), *job.shape)[:, rows].reshape(len(vectors), -1)
        slopes: np.ndarray = (
            (vectors @ gradient.reshape(-1).to(vectors.device, vectors.dtype))
            .to(self._torch.float64)
            .cpu()
            .numpy()
        )
        return slopes * self._factor_of(job)

    def _read(self, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
        assert job.base is not None
        real = np.dtype(job.real)
        sources = self._plan.sources
        base = read_tensor(sources[job.base.model], job.base.name).astype(real, copy=False).reshape(-1)
        if job.kind == "matrix":
            return self._torch.from_numpy(base), self._torch.from_numpy(self._parts(job))
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


def _chunk(values: torch.Tensor, elements: int) -> int:
    """Return the elements per block of a sum: ``elements`` on the processor."""
    return GPU_CHUNK if values.is_cuda else elements


class MergedModules:
    """Modules whose parameters and buffers hold a weighted sum of task vectors.

    ``modules`` maps the kind that a module was loaded as to the module; each must hold the base's values.
    Gradients are recorded only for parameters that a task vector changes; ``close`` restores the modules'
    settings. ``absent`` lists the changed tensors that no module has. ``copies`` maps the second copy of a
    tied tensor, if the files store both, to the first.

    Tables that only ``nn.Embedding`` uses have sparse gradients, and ``update`` leaves their rows out until they are
    looked up, so that a step costs the same for any vocabulary.
    Errors: MismatchError for modules that have none of the merged tensors, one in another shape, or one that
    is in no file.
    """

    def __init__(
        self,
        vectors: TaskVectors,
        modules: Mapping[str, Any],
        plan: Plan,
        *,
        gpu_room: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """``gpu_room`` are the bytes for task vectors on GPUs, by the names that torch gives these."""
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
        vectors.hold_on({n: places[0].own.device for n, places in self.places.items() if places}, gpu_room)
        for name, first in self.copies.items():
            self._check_copy(jobs[name], jobs[first])
        self.absent = tuple(job.name for job in vectors.changing if not self.places[job.name])
        self._parts: dict[int, list[tuple[Job, PlacedElements]]] = {}
        for job in vectors.changing:
            for part in self.places[job.name]:
                self._parts.setdefault(id(part.own), []).append((job, part))
        self._before = [(p, p.requires_grad) for module in modules.values() for p in module.parameters()]
        self._weights: Mapping[str, np.ndarray] = {}
        self._tables: dict[int, list[tuple[Any, Any]]] = {}
        for parameter, _ in self._before:
            parameter.requires_grad_(id(parameter) in self._parts)
        for module in modules.values():
            for one in module.modules() if hasattr(module, "modules") else ():
                self._watch_table(one)

    def _watch_table(self, module: Any) -> None:
        """Give a table sparse gradients if it is one whole tensor of the files that is held in memory."""
        embedding = import_torch("learning coefficients").nn.Embedding
        if type(module) is not embedding or module.sparse or module.scale_grad_by_freq or module.max_norm:
            return
        own: torch.Tensor = module.weight
        parts = self._parts.get(id(own), [])
        if len(parts) == 1 and self._same(parts[0][0]) is own and self.vectors.is_held(parts[0][0]):

            def fill(_: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
                self._fill(own, given[0] if given else named["input"])

            module.sparse = True
            handle = module.register_forward_pre_hook(fill, with_kwargs=True)
            self._tables.setdefault(id(own), []).append((module, handle))

    def _same(self, job: Job) -> torch.Tensor | None:
        """Return the module's tensor that has exactly the elements of a tensor of the files; None if there is no single one."""
        places = self.places[job.name]
        is_same = len(places) == 1 and places[0].is_same and places[0].own.numel() == job.elements
        return places[0].own if is_same else None

    def _fill(self, own: torch.Tensor, rows: torch.Tensor) -> None:
        """Compute the rows of a table that are about to be looked up."""
        if self._weights and id(own) in self._tables:
            job, _ = self._parts[id(own)][0]
            chosen = rows.detach().reshape(-1).unique()  # type: ignore[no-untyped-call]
            values = self.vectors.rows(job, self._weights[job.name], chosen)
            own.data[chosen] = values.to(own.device, own.dtype)

    def must_repeat(self) -> bool:
        """Whether a backward pass used rows of a table that ``update`` left out; then its gradients are dropped.

        The gradient of a table is dense if more than ``nn.Embedding`` uses it. Such a table is computed whole from now on.
        """
        is_stale = False
        for own in {id(p): p for p, _ in self._before if id(p) in self._tables}.values():
            if own.grad is not None and not own.grad.is_sparse:
                for module, handle in self._tables.pop(id(own)):
                    module.sparse = False
                    handle.remove()
                is_stale = bool(self._weights)
        if is_stale:
            self.drop_gradients()
        return is_stale

    def _check_copy(self, job: Job, first: Job) -> None:
        """Check that both stored copies of a tied tensor change equally. Errors: MismatchError."""
        mixed = [tensor in self.vectors.jobs for tensor in (job, first)]
        if any(mixed) and not (
            all(mixed) and bool((self.vectors.of(job)[1].cpu() == self.vectors.of(first)[1].cpu()).all())
        ):
            raise MismatchError(
                f"{job.name}: the module ties it to {first.name}, but a model has different values for the "
                "two; expected equal values. Remove one of them from the files, or set tie_word_embeddings "
                "to false in the base's config.json."
            )

    def write(self, weights: Mapping[str, np.ndarray]) -> None:
        """Write the merge into the modules, bit for bit; ``weights`` has one weight per model for each tensor's name."""
        self._weights = {}
        for job in self.vectors.jobs:
            if places := self.places[job.name]:
                merged = self.vectors.merged(job, weights[job.name])
                for place in places:
                    place.put(merged)

    def update(self, weights: Mapping[str, np.ndarray]) -> None:
        """Write the merge of a step after ``write``: to the last bit but one, and only what can change.

        Rows of tables are computed when they are looked up.
        """
        self._weights = weights
        for job in self.vectors.changing:
            own, places = self._same(job), self.places[job.name]
            if own is not None and own.is_contiguous():
                if id(own) not in self._tables:
                    self.vectors.add_up(job, weights[job.name], own.data.view(-1))
            elif places:
                merged = self.vectors.merged(job, weights[job.name])
                for place in places:
                    place.put(merged)

    def slopes(self) -> Iterator[tuple[Job, np.ndarray]]:
        """Yield the derivatives by the weights (k,) of changing tensors with gradients; then clear those.

        A tied tensor that the files store twice has one gradient, which counts once.
        """
        for job in self.vectors.changing:
            if job.name in self.copies:
                continue
            own = self._same(job)
            if own is not None and id(own) in self._tables:
                gradient = own.grad
            else:
                gradient = sum_of(self.places[job.name], job.elements, lambda own: own.grad)
            if gradient is not None:
                yield job, self.vectors.slope(job, gradient)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter, _ in self._before:
            parameter.grad = None

    def close(self) -> None:
        for module, handle in (one for table in self._tables.values() for one in table):
            module.sparse = False
            handle.remove()
        for parameter, requires_grad in self._before:
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
