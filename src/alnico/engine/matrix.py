"""Makes one output tensor from whole matrices: in float64, in one thread, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from alnico.checkpoint.source import Source
from alnico.engine.arena import Arena
from alnico.engine.blocks import blocks
from alnico.engine.mix import NOTHING, refuse_output, refuse_tensor
from alnico.kernels.choice import kernel_for
from alnico.kernels.constants import CODES
from alnico.kernels.mix_kernel import MixKernel
from alnico.methods.base import combine
from alnico.numerics.digest import PieceHasher, TensorDigest
from alnico.numerics.dtypes import decode
from alnico.plan.job import Input, Job

ROUNDING = combine((1.0,))


def rounding_kernel() -> MixKernel:
    """Describe the kernel that rounds float64 numbers to the output dtype."""
    return MixKernel(ROUNDING.mix, 1, False, ("numbers",), "float64")


class JobMatrices:
    """The matrices of one job, read when its method requests them. With ``digests``, one per tensor, each
    tensor is hashed at its first read."""

    def __init__(
        self,
        job: Job,
        sources: Sequence[Source],
        digests: Sequence[TensorDigest],
        arena: Arena,
        block_elements: int,
        check: Callable[[], None],
    ) -> None:
        self.job = job
        self.models = len(job.inputs)
        self._sources = sources
        self._digests: dict[Input, list[TensorDigest]] = {}
        for tensor, digest in zip(job.read, digests, strict=False):
            self._digests.setdefault(tensor, []).append(digest)
        self._arena = arena
        self._block = block_elements
        self._check = check

    def value(self, model: int) -> np.ndarray:
        matrix = self._read(self.job.inputs[model])
        if self.job.base is not None:
            matrix -= self._read(self.job.base)
        return matrix

    def side(self, kind: str, model: int) -> np.ndarray:
        assert self.job.matrix is not None
        return self._read(self.job.sides[self.job.matrix.sides.index(kind) * self.models + model])

    def make(self, write: Callable[[int, memoryview], None]) -> None:
        """Compute the matrix and pass its bytes to ``write``, in order, with their offsets. Errors:
        NonFiniteError; those of the method."""
        job = self.job
        assert job.matrix is not None
        if job.matrix.fixes_equal_inputs and self._are_equal():
            result = self._read(job.inputs[0])
        else:
            result = job.matrix.make(self, *job.matrix.arguments)
            if job.base is not None:
                base = self._read(job.base)
                result = np.where(result == 0, base, base + result)
        for tensor in list(self._digests):
            self._read(tensor, only_hash=True)
        self._write(result, write)

    def _write(self, result: np.ndarray, write: Callable[[int, memoryview], None]) -> None:
        job, kernel, width = self.job, kernel_for(rounding_kernel()), self.job.width
        codes, factor = np.array([CODES["F64"]], np.int64), np.ones(1)
        rows = max(self._block // job.row, 1)
        for first in range(0, job.shape[0], rows):
            self._check()
            part = np.ascontiguousarray(result[first : first + rows], np.float64).reshape(-1)
            out = np.empty(part.size * width, np.uint8)
            start = first * job.row
            bad = kernel(
                (part.view(np.uint8),), codes, NOTHING, 0, out, CODES[job.dtype], start, True, factor
            )
            if bad >= 0:
                refuse_output(job, start, out)
            write(start * width, memoryview(out))

    def _are_equal(self) -> bool:
        """Do all models have the same bytes? If not, most differ in the first block."""
        inputs = self.job.inputs
        if len({i.dtype for i in inputs}) > 1:
            return False
        width = inputs[0].width
        for start, stop in blocks((0, self.job.elements), self._block):
            self._check()
            size = (stop - start) * width
            first, other = self._arena.views([size, size])
            self._sources[inputs[0].model].read_into(inputs[0].name, start * width, memoryview(first))
            for tensor in inputs[1:]:
                self._sources[tensor.model].read_into(tensor.name, start * width, memoryview(other))
                if not np.array_equal(first, other):
                    return False
        return True

    def _read(self, tensor: Input, only_hash: bool = False) -> np.ndarray:
        """Read a tensor as float64, in its shape. Errors: NonFiniteError."""
        source = self._sources[tensor.model]
        shape = source.tensors[tensor.name].shape
        width = tensor.width
        elements = tensor.byte_size // width
        values = np.empty(0 if only_hash else elements)
        digests = self._digests.pop(tensor, [])
        hasher = PieceHasher(digests[0], 0) if digests else None
        for start, stop in blocks((0, elements), self._block):
            self._check()
            (raw,) = self._arena.views([(stop - start) * width])
            source.read_into(tensor.name, start * width, memoryview(raw))
            if hasher is not None:
                hasher.update(memoryview(raw))
            if only_hash:
                continue
            decoded = decode(raw, tensor.dtype)
            if not np.isfinite(decoded).all():
                refuse_tensor(tensor, source.label, shape, start, raw)
            values[start:stop] = decoded
        if hasher is not None:
            hasher.finish()
        for same in digests[1:]:
            same.pieces = digests[0].pieces
        return values if only_hash else values.reshape(shape)
