"""Defines Plan and its parts: one job per output tensor, dropped tensors, memory, norm weights."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from alnico._version import __version__
from alnico.checkpoint.shards import OutputShard
from alnico.checkpoint.source import Source
from alnico.devices import CPU, Device
from alnico.kernels.constants import ARITHMETIC
from alnico.kernels.template import Real
from alnico.methods import digests_of_foreign
from alnico.methods.base import MatrixMethod, Merge
from alnico.notebook import ResultTable, never_fails, result_html
from alnico.numerics.dtypes import DTYPES
from alnico.numerics.sizes import count_of, format_size
from alnico.recipe.schema import NormWeight, Recipe

LEAST_MATRIX = 32
"""The least last dimension of a stack of matrices; kernels of convolutions are smaller."""


def stack_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the matrices of a tensor: their number, rows and columns.

    A tensor of more dimensions is a stack of matrices if its last one is at least :data:`LEAST_MATRIX`, else a
    convolution kernel (outputs, inputs, ...), which is one matrix (outputs, inputs x kernel).

    >>> stack_of((4, 64, 96)), stack_of((8, 3, 5, 5))
    ((4, 64, 96), (1, 8, 75))
    """
    if len(shape) == 3 and shape[2] >= LEAST_MATRIX:
        return shape
    return 1, shape[0], math.prod(shape[1:])


JobKind = Literal["mix", "matrix", "copy", "equal"]


@dataclass(frozen=True)
class Input:
    """A tensor of a source. ``model`` is the source's position in ``Plan.sources``."""

    model: int
    name: str
    dtype: str
    byte_size: int
    digest: str = ""
    """The hash that it must have, if statistics were measured on it; empty if any content is allowed."""
    is_difference: bool = False
    """Is what is read the difference to the base, not the model's tensor? See ``engine/differences.py``."""

    @property
    def width(self) -> int:
        """Bytes of an element; 0 for dtypes narrower than a byte."""
        return DTYPES[self.dtype].bytes


