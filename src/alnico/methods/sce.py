"""SCE: selects by variance, calculates weights by energy, erases minority signs."""

import math

from alnico.kernels.facts import Count, Derived, KthLargest, Sum
from alnico.methods.base import KeptShare, Merge, method


@method(
    space="delta",
    source="Wan et al. 2024, FuseChat, https://arxiv.org/abs/2408.07990, section 3.3",
    presets={"paper": {"select_topk": 0.1}},
)
def sce(*, select_topk: KeptShare = 1.0) -> Merge:
    """Select where the models differ most, weight each model by its energy there, erase minority signs.

    Select: ``kept_i = model_i - base`` at the share ``select_topk`` of entries with the largest variance over
    the models, of those where it is not 0; elsewhere 0. Calculate: ``w_i = mean(kept_i^2) / sum_j
    mean(kept_j^2)``, tensor by tensor. Erase: ``out = base + sum_A w_i * kept_i / sum_A w_i`` over the models
    A whose ``kept_i`` has the sign of ``sum_i kept_i``.

    Use when: you fuse several chat models of one base, tuned on data from different teachers (FuseChat). Set
        ``select_topk``: at 1 every entry is selected.
    Start with: {select_topk: 0.1}

    Options:
        select_topk: the share of entries that is selected, in (0, 1]; 1 selects all (FuseChat uses 0.1).
    Presets:
        paper: selects 10 % of the entries, as FuseChat does.
    Shapes: one task-vector entry per model in, one number out; any number of models besides the base.
    Measures: below 1, the number of entries that differ and the kth largest variance, then sums: three
        levels, three to five passes; otherwise sums, one pass; then one to mix. Memory: blocks, a few MiB of
        counters, and at most 32 MiB of candidates while a large tensor is searched. Grain: element.
    Edge cases: entries whose variance equals the limit are all kept; a balance of exactly 0 elects plus; one
        model has no variance: with ``select_topk`` below 1 the base is written; task vectors so small that
        their squares are 0 in float32 (1e-23 and below) get equal weights.
    Differs from the source: the selection also applies to the merge itself, as in mergekit; FuseAI selects
        for the weights only. mergekit gives equal weights where the energies of a tensor sum to less than
        1e-6, which is usual for fine-tunes.
    Source: Wan et al. 2024, https://arxiv.org/abs/2408.07990, section 3.3.

    >>> [len(sce.bind({"select_topk": s}, 3).levels()) for s in (1.0, 0.1)]
    [1, 3]
    """
    if select_topk >= 1:
        weight = Derived(_by_energy, (Sum(square),))
        return Merge(_average, (weight,))
    limit = KthLargest((select_topk,), variance_of, among=Count(variance_of, across=True), across=True)
    return Merge(
        _average_selected, (limit, Derived(_by_energy, (Sum(square_if_selected, (limit,), across=True),)))
    )


def variance(delta):
    mean = 0.0
    for i in range(len(delta)):
        mean += delta[i]
    mean = mean / len(delta)
    total = 0.0
    for i in range(len(delta)):
        total += (delta[i] - mean) * (delta[i] - mean)
    return total / len(delta)


def variance_of(own, delta):
    return variance(delta)


def square(own):
    return own * own


def square_if_selected(own, delta, limit):
    return own * own if variance(delta) >= limit else 0.0


def average_elected(delta, weight):
    """The weighted mean of the entries that have the sign of their sum."""
    balance = 0.0
    for i in range(len(delta)):
        balance += delta[i]
    total = 0.0
    share = 0.0
    for i in range(len(delta)):
        if (delta[i] > 0) if balance >= 0 else (delta[i] < 0):
            total += weight[i] * delta[i]
            share += weight[i]
    return total / share if share > 0 else share - share  # 0, or NaN where the energies are


def _average(delta, weight):
    return average_elected(delta, weight)


def _average_selected(delta, limit, weight):
    spread = variance(delta)
    unknown = spread - spread  # 0, or NaN where the squares overflow
    return average_elected(delta, weight) + unknown if spread >= limit[0] else unknown


def _by_energy(energy: tuple[float, ...]) -> tuple[float, ...]:
    total = sum(energy)
    if total == math.inf:  # the energies themselves are finite: a run refuses others
        energy = tuple(e / 2**64 for e in energy)
        total = sum(energy)
    return tuple(e / total for e in energy) if total > 0 else (1.0 / len(energy),) * len(energy)
