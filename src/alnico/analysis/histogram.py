"""Histograms of float32 numbers by the upper half of their bits, and order statistics from them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

PAGE = 256
"""Bins per page. A page covers two powers of two of one sign, so a task vector uses few of the 256 pages."""


class Histogram:
    """Counts of keys (see kernels.analysis_kernels) by their upper 16 bits; empty pages take no memory."""

    def __init__(self) -> None:
        self.pages: dict[int, np.ndarray] = {}

    def take(self, tables: np.ndarray) -> None:
        """Add tables (n, 65,536) of counts, and set them to 0."""
        paged = tables.reshape(-1, PAGE, PAGE)
        for page in np.flatnonzero(paged.any(axis=(0, 2))).tolist():
            counts = paged[:, page].sum(axis=0, dtype=np.int64)
            self.pages[page] = self.pages[page] + counts if page in self.pages else counts
            paged[:, page] = 0

    def add(self, other: Histogram) -> None:
        for page, counts in other.pages.items():
            self.pages[page] = self.pages[page] + counts if page in self.pages else counts.copy()

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bins of all pages in order, and their counts."""
        pages = sorted(self.pages)
        if not pages:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        bins = (np.array(pages)[:, None] * PAGE + np.arange(PAGE)).reshape(-1)
        return bins, np.concatenate([self.pages[page] for page in pages])

    def places(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return bin, rank in the bin and count of the bin, for entries of these ranks (0 is the
        smallest)."""
        bins, counts = self.flat()
        until = np.cumsum(counts)
        at = np.searchsorted(until, ranks, side="right")
        return bins[at], ranks - (until[at] - counts[at]), counts[at]

    def estimate(self, ranks: np.ndarray) -> np.ndarray:
        """Estimate the entries of these ranks, evenly spaced inside a bin; the relative error is below
        2^-7."""
        bins, inside, counts = self.places(ranks)
        upward = bins >= 0x8000
        least, most = value_of(bins << 16), value_of((bins << 16) | 0xFFFF)
        share = (inside + 0.5) / counts
        zeros = (bins == 0x8000) | (bins == 0x7FFF)  # only 0 and negligible numbers
        return np.where(zeros, np.where(upward, least, most), least + (most - least) * share)

    def kth_largest_magnitude(self, k: int) -> int:
        """Return the bits of the kth largest magnitude, with the lower 16 set to 0."""
        bins, counts = self.flat()
        magnitudes = np.where(bins >= 0x8000, bins - 0x8000, 0x7FFF - bins)
        order = np.argsort(-magnitudes, kind="stable")
        at = np.searchsorted(np.cumsum(counts[order]), k)
        return int(magnitudes[order][at]) << 16


def value_of(keys: np.ndarray) -> np.ndarray:
    """Return the float32 numbers of these keys, as float64."""
    keys = np.asarray(keys).astype(np.uint32)
    bits = np.where(keys >> 31 == 1, keys ^ np.uint32(0x80000000), ~keys)
    values: np.ndarray = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return values


def place_in(counts: np.ndarray, rank: int) -> int:
    """Return the bin, of 65,536, of the entry of this rank.

    >>> place_in(np.eye(1, 65_536, 7, dtype=np.uint32)[0] * 3, 2)
    7
    """
    pages = counts.reshape(PAGE, PAGE).sum(axis=1, dtype=np.int64)
    until = np.cumsum(pages)
    page = int(np.searchsorted(until, rank, side="right"))
    within = np.cumsum(counts[page * PAGE : (page + 1) * PAGE], dtype=np.int64)
    return page * PAGE + int(np.searchsorted(within, rank - (until[page] - pages[page]), side="right"))


def neighbours(elements: int, levels: Iterable[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each level, the ranks below and above the quantile, and its distance from the one below.

    >>> [x.tolist() for x in neighbours(5, (0.0, 0.3, 1.0))]
    [[0, 1, 4], [0, 2, 4], [0.0, 0.19999999999999996, 0.0]]
    """
    places = np.array([(elements - 1) * level for level in levels])
    below = np.floor(places).astype(np.int64)
    return (
        below,
        np.minimum(below + 1, elements - 1) * (places > below) + below * (places <= below),
        places - below,
    )
