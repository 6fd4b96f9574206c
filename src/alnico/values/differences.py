"""Computes the tensors of a task vector from its models, block by block, in float64 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from alnico.checkpoint.memory_model import MemoryModel, to_numpy, to_torch
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.source import Source
from alnico.checkpoint.task_vectors.equipped_model import EquippedModel
from alnico.checkpoint.task_vectors.stored_vector import open_vector
from alnico.engine.fetch import fetch_weights
from alnico.errors import AlnicoError, ModelError, NonFiniteError, near_name
from alnico.models.open_models import OpenModels, open_models
from alnico.numerics.dtypes import MERGEABLE
from alnico.plan.job import Input, Job, Plan
from alnico.plan.layers import layer_position
from alnico.recipe.reference import resolve_reference
from alnico.run_options import ONLINE, Access
from alnico.values.displaced_model import DisplacedModel, read_values
from alnico.values.expanded_task_vector import expanded
from alnico.values.operands import Operand, Term, name_models
from alnico.values.stored_differences import open_differences
from alnico.values.words import in_words_of_python

BLOCK = 1 << 18
"""Elements computed at a time."""

MissingTensors = str
"""What to do with tensors that some models lack: error, copy or drop."""


def open_operands(
    models: Mapping[str, Any],
    deltas: Mapping[str, Operand],
    base: str | None = None,
    *,
    access: Access = ONLINE,
) -> OpenModels:
    """Open models, and stored task vectors as plain tensors, or each as a model on the ``base``.

    Errors: ModelError, HubError.
    """
    opened = open_models(models, access=access)
    sources: dict[str, Source] = dict(opened.sources)
    names, gives_torch = list(opened.names), opened.gives_torch
    try:
        for reference, delta in deltas.items():
            path = delta.path()
            if path is not None and delta.is_artifact:
                sources[reference] = (
                    open_differences(path, access=access)
                    if base is None
                    else EquippedModel(reference, sources[base], open_vector(path, access=access), 1.0)
                )
                continue
            if path is not None:
                sources[reference] = expanded(open_model(resolve_reference(path, "."), may_be_adapter=True))
                continue
            state = {n: v for n, v in delta.value.items() if n not in opened.tied}
            sources[reference] = MemoryModel(reference, state)
            gives_torch = (
                gives_torch if models else not all(isinstance(v, np.ndarray) for v in state.values())
            )
            names += state
        if base is not None:
            for reference in (r for r, delta in deltas.items() if not delta.is_artifact):
                sources[reference] = DisplacedModel(reference, sources[base], sources[reference])
    except BaseException:
        for source in sources.values():
            source.close()
        raise
    if base is None:
        opened = replace(opened, names=tuple(dict.fromkeys(names)), gives_torch=gives_torch)
    return replace(opened, sources=sources)


class Differences:
    """The tensors of task vectors over one plan. Use it in ``with``, which closes the models.

    A tensor is float32, or float64 where a model is. Only tensors of floating point belong to a task vector.
    """

    def __init__(
        self,
        vectors: Sequence[Sequence[Term]],
        missing: MissingTensors = "error",
        *,
        access: Access = ONLINE,
    ) -> None:
        sides = [side for terms in vectors for _, model, base in terms for side in (base, model)]
        operands = list(dict.fromkeys(side for side in sides if not side.is_nothing))
        names, models = name_models(operands)
        deltas = {names[o]: o for o in operands if o.is_delta}
        plain = {n: v for n, v in models.items() if n not in deltas}
        self._opened = open_operands(plain, deltas, access=access)
        self._vectors = vectors
        try:
            with in_words_of_python():
                self._plan = self._opened.plan(_recipe(list(names.values()), missing))
        except BaseException:
            self._opened.close()
            raise
        # A plan may wrap a model, for example to rename its tensors.
        position = {reference: i for i, reference in enumerate(self._plan.recipe.references)}
        self._positions = {o: position[names[o]] for o in operands}
        is_alone = len(names) == 1
        self._jobs = {job.name: job for job in self._plan.jobs if _is_difference(job, is_alone)}
        tied = {n: t for n, t in self._opened.tied.items() if t in self._jobs}
        self._stored = {**{name: name for name in self._jobs}, **tied}

    @property
    def plan(self) -> Plan:
        return self._plan

    @property
    def names(self) -> list[str]:
        """The names of the tensors, in the order of the models; a tied tensor has all its names."""
        ordered = [n for n in self._opened.names if n in self._stored]
        return list(dict.fromkeys([*ordered, *self._stored]))

    @property
    def stored(self) -> list[Job]:
        """A job for each tensor, tied tensors once."""
        return list(self._jobs.values())

    def job(self, name: str) -> Job:
        """Return the job of a tensor. Errors: UnknownTensorError with the nearest name."""
        if name not in self._stored:
            near = near_name(name, self._stored) if isinstance(name, str) else None
            hint = f"Did you mean {near}?" if near else f"The first is {next(iter(self.names), 'none')}."
            raise UnknownTensorError(
                f"{name!r}: is not in the task vector; expected one of its {len(self._stored)} tensors. {hint}"
            )
        return self._jobs[self._stored[name]]

    def dtype(self, job: Job) -> str:
        return "F64" if any(i.dtype == "F64" for i in job.merged) else "F32"

    def blocks(
        self, job: Job, vector: int = 0, span: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Compute a tensor of a task vector, or a span of it, in float64: the first element of each block, and its values."""
        inputs = {i.model: i for i in job.merged}
        start, end = span if span is not None else (0, job.elements)
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            values: dict[Operand, np.ndarray] = {}
            total = np.zeros(last - first)
            with np.errstate(all="ignore"):
                for coefficient, model, base in self._vectors[vector]:
                    if model == base:
                        continue
                    sides = []
                    for side in (model, base):
                        if side.is_nothing:
                            continue
                        if side not in values:
                            values[side] = self._read(inputs[self._positions[side]], first, last)
                        sides.append(values[side])
                    difference = sides[0] - sides[1] if len(sides) == 2 else sides[0]
                    total += coefficient * difference
            yield first, total

    def _read(self, tensor: Input, first: int, last: int) -> np.ndarray:
        values = read_values(self._plan.sources[tensor.model], tensor.name, first, last)
        if not np.isfinite(values).all():
            at = first + int(np.argmin(np.isfinite(values)))
            where = self._plan.sources[tensor.model]
            shape = where.tensors[tensor.name].shape
            index = [int(i) for i in np.unravel_index(at, shape)] if shape else ""
            kind = "NaN" if np.isnan(values[at - first]) else "an infinity"
            raise NonFiniteError(
                f"{where.label}: {tensor.name}{index} is {kind}; expected finite numbers. Correct the model, or leave it out."
            )
        return values

    def write(
        self, job: Job, put: Callable[[int, np.ndarray], None], span: tuple[int, int] | None = None
    ) -> None:
        """Pass the bytes of a tensor, or of a span of its elements, each value rounded once, with their place in the tensor.

        Errors: NonFiniteError.
        """
        real = np.float64 if self.dtype(job) == "F64" else np.float32
        for first, values in self.blocks(job, span=span):
            with np.errstate(all="ignore"):
                rounded = values.astype(real)
            if not np.isfinite(rounded).all():
                at = first + int(np.argmin(np.isfinite(rounded)))
                index = [int(i) for i in np.unravel_index(at, job.shape)] if job.shape else ""
                raise NonFiniteError(
                    f"{job.name}{index} of the task vector is beyond {real.__name__}; expected finite numbers. "
                    "Multiply it by a smaller number."
                )
            put(first * rounded.itemsize, rounded.view(np.uint8))

    def tensor(self, name: str) -> Any:
        """Return a tensor, as a torch tensor or a numpy array as the models are."""
        job = self.job(name)
        raw = np.empty(job.elements * (8 if self.dtype(job) == "F64" else 4), np.uint8)

        def put(offset: int, part: np.ndarray) -> None:
            raw[offset : offset + part.size] = part

        self.write(job, put)
        view = to_torch if self._opened.gives_torch else to_numpy
        return view(raw, self.dtype(job), job.shape)

    def tensors(self) -> dict[str, Any]:
        """Return all tensors; names of one tied tensor have one value."""
        done: dict[str, Any] = {}
        for name in self.names:
            stored = self._stored[name]
            if stored not in done:
                done[stored] = self.tensor(stored)
        return {name: done[self._stored[name]] for name in self.names}

    def fetch(self) -> None:
        """Download the weights of models on the hub. Errors: HubError."""
        fetch_weights(self._plan)

    def products(self, jobs: Sequence[Job]) -> tuple[np.ndarray, list[int]]:
        """Return the inner products of the task vectors over tensors, and the exponents of their powers of 2.

        A task vector is divided by its power of 2, so that products do not overflow. Errors: AlnicoError for a
        length beyond float64.
        """
        exponents = [math.frexp(max(abs(c) for c, *_ in terms))[1] for terms in self._vectors]
        count = len(exponents)
        parts = []
        for job in jobs:
            total = np.zeros((count, count))
            with np.errstate(all="ignore"):
                for blocks in zip(*(self.blocks(job, i) for i in range(count)), strict=True):
                    rows = np.stack(
                        [np.ldexp(values, -e) for (_, values), e in zip(blocks, exponents, strict=True)]
                    )
                    total += rows @ rows.T
            if not np.isfinite(total).all():
                raise AlnicoError(
                    f"{job.name}: the length of a task vector is beyond float64; expected a finite number. "
                    "Multiply it by a smaller number."
                )
            parts.append(total)
        whole = [[math.fsum(p[i, j] for p in parts) for j in range(count)] for i in range(count)]
        return np.array(whole), exponents

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Differences:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class UnknownTensorError(ModelError, KeyError):
    """A task vector has no tensor of this name."""

    __str__ = BaseException.__str__  # KeyError would show the repr of the message


def _is_difference(job: Job, is_alone: bool) -> bool:
    """Does a tensor belong to a task vector? ``is_alone``: there is one operand, a stored task vector, which is copied."""
    is_whole_copy = job.kind == "copy" and (is_alone or not job.why) and job.inputs[0].dtype in MERGEABLE
    return job.kind == "mix" or is_whole_copy


def _recipe(references: Sequence[str], missing: MissingTensors) -> dict[str, Any]:
    """Return a recipe whose plan matches the tensors of the models; nobody runs it."""
    first, *others = references
    recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [first]}
    if others:
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": first,
            "models": [{"model": other, "parameters": {"weight": 0.5}} for other in others],
        }
    recipe |= {"missing": missing} if missing != "error" else {}
    return {**recipe, "dtype": "float64"}


def layer_of(name: str) -> str:
    """Return the layer of a tensor: up to the first number in its name, or its module without one.

    >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("fc1.weight"), layer_of("scale")
    ('model.layers.3', 'fc1', 'scale')
    """
    place = layer_position(name)
    if place is not None:
        return f"{place.stack}{place.layer}"
    return name.rpartition(".")[0] or name
