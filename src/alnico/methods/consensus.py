"""Consensus merging: keeps the entries that several tasks need."""

from typing import Annotated

from alnico.errors import MethodError
from alnico.methods.base import Between, Merge, PerModel, each, method


@method(
    space="delta",
    models=(2, None),
    source="Wang et al. 2024, Localizing Task Information (TALL-masks), https://arxiv.org/abs/2405.07813, section 4",
)
def consensus(
    *,
    threshold: PerModel[Annotated[float, Between(0)]] = each(0.4),
    at_least: Annotated[int, Between(1)] = 2,
    weight: PerModel[float] = each(1.0),
    scale: float = 1.0,
) -> Merge:
    """Keep the summed task vector where enough models need it, and the base elsewhere.

    With ``v_i = weight_i * (model_i - base)`` and ``total = sum_i v_i``, model i needs an entry where ``|v_i|
    >= threshold_i * |total - v_i|``; ``out = base + scale * total`` where at least ``at_least`` models need
    it.

    Use when: a plain sum of many task vectors suffers from entries that serve only one task, or none: these
        are left out.

    Options:
        threshold: how large an entry must be, relative to the sum of the others, for the model to need it, at
            least 0 (the paper's mask lambda); larger makes sparser masks. The paper chooses 0.2 to 0.6 by
            validation.
        at_least: the number of models that must need an entry; 1 leaves out entries that no model needs, 2
            (the paper) also those that only one needs.
        weight: a model's coefficient, any number.
        scale: the factor on the sum (``lambda`` in YAML), any number; the paper tunes it as in task
            arithmetic.
    Shapes: one task-vector entry per model in, one number out; at least two models besides the base.
    Measures: one pass. Memory: blocks. Grain: element.
    Edge cases: where the sum is exactly 0 the base's bits are written; all weights 0, or scale 0, copies the
        base.
    Errors: MethodError if ``at_least`` is more than the number of models.
    Differs from the source: one default threshold for all models, since nothing is validated here; the paper
        has no weights (all are 1). The masks are used in the merge and not saved.
    Source: Wang et al. 2024, https://arxiv.org/abs/2405.07813, section 4.

    >>> consensus.bind({"scale": 0}, 2).copies
    'base'
    """
    if at_least > len(weight):
        raise MethodError(
            f"at_least is {at_least:g} with {len(weight)} models besides the base; expected at most that number. "
            "Choose a smaller at_least."
        )

    def mix(delta, threshold, at_least, weight, scale):
        total = 0.0
        for i in range(len(delta)):
            total += weight[i] * delta[i]
        needed = 0.0
        for i in range(len(delta)):
            own = weight[i] * delta[i]
            if abs(own) >= threshold[i] * abs(total - own):
                needed += 1.0
        # total - total is 0, or NaN where the sum overflows: then it is unknown which entries are needed.
        return scale * total if needed >= at_least else total - total

    nothing = scale == 0 or not any(weight)
    return Merge(mix, (threshold, float(at_least), weight, scale), copies="base" if nothing else None)
