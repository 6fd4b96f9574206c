"""Reads the factors of LoHa, LoKr and Tucker cores as tensors: those of a plain LoRA, and the difference."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from alnico.checkpoint.lora_dialects.factor_algebra import Algebra, StoredProduct
from alnico.checkpoint.source import FactorSource, Shard, SourceWrapper, Tensor, TensorSpec, read_finite
from alnico.checkpoint.virtual_read import CHUNK, read_computed
from alnico.numerics import dtypes

LEFT, RIGHT, DIFFERENCE = " (left factor)", " (right factor)", " (difference)"
"""What follows a module's name in the names of tensors that are computed. No name in a file ends so: it would be of an unknown kind."""

MAX_KEPT = 4
"""Modules whose operands stay in memory: the one that is read, and those that other threads read."""


class UnfoldedFactors(SourceWrapper):
    """The tensors of a LoRA file, and for each module of ``algebra`` the tensors that are computed from its factors.

    ``MODULE (left factor)`` is (rows, rank), ``MODULE (right factor)`` (rank, inputs, *kernel) and ``MODULE (difference)`` (rows, inputs,
    *kernel). They are computed in float64, element by element in a fixed order, and are float64 if a tensor of the file is, else float32:
    the part that is read changes no bit.
    """

    def __init__(self, stored: FactorSource, algebra: Mapping[str, Algebra | StoredProduct]) -> None:
        self.wrapped = stored
        self._stored = stored
        self._algebra = dict(algebra)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[threading.Lock, list[tuple[np.ndarray, ...]]]] = OrderedDict()
        self._of: dict[str, tuple[str, str]] = {}
        computed: dict[str, TensorSpec] = {}
        code = "F64" if any(t.dtype == "F64" for t in stored.tensors.values()) else "F32"
        for module, product in algebra.items():
            shapes = {LEFT: (product.rows, product.rank), RIGHT: (product.rank, *product.right_shape)}
            if not isinstance(product, StoredProduct):
                shapes[DIFFERENCE] = (product.rows, *product.right_shape)
            for ending, shape in shapes.items():
                computed[module + ending] = TensorSpec(code, shape, code)
                self._of[module + ending] = (module, ending)
        self.tensors: Mapping[str, Tensor] = {**stored.tensors, **computed}

    @property
    def shards(self) -> Sequence[Shard]:
        return self._stored.shards

    @property
    def notes(self) -> Sequence[str]:
        return self._stored.notes

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        stored: dict[str, None] = {}
        for name in tensors:
            names = self._algebra[self._of[name][0]].names if name in self._of else (name,)
            stored |= dict.fromkeys(names)
        return self.wrapped.absent(stored, side_files)

    def identity(self) -> list[dict[str, Any]]:
        return self.wrapped.identity()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name not in self._of:
            self.wrapped.read_into(name, offset, buffer)
            return
        module, ending = self._of[name]
        product, dtype = self._algebra[module], np.dtype(dtypes.DTYPES[self.tensors[name].dtype].storage)
        if ending == DIFFERENCE:
            assert not isinstance(product, StoredProduct)
            operands = self._operands(module, product)
            read_computed(offset, buffer, dtype, lambda first, out: _fill(product, operands, first, out))
            return
        values = product.factors(self._read)[0 if ending == LEFT else 1]
        raw = np.ascontiguousarray(values, dtype).reshape(-1).view(np.uint8)
        np.frombuffer(buffer, np.uint8)[:] = raw[offset : offset + len(buffer)]

    def _read(self, name: str) -> np.ndarray:
        return read_finite(self.wrapped, name, np.dtype(np.float64))

    def _operands(self, module: str, product: Algebra) -> tuple[np.ndarray, ...]:
        """What a difference is computed with, made once by the first thread that needs it."""
        with self._lock:
            entry = self._kept.setdefault(module, (threading.Lock(), []))
            self._kept.move_to_end(module)
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        lock, made = entry
        with lock:
            if not made:
                made.append(product.operands(self._read))
            return made[0]

    @property
    def held_bytes(self) -> int:
        sizes = [p.operand_elements for p in self._algebra.values() if not isinstance(p, StoredProduct)]
        return self.wrapped.held_bytes + 8 * sum(sorted(sizes, reverse=True)[:MAX_KEPT])

    @property
    def reading_bytes(self) -> int:
        """A chunk in float64 with its second factor, and the right factor of a core."""
        factors = [
            p.rank * p.columns for p in self._algebra.values() if isinstance(p, StoredProduct) and p.core
        ]
        return self.wrapped.reading_bytes + 4 * 8 * CHUNK + 2 * 8 * max(factors, default=0)


def _fill(product: Algebra, operands: tuple[np.ndarray, ...], first: int, out: np.ndarray) -> None:
    if out.dtype == np.float64:
        product.fill(operands, first, out)
        return
    values = np.empty(out.size)
    product.fill(operands, first, values)
    with np.errstate(all="ignore"):  # an overflow gives an infinity, which is refused
        out[:] = values
