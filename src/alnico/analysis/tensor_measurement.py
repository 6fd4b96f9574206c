"""The measurement of one tensor in two readings: sums per leaf, counts, histograms and exact quantiles."""

from __future__ import annotations

import threading

import numpy as np

from alnico.analysis.histogram import Histogram, neighbours, place_in, value_of
from alnico.analysis.results import LEVELS, Subspace
from alnico.analysis.tally import Tally
from alnico.engine.blocks import Span
from alnico.engine.kernel_arguments import codes_of
from alnico.kernels.analysis_kernels import MOMENTS, TABLES, DescribingKernel, OrderKernel, lanes_of
from alnico.kernels.choice import kernel_for
from alnico.kernels.constants import LANES, LEAF, TILE
from alnico.kernels.template import Real
from alnico.numerics.dtypes import decode
from alnico.plan.job import Job

SORTED = 65_536
"""Up to this many elements, quantiles come from the sorted entries themselves."""


class ThreadBuffers:
    """Buffers of one thread for the kernels; each method returns those of the first k models."""

    def __init__(self, models: int) -> None:
        self._values = np.empty(models * TILE, np.float64)
        self._narrow = np.empty((models, TILE), np.float32)
        self._flags = np.empty((models, TILE), np.uint32)
        self._lanes = np.empty((lanes_of(models), LANES), np.float64)

    def values(self, real: Real, models: int) -> np.ndarray:
        return self._values.view(real)[: models * TILE].reshape(models, TILE)

    def narrow(self, models: int) -> np.ndarray:
        return self._narrow[:models]

    def flags(self, models: int) -> np.ndarray:
        return self._flags[:models]

    def lanes(self, models: int) -> np.ndarray:
        return self._lanes[: lanes_of(models)]


