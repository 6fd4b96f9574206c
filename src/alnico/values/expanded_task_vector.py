"""Reads a compressed task vector: matrices are computed from their factors while they are read."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.source import Origin, Source, Tensor, TensorSpec, read_tensor
from alnico.checkpoint.task_vector_file import LEFT, RIGHT, is_compressed
from alnico.checkpoint.virtual_read import CHUNK, read_computed
from alnico.errors import ModelError
from alnico.kernels.choice import kernel_for
from alnico.kernels.constants import CODES
from alnico.kernels.low_rank_kernel import FoldKernel

MOST_HELD = 4
"""Matrices whose factors stay in memory: those that threads are reading."""


def expanded(stored: Source) -> Source:
    """Return the tensors of a task vector, compressed or not. Errors: ModelError."""
    return ExpandedTaskVector(stored) if is_compressed(stored) else stored


class ExpandedTaskVector:
    """A compressed task vector as the tensors that it stands for. It closes what it reads.

    ``left @ right`` is summed in float64 in the order of the rank and rounded once, so that reading a part changes no bit.
    """

    directory: Path | None = None
    origin: Origin | None = None

    def __init__(self, stored: Source) -> None:
        self.label = stored.label
        self.config: Mapping[str, Any] = stored.config
        self._stored = stored
        self._lock = threading.Lock()
        self._held: OrderedDict[str, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        names = [n.removesuffix(LEFT) for n in stored.tensors if n.endswith(LEFT)]
        self._factored = {name: self._shape(name) for name in names}
        tensors: dict[str, Tensor] = {}
        for name, tensor in stored.tensors.items():
            whole = name.removesuffix(LEFT)
            if whole in self._factored and name.endswith(LEFT):
                tensors[whole] = TensorSpec(tensor.dtype, self._factored[whole], tensor.dtype)
            elif name.removesuffix(RIGHT) not in self._factored:
                tensors[name] = tensor
        self.tensors: Mapping[str, Tensor] = tensors

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a matrix, or of a stack of matrices, from its factors. Errors: ModelError."""
        left, right = (self._stored.tensors.get(name + ending) for ending in (LEFT, RIGHT))
        if right is None or left is None:
            raise self._broken(name, "has one factor", "two")
        is_stack = len(left.shape) == 3
        if (
            len(left.shape) not in (2, 3)
            or len(right.shape) < 2
            or left.shape[-1] != right.shape[is_stack]
            or (is_stack and (len(right.shape) != 3 or left.shape[0] != right.shape[0]))
        ):
            raise self._broken(
                name, f"has factors of {left.shape} and {right.shape}", "(rows, k) and (k, columns)"
            )
        if left.dtype != right.dtype or left.dtype not in ("F32", "F64"):
            raise self._broken(
                name, f"has factors of {left.dtype} and {right.dtype}", "both F32, or both F64"
            )
        if name in self._stored.tensors:
            raise self._broken(name, "is stored whole and in factors", "one of the two")
        return left.shape[:-1] + right.shape[1 + is_stack :]

    def _broken(self, name: str, found: str, expected: str) -> ModelError:
        return ModelError(
            f"{self.label}: {name} {found}; expected {expected} in a compressed task vector. Compress it again."
        )

    @property
    def held_bytes(self) -> int:
        sizes = (
            8 * sum(self._stored.tensors[name + ending].elements for ending in (LEFT, RIGHT))
            for name in self._factored
        )
        return self._stored.held_bytes + sum(sorted(sizes)[-MOST_HELD:])

    @property
    def reading_bytes(self) -> int:
        return self._stored.reading_bytes + 3 * 8 * CHUNK

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return self._stored.absent([n for name in tensors for n in self._names(name)], side_files)

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        self._stored.fetch(files, report)

    def _names(self, name: str) -> tuple[str, ...]:
        """The names of a tensor's parts in the files."""
        return (name + LEFT, name + RIGHT) if name in self._factored else (name,)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name not in self._factored:
            self._stored.read_into(name, offset, buffer)
            return
        left, right = self._factors(name)
        size = left.shape[1] * right.shape[2]
        dtype = np.dtype(np.float64 if self.tensors[name].dtype == "F64" else np.float32)
        kernel = kernel_for(FoldKernel("float64"), len(buffer) // dtype.itemsize * left.shape[2])

        def compute(first: int, out: np.ndarray) -> None:
            at = 0
            while at < out.size:
                matrix, begin = divmod(first + at, size)
                values = np.empty(min(size - begin, out.size - at))
                nothing = np.zeros(values.nbytes, np.uint8)
                kernel(nothing, CODES["F64"], left[matrix], right[matrix], 1.0, begin, values)
                with np.errstate(all="ignore"):  # a NaN or an infinity is reported where it is merged
                    out[at : at + values.size] = values
                at += values.size

        read_computed(offset, buffer, dtype, compute)

    def _factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the factors of a tensor in float64: (stack, rows, k) and (stack, k, columns)."""
        with self._lock:
            if name not in self._held:
                left, right = (read_tensor(self._stored, n) for n in self._names(name))
                stack = left.shape[0] if left.ndim == 3 else 1
                columns = math.prod(right.shape[left.ndim - 1 :])
                self._held[name] = (
                    left.reshape(stack, left.shape[-2], left.shape[-1]).astype(np.float64),
                    right.reshape(stack, left.shape[-1], columns).astype(np.float64),
                )
            self._held.move_to_end(name)
            while len(self._held) > MOST_HELD:
                self._held.popitem(last=False)
            return self._held[name]

    def identity(self) -> list[dict[str, Any]]:
        return self._stored.identity()

    def paths(self) -> list[Path]:
        return self._stored.paths()

    def close(self) -> None:
        self._held.clear()
        self._stored.close()
