"""PCB-Merging: entries compete within their model and between models."""

from alnico.kernels.facts import KthLargest
from alnico.methods.base import Merge, PerModel, Share, each, method
from alnico.methods.shared.exponential import exponential

CLIPPED = 1e-4
"""The share of entries clipped at each end of the magnitudes, as in the authors' code."""


@method(
    space="delta",
    source="Du et al. 2024, Parameter Competition Balancing, https://arxiv.org/abs/2410.02396, section 3",
    presets={"paper": {"density": 0.1, "scale": 1.2}},
)
def pcb(
    *, density: PerModel[Share] = each(0.1), weight: PerModel[float] = each(1.0), scale: float = 1.0
) -> Merge:
    """Keep entries that win within their model and agree with the others, weighted by how clearly.

    With the task-vector entries ``d_i``, ``s_i`` their magnitudes scaled to [0, 1] over the tensor, and N
    models: ``b_i = exp(N * s_i^2) * d_i * sum_j d_j``. The share ``density_i`` of each model's entries, those
    of largest b, is kept, and ``r_i`` is their b scaled from the smallest kept (0) to the largest (1). ``out
    = base + scale * sum_i r_i * weight_i * d_i / sum_i r_i``.

    Use when: you merge models of different tasks as with ``ties``, and the strongest entries of each should
        count for more. The paper reports better results than ``ties`` on eight vision tasks, with scale and
        density tuned.

    Options:
        density: the share of each tensor's entries that is kept, in (0, 1]; the authors use 0.1, and 0.05 for
            language models.
        weight: a model's coefficient, any number (the paper's lambda per model, found by a search).
        scale: the factor on the merged task vector (``lambda`` in YAML), any number.
    Presets:
        paper: density 0.1 and scale 1.2.
    Shapes: one task-vector entry per model in, one number out; any number of models besides the base.
    Measures: the ends of the magnitudes, then the limit and the largest b: two levels of one to five passes
        each; then one to mix. All in float64. Memory: blocks, a few MiB of counters, and at most 32 MiB of
        candidates while a large tensor is searched. Grain: element.
    Edge cases: entries whose sign differs from the sum's are never kept; where no entry is kept the base's
        bits are written; where all kept b of a tensor are equal they weigh 1; all weights 0, or scale 0,
        copies the base.
    Errors: MethodError if a density is outside (0, 1].
    Differs from the source: normalises and keeps tensor by tensor; the authors' code takes the whole model, a
        hyperbolic tangent of ``d_i * sum_j d_j`` (which for entries below 0.01 is that product to 1e-8, and
        has a scale of its own), and also clips the merged entries at the ends of the magnitudes (1e-4 on each
        side).
    Source: Du et al. 2024, https://arxiv.org/abs/2410.02396, section 3, and the authors' code.

    >>> len(pcb.bind({}, 3).levels())
    2
    """
    ones = (1.0,) * len(weight)
    low = KthLargest(tuple(1 - CLIPPED for _ in ones), is_quantile=True)
    high = KthLargest(tuple(0.5 for _ in ones), skip=tuple(CLIPPED for _ in ones), end="first")
    limit = KthLargest(density, competition, (low, high), across=True)
    largest = KthLargest(
        tuple(0.5 for _ in ones),
        competition,
        (low, high),
        skip=tuple(0.0 for _ in ones),
        end="first",
        across=True,
    )

    def mix(delta, low, high, limit, largest, weight, scale):
        total = 0.0
        shares = 0.0
        unknown = 0.0
        for i in range(len(delta)):
            strength = competition(delta[i], delta, low[i], high[i])
            share = (strength - limit[i]) / (largest[i] - limit[i]) if largest[i] > limit[i] else 1.0
            share = share if strength > 0 and strength >= limit[i] else 0.0
            total += share * (weight[i] * delta[i])
            shares += share
            unknown += strength - strength  # 0, or NaN where the product overflows
        return scale * total / shares + unknown if shares > 0 else unknown

    nothing = scale == 0 or not any(weight)
    return Merge(
        mix, (low, high, limit, largest, weight, scale), copies="base" if nothing else None, is_wide=True
    )


def competition(own, delta, low, high):
    """b of the docstring over e^N, which no share depends on; 0 where it is negative."""
    total = 0.0
    for i in range(len(delta)):
        total += delta[i]
    size = min(max(abs(own), low), high)
    place = (size - low) / (high - low) if high > low else 1.0
    return max(exponential(len(delta) * (place * place - 1.0)) * (own * total), 0.0)
