"""DELLA: drops entries by rank, elects a sign, merges the entries that agree."""

from alnico.methods.base import KeptShare, Merge, PerModel, Proportion, each, method
from alnico.methods.shared.elect import Divide, Elect, Tie, sum_elected
from alnico.methods.shared.sparsify import Rescale, keep_by_rank


@method(
    space="delta",
    source="Deep et al. 2024, DELLA-Merging, https://arxiv.org/abs/2406.11617",
    presets={"paper": {"density": 0.7, "epsilon": 0.07, "scale": 1.1}},
)
def della(
    *,
    density: PerModel[KeptShare] = each(1.0),
    epsilon: PerModel[Proportion] = each(0.15),
    weight: PerModel[float] = each(1.0),
    scale: float = 1.0,
    elect: Elect = "weighted",
    tie: Tie = "auto",
    divide: Divide = "weight",
    rescale: Rescale = "l1",
) -> Merge:
    """Drop random task-vector entries, small ones more often, elect signs, average the entries that agree.

    In each row of ``model_i - base`` the entry of magnitude rank r (0 the smallest, n - 1 the largest) is
    kept with probability ``density_i - epsilon_i + 2 * epsilon_i * r / (n - 1)``, times a factor (see
    ``rescale``). Then as in ``ties``: ``out = base + scale * sum_A weight_i * kept_i / sum_A weight_i`` over
    the models A that agree with the elected sign.

    Use when: you would use ``dare_ties``, and large entries should be kept more often than small ones. The
        authors report gains over DARE and TIES for language, mathematics and code models of one base. Set
        ``density``: 1 drops nothing.
    Start with: {density: 0.7, epsilon: 0.07}

    Options:
        density: the mean probability that an entry is kept, in (0, 1]; 1 keeps all. The paper's drop rate p
            is 1 - density.
        epsilon: how far the probability goes below and above density over the ranks of a row, in [0, 1];
            density - epsilon and density + epsilon must be between 0 and 1. Half of the paper's window.
        weight: a model's coefficient, any number.
        scale: the factor on the merged task vector (``lambda`` in YAML), any number; the authors use 1.1.
        elect: what the vote on the sign sums: the ``weighted`` entries, the entries as they are (``mass``),
            or their signs (``count``).
        tie: what a vote of exactly 0 elects: ``plus``, or ``none``, which keeps the base; ``auto`` (as in
            mergekit) is ``none`` with ``elect: count`` and ``plus`` otherwise.
        divide: what the sum is divided by: the ``weight`` or the ``count`` of the models that agree, or
            ``none``; mergekit's ``normalize: true`` and ``false`` are ``weight`` and ``none``.
        rescale: ``l1`` keeps each tensor's sum of magnitudes, ``inverse`` divides by the density, ``none``.
    Presets:
        paper: the authors' example: drop rate 0.3, window 0.14, lambda 1.1.
    Shapes: one task-vector entry per model in, one number out; any number of models besides the base.
    Measures: with ``l1`` two sums, one pass; then one to mix. Memory: blocks of whole rows with their ranks.
        Grain: row. Noise: yes, by (seed, tensor, model, element).
    Edge cases: equal magnitudes of a row share their mean rank; a row of one entry is kept with probability
        density; a tensor of one dimension is one row.
    Errors: MethodError if a density is outside (0, 1], or epsilon does not fit the density.
    Differs from the source: an L1 rescale, as in mergekit; the paper divides each entry by its own
        probability. Rows are along the last dimension; mergekit ranks along the second of three or more, and
        fails on rows of one entry.
    Source: Deep et al. 2024, https://arxiv.org/abs/2406.11617, section 3.

    >>> len(della.bind({"density": 0.5}, 2).levels())
    1
    """
    return sum_elected(keep_by_rank(density, epsilon, rescale), weight, scale, elect, tie, divide)
