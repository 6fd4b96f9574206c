"""Model Breadcrumbs with the sign election of TIES: drops both tails, merges what agrees."""

from alnico.methods.base import KeptShare, Merge, PerModel, Proportion, each, method
from alnico.methods.shared.elect import Divide, Elect, Tie, sum_elected
from alnico.methods.shared.sparsify import Rescale, keep_middle


@method(
    space="delta", source="Davari and Belilovsky 2023, Model Breadcrumbs, https://arxiv.org/abs/2312.06795"
)
def breadcrumbs_ties(
    *,
    density: PerModel[KeptShare] = each(1.0),
    gamma: PerModel[Proportion] = each(0.01),
    weight: PerModel[float] = each(1.0),
    scale: float = 1.0,
    elect: Elect = "weighted",
    tie: Tie = "auto",
    divide: Divide = "none",
    rescale: Rescale = "none",
) -> Merge:
    """Leave out the largest and smallest task-vector entries, elect signs, and keep the entries that agree.

    ``kept_i`` as in ``breadcrumbs``; ``sign = sign(sum_i weight_i * kept_i)``; ``out = base + scale * sum_A
    weight_i * kept_i`` over the models A with ``sign(weight_i * kept_i) = sign``.

    Use when: you would use ``breadcrumbs``, and the models also disagree in sign. mergekit combines the two;
        we know of no paper that compares it.
    Start with: {density: 0.15, gamma: 0.006, scale: 0.3}

    Options:
        density: the share of each tensor's entries that is kept, in (0, 1]; 1 keeps all (the authors use
            0.15).
        gamma: the share of largest magnitude that is left out, in [0, 1]; at most ``1 - density`` (the
            authors use 0.006).
        weight: a model's coefficient, any number.
        scale: the factor on the merged task vector (``lambda`` in YAML), any number; the authors use 0.2 to
            0.3.
        elect: what the vote on the sign sums: the ``weighted`` entries, the entries as they are (``mass``),
            or their signs (``count``).
        tie: what a vote of exactly 0 elects: ``plus``, or ``none``, which keeps the base; ``auto`` (as in
            mergekit) is ``none`` with ``elect: count`` and ``plus`` otherwise.
        divide: what the sum is divided by: the ``weight`` or the ``count`` of the models that agree, or
            ``none``; mergekit's ``normalize: true`` is ``weight``.
        rescale: ``l1`` scales the kept entries to the L1 norm of the whole, ``inverse`` by 1/density,
            ``none``.
    Shapes: one task-vector entry per model in, one number out; any number of models besides the base.
    Measures: two kth largest magnitudes, one to three passes; with ``rescale: l1`` two sums, one more pass;
        then one to mix. Memory: blocks, a few MiB of counters, and at most 32 MiB of candidates while a large
        tensor is searched. Grain: element.
    Edge cases: at least one entry of a tensor is kept; entries equal to either threshold are kept; at density
        1 all are kept, for any gamma.
    Errors: MethodError if a density is outside (0, 1].
    Differs from the source: trims each tensor, as mergekit does; the authors' code trims each row.
    Source: Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795, section 3; with the election of
        Yadav et al. 2023, https://arxiv.org/abs/2306.01708.

    >>> len(breadcrumbs_ties.bind({"density": 0.15}, 2).levels())
    1
    """
    return sum_elected(keep_middle(density, gamma, rescale), weight, scale, elect, tie, divide)
