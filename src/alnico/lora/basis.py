"""Represents the updates of several adapters as small matrices in a shared basis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from alnico.checkpoint.lora_adapter import Adapter
from alnico.checkpoint.source import Tensor, TensorSpec
from alnico.lora.matching import ExpertFactors, SharedModule, read_biases, read_factors
from alnico.lora.updates import BIAS


class Basis(Protocol):
    """The updates of one matrix in a shared basis: ``values``, one per adapter.

    ``factors`` turns a merged value back into factors of the whole matrix.
    """

    @property
    def values(self) -> tuple[np.ndarray, ...]: ...

    def factors(self, merged: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


Build = Callable[[Sequence[ExpertFactors | None], int, int], Basis]


class SharedBases:
    """The bases of all matrices, built on demand; only the last one is cached. Thread-safe.

    ``tensors`` describes the values. Their names are those of the base's tensors, with the number of the
    expert for tensors that hold several experts.
    """

    def __init__(self, adapters: Sequence[Adapter], modules: Sequence[SharedModule], build: Build) -> None:
        self._adapters = adapters
        self._build = build
        self._lock = threading.Lock()
        self._cached: tuple[str, list[Basis]] = ("", [])
        self._places: dict[str, tuple[SharedModule, int]] = {}
        self.tensors: dict[str, Tensor] = {}
        for module in modules:
            for expert, basis in enumerate(self._of(module)):
                name = self.name(module, expert)
                self._places[name] = module, expert
                self.tensors[name] = TensorSpec("F64", basis.values[0].shape, "F64")
            if module.has_bias:
                self._places[module.module + BIAS] = module, -1
                self.tensors[module.module + BIAS] = TensorSpec("F64", (module.rows,), "F64")

    @staticmethod
    def name(module: SharedModule, expert: int) -> str:
        return f"{module.name}.{expert}" if module.experts > 1 else module.name

    def basis(self, module: SharedModule, expert: int) -> Basis:
        with self._lock:
            return self._of(module)[expert]

    def values(self, name: str) -> Sequence[np.ndarray]:
        """Return what each adapter adds to a tensor."""
        module, expert = self._places[name]
        return self.basis(module, expert).values if expert >= 0 else read_biases(self._adapters, module)

    def _of(self, module: SharedModule) -> list[Basis]:
        if self._cached[0] != module.key:
            bases = [
                self._build(of_expert, module.rows, module.columns)
                for of_expert in read_factors(self._adapters, module)
            ]
            self._cached = module.key, bases
        return self._cached[1]
