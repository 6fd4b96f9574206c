"""Encodes the largest entries of a difference, with their indices; all others count as zero."""

from __future__ import annotations

import math

import numpy as np

from alnico.store.encoders.encoded import EncodedTensor, Lost, PartWriter, index_dtype, rounded, scale_of
from alnico.store.spool import Spool
from alnico.store.tensor_change import TensorChange


def encode_top_k(change: TensorChange, spool: Spool, share: float, dtype: str = "F16") -> EncodedTensor:
    """Encode the ``share`` of entries with the largest magnitudes in float32; of equal ones, those that come first.

    Entries that are 0 are never stored. At least one entry is.
    """
    wanted = min(max(math.ceil(share * change.elements), 1), change.elements)
    threshold, above = _threshold(change, wanted)
    at_threshold = wanted - above if threshold else 0
    if not threshold:
        wanted = above
    indices = PartWriter(spool, index_dtype(change.elements), (wanted,))
    stored = PartWriter(spool, dtype, (wanted,))
    scale = scale_of(change, dtype)
    lost = Lost()
    for first, last in change.spans():
        values = change.difference(first, last)
        sizes = _sizes(values)
        kept = sizes > threshold
        equal = np.flatnonzero(sizes == threshold)[:at_threshold] if at_threshold else np.empty(0, np.int64)
        at_threshold -= len(equal)
        kept[equal] = True
        at = np.flatnonzero(kept)
        indices.write((at + first).astype(np.int64 if indices.dtype == "I64" else np.int32))
        raw, numbers = rounded(values[at] / scale, dtype, change.name)
        stored.write(raw)
        decoded = np.zeros(len(values))
        decoded[at] = numbers * scale
        lost.add(values, decoded)
    parts = {"indices": indices.done(), "values": stored.done()}
    return EncodedTensor("top_k", f"top_k:{share:g}", parts, scale, lost.norm)


def _sizes(values: np.ndarray) -> np.ndarray:
    """Magnitudes in float32, as whole numbers in the same order."""
    with np.errstate(all="ignore"):
        bits: np.ndarray = np.abs(values).astype(np.float32).view(np.uint32)
    return bits


def _threshold(change: TensorChange, wanted: int) -> tuple[int, int]:
    """Return the magnitude of rank ``wanted``, and how many entries are larger. Two readings: upper bits, then lower ones."""
    counts = np.zeros(1 << 16, np.int64)
    for first, last in change.spans():
        counts += np.bincount(_sizes(change.difference(first, last)) >> 16, minlength=1 << 16)
    high, above = _rank(counts, wanted)
    counts = np.zeros(1 << 16, np.int64)
    for first, last in change.spans():
        sizes = _sizes(change.difference(first, last))
        inside = sizes[sizes >> 16 == high]
        counts += np.bincount(inside & 0xFFFF, minlength=1 << 16)
    low, more = _rank(counts, wanted - above)
    return high << 16 | low, above + more


def _rank(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """Return the highest bin with at least ``wanted`` entries in it and above, and the number above it."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, wanted))
    return len(counts) - 1 - place, int(from_top[place] - counts[::-1][place])