class TensorMeasurement:
    """The measurement of one tensor: ``describe`` blocks, ``start_second``, ``order`` blocks, ``result``."""

    def __init__(self, job: Job, top_share: float) -> None:
        self.job = job
        self.top_share = top_share
        self.codes, self.base_code = codes_of(job)
        self.real = job.real
        k, leaves = len(job.inputs), -(-job.elements // LEAF)
        self.pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
        describing, ordering = kernels_of(job)
        self.describing, self.ordering = kernel_for(describing), kernel_for(ordering)
        self.moments = np.zeros((leaves, k * (MOMENTS + 1)))
        self.of_base = np.zeros((leaves, 2))
        self.of_pairs = np.zeros((leaves, 2 * len(self.pairs)))
        self.of_sum = np.zeros((leaves, 1))
        self.unchanged = np.zeros(k, np.int64)
        self.both = np.zeros((len(self.pairs), 2), np.int64)
        self.together = np.zeros(2, np.int64)
        self.ends = _no_ends(k)
        self.histograms = [Histogram() for _ in range(k)]
        self.fine: np.ndarray | None = None
        self.quantiles: list[tuple[float, ...]] = []
        self.has_second = False
        self.lock = threading.Lock()

    def describe(self, span: Span, views: list[np.ndarray], tables: np.ndarray, work: ThreadBuffers) -> int:
        """Add a block of the first reading; return 0 unless a value in it is not finite."""
        first, last = span[0] // LEAF, -(-span[1] // LEAF)
        k = len(self.codes)
        counts = np.zeros(k, np.int64), np.zeros_like(self.both), np.zeros(2, np.int64), _no_ends(k)
        of_leaf = (
            self.moments[first:last],
            self.of_base[first:last],
            self.of_pairs[first:last],
            self.of_sum[first:last],
        )
        values, narrow = work.values(self.real, k), work.narrow(k)
        status = self.describing(
            *self._kernel_arguments(views), *of_leaf, *counts, tables, values, narrow, work.lanes(k)
        )
        with self.lock:
            self.unchanged += counts[0]
            self.both += counts[1]
            self.together += counts[2]
            self.ends[:, 0] = np.minimum(self.ends[:, 0], counts[3][:, 0])
            self.ends[:, 1] = np.maximum(self.ends[:, 1], counts[3][:, 1])
        return status

    def _kernel_arguments(
        self, views: list[np.ndarray]
    ) -> tuple[np.ndarray, int, np.ndarray, np.ndarray, int]:
        addresses = np.array([view.ctypes.data for view in views[:-1]], np.int64)
        return (
            addresses,
            views[-1].size // self.job.read[-1].width,
            self.codes,
            views[-1],
            self.base_code,
        )

    def take(self, tables: np.ndarray) -> None:
        """Add what a thread counted in the first reading."""
        with self.lock:
            for i, histogram in enumerate(self.histograms):
                histogram.take(tables[TABLES * i : TABLES * (i + 1)])

    def start_second(self) -> None:
        """End the first reading: choose the bins that the second counts finely."""
        with self.lock:
            if not self.has_second:
                self._choose_bins()
                self.has_second = True

    def _choose_bins(self) -> None:
        n, k = self.job.elements, len(self.codes)
        self.slots = np.zeros((k, 65_536), np.uint8)
        self.fine_bins: list[list[int]] = [[] for _ in range(k)]
        self.tops = np.zeros(k, np.int64)
        self.shared = np.zeros((len(self.pairs), 2), np.int64)
        top_count = max(1, int(self.top_share * n))
        least = [max(h.kth_largest_magnitude(top_count), 1) if n else 1 for h in self.histograms]
        self.least = np.array(least, np.uint32)
        if n > SORTED:
            below, above, _ = neighbours(n, LEVELS[1:-1])
            for i, histogram in enumerate(self.histograms):
                bins, _, counts = histogram.places(np.concatenate([below, above]))
                # The bin of zeros hardly ever has other entries. If it has none, it needs no second count.
                settled = {0x8000} if self.unchanged[i] == counts[bins == 0x8000][:1].sum() else set()
                self.fine_bins[i] = sorted(set(bins.tolist()) - settled)
                self.slots[i, self.fine_bins[i]] = np.arange(1, len(self.fine_bins[i]) + 1)
        self.places = k * max(map(len, self.fine_bins))

    def order(self, views: list[np.ndarray], fine: np.ndarray, work: ThreadBuffers) -> None:
        """Add a block of the second reading, and its fine histograms to ``fine``."""
        tops, shared = np.zeros_like(self.tops), np.zeros_like(self.shared)
        k = len(self.codes)
        outputs = self.slots, fine, self.least, tops, shared
        self.ordering(
            *self._kernel_arguments(views), *outputs, work.values(self.real, k), work.narrow(k), work.flags(k)
        )
        with self.lock:
            self.tops += tops
            self.shared += shared

    def take_fine(self, fine: np.ndarray, is_alone: bool) -> None:
        """Add what a thread counted in the second reading; it is everything if the thread ``is_alone``."""
        if is_alone:
            # Not a copy: fresh memory for each tensor took a third of the time on a virtual machine.
            self.quantiles = self.quantiles or [self._quantiles(i, fine) for i in range(len(self.codes))]
        elif self.places:
            with self.lock:
                self.fine = fine.copy() if self.fine is None else self.fine + fine

    def sort(self, views: list[np.ndarray]) -> None:
        """Compute the quantiles of a small tensor in memory from its sorted entries."""
        base = decode(views[-1], self.job.read[-1].dtype)
        below, above, share = neighbours(self.job.elements, LEVELS)
        for view, tensor in zip(views[:-1], self.job.inputs, strict=True):
            entries = np.sort((decode(view, tensor.dtype) - base).astype(np.float64))
            if entries.size:
                self.quantiles.append(
                    tuple((entries[below] + (entries[above] - entries[below]) * share).tolist())
                )
            else:
                self.quantiles.append((0.0,) * len(LEVELS))

    def result(self, models: tuple[int, ...], subspaces: list[Subspace | None]) -> Tally:
        return Tally.of_leaves(
            models=models,
            elements=self.job.elements,
            moments=self.moments,
            of_base=self.of_base,
            of_pairs=self.of_pairs,
            of_sum=self.of_sum,
            unchanged=self.unchanged,
            both=self.both,
            together=self.together,
            ends=value_of(self.ends) if self.job.elements else np.zeros(self.ends.shape),
            tops=self.tops,
            shared=self.shared,
            quantiles=self.quantiles or [self._quantiles(i, self.fine) for i in range(len(self.codes))],
            subspaces=subspaces,
        )

    def _quantiles(self, model: int, fine: np.ndarray | None) -> tuple[float, ...]:
        below, above, share = neighbours(self.job.elements, LEVELS)
        low, high = self._entries(model, below, fine), self._entries(model, above, fine)
        return tuple((low + (high - low) * share).tolist())

    def _entries(self, model: int, ranks: np.ndarray, fine: np.ndarray | None) -> np.ndarray:
        """Return the exact entries of a model with these ranks."""
        bins, inside, _ = self.histograms[model].places(ranks)
        ends = value_of(self.ends[model])
        each = self.places // len(self.codes)
        entries = np.zeros(len(ranks))
        for n, (rank, at, place) in enumerate(
            zip(ranks.tolist(), bins.tolist(), inside.tolist(), strict=True)
        ):
            if rank in (0, self.job.elements - 1):
                entries[n] = ends[0] if rank == 0 else ends[1]
            elif at in self.fine_bins[model]:
                assert fine is not None
                lower = place_in(fine[model * each + self.fine_bins[model].index(at)], place)
                entries[n] = value_of(np.array(at << 16 | lower))
        return entries


def _no_ends(models: int) -> np.ndarray:
    return np.tile(np.array([0xFFFFFFFF, 0], np.uint32), (models, 1))


def kernels_of(job: Job) -> tuple[DescribingKernel, OrderKernel]:
    real = job.real
    return DescribingKernel(real), OrderKernel(real)
