"""Merges many recipes in memory over the same open models, and reuses what does not change.

Models stay in memory (:mod:`alnico.checkpoint.resident_model`), facts are measured once
(:mod:`alnico.engine.fact_cache`), draws are kept (:mod:`alnico.engine.draw_store`), matrices are decomposed once
(:mod:`alnico.engine.matrix_store`), a result
reuses the arrays of the previous one if it has the same layout, and nothing is hashed. Kernels and order of arithmetic are those of :func:`alnico.engine.run.run_plan`, and so
are the bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from alnico.checkpoint.resident_model import ResidentModel, SharedBudget
from alnico.checkpoint.source import Source
from alnico.devices import free_bytes
from alnico.engine.blocks import blocks
from alnico.engine.fact_cache import FactCache, FactStore
from alnico.engine.fetch import fetch_weights
from alnico.engine.in_memory import (
    Arrays,
    Follower,
    NullRecorder,
    host_bytes,
    new_arrays,
    wait_for_torch,
)
from alnico.engine.matrix_store import ResidentStore
from alnico.engine.merge_run import MergeRun
from alnico.engine.mix import refuse_tensor
from alnico.engine.norm_weights import measure_norm_weights
from alnico.engine.relatedness import IN_A_RECIPE, Caller, check_relatedness
from alnico.numerics.dtypes import DTYPES, MERGEABLE
from alnico.output.journal import JournalState
from alnico.plan.build import build_plan
from alnico.plan.job import Job, Plan
from alnico.plan.repeat import RepeatedPlans
from alnico.recipe.schema import Recipe
from alnico.run_options import DEFAULT_RUN, RunOptions

TensorLayout = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, dtype and shape of every output tensor."""


