"""Model Breadcrumbs: adds up task vectors without their largest and smallest entries."""

from typing import Literal

from alnico.methods.base import KeptShare, Merge, PerModel, Proportion, each, method
from alnico.methods.shared.elect import sum_all
from alnico.methods.shared.sparsify import Rescale, keep_middle


@method(
    space="delta",
    source="Davari and Belilovsky 2023, Model Breadcrumbs, https://arxiv.org/abs/2312.06795",
    presets={"paper": {"density": 0.15, "gamma": 0.006, "scale": 0.2}},
)
def breadcrumbs(
    *,
    density: PerModel[KeptShare] = each(1.0),
    gamma: PerModel[Proportion] = each(0.01),
    weight: PerModel[float] = each(1.0),
    scale: float = 1.0,
    divide: Literal["weight", "none"] = "none",
    rescale: Rescale = "none",
) -> Merge:
    """Leave out the largest and the smallest entries of each task vector, and add up the others.

    Of the n entries of a tensor of ``model_i - base``, ordered by magnitude, the largest ``int(gamma_i * n)``
    are left out and the ``int(density_i * n)`` below them are kept; ``out = base + scale * sum_i weight_i *
    kept_i``.

    Use when: you add up many task vectors and a few outlying entries would dominate the sum. Set ``density``:
        at 1 nothing is left out, for any ``gamma``.
    Start with: {density: 0.15, gamma: 0.006, scale: 0.3}

    Options:
        density: the share of each tensor's entries that is kept, in (0, 1]; 1 keeps all (the authors use
            0.15).
        gamma: the share of largest magnitude that is left out, in [0, 1]; at most ``1 - density`` (the
            authors use 0.006).
        weight: a model's coefficient, any number.
        scale: the factor on the whole sum (``lambda`` in YAML), any number; the authors use 0.2 to 0.3.
        divide: ``weight`` divides the sum by the sum of the weights (mergekit: ``normalize: true``).
        rescale: ``l1`` scales the kept entries to the L1 norm of the whole, ``inverse`` by 1/density,
            ``none``.
    Presets:
        paper: the authors' code: beta 0.15, gamma 0.006, alpha 0.2.
    Shapes: one task-vector entry per model in, one number out; any number of models besides the base.
    Measures: two kth largest magnitudes, one to three passes; with ``rescale: l1`` two sums, one more pass;
        then one to mix. Memory: blocks, a few MiB of counters, and at most 32 MiB of candidates while a large
        tensor is searched. Grain: element.
    Edge cases: at least one entry of a tensor is kept; entries equal to either threshold are kept; at density
        1 all are kept, for any gamma.
    Errors: MethodError if a density is outside (0, 1], or if ``divide`` is ``weight`` and the weights sum to
        0.
    Differs from the source: trims each tensor, as mergekit does; the authors' code trims each row.
    Source: Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795, section 3.

    >>> len(breadcrumbs.bind({"density": 0.15}, 2).levels())
    1
    """
    return sum_all(keep_middle(density, gamma, rescale), weight, scale, divide)
