"""Sketches the change of a tensor in 64 numbers, from which cosines between task vectors are estimated.

The sketch is a CountSketch (Charikar, Chen and Farach-Colton 2002, https://doi.org/10.1007/3-540-45465-9_59): entry ``i``
of the tensor, in row-major order, times a random sign is added to one of 64 buckets. With the chunk ``c = i // 65536`` the
bucket is ``(i + h(c)) mod 64``, and the sign is bit ``i mod 64`` of ``h(2**32 + i // 64)``, where 1 is minus. ``h(n)`` is
output ``n`` of SplitMix64 started at 0. Both are the same for all tensors and all task vectors. The inner product of two
sketches is an estimate, without bias, of that of the tensors. The cosine of two tensors is estimated by that of their
sketches: it has the variance (1 - cosine^2)^2 / 64, so that vectors that are much alike are known to be.

A sketch is stored as a float32, the norm of the tensor; another, the value of one step; and 64 signed bytes: the buckets in
steps. All are little-endian: 72 bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.checkpoint.task_vectors.manifest import Manifest, TensorEntry
from alnico.notebook import result_line
from alnico.numerics.noise import GAMMA, MIX_1, MIX_2

BUCKETS = 64
CHUNK = 1 << 16
"""Entries that share a shift of the buckets."""
SIGNS = 1 << 32
"""The first number whose hash gives signs; smaller ones give shifts."""
STORED_BYTES = 8 + BUCKETS
MOST_STEPS = 127
LEAST_VARIANCE = 1 / (BUCKETS * MOST_STEPS**2)
"""Of a cosine: what rounding to steps adds."""


@dataclass(frozen=True)
class TensorSketch:
    """The sketch of one tensor: its norm, and the sums of its 64 buckets."""

    norm: float
    buckets: np.ndarray

    def stored(self) -> bytes:
        """Return the 72 bytes of a manifest."""
        largest = float(np.abs(self.buckets).max(initial=0.0))
        step = np.float32(largest / MOST_STEPS)
        if not np.isfinite(step) or not step > 0:
            step = np.float32(0.0)
        steps = np.rint(self.buckets / float(step)) if step else np.zeros(BUCKETS)
        head = np.array([min(self.norm, float(np.finfo(np.float32).max)), step], "<f4")
        return head.tobytes() + np.clip(steps, -MOST_STEPS, MOST_STEPS).astype(np.int8).tobytes()

    @classmethod
    def of(cls, stored: bytes) -> TensorSketch | None:
        """Read the bytes of a manifest; None for anything but a sketch."""
        if len(stored) != STORED_BYTES:
            return None
        norm, step = (float(x) for x in np.frombuffer(stored, "<f4", 2))
        if not (math.isfinite(norm) and math.isfinite(step)):
            return None
        return cls(norm, np.frombuffer(stored, np.int8, BUCKETS, 8).astype(np.float64) * step)


class Sketching:
    """Collects the sketches of a tensor and of its signs, from blocks that begin at multiples of 65,536 entries."""

    def __init__(self) -> None:
        self._values = np.zeros(BUCKETS)
        self._signs = np.zeros(BUCKETS)
        self._squares = 0.0
        self._changed = 0

    def add(self, first: int, values: np.ndarray) -> None:
        """Add entries from ``first`` on: float64, flat."""
        assert first % CHUNK == 0
        self._squares += float((values * values).sum())
        self._changed += int(np.count_nonzero(values))
        for start in range(0, len(values), CHUNK):
            part = values[start : start + CHUNK]
            signs, shift = _signs_of((first + start) // CHUNK, len(part))
            for sums, one in ((self._values, part), (self._signs, np.sign(part))):
                signed = one * signs
                if len(signed) % BUCKETS:
                    signed = np.concatenate([signed, np.zeros(-len(signed) % BUCKETS)])
                sums += np.roll(signed.reshape(-1, BUCKETS).sum(0), shift)

    def result(self) -> tuple[TensorSketch, TensorSketch]:
        """Return the sketches of the values and of their signs."""
        return (
            TensorSketch(math.sqrt(self._squares), self._values),
            TensorSketch(math.sqrt(self._changed), self._signs),
        )


def _hash(start: int, count: int) -> np.ndarray:
    """Return outputs ``start`` to ``start + count`` of SplitMix64 started at 0, as 64-bit numbers."""
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z = index * np.uint64(GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    z ^= z >> np.uint64(31)
    return z


@functools.lru_cache(8)
def _signs_of(chunk: int, count: int) -> tuple[np.ndarray, int]:
    """Return the signs of the first entries of a chunk, and by how much its buckets are shifted."""
    words = _hash(SIGNS + chunk * (CHUNK // 64), -(-count // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=count, bitorder="little")
    return 1.0 - 2.0 * bits, int(_hash(chunk, 1)[0] % np.uint64(BUCKETS))


@dataclass(frozen=True)
class Interference:
    """How two task vectors meet, estimated from their sketches.

    ``cosine`` is that of all tensors together, with the standard error ``cosine_error``. ``sign_conflict`` is the share of
    entries whose signs differ: an entry that only one of the two changes counts as a half. ``tensors`` maps each tensor that both
    change to its own cosine and share; these are rough, with an error of about 0.12. ``unknown`` names tensors that both
    change and that have no sketch.
    """

    cosine: float
    sign_conflict: float
    cosine_error: float
    tensors: Mapping[str, tuple[float, float]]
    unknown: tuple[str, ...] = ()

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return {
            "cosine": self.cosine,
            "sign_conflict": self.sign_conflict,
            "cosine_error": self.cosine_error,
            "tensors": {n: {"cosine": c, "sign_conflict": s} for n, (c, s) in self.tensors.items()},
            "unknown": list(self.unknown),
        }

    def __repr__(self) -> str:
        return result_line(
            f"interference over {len(self.tensors)} tensors",
            f"cosine {self.cosine:.3f} +- {self.cosine_error:.3f}",
            f"{self.sign_conflict:.0%} of the signs differ",
        )


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of two sketches; 0 where one has no length."""
    scaled = [x / largest if (largest := float(np.abs(x).max(initial=0.0))) else x for x in (a, b)]
    size = math.sqrt(float(scaled[0] @ scaled[0]) * float(scaled[1] @ scaled[1]))
    return min(max(float(scaled[0] @ scaled[1]) / size, -1.0), 1.0) if size else 0.0