class Resident:
    """Models that are merged many times. Close it, or use it in ``with``. It runs one merge at a time.

    ``open_source`` opens the model of a reference when a recipe first names it. ``run.memory_bytes`` is the
    budget for the work of a merge and for everything that is computed from models and kept; mapped files and
    the result do not count. ``caller`` has the words in which unrelated models are refused.

    With ``run.device`` a GPU, models are kept in its memory, in half of what the result and the work of a merge leave free, and
    results are made there: ``arrays`` are then torch tensors of bytes on that GPU, which ``checkpoint.memory_model.to_torch``
    views as tensors of their dtype, and :meth:`follow` takes torch tensors on it, too.
    """

    def __init__(
        self,
        open_source: Callable[[str], Source],
        *,
        run: RunOptions = DEFAULT_RUN,
        caller: Caller = IN_A_RECIPE,
    ) -> None:
        self._open_source = open_source
        self._caller = caller
        self._run = run
        self._room = SharedBudget(run.memory_bytes)
        self._rooms: dict[str, SharedBudget] = {}
        self._models: dict[str, ResidentModel] = {}
        self._plans = RepeatedPlans(self._build)
        self._checked: set[frozenset[Source]] = set()
        self._store = FactStore(self._room)
        self._matrices = ResidentStore(self._room)
        self._copied: dict[str, tuple[object, ...]] = {}
        self.layout: TensorLayout = ()
        self.arrays: dict[str, Any] = {}
        """The bytes of every output tensor of the last merge: arrays, or torch tensors on the GPU. Those that a merge writes
        into an array that follows are made by :meth:`bytes_of`."""
        self._followers: dict[str, list[Follower]] = {}
        self._kept: set[str] = set()

    def model(self, reference: str) -> ResidentModel:
        """Return the open model of a reference. Errors: ModelError, HubError."""
        if reference not in self._models:
            self._models[reference] = ResidentModel(self._open_source(reference), self._room, self._rooms)
        return self._models[reference]

    def plan(self, recipe: Recipe) -> Plan:
        """Plan a recipe over the open models. Errors: as for :func:`alnico.plan.build.build_plan`."""
        return self._plans.plan(recipe)

    def _build(self, recipe: Recipe) -> Plan:
        return build_plan(recipe, open_source=self.model, run=self._run)

    def merge(self, plan: Plan) -> Mapping[str, Any]:
        """Carry out a plan of :meth:`plan` and return its tensors' bytes by name, but those that :meth:`bytes_of` makes.

        If names, dtypes and shapes are those of the previous merge, they are its arrays with new values.
        Whether models come from one base is checked when they are first merged. Errors: as for
        :func:`alnico.engine.run.run_plan`; the arrays then hold a partial result.
        """
        fetch_weights(plan)
        self._check_relatedness(plan)
        layout = tuple((job.name, job.dtype, job.shape) for job in plan.jobs)
        if layout != self.layout:
            self._copied.clear()
            self.unfollow()
            self.arrays = {}
            self.layout = layout
        wait_for_torch(plan)
        self._give_room(plan)
        cache = FactCache(plan.sources, self._store)
        self._matrices.begin()
        self._store.draws.begin()
        settled = self._with_norms(plan, cache)
        origins = {job.name: _origin(job, plan.sources) for job in settled.jobs if not job.is_computed}
        left = tuple(
            job
            for job in settled.jobs
            if job.name not in origins or self._copied.get(job.name) != origins[job.name]
        )
        for job in left:
            self._copied.pop(job.name, None)
        wide = {} if plan.gpus else {job.name: of for job in left if (of := self._wide(job)) is not None}
        for name in wide:
            self.arrays.pop(name, None)
        missing = tuple(job for job in plan.jobs if job.name not in self.arrays and job.name not in wide)
        self.arrays |= new_arrays(dataclasses.replace(plan, jobs=missing), stays=True)
        output = Arrays(
            self.arrays | {name: of.values.view(np.uint8) for name, of in wide.items()},
            {name: _others(of, wide.get(name)) for name, of in self._followers.items()},
        )
        # A fact of the whole model needs all its jobs. Only copies are left out, and they have no facts.
        try:
            MergeRun(
                dataclasses.replace(
                    settled, jobs=tuple(_widened(job) if job.name in wide else job for job in left)
                ),
                output,
                NullRecorder(plan),
                JournalState(),
                None,
                cache,
                matrices=self._matrices,
                factor_cache=self._run.factor_cache,
            ).all()
        finally:
            for statistics in plan.statistics:
                statistics.close()
        for job in left:
            if job.name in origins:
                self._refuse_copy(job, plan)
        self._copied |= origins
        return self.arrays

    def _give_room(self, plan: Plan) -> None:
        """Let models use half of the memory of each GPU that the result and the work of a merge leave free."""
        for device in plan.gpus:
            if device.name not in self._rooms:
                self._rooms[device.name] = SharedBudget(
                    max(free_bytes(device) - plan.memory.gpu_bytes, 0)
                    // 2  # modules that are scored need room, too
                )

    def _refuse_copy(self, job: Job, plan: Plan) -> None:
        """Refuse a copied NaN or infinity, as the result may be scored. Errors: NonFiniteError, naming tensor
        and index."""
        tensor = job.inputs[0]
        if tensor.dtype not in MERGEABLE or not job.elements:
            return
        for start, stop in blocks((0, job.elements), plan.memory.block_elements):
            raw = host_bytes(self.arrays[job.name][start * job.width : stop * job.width])
            refuse_tensor(tensor, plan.sources[tensor.model].label, job.shape, start, raw)

    def follow(self, tensor: str, arrays: Iterable[Any]) -> None:
        """Update flat float32 arrays, or flat torch tensors on any device, with the values of an output tensor at each merge,
        until the layout changes."""
        dtype = next(dtype for name, dtype, _ in self.layout if name == tensor)
        self._followers.setdefault(tensor, []).extend(Follower(values, dtype) for values in arrays)

    def unfollow(self) -> None:
        """Stop updating all arrays."""
        self._followers.clear()
        self._kept.clear()

    def keep(self, tensor: str) -> None:
        """Make an output tensor in its array at each merge, as somebody uses that memory, until the layout changes."""
        self._kept.add(tensor)

    def bytes_of(self, tensor: str) -> Any:
        """Return the bytes of an output tensor of the last merge; those of one that was made in an array that follows are
        valid until the next merge."""
        if tensor not in self.arrays:
            self.arrays[tensor] = next(of for of in self._followers[tensor] if of.is_wide).narrowed()
        return self.arrays[tensor]

    def _wide(self, job: Job) -> Follower | None:
        """Return what a job's output is written to as float32, if nobody uses its own bytes."""
        if job.kind != "mix" or job.name in self._kept:
            return None
        return next((of for of in self._followers.get(job.name, ()) if of.is_wide), None)

    def _check_relatedness(self, plan: Plan) -> None:
        """Check models that are mixed and were not merged together before."""
        together = {
            frozenset(plan.sources[i.model] for i in job.merged) for job in plan.jobs if job.is_computed
        }
        if plan.recipe.unrelated == "allow" or all(
            any(models <= checked for checked in self._checked) for models in together
        ):
            return
        check_relatedness(plan, self._caller)
        self._checked |= together

    def _with_norms(self, plan: Plan, cache: FactCache) -> Plan:
        jobs = {
            i: [t.delta for t in w.tensors.values()]
            for i, w in enumerate(plan.norm_weight_groups)
            if w.norms is None
        }
        known = {i: norms for i, of in jobs.items() if (norms := cache.norms(of)) is not None}

        def keep(measured: Mapping[int, tuple[float, ...]]) -> None:
            for i, norms in measured.items():
                cache.keep_norms(jobs[i], norms)

        return measure_norm_weights(plan, known, note=keep)

    def close(self) -> None:
        """Close all models. The arrays keep their values."""
        for model in self._models.values():
            model.release()
        self._models.clear()
        self._plans = RepeatedPlans(self._build)
        self._checked.clear()
        self._room = SharedBudget(self._run.memory_bytes)
        self._rooms.clear()
        self._store = FactStore(self._room)
        self._matrices = ResidentStore(self._room)

    def __enter__(self) -> Resident:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _widened(job: Job) -> Job:
    return dataclasses.replace(job, is_wide=True, byte_size=job.elements * DTYPES["F32"].bytes)


def _others(followers: Sequence[Follower], made: Follower | None) -> Sequence[Follower]:
    """Return what follows a tensor; without the one that it is made in, and then of float32."""
    if made is None:
        return followers
    return [dataclasses.replace(of, dtype="F32") for of in followers if of is not made]


def _origin(job: Job, sources: Sequence[Source]) -> tuple[object, ...]:
    return tuple((sources[tensor.model], tensor.name) for tensor in job.inputs)
