"""EMR's unified task vector: elects a sign and takes the largest entry that agrees."""

from alnico.methods.base import Merge, PerModel, each, method


@method(space="delta", source="Huang et al. 2024, EMR-Merging, https://arxiv.org/abs/2405.17461, section 3.2")
def emr(*, weight: PerModel[float] = each(1.0), scale: float = 1.0) -> Merge:
    """Elect a sign for each parameter, and take the largest entry that agrees with it.

    ``out = base + scale * sign * max_A |v_i|`` with ``v_i = weight_i * (model_i - base)``, ``sign =
    sign(sum_i v_i)``, over the models A whose ``v_i`` has that sign.

    Use when: each model's strongest changes should keep their full size where the models agree, instead of
        being averaged; or you need the common part of models that masks separate later.

    Options:
        weight: a model's coefficient, any number; it counts in the vote and in the comparison.
        scale: the factor on the merged task vector (``lambda`` in YAML), any number.
    Shapes: one task-vector entry per model in, one number out; any number of models besides the base.
    Measures: one pass. Memory: blocks. Grain: element.
    Edge cases: where the entries sum to exactly 0 no sign is elected and the base's bits are written; one
        model at weight 1 and scale 1 is copied; all weights 0, or scale 0, copies the base.
    Differs from the source: this is only the unified task vector; the paper adds a mask and a factor per
        task, applied when a task is served, which do not give a single model. The paper has no weights (all
        are 1).
    Source: Huang et al. 2024, https://arxiv.org/abs/2405.17461, section 3.2.

    >>> emr.bind({"weight": 0.0}, 2).copies
    'base'
    """

    def mix(delta, weight, scale):
        balance = 0.0
        for i in range(len(delta)):
            balance += weight[i] * delta[i]
        sign = 1.0 if balance > 0 else (-1.0 if balance < 0 else 0.0)
        largest = 0.0
        for i in range(len(delta)):
            largest = max(largest, sign * (weight[i] * delta[i]))
        return scale * (sign * largest)

    nothing = scale == 0 or not any(weight)
    alone = len(weight) == 1 and weight[0] * scale == 1
    return Merge(mix, (weight, scale), copies="base" if nothing else 0 if alone else None)
