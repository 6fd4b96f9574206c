"""DARE with a plain sum: drops random entries and adds up the others."""

from typing import Literal

from alnico.methods.base import KeptShare, Merge, PerModel, each, method
from alnico.methods.shared.elect import sum_all
from alnico.methods.shared.sparsify import Rescale, keep_random


@method(
    space="delta",
    source="Yu et al. 2024, Language models are super Mario, https://arxiv.org/abs/2311.03099",
    presets={"paper": {"density": 0.1, "rescale": "inverse"}},
)
def dare_linear(
    *,
    density: PerModel[KeptShare] = each(1.0),
    weight: PerModel[float] = each(1.0),
    scale: float = 1.0,
    divide: Literal["weight", "none"] = "none",
    rescale: Rescale = "l1",
) -> Merge:
    """Drop random task-vector entries, rescale the others, and add them to the base.

    ``kept_i`` keeps each entry of ``model_i - base`` with probability ``density_i``; ``out = base + scale *
    sum_i weight_i * factor_i * kept_i``, with ``factor_i = sum |delta_i| / sum |kept_i|`` for ``rescale:
    l1``.

    Use when: task vectors are small, as after instruction tuning of a large model (entries below about
        0.005): most entries can then be dropped. It fails on models with continued pretraining, and the noise
        adds up when you merge repeatedly. Set ``density``: 1 drops nothing.
    Start with: {density: 0.5}

    Options:
        density: the probability that an entry is kept, in (0, 1]; 1 keeps all. The paper's drop rate p is 1 -
            density.
        weight: a model's coefficient, any number.
        scale: the factor on the whole sum (``lambda`` in YAML), any number.
        divide: ``weight`` divides by the sum of the weights (mergekit: ``normalize: true``).
        rescale: ``l1`` keeps each tensor's sum of magnitudes, ``inverse`` divides by the density (the paper),
            ``none``.
    Presets:
        paper: drops 90 % of the entries and divides the others by the density; the paper goes up to 99 % for
            large models.
    Shapes: one task-vector entry per model in, one number out; any number of models besides the base.
    Measures: with ``l1`` two sums, one pass; then one to mix. Memory: blocks. Grain: element. Noise: yes, by
        (seed, tensor, model, element).
    Edge cases: a task vector of zeros stays zero; if no entry of a tensor is kept, nothing is added.
    Errors: MethodError if a density is outside (0, 1], or ``divide`` is ``weight`` and the weights sum to 0.
    Differs from the source: rescales by L1 norms, as mergekit does; the paper divides by the density
        (``inverse``). The mask depends only on the seed and the element's place, never on order, threads or
        device.
    Source: Yu et al. 2024, https://arxiv.org/abs/2311.03099, section 3.1.

    >>> dare_linear.bind({"density": 0.5, "rescale": "inverse"}, 2).levels()
    []
    """
    return sum_all(keep_random(density, rescale), weight, scale, divide)
