"""Sums and counts over tensors in float64, in any order, and the statistics computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from alnico.analysis.common_tensors import CommonTensor
from alnico.analysis.histogram import Histogram, neighbours
from alnico.analysis.results import LEVELS, DeltaStatistics, Pair, ScopeStatistics, Subspace, TensorScope
from alnico.kernels.analysis_kernels import MOMENTS
from alnico.kernels.constants import LEAF

Moments = tuple[float, float, float, float, float]
"""Count, mean, and sums of the 2nd, 3rd and 4th powers of the deviations from the mean."""


@dataclass(frozen=True)
class Tally:
    """Sums and counts of a tensor: for each of its ``models`` (positions), for each pair, for all together.

    ``l1``, ``squares``: sum |d|, sum d^2. ``products``, ``sizes``: sum d1 d2, sum |d1 d2|. ``both``: the
    number of entries that both models changed, and of those with opposite signs. ``shared``: the same for top
    parameters of both. ``together``: the number of entries that at least two models changed, and of those
    with both signs. ``of_sum``: sum |d1 + d2 + ...|.
    """

    models: tuple[int, ...]
    elements: int
    base_l1: float
    base_squares: float
    l1: tuple[float, ...]
    squares: tuple[float, ...]
    moments: tuple[Moments, ...]
    ends: tuple[tuple[float, float], ...]
    unchanged: tuple[int, ...]
    tops: tuple[int, ...]
    quantiles: tuple[tuple[float, ...], ...]
    products: tuple[float, ...]
    sizes: tuple[float, ...]
    both: tuple[tuple[int, int], ...]
    shared: tuple[tuple[int, int], ...]
    subspaces: tuple[Subspace | None, ...]
    together: tuple[int, int]
    of_sum: float

    @classmethod
    def of_leaves(
        cls,
        *,
        models: tuple[int, ...],
        elements: int,
        moments: np.ndarray,
        of_base: np.ndarray,
        of_pairs: np.ndarray,
        of_sum: np.ndarray,
        unchanged: np.ndarray,
        both: np.ndarray,
        together: np.ndarray,
        ends: np.ndarray,
        tops: np.ndarray,
        shared: np.ndarray,
        quantiles: Sequence[tuple[float, ...]],
        subspaces: Sequence[Subspace | None],
    ) -> Tally:
        """Add up the kernels' results for each leaf; see :class:`DescribingKernel`."""
        counts = np.minimum(LEAF, elements - np.arange(len(moments)) * LEAF).astype(np.float64)
        of_models = moments.reshape(len(moments), len(models), MOMENTS + 1).transpose(1, 2, 0)
        return cls(
            models=models,
            elements=elements,
            base_l1=math.fsum(of_base[:, 0]),
            base_squares=math.fsum(of_base[:, 1]),
            l1=tuple(math.fsum(m[4]) for m in of_models),
            squares=tuple(math.fsum(m[5]) for m in of_models),
            moments=tuple(combine_moments(_center_moments(counts, m)) for m in of_models),
            ends=tuple((low, high) for low, high in ends.tolist()),
            unchanged=tuple(unchanged.tolist()),
            tops=tuple(tops.tolist()),
            quantiles=tuple(quantiles),
            products=tuple(math.fsum(column) for column in of_pairs[:, 0::2].T),
            sizes=tuple(math.fsum(column) for column in of_pairs[:, 1::2].T),
            both=tuple((a, b) for a, b in both.tolist()),
            shared=tuple((a, b) for a, b in shared.tolist()),
            subspaces=tuple(subspaces),
            together=(int(together[0]), int(together[1])),
            of_sum=math.fsum(of_sum[:, 0]),
        )


def _center_moments(counts: np.ndarray, sums: np.ndarray) -> list[Moments]:
    """Compute the moments of leaves from the sums of powers of deviations from ``sums[MOMENTS]``."""
    y1, y2, y3, y4, shift = sums[0], sums[1], sums[2], sums[3], sums[MOMENTS]
    m = y1 / counts
    second = np.maximum(y2 - m * y1, 0.0)
    third = y3 - 3 * m * y2 + 2 * m**2 * y1
    fourth = np.maximum(y4 - 4 * m * y3 + 6 * m**2 * y2 - 3 * m**3 * y1, 0.0)
    return list(
        zip(
            counts.tolist(),
            (shift + m).tolist(),
            second.tolist(),
            third.tolist(),
            fourth.tolist(),
            strict=True,
        )
    )


def combine_moments(parts: Sequence[Moments]) -> Moments:
    """Combine the moments of parts into those of all numbers.

    >>> combine_moments([(2.0, 0.0, 2.0, 0.0, 2.0), (2.0, 2.0, 0.0, 0.0, 0.0)])  # -1, 1 and 2, 2
    (4.0, 1.0, 6.0, -6.0, 18.0)
    """
    n = math.fsum(p[0] for p in parts)
    if not n:
        return 0.0, 0.0, 0.0, 0.0, 0.0
    mean = math.fsum(p[0] * p[1] for p in parts) / n
    second, third, fourth = [], [], []
    for count, own, m2, m3, m4 in parts:
        d = own - mean
        second += [m2, count * d**2]
        third += [m3, 3 * d * m2, count * d**3]
        fourth += [m4, 4 * d * m3, 6 * d**2 * m2, count * d**4]
    return n, mean, math.fsum(second), math.fsum(third), math.fsum(fourth)


