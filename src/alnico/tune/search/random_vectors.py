"""The control of a search: a model whose task vector is random, with the norm of the real one in each tensor."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from alnico.checkpoint.source import Source, SourceWrapper, Tensor, TensorSpec
from alnico.numerics.dtypes import DTYPES, MERGEABLE, decode
from alnico.numerics.noise import noise_key, uniform
from alnico.recipe.schema import ModelEntry, Recipe

CHUNK = 1 << 16
"""Elements computed at a time."""

PREFIX = "random vector of "
"""Before the reference of the model that a random one stands for."""


class OpensModels(Protocol):
    """Candidates, as the control uses them."""

    def source(self, reference: str) -> Source: ...

    def add(self, reference: str, open_source: Callable[[], Source]) -> None: ...


class RandomVectorModel(SourceWrapper):
    """``base + r``, with a random ``r`` of the norm of ``wrapped - base`` in each tensor.

    Entries of ``r`` are uniform on (-1, 1), scaled; they depend on the seed, the tensor's name and the position of the model, so
    they are the same in every run. Values are float64. Tensors that the base lacks, has in another shape, or that are no
    floating-point numbers are those of ``wrapped``. Neither model is closed with it.
    """

    def __init__(self, wrapped: Source, base: Source, seed: int, position: int) -> None:
        self.wrapped = wrapped
        self._base = base
        self._seed = seed
        self._position = position
        self._scales: dict[str, float] = {}
        self.tensors: Mapping[str, Tensor] = {
            name: TensorSpec("F64", tensor.shape, tensor.nominal) if self._is_random(name) else tensor
            for name, tensor in wrapped.tensors.items()
        }

    def _is_random(self, name: str) -> bool:
        own, others = self.wrapped.tensors[name], self._base.tensors
        return (
            own.dtype in MERGEABLE
            and name in others
            and others[name].dtype in MERGEABLE
            and others[name].shape == own.shape
        )

    @property
    def label(self) -> str:
        return PREFIX + self.wrapped.label

    @property
    def reading_bytes(self) -> int:
        return self.wrapped.reading_bytes + getattr(self._base, "reading_bytes", 0) + 8 * 8 * CHUNK

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return self.wrapped.absent(tensors, side_files)

    def identity(self) -> list[dict[str, Any]]:
        return [
            {"random_vector": [self._seed, self._position]},
            *self.wrapped.identity(),
            *self._base.identity(),
        ]

    def close(self) -> None:
        """The models belong to the candidates."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if not self._is_random(name):
            self.wrapped.read_into(name, offset, buffer)
            return
        scale = self._scale(name)
        width = DTYPES["F64"].bytes
        out = np.frombuffer(buffer, np.uint8)
        first, last = offset // width, -(-(offset + len(buffer)) // width)
        for start in range(first, last, CHUNK):
            stop = min(start + CHUNK, last)
            values = _values(self._base, name, start, stop)
            values += scale * self._noise(name, start, stop)
            raw = values.view(np.uint8)
            begin, end = max(offset, start * width), min(offset + len(buffer), stop * width)
            out[begin - offset : end - offset] = raw[begin - start * width : end - start * width]

    def _noise(self, name: str, start: int, stop: int) -> np.ndarray:
        key = noise_key(self._seed, f"random vector\0{name}", self._position)
        noise = uniform(key, start, stop - start).astype(np.float64)
        noise -= 0.5 - 2.0**-25  # the mean of 24-bit numbers in [0, 1)
        return noise

    def _scale(self, name: str) -> float:
        """The norm of the task vector over that of the noise; computed on first use."""
        if name not in self._scales:
            squares, drawn = 0.0, 0.0
            elements = self.wrapped.tensors[name].elements
            for start in range(0, elements, CHUNK):
                stop = min(start + CHUNK, elements)
                delta = _values(self.wrapped, name, start, stop) - _values(self._base, name, start, stop)
                noise = self._noise(name, start, stop)
                squares += float(delta @ delta)
                drawn += float(noise @ noise)
            self._scales[name] = math.sqrt(squares / drawn) if drawn else 0.0
        return self._scales[name]


def _values(source: Source, name: str, start: int, stop: int) -> np.ndarray:
    dtype = source.tensors[name].dtype
    width = DTYPES[dtype].bytes
    raw = np.empty((stop - start) * width, np.uint8)
    source.read_into(name, start * width, memoryview(raw))
    return decode(raw, dtype).astype(np.float64)


def _opened(
    candidates: OpensModels, reference: str, base: str, seed: int, position: int
) -> RandomVectorModel:
    return RandomVectorModel(candidates.source(reference), candidates.source(base), seed, position)


def why_no_control(recipe: Recipe) -> str | None:
    """Return why a recipe has no control with random vectors; None if it has one."""
    if recipe.base_model is None:
        return "the recipe has no base, so its models have no task vectors"
    if all(entry.reference == recipe.base_model for entry in recipe.entries):
        return "the recipe has no model besides its base"
    return None


def random_control(recipe: Recipe, candidates: OpensModels, seed: int) -> Recipe:
    """Return a recipe with a random vector in the place of each task vector, whose models ``candidates`` then knows.

    Every number of the recipe stays. Errors: ModelError, HubError.
    """
    base = recipe.base_model
    assert base is not None  # why_no_control
    for position, reference in enumerate(dict.fromkeys(e.reference for e in recipe.entries)):
        if reference != base:
            candidates.add(
                PREFIX + reference, functools.partial(_opened, candidates, reference, base, seed, position)
            )

    def renamed(entries: tuple[ModelEntry, ...]) -> tuple[ModelEntry, ...]:
        return tuple(
            e if e.reference == base else dataclasses.replace(e, reference=PREFIX + e.reference)
            for e in entries
        )

    def sliced(slices: Any) -> Any:
        return tuple(dataclasses.replace(s, models=renamed(s.models)) for s in slices)

    return dataclasses.replace(
        recipe,
        models=renamed(recipe.models),
        slices=sliced(recipe.slices),
        modules=tuple(
            dataclasses.replace(m, models=renamed(m.models), slices=sliced(m.slices)) for m in recipe.modules
        ),
        methods=tuple(dataclasses.replace(r, models=renamed(r.models)) for r in recipe.methods),
        unrelated="allow",  # random vectors have no common origin
        text="",
    )
