"""TIES: trims, elects a sign, merges the entries that agree."""

from alnico.methods.base import KeptShare, Merge, PerModel, each, method
from alnico.methods.shared.elect import Divide, Elect, Tie, sum_elected
from alnico.methods.shared.sparsify import Rescale, Scope, keep_largest


@method(
    space="delta",
    source="Yadav et al. 2023, TIES-Merging, https://arxiv.org/abs/2306.01708, algorithm 1",
    presets={
        "paper": {
            "density": 0.2,
            "elect": "mass",
            "tie": "none",
            "divide": "count",
            "scope": "model",
            "scale": 1.0,
        }
    },
)
def ties(
    *,
    density: PerModel[KeptShare] = each(1.0),
    weight: PerModel[float] = each(1.0),
    scale: float = 1.0,
    elect: Elect = "weighted",
    tie: Tie = "auto",
    divide: Divide = "weight",
    rescale: Rescale = "none",
    scope: Scope = "tensor",
) -> Merge:
    """Trim each task vector, elect a sign for each parameter, average the entries that agree with it.

    ``kept_i`` is the share ``density_i`` of largest magnitude of ``model_i - base``; ``sign = sign(sum_i
    weight_i * kept_i)``; ``out = base + scale * sum_A weight_i * kept_i / sum_A weight_i`` over the models A
    with ``sign(weight_i * kept_i) = sign``.

    Use when: models of different tasks disagree in sign and interfere with one another. The paper finds gains
        over ``task_arithmetic`` with ``scale`` tuned on held-out data; on language models found in the wild
        its defaults often gain nothing. Set ``density``: 1 trims nothing.
    Start with: {density: 0.2}

    Options:
        density: the share of each tensor's entries that is kept, in (0, 1]; 1 keeps all (the paper uses 0.2).
        weight: a model's coefficient, any number.
        scale: the factor on the merged task vector (``lambda`` in YAML), any number; the paper searches 0.8
            to 2.5.
        elect: what the vote on the sign sums: the ``weighted`` entries, the entries as they are (``mass``,
            the paper), or their signs (``count``).
        tie: what a vote of exactly 0 elects: ``plus``, or ``none``, which keeps the base; ``auto`` (as in
            mergekit) is ``none`` with ``elect: count`` and ``plus`` otherwise.
        divide: what the sum is divided by: the ``weight`` or the ``count`` (the paper) of the models that
            agree, or ``none``; mergekit's ``normalize: true`` and ``false`` are ``weight`` and ``none``.
        rescale: ``l1`` scales the kept entries of a tensor to its L1 norm, ``inverse`` by
            1/density, ``none``.
        scope: ``tensor`` keeps the density in each tensor; ``model`` (the paper) keeps it in a model's whole
            task vector, with one threshold for all tensors that are merged with the same densities of the
            same models.
    Presets:
        paper: keeps 20 % of each whole task vector, votes by mass, elects no sign on a tie, divides by count,
            scale 1.
    Shapes: one task-vector entry per model in, one number out; any number of models besides the base.
    Measures: the kth largest magnitude, one to three passes, or, with ``scope: model``, two over all tensors
        before the first is merged (four in float64); with ``rescale: l1`` two sums, one more pass; then one
        to mix. Memory: blocks, a few MiB of counters, and at most 32 MiB of candidates while a large tensor
        is searched. Grain: element.
    Edge cases: a task vector of zeros stays zero; entries equal to the threshold are all kept; where the
        weights of the agreeing models sum to 0 the sum is not divided.
    Errors: MethodError if a density is outside (0, 1].
    Differs from the source: by default trims each tensor on its own, weights the vote and divides by weights,
        as mergekit does and recipes in circulation expect; the paper trims the whole model, votes by mass and
        divides by count. On a tie the paper's ``sgn(0)`` elects no sign (``tie: none``); its authors' code
        takes the sign that most parameters of the model have.
    Source: Yadav et al. 2023, https://arxiv.org/abs/2306.01708, algorithm 1.

    >>> len(ties.bind({"density": 0.2}, 3).levels())
    1
    """
    sparse = keep_largest(density, rescale, scope)
    return sum_elected(sparse, weight, scale, elect, tie, divide)
