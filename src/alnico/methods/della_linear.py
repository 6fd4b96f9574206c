"""DELLA with a plain sum: drops entries by rank and adds up the others."""

from typing import Literal

from alnico.methods.base import KeptShare, Merge, PerModel, Proportion, each, method
from alnico.methods.shared.elect import sum_all
from alnico.methods.shared.sparsify import Rescale, keep_by_rank


@method(space="delta", source="Deep et al. 2024, DELLA-Merging, https://arxiv.org/abs/2406.11617")
def della_linear(
    *,
    density: PerModel[KeptShare] = each(1.0),
    epsilon: PerModel[Proportion] = each(0.15),
    weight: PerModel[float] = each(1.0),
    scale: float = 1.0,
    divide: Literal["weight", "none"] = "none",
    rescale: Rescale = "l1",
) -> Merge:
    """Drop random task-vector entries, small ones more often, and add up the others.

    In each row of ``model_i - base`` the entry of magnitude rank r (0 the smallest, n - 1 the largest) is
    kept with probability ``density_i - epsilon_i + 2 * epsilon_i * r / (n - 1)``, times a factor (see
    ``rescale``); ``out = base + scale * sum_i weight_i * kept_i``.

    Use when: you would use ``della``, but the models' signs agree or you want the whole sum. Set ``density``:
        1 drops nothing.
    Start with: {density: 0.7, epsilon: 0.07}

    Options:
        density: the mean probability that an entry is kept, in (0, 1]; 1 keeps all. The paper's drop rate p
            is 1 - density.
        epsilon: how far the probability goes below and above density over the ranks of a row, in [0, 1];
            density - epsilon and density + epsilon must be between 0 and 1. Half of the paper's window.
        weight: a model's coefficient, any number.
        scale: the factor on the whole sum (``lambda`` in YAML), any number; the authors use 1.1.
        divide: ``weight`` divides the sum by the sum of the weights (mergekit: ``normalize: true``).
        rescale: ``l1`` keeps each tensor's sum of magnitudes, ``inverse`` divides by the density, ``none``.
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

    >>> len(della_linear.bind({"density": 0.5}, 2).levels())
    1
    """
    return sum_all(keep_by_rank(density, epsilon, rescale), weight, scale, divide)
