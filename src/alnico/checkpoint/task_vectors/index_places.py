"""Finds in a stored list of indices those of a block of elements, and checks that the list ascends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from alnico.checkpoint.source import Source
from alnico.checkpoint.task_vectors.decoders import CHUNK, index_problem, storage
from alnico.errors import ModelError
from alnico.numerics.digest import PieceHasher, TensorDigest

READ_BYTES = 1 << 18
"""Bytes that are read at a time: they fit the second-level cache."""


@dataclass(frozen=True)
class IndexPlaces:
    """The positions, in a list of indices, of the first index of each block of :data:`CHUNK` elements, and one more."""

    starts: np.ndarray

    def within(self, first: int, last: int, read: Callable[[int, int], np.ndarray]) -> tuple[int, int]:
        """Return the positions of the indices from ``first`` to ``last``. ``read(position, count)`` returns some of them."""
        begin, end = int(self.starts[first // CHUNK]), int(self.starts[-(-last // CHUNK)])
        if not (first % CHUNK or last % CHUNK) or begin == end:
            return begin, end
        indices = read(begin, end - begin)
        low = int(np.searchsorted(indices, indices.dtype.type(first)))
        high = (
            int(np.searchsorted(indices, indices.dtype.type(last)))
            if last <= int(indices[-1])
            else end - begin
        )
        return begin + low, begin + high


def find_places(
    source: Source, name: str, elements: int, buffer: memoryview, where: str
) -> tuple[IndexPlaces, str]:
    """Read the indices ``name`` of a tensor of some elements once; return their places and their hash, as locks have it.

    Errors: ModelError, which begins with ``where``, for indices that do not ascend or lie outside.
    """
    dtype = storage(source.tensors[name].dtype)
    starts = np.zeros(-(-elements // CHUNK) + 1, np.int64)
    done, previous = 0, -1

    def look(raw: memoryview) -> None:
        nonlocal done, previous
        indices = np.frombuffer(raw, dtype)
        if problem := index_problem(indices, previous, elements):
            raise ModelError(
                f"{where}: the indices {name}: {problem}; expected places in the tensor, in order. The file is damaged: get it again."
            )
        first, last = previous // CHUNK + 1, int(indices[-1]) // CHUNK
        if last >= first:
            bounds = np.arange(first, last + 1, dtype=np.int64) * CHUNK
            starts[first : last + 1] = done + np.searchsorted(indices, bounds.astype(dtype))
        done += indices.size
        previous = int(indices[-1])

    digest = stream_tensor(source, name, buffer, look)
    starts[previous // CHUNK + 1 :] = done
    return IndexPlaces(starts), digest


def stream_tensor(
    source: Source, name: str, buffer: memoryview, look: Callable[[memoryview], None] | None = None
) -> str:
    """Read a tensor once, in order, and return its hash, as locks have it. ``look`` receives the bytes."""
    tensor = source.tensors[name]
    digest = TensorDigest(tensor.dtype, tensor.shape, tensor.byte_size)
    hasher = PieceHasher(digest, 0)
    for offset in range(0, tensor.byte_size, len(buffer)):
        part = buffer[: min(len(buffer), tensor.byte_size - offset)]
        source.read_into(name, offset, part)
        hasher.update(part)
        if look is not None:
            look(part)
    hasher.finish()
    return digest.result()
