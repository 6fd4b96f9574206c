"""DARE with the sign election of TIES: drops random entries, merges those that agree."""

from alnico.methods.base import KeptShare, Merge, PerModel, Share, each, method
from alnico.methods.shared.elect import Divide, Elect, Tie, sum_elected
from alnico.methods.shared.sparsify import Rescale, keep_random_then_large


@method(
    space="delta",
    source="Yu et al. 2024, Language models are super Mario, https://arxiv.org/abs/2311.03099",
    presets={
        "paper": {"density": 0.1, "rescale": "inverse", "elect": "mass", "tie": "none", "divide": "count"}
    },
)
def dare_ties(
    *,
    density: PerModel[KeptShare] = each(1.0),
    trim: PerModel[Share] = each(1.0),
    weight: PerModel[float] = each(1.0),
    scale: float = 1.0,
    elect: Elect = "weighted",
    tie: Tie = "auto",
    divide: Divide = "none",
    rescale: Rescale = "l1",
) -> Merge:
    """Drop random task-vector entries, rescale the others, then elect signs and keep the entries that agree.

    ``kept_i`` keeps each entry of ``model_i - base`` with probability ``density_i``, and of the result, with its
    zeros, the share ``trim_i`` of largest magnitude, times ``factor_i`` (see ``rescale``); ``sign = sign(sum_i weight_i * kept_i)``; ``out = base + scale * sum_A weight_i * kept_i``
    over the models A that agree.

    Use when: you would use ``dare_linear``, and the models also disagree in sign. Papers report slightly
        better results than ``dare_linear`` for a language, a mathematics and a code model of one base; on
        language models found in the wild its defaults often gain nothing.
    Start with: {density: 0.5}

    Options:
        density: the probability that an entry is kept, in (0, 1]; 1 keeps all. The paper's drop rate p is 1 -
            density.
        trim: the share of a tensor's entries that is kept by magnitude after the random drop, in (0, 1]; 1
            trims nothing. It is the density that ``ties`` would have on what the drop left: dropped entries
            count as 0, so only a trim below the density leaves entries out.
        weight: a model's coefficient, any number.
        scale: the factor on the merged task vector (``lambda`` in YAML), any number.
        elect: what the vote on the sign sums: the ``weighted`` entries, the entries as they are (``mass``),
            or their signs (``count``).
        tie: what a vote of exactly 0 elects: ``plus``, or ``none``, which keeps the base; ``auto`` (as in
            mergekit) is ``none`` with ``elect: count`` and ``plus`` otherwise.
        divide: what the sum is divided by: the ``weight`` or the ``count`` of the models that agree, or
            ``none``; mergekit's ``normalize: true`` is ``weight``.
        rescale: ``l1`` keeps each tensor's sum of magnitudes, also after a ``trim``; ``inverse`` divides by
            the density (the paper), ``none``.
    Presets:
        paper: drops 90 % of the entries, divides the others by the density, votes by mass and divides by
            count. The paper then also trims by magnitude; ``trim`` does that.
    Shapes: one task-vector entry per model in, one number out; any number of models besides the base.
    Measures: with ``trim`` the kth largest magnitude that was drawn, one to three passes; with ``l1`` two
        sums, one pass; then one to mix. Memory: blocks. Grain: element. Noise: yes, by (seed, tensor, model,
        element).
    Edge cases: the same as for ``ties`` and ``dare_linear``; where the drop leaves fewer entries than ``trim``
        keeps, all of them are kept.
    Errors: MethodError if a density or a trim is outside (0, 1].
    Differs from the source: by default no trim by magnitude after the random drop, and an L1 rescale, as in
        mergekit; the paper runs the whole of TIES on task vectors divided by the density.
    Source: Yu et al. 2024, https://arxiv.org/abs/2311.03099, section 3.1.

    >>> [len(dare_ties.bind({"density": 0.5, **more}, 2).levels()) for more in ({}, {"trim": 0.2})]
    [1, 2]
    """
    sparse = keep_random_then_large(density, trim, rescale)
    return sum_elected(sparse, weight, scale, elect, tie, divide)
