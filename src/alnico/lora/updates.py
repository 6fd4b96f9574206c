"""Presents adapters' updates to the engine as sources: matrices by rows, or core matrices."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from alnico.checkpoint.lora_adapter import Adapter
from alnico.checkpoint.lora_model import AdaptedModel
from alnico.checkpoint.source import Origin, Shard, Tensor, TensorSpec, read_tensor
from alnico.lora.matching import SharedModule

BIAS = ".bias"


class Zeros:
    """A base of zeros: applying an adapter to it gives the adapter's update."""

    config: Mapping[str, Any] = MappingProxyType({})
    directory: Path | None = None
    origin: Origin | None = None
    shards: Sequence[Shard] = ()
    notes: Sequence[str] = ()
    held_bytes = 0
    reading_bytes = 0

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.label = "zeros"
        self.tensors = tensors

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Nothing is ever absent."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        np.frombuffer(buffer, np.uint8)[:] = 0

    def read(self, name: str) -> np.ndarray:
        return read_tensor(self, name)

    def identity(self) -> list[dict[str, Any]]:
        return []

    def paths(self) -> list[Path]:
        return []

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Zeros:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


def whole_tensors(modules: Sequence[SharedModule], dtype: str) -> dict[str, Tensor]:
    """Describe the base's tensors that adapters change, as stored, so that rows and noise match a merge with the base."""
    tensors: dict[str, Tensor] = {}
    for module in modules:
        shape: tuple[int, ...] = (module.rows, *module.right_shape)
        if module.is_turned:
            shape = shape[::-1]
        if module.experts > 1:
            shape = (module.experts, *shape)
        tensors[module.name] = TensorSpec(dtype, shape, dtype)
        if module.has_bias:
            tensors[module.module + BIAS] = TensorSpec(dtype, (module.rows,), dtype)
    return tensors


def whole_updates(
    adapters: Sequence[Adapter], modules: Sequence[SharedModule], base: Zeros
) -> list[AdaptedModel]:
    """Return each adapter on a base of zeros: its updates, computed by rows on reading, as in a merge of ``base+adapter``."""
    sources = []
    for i, adapter in enumerate(adapters):
        own = copy.copy(adapter)
        own.replaced, own.vectors, own.dialect = (
            {},
            {},
            None,
        )  # the names of the zeros are those of the updates
        own.updates = {
            module.key: dataclasses.replace(update, module=module.module, parameters=(module.parameter,))
            for module in modules
            if (update := module.updates[i]) is not None
        }
        sources.append(AdaptedModel(adapter.label, base, own))
    return sources


class SmallMatrices:
    """The small matrices of one adapter as a source; those of all adapters are computed together on first use."""

    config: Mapping[str, Any] = MappingProxyType({})
    directory: Path | None = None
    origin: Origin | None = None
    notes: Sequence[str] = ()
    held_bytes = 0
    reading_bytes = 0

    def __init__(
        self,
        label: str,
        tensors: Mapping[str, Tensor],
        values: Callable[[str], Sequence[np.ndarray]],
        position: int,
    ) -> None:
        self.label = label
        self.tensors = tensors
        self._values = values
        self._position = position

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Nothing is ever absent."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        values = np.ascontiguousarray(self._values(name)[self._position]).reshape(-1).view(np.uint8)
        np.frombuffer(buffer, np.uint8)[:] = values[offset : offset + len(buffer)]

    def identity(self) -> list[dict[str, Any]]:
        return []

    def paths(self) -> list[Path]:
        return []

    def close(self) -> None:
        """Nothing is open."""