def sketches_of(entry: TensorEntry) -> tuple[TensorSketch, TensorSketch] | None:
    """Return the sketches of a tensor's values and of its signs; None if it has none."""
    found = [TensorSketch.of(stored) for stored in entry.sketch]
    return (found[0], found[1]) if len(found) == 2 and found[0] and found[1] else None


def interference(a: Manifest, b: Manifest) -> Interference:
    """Estimate how two task vectors of one base meet, from their manifests alone."""
    dot, first, second = 0.0, [0.0], [0.0]
    sign_dot, first_signs, second_signs = 0.0, [0.0], [0.0]
    variance = 0.0
    tensors: dict[str, tuple[float, float]] = {}
    unknown = []
    for manifest, norms, sign_norms in ((a, first, first_signs), (b, second, second_signs)):
        for entry in manifest.tensors.values():
            if (own := sketches_of(entry)) is not None:
                norms.append(own[0].norm)
                sign_norms.append(own[1].norm)
            elif entry.norm:
                norms.append(entry.norm)
    for name, entry in a.tensors.items():
        other = b.tensors.get(name)
        if other is None or not entry.norm or not other.norm or entry.shape != other.shape:
            continue
        mine, theirs = sketches_of(entry), sketches_of(other)
        if mine is None or theirs is None:
            unknown.append(name)
            continue
        products, sizes = [], []
        for x, y in zip(mine, theirs, strict=True):
            size = x.norm * y.norm
            products.append(size * _cosine(x.buckets, y.buckets))
            sizes.append(size)
        cosine = products[0] / sizes[0] if sizes[0] else 0.0
        signs = products[1] / sizes[1] if sizes[1] else 0.0
        tensors[name] = (cosine, (1 - signs) / 2)
        dot += products[0]
        sign_dot += products[1]
        variance += sizes[0] ** 2 * max((1 - cosine**2) ** 2 / BUCKETS, LEAST_VARIANCE)
    size = math.hypot(*first) * math.hypot(*second)
    sign_size = math.hypot(*first_signs) * math.hypot(*second_signs)
    return Interference(
        dot / size if size else 0.0,
        (1 - (sign_dot / sign_size if sign_size else 0.0)) / 2,
        math.sqrt(variance) / size if size else 0.0,
        tensors,
        tuple(unknown),
    )