@dataclass(frozen=True)
class Job:
    """How one output tensor is made.

    ``mix`` computes it from ``inputs`` (and ``base``, in delta space) with ``merge``, block by block;
    ``matrix`` computes all of it at once with ``matrix``; ``copy`` takes the bytes of ``inputs[0]``;
    ``equal`` does too, after checking that all inputs hold the same bytes. ``sides`` are statistics of the
    inputs: for each kind that the method takes, one per model. ``why`` is for people.
    """

    kind: JobKind
    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    byte_size: int
    inputs: tuple[Input, ...]
    base: Input | None = None
    merge: Merge | None = field(default=None, compare=False)
    why: str = ""
    sides: tuple[Input, ...] = ()
    matrix: MatrixMethod | None = field(default=None, compare=False)
    is_wide: bool = False
    """Is the output written as float32, with values rounded to ``dtype``? Only of ``mix`` jobs that are scored in memory."""
    protection: Protection | None = None
    """What the tensor protects; only of ``matrix`` jobs."""

    @property
    def width(self) -> int:
        """Bytes of an element of the output; 0 for dtypes narrower than a byte."""
        return DTYPES["F32" if self.is_wide else self.dtype].bytes

    @property
    def is_computed(self) -> bool:
        """Is the tensor computed? The others are copied."""
        return self.kind in ("mix", "matrix")

    @property
    def stack(self) -> tuple[int, int, int]:
        """The matrices of a ``matrix`` job: their number, rows and columns."""
        return stack_of(self.shape)

    @property
    def recorded_kind(self) -> str:
        """The kind as locks and fingerprints spell it, so that they stay the same."""
        return "whole" if self.kind == "matrix" else self.kind

    @functools.cached_property
    def read(self) -> tuple[Input, ...]:
        """All tensors that the job reads: inputs, statistics, a protected tensor, base."""
        given = (*self.inputs, *self.sides, *self._protected)
        return given if self.base is None else (*given, self.base)

    @functools.cached_property
    def real(self) -> Real:
        """The dtype of the computation: float64 for F64 inputs or outputs, or if the method needs it; else float32."""
        if self.merge is not None and self.merge.is_wide:
            return "float64"
        return "float64" if "F64" in {self.dtype, *(i.dtype for i in self.read)} else "float32"

    @property
    def merged(self) -> tuple[Input, ...]:
        """All model tensors that the job reads: inputs, a protected tensor, base."""
        given = (*self.inputs, *self._protected)
        return given if self.base is None else (*given, self.base)

    @property
    def _protected(self) -> tuple[Input, ...]:
        """The tensor that is protected, if it is none of the inputs and not the base."""
        if self.protection is None or self.protection.anchor in (*self.inputs, self.base):
            return ()
        return (self.protection.anchor,)

    @property
    def mixed(self) -> Job | None:
        """The job that is mixed element by element: itself, or what a protected one makes first; None of all others."""
        if self.kind == "mix":
            return self
        return (
            self.protection.job if self.protection is not None and self.protection.job.kind == "mix" else None
        )

    @property
    def row(self) -> int:
        """The number of elements in a row: the last dimension. A vector is one row."""
        return max(self.shape[-1], 1) if self.shape else 1

    @property
    def columns(self) -> int:
        """The number of columns: the product of all dimensions except the first; 1 for a vector."""
        return max(self.elements // max(self.shape[0], 1), 1) if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class Protection:
    """How a matrix is protected, as ``plan/protection.py`` says.

    ``job`` merges the tensor without protection; a mix of it writes float64. ``anchor`` is the tensor of the protected model, ``gram``
    the Gram matrix of its inputs, of which the share ``energy`` is protected. ``is_transposed``: the tensor is (inputs, outputs).
    """

    job: Job = field(compare=False)
    anchor: Input
    gram: Input
    energy: float
    is_transposed: bool


@dataclass(frozen=True)
class Dropped:
    """An input tensor that is not in the output, and why."""

    model: int
    name: str
    byte_size: int
    why: str


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run: ``peak_bytes`` in total, ``worker_bytes`` for each of ``threads`` workers, ``gpu_bytes`` on each of
    its GPUs, ``ahead_bytes`` for tensors of models at URLs that are read before they are needed."""

    budget_bytes: int
    peak_bytes: int
    threads: int
    worker_bytes: int
    block_elements: int
    gpu_bytes: int = 0
    ahead_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """A merge that is ready to run. :func:`alnico.plan.build.build_plan` makes it.

    ``sources`` are the models in the order of ``recipe.references``, followed by the statistics that the
    recipe names.
    """

    recipe: Recipe
    sources: tuple[Source, ...] = field(compare=False)
    donor: int
    jobs: tuple[Job, ...]
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]
    shards: tuple[OutputShard, ...]
    dtype: str | None
    memory: MemoryPlan
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The output's ``config.json``, without its dtype; empty if the donor has none."""
    files: Mapping[str, bytes] = field(default_factory=dict, compare=False)
    """Side files to write. All others are copied from the donor."""
    left: frozenset[str] = frozenset()
    """Side files of the donor that are not copied."""
    norm_weight_groups: tuple[NormWeightGroup, ...] = field(default=(), compare=False)
    """Weights computed from norms. Until the norms are known, the jobs have equal weights."""
    rules: tuple[RuleUse, ...] = field(default=(), compare=False)
    """What the rules under ``methods`` do, in order."""
    devices: tuple[Device, ...] = field(default=(CPU,), compare=False)
    """Where tensors are computed: the processor, or one GPU or several."""
    again: Callable[[Plan, Recipe], Plan | None] | None = field(default=None, compare=False, repr=False)
    """Plans a recipe that differs from this plan's in numbers alone (:mod:`alnico.plan.repeat`); returns None where they make
    another plan. None if the numbers of this plan's tensors differ from one another."""
    bytes_to_request: int = 0
    """Bytes of weights that are requested from servers, of models at URLs; see :mod:`alnico.engine.requested_bytes`."""
    stages: tuple[Plan, ...] = field(default=(), compare=False)
    """The plans of earlier stages, in the order in which they ran. Their sources are closed."""

    def __repr__(self) -> str:
        return (
            f"<plan of {', '.join(self.recipe.methods_used)}: {count_of(len(self.jobs), 'tensor')}, {count_of(self.elements, 'parameter')}, "
            f"{format_size(self.bytes_to_write)} to write, at most {format_size(self.memory.peak_bytes)} of memory>"
        )

    @never_fails
    def _repr_html_(self) -> str:
        donor = self.sources[self.donor].label if self.donor < len(self.sources) else ""
        rows = [
            [s.label, "base" if s.label == self.recipe.base_model else "model", donor == s.label]
            for s in self.models
        ]
        return result_html(
            f"Plan of {', '.join(self.recipe.methods_used)}",
            ResultTable(("model", "role", "gives config and tokenizer"), rows),
            *self.notes,
            facts=[
                ("tensors", len(self.jobs)),
                ("parameters", self.elements),
                ("dtype", self.dtype or "as the models"),
                ("to read", format_size(self.bytes_to_read)),
                *(
                    [("to request from servers", format_size(self.bytes_to_request))]
                    if self.bytes_to_request
                    else []
                ),
                ("to write", format_size(self.bytes_to_write)),
                ("memory", f"at most {format_size(self.memory.peak_bytes)}"),
                *[(f"memory of {d}", f"at most {format_size(self.memory.gpu_bytes)}") for d in self.gpus],
                ("dropped", len(self.dropped)),
            ],
        )

    @property
    def models(self) -> tuple[Source, ...]:
        return self.sources[: len(self.recipe.references)]

    @property
    def statistics(self) -> tuple[Source, ...]:
        return self.sources[len(self.recipe.references) :]

    @property
    def bytes_to_read(self) -> int:
        return sum(i.byte_size for job in self.jobs for i in job.read)

    @property
    def to_measure(self) -> tuple[Job, ...]:
        """The task vectors whose norms must be measured before the first tensor is merged."""
        return tuple(t.delta for w in self.norm_weight_groups if w.norms is None for t in w.tensors.values())

    @property
    def bytes_to_write(self) -> int:
        return sum(shard.byte_size for shard in self.shards)

    @property
    def elements(self) -> int:
        return sum(job.elements for job in self.jobs)

    @property
    def gpus(self) -> tuple[Device, ...]:
        """The GPUs that tensors are computed on."""
        return tuple(device for device in self.devices if device.is_gpu)

    @property
    def device_kind(self) -> str:
        """``cpu`` or ``cuda``: an interrupted merge is resumed on the same kind."""
        return self.devices[0].kind

    def _kinds(self) -> list[JobKind]:
        """Kinds of jobs to count: matrices only where there are some."""
        kinds: list[JobKind] = ["mix", "matrix", "copy", "equal"]
        return [k for k in kinds if k != "matrix" or any(j.kind == "matrix" for j in self.jobs)]

    def fingerprint(self) -> dict[str, Any]:
        """Return what determines the output's bits and layout, without reading tensors; see the journal."""
        jobs = [
            [
                j.recorded_kind,
                j.name,
                j.dtype,
                list(j.shape),
                [[i.model, i.name] for i in (*j.inputs, *j.sides)],
                j.base and [j.base.model, j.base.name],
            ]
            for j in self.jobs
        ]
        norms = [
            list(w.norms)
            for w in self.norm_weight_groups
            if w.setting.origin == "analysis" and w.norms is not None
        ]
        shards = [[s.name, hashlib.sha256(s.start).hexdigest()] for s in self.shards]
        foreign = digests_of_foreign(self.recipe.methods_used)
        return {
            "recipe": self.recipe.canonical(),
            "arithmetic": ARITHMETIC,
            "plan": hashlib.sha256(json.dumps([jobs, shards]).encode()).hexdigest(),
            "inputs": [{"model": s.label, "files": s.identity()} for s in self.sources],
            **({"norms": norms} if norms else {}),
            **({"methods": foreign} if foreign else {}),
            "device": self.device_kind,
            "alnico": __version__,
        }

    def schedules(self) -> list[dict[str, Any]]:
        """Return each schedule of weights with the weight of each model, as plain data."""
        from alnico.recipe.schedule_weight import schedule_data, schedules_of  # only to show a plan

        return [schedule_data(schedule, models) for schedule, models in schedules_of(self.recipe)]

    def summary(self) -> dict[str, Any]:
        """Return the plan as plain data, for ``--json``."""
        return {
            **({"stage": self.recipe.stage} if self.recipe.stage else {}),
            "merge_method": self.recipe.merge_method,
            "methods": list(self.recipe.methods_used),
            "models": [s.label for s in self.models],
            **({"statistics": [s.label for s in self.statistics]} if self.statistics else {}),
            "donor": self.sources[self.donor].label,
            "dtype": self.dtype,
            "tensors": {kind: sum(1 for j in self.jobs if j.kind == kind) for kind in self._kinds()},
            "parameters": self.elements,
            "bytes_to_read": self.bytes_to_read,
            **({"bytes_to_request": self.bytes_to_request} if self.bytes_to_request else {}),
            "bytes_to_write": self.bytes_to_write,
            "peak_memory_bytes": self.memory.peak_bytes,
            "threads": self.memory.threads,
            "shards": [{"name": s.name, "bytes": s.byte_size} for s in self.shards],
            "dropped": [
                {"model": self.sources[d.model].label, "tensor": d.name, "bytes": d.byte_size, "why": d.why}
                for d in self.dropped
            ],
            **({"rules": [rule.data(self.sources) for rule in self.rules]} if self.rules else {}),
            **(
                {"weights": [w.data(self.sources) for w in self.norm_weight_groups]}
                if self.norm_weight_groups
                else {}
            ),
            **({"schedules": schedules} if (schedules := self.schedules()) else {}),
            "notes": list(self.notes),
            "jobs": [
                {
                    "tensor": j.name,
                    "do": j.kind,
                    "dtype": j.dtype,
                    "shape": list(j.shape),
                    **({"why": j.why} if j.why else {}),
                }
                for j in self.jobs
            ],
        }


def count_by_reason(jobs: tuple[Job, ...]) -> Mapping[tuple[JobKind, str], list[Job]]:
    """Group jobs of the same kind with the same reason, in order."""
    groups: dict[tuple[JobKind, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.kind, job.why), []).append(job)
    return groups


@dataclass(frozen=True)
class RuleUse:
    """What a rule under ``methods`` does: the number of its tensors, and the models that it reads for them.

    ``models`` and ``base`` are positions in ``Plan.sources``, in the order of the rule. ``base`` is None if
    the rule's method uses none.
    """

    filter: str
    merge_method: str
    tensors: int
    models: tuple[int, ...]
    base: int | None

    def data(self, sources: Sequence[Source]) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        base = {"base": sources[self.base].label} if self.base is not None else {}
        return {
            "filter": self.filter,
            "merge_method": self.merge_method,
            "tensors": self.tensors,
            "models": [sources[m].label for m in self.models],
            **base,
        }


Norms = tuple[float, ...]


@dataclass(frozen=True)
class PendingJob:
    """An output tensor whose weights depend on norms.

    ``delta`` has the tensors to measure as its inputs, relative to its base. ``with_weights`` returns the
    final job.
    """

    delta: Job
    with_weights: Callable[[tuple[float, ...]], Job]


@dataclass(frozen=True)
class NormWeightGroup:
    """Models whose weights are computed together, over ``tensors`` of the output.

    ``models`` and ``base`` are positions in ``Plan.sources``; given norms need no base. ``place`` is the layer or the tensor, empty for
    the whole model. ``norms`` are None until they are measured.
    """

    setting: NormWeight
    models: tuple[int, ...]
    base: int | None
    place: str
    tensors: Mapping[str, PendingJob]
    norms: Norms | None = None

    @property
    def weights(self) -> tuple[float, ...] | None:
        return None if self.norms is None else self.setting.weights(self.norms)

    def data(self, sources: Sequence[Source]) -> dict[str, Any]:
        """Return the group as plain data for the lock and ``--json``, with known norms and weights."""
        models: list[dict[str, Any]] = [{"model": sources[m].label} for m in self.models]
        if self.norms is not None:
            for entry, norm, weight in zip(models, self.norms, self.setting.weights(self.norms), strict=True):
                entry |= {"l2_norm": norm, "weight": weight}
        place = {"place": self.place} if self.place else {}
        return {
            "weight": self.setting.data(),
            **place,
            **({"base": sources[self.base].label} if self.base is not None else {}),
            "tensors": len(self.tensors),
            "models": models,
        }