@dataclass(frozen=True)
class PooledTallies:
    """The tallies of all tensors in a scope, over ``models`` models.

    Without ``histograms`` it is a single tensor, whose quantiles are known.
    """

    name: str
    parts: Sequence[Tally]
    models: int
    histograms: Sequence[Histogram] | None = None

    def scope(self) -> ScopeStatistics:
        return ScopeStatistics(self.name, self._changes(), self._pairs(), *self._together())

    def of_tensor(self, subject: CommonTensor) -> TensorScope:
        job = subject.job
        results = (self.name, self._changes(), self._pairs(), *self._together())
        return TensorScope(*results, job.dtype, job.shape, subject.group, subject.layer, subject.module)

    def _changes(self) -> tuple[DeltaStatistics | None, ...]:
        return tuple(self._change(model) for model in range(self.models))

    def _change(self, model: int) -> DeltaStatistics | None:
        own = [(part, part.models.index(model)) for part in self.parts if model in part.models]
        elements = sum(part.elements for part, _ in own)
        if not own:
            return None
        l1, squares = (
            math.fsum(part.l1[i] for part, i in own),
            math.fsum(part.squares[i] for part, i in own),
        )
        base_l1, base_squares = (
            math.fsum(part.base_l1 for part, _ in own),
            math.fsum(part.base_squares for part, _ in own),
        )
        filled = [(part, i) for part, i in own if part.elements]
        low = min((part.ends[i][0] for part, i in filled), default=0.0)
        high = max((part.ends[i][1] for part, i in filled), default=0.0)
        n, mean, second, third, fourth = combine_moments([part.moments[i] for part, i in own])
        is_spread = low < high and second > 0
        return DeltaStatistics(
            elements=elements,
            l1=l1,
            l2=squares**0.5,
            relative_l1=_share(l1, base_l1),
            relative_l2=_share(squares**0.5, base_squares**0.5),
            max_abs=max(0.0, -low, high),
            mean=mean,
            std=(second / n) ** 0.5 if is_spread else 0.0,
            skewness=(third / n) / (second / n) ** 1.5 if is_spread else None,
            excess_kurtosis=(fourth / n) / (second / n) ** 2 - 3 if is_spread else None,
            quantiles=self._quantiles(own, model, elements, low, high),
            unchanged=_share(sum(part.unchanged[i] for part, i in own), elements) or 0.0,
            effective_sparsity=max(0.0, 1 - l1**2 / (elements * squares)) if squares > 0 else None,
        )

    def _quantiles(
        self, own: Sequence[tuple[Tally, int]], model: int, elements: int, low: float, high: float
    ) -> tuple[float, ...]:
        if self.histograms is None:
            ((part, i),) = own
            return part.quantiles[i]
        if not elements:
            return (0.0,) * len(LEVELS)
        below, above, share = neighbours(elements, LEVELS[1:-1])
        histogram = self.histograms[model]
        first, second = (np.clip(histogram.estimate(ranks), low, high) for ranks in (below, above))
        return (low, *(first + (second - first) * share + 0.0).tolist(), high)

    def _pairs(self) -> tuple[Pair, ...]:
        pairs = []
        for first in range(self.models):
            for second in range(first + 1, self.models):
                parts = [part for part in self.parts if first in part.models and second in part.models]
                if parts:
                    pairs.append(_pair(first, second, parts))
        return tuple(pairs)

    def _together(self) -> tuple[float | None, float | None]:
        several = [part for part in self.parts if len(part.models) > 1]
        conflict = _share(sum(p.together[1] for p in several), sum(p.together[0] for p in several))
        added = _share(math.fsum(p.of_sum for p in several), math.fsum(x for p in several for x in p.l1))
        return conflict, None if added is None else max(0.0, 1 - added)


def _pair(a: int, b: int, parts: Sequence[Tally]) -> Pair:
    places = [(part, part.models.index(a), part.models.index(b)) for part in parts]
    numbers = [_number(i, j, len(part.models)) for part, i, j in places]

    def total(value: Callable[[Tally, int], float]) -> float:
        return math.fsum(value(part, n) for (part, _, _), n in zip(places, numbers, strict=True))

    product, size = total(lambda part, n: part.products[n]), total(lambda part, n: part.sizes[n])
    first = math.fsum(part.squares[i] for part, i, _ in places)
    second = math.fsum(part.squares[j] for part, _, j in places)
    tops = min(sum(part.tops[i] for part, i, _ in places), sum(part.tops[j] for part, _, j in places))
    shared = total(lambda part, n: part.shared[n][0])
    return Pair(
        models=(a, b),
        cosine=None if first == 0 or second == 0 else min(max(product / (first * second) ** 0.5, -1.0), 1.0),
        distance=max(math.fsum((first, second, -2 * product)), 0.0) ** 0.5,
        sign_conflict=_share(total(lambda part, n: part.both[n][1]), total(lambda part, n: part.both[n][0])),
        weighted_sign_conflict=None if size == 0 else min(max((size - product) / (2 * size), 0.0), 1.0),
        top_overlap=_share(shared, tops),
        top_sign_conflict=_share(total(lambda part, n: part.shared[n][1]), shared),
        subspace=_mean_subspace(
            [s for (part, _, _), n in zip(places, numbers, strict=True) if (s := part.subspaces[n])]
        ),
    )


def _number(i: int, j: int, models: int) -> int:
    """Return the position of the pair (i, j) in (0, 1), (0, 2), ... (1, 2), ..."""
    return i * models - i * (i + 1) // 2 + j - i - 1


def _mean_subspace(matrices: Sequence[Subspace]) -> Subspace | None:
    if not matrices:
        return None
    left, right = (
        math.fsum(getattr(s, side) for s in matrices) / len(matrices) for side in ("left", "right")
    )
    return Subspace(left, right, max(s.rank for s in matrices), sum(s.matrices for s in matrices))


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
