"""Merges in memory again and again over the same open models: what does not change between two recipes is kept.

The models stay in memory (:mod:`alnico.checkpoint.resident_model`), facts are measured once (:mod:`alnico.engine.fact_cache`), the result is
computed in the arrays of the one before where it has the same layout, and nothing is hashed. Kernels and order of arithmetic are
those of :func:`alnico.engine.run.run_plan`, so are the bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from alnico.checkpoint.resident_model import ResidentModel, SharedBudget
from alnico.checkpoint.source import Source
from alnico.engine.blocks import blocks
from alnico.engine.fact_cache import FactCache, FactStore
from alnico.engine.fetch import fetch_weights
from alnico.engine.in_memory import Arrays, Follower, Unwritten
from alnico.engine.mix import refuse_tensor
from alnico.engine.norm_weights import measure_norm_weights
from alnico.engine.relatedness import IN_A_RECIPE, Caller, check_relatedness
from alnico.engine.run import MergeRun
from alnico.numerics.dtypes import MERGEABLE
from alnico.output.journal import JournalState
from alnico.plan.build import build_plan
from alnico.plan.job import Job, Plan
from alnico.plan.memory import DEFAULT_BUDGET_BYTES
from alnico.recipe.schema import Recipe

TensorLayout = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, dtype and shape of every output tensor."""


class Resident:
    """Models that are merged many times. Close it, or use it in ``with``.

    ``open_source`` opens the model of a reference when a recipe first names it. ``memory_bytes`` is the budget of what a merge works
    with, and of what is computed from models once and kept; mapped files and the result are beside it. One merge at a time.
    ``caller`` says in whose words unrelated models are refused.
    """

    def __init__(
        self,
        open_source: Callable[[str], Source],
        *,
        threads: int | None = None,
        memory_bytes: int = DEFAULT_BUDGET_BYTES,
        caller: Caller = IN_A_RECIPE,
    ) -> None:
        self._open_source = open_source
        self._caller = caller
        self._threads = threads
        self._memory_bytes = memory_bytes
        self._room = SharedBudget(memory_bytes)
        self._models: dict[str, ResidentModel] = {}
        self._judged: set[frozenset[Source]] = set()
        self._store = FactStore(self._room)
        self._copied: dict[str, tuple[object, ...]] = {}
        self.layout: TensorLayout = ()
        self.arrays: dict[str, np.ndarray] = {}
        """The bytes of every output tensor of the last merge, in the order of its plan."""
        self._followers: dict[str, list[Follower]] = {}

    def model(self, reference: str) -> ResidentModel:
        """Return the open model of a reference. Errors: ModelError, HubError."""
        if reference not in self._models:
            self._models[reference] = ResidentModel(self._open_source(reference), self._room)
        return self._models[reference]

    def plan(self, recipe: Recipe) -> Plan:
        """Plan a recipe over the open models. Errors: as for :func:`alnico.plan.build.build_plan`."""
        return build_plan(
            recipe, open_source=self.model, threads=self._threads, memory_bytes=self._memory_bytes
        )

    def merge(self, plan: Plan) -> Mapping[str, np.ndarray]:
        """Carry out a plan of :meth:`plan` and return its tensors' bytes by name.

        They are the arrays of the merge before, with new values, where names, dtypes and shapes are the same; else new ones.
        That models come from one base is looked at when they first meet. Errors: as for :func:`alnico.engine.run.run_plan`; the arrays
        then hold what is no model.
        """
        fetch_weights(plan)
        self._look(plan)
        layout = tuple((job.name, job.dtype, job.shape) for job in plan.jobs)
        if layout != self.layout:
            self._copied.clear()
            self._followers.clear()
            self.arrays = {job.name: np.empty(job.byte_size, np.uint8) for job in plan.jobs}
            self.layout = layout
        recall = FactCache(plan.sources, self._store)
        plan = self._weighed(plan, recall)
        origins = {job.name: _origin(job, plan.sources) for job in plan.jobs if job.kind in ("copy", "equal")}
        left = tuple(
            job
            for job in plan.jobs
            if job.name not in origins or self._copied.get(job.name) != origins[job.name]
        )
        for job in left:
            self._copied.pop(job.name, None)
        # A fact over the model is over all jobs, so those that are left out must have none: they are copies.
        try:
            MergeRun(
                dataclasses.replace(plan, jobs=left),
                Arrays(self.arrays, self._followers),
                Unwritten(plan),
                JournalState(),
                None,
                recall,
            ).all()
        finally:
            for statistics in plan.statistics:
                statistics.close()
        for job in left:
            if job.name in origins:
                self._refuse_copy(job, plan)
        self._copied |= origins
        return self.arrays

    def _refuse_copy(self, job: Job, plan: Plan) -> None:
        """Refuse a NaN or an infinity that was copied, as it would be scored. Errors: NonFiniteError, naming tensor and index."""
        tensor = job.inputs[0]
        if tensor.dtype not in MERGEABLE or not job.elements:
            return
        for start, stop in blocks((0, job.elements), plan.memory.block_elements):
            raw = self.arrays[job.name][start * job.width : stop * job.width]
            refuse_tensor(tensor, plan.sources[tensor.model].label, job.shape, start, raw)

    def follow(self, tensor: str, arrays: Iterable[np.ndarray]) -> None:
        """Let flat float32 arrays that hold the values of an output tensor hold those of the next merges, too, until the layout changes."""
        dtype = next(dtype for name, dtype, _ in self.layout if name == tensor)
        self._followers.setdefault(tensor, []).extend(Follower(values, dtype) for values in arrays)

    def unfollow(self) -> None:
        """Let nothing follow any more."""
        self._followers.clear()

    def _look(self, plan: Plan) -> None:
        """Look at models that are to be mixed and have not met before."""
        together = {
            frozenset(plan.sources[i.model] for i in job.merged) for job in plan.jobs if job.is_computed
        }
        if plan.recipe.unrelated == "allow" or all(
            any(met <= one for one in self._judged) for met in together
        ):
            return
        check_relatedness(plan, self._caller)
        self._judged |= together

    def _weighed(self, plan: Plan, recall: FactCache) -> Plan:
        jobs = {
            i: [t.delta for t in w.tensors.values()] for i, w in enumerate(plan.weighings) if w.norms is None
        }
        known = {i: norms for i, of in jobs.items() if (norms := recall.norms(of)) is not None}

        def keep(found: Mapping[int, tuple[float, ...]]) -> None:
            for i, norms in found.items():
                recall.keep_norms(jobs[i], norms)

        return measure_norm_weights(plan, known, note=keep)

    def close(self) -> None:
        """Close all models. The arrays stay what they are."""
        for model in self._models.values():
            model.release()
        self._models.clear()
        self._judged.clear()
        self._room = SharedBudget(self._memory_bytes)
        self._store = FactStore(self._room)

    def __enter__(self) -> Resident:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _origin(job: Job, sources: Sequence[Source]) -> tuple[object, ...]:
    return tuple((sources[tensor.model], tensor.name) for tensor in job.inputs)
