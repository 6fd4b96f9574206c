"""What all encoders return: the parts of a tensor in a spool, their hashes, and the measured error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from alnico.checkpoint.task_vectors.manifest import EXACT, Encoding
from alnico.lora.writer import encoded
from alnico.numerics.digest import PieceHasher, TensorDigest
from alnico.numerics.dtypes import DTYPES, decode
from alnico.store.spool import Spool
from alnico.store.tensor_change import TensorChange

LONG_INDICES = 1 << 31
"""From this many entries on, indices have 64 bits."""


@dataclass(frozen=True)
class SpooledPart:
    """One stored tensor: its dtype and shape, its place in the spool, and its hash."""

    dtype: str
    shape: tuple[int, ...]
    place: int
    size: int
    digest: str


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor in one encoding. ``lost`` is ``|D' - D|`` of what is decoded; ``label`` names the encoding with its options."""

    encoding: Encoding
    label: str
    parts: Mapping[str, SpooledPart] = field(default_factory=dict)
    scale: float = 1.0
    lost: float = 0.0
    is_peft: bool = False
    """Are the factors stored under PEFT's names?"""

    @property
    def byte_size(self) -> int:
        return sum(part.size for part in self.parts.values())

    @property
    def is_exact(self) -> bool:
        return self.encoding in EXACT

    @property
    def rank(self) -> int:
        """The rank of its factors."""
        return self.parts["right"].shape[-2] if "right" in self.parts else 0


class PartWriter:
    """Writes one part into a spool, in order, and hashes it as it passes."""

    def __init__(self, spool: Spool, dtype: str, shape: Sequence[int]) -> None:
        self.dtype = dtype
        self.shape = tuple(shape)
        self.size = math.prod(self.shape) * DTYPES[dtype].bits // 8
        self._spool = spool
        self._place = spool.reserve(self.size)
        self._done = 0
        self._digest = TensorDigest(dtype, self.shape, self.size)
        self._hasher = PieceHasher(self._digest, 0)

    def write(self, values: np.ndarray) -> None:
        """Write the bytes of an array after those before."""
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._spool.write(self._place + self._done, raw)
        self._hasher.update(memoryview(raw))
        self._done += raw.size

    def done(self) -> SpooledPart:
        """Return the part, after its last byte."""
        assert self._done == self.size, f"{self._done} of {self.size} bytes were written"
        self._hasher.finish()
        return SpooledPart(self.dtype, self.shape, self._place, self.size, self._digest.result())


class Lost:
    """Adds up the squares of what is lost, block by block."""

    def __init__(self) -> None:
        self._squares = 0.0

    def add(self, values: np.ndarray, decoded: np.ndarray) -> None:
        gone = decoded - values
        gone *= gone
        self._squares += float(gone.sum())

    @property
    def norm(self) -> float:
        return math.sqrt(self._squares)


def index_dtype(elements: int) -> str:
    return "I64" if elements >= LONG_INDICES else "I32"


def rounded(values: np.ndarray, dtype: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Round float64 numbers once; return their bytes, and the rounded numbers in float64."""
    if dtype == "F64":
        raw = np.ascontiguousarray(values, np.float64).view(np.uint8)
    elif dtype == "BF16":
        raw = encoded(values, dtype, name)
    else:
        raw = values.astype(np.float16 if dtype == "F16" else np.float32).view(np.uint8)
    return raw, decode(raw, dtype).astype(np.float64)


def scale_of(change: TensorChange, dtype: str) -> float:
    """Return the power of 2 that numbers are divided by, so that the largest is near the top of a narrow dtype.

    F16 holds numbers from 2**-14 on with all their bits, and up to 65504.
    """
    if dtype != "F16" or not change.facts.largest:
        return 1.0
    return 2.0 ** (math.frexp(change.facts.largest)[1] - 15)
