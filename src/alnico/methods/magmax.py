"""MagMax: takes the largest change of each parameter."""

from alnico.methods.base import Merge, PerModel, each, method


@method(
    space="delta",
    source="Marczak et al. 2024, MagMax, https://arxiv.org/abs/2407.06322, section 3",
    presets={"paper": {"scale": 0.5}},
)
def magmax(*, weight: PerModel[float] = each(1.0), scale: float = 1.0) -> Merge:
    """Take, for each parameter, the task-vector entry of largest magnitude.

    ``out = base + scale * v_j`` with ``v_i = weight_i * (model_i - base)`` and j the model of largest
    ``|v_j|``.

    Use when: the models were tuned one after another, each from the last one (continual learning), or a mean
        of many task vectors dilutes what each has learned.

    Options:
        weight: a model's coefficient, any number; it also counts in the comparison.
        scale: the factor on the merged task vector (``lambda`` in YAML), any number; the authors use 0.5.
    Presets:
        paper: scale 0.5.
    Shapes: one task-vector entry per model in, one number out; any number of models besides the base.
    Measures: one pass. Memory: blocks. Grain: element.
    Edge cases: of equal magnitudes the first model's is taken; one model at weight 1 and scale 1 is copied;
        all weights 0, or scale 0, copies the base.
    Differs from the source: nothing; the paper has no weights (all are 1).
    Source: Marczak et al. 2024, https://arxiv.org/abs/2407.06322, section 3.

    >>> magmax.bind({}, 1).copies, magmax.bind({"scale": 0}, 2).copies
    (0, 'base')
    """

    def mix(delta, weight, scale):
        chosen = 0.0
        for i in range(len(delta)):
            weighted = weight[i] * delta[i]
            if abs(weighted) > abs(chosen):
                chosen = weighted
        return scale * chosen

    nothing = scale == 0 or not any(weight)
    alone = len(weight) == 1 and weight[0] * scale == 1
    return Merge(mix, (weight, scale), copies="base" if nothing else 0 if alone else None)
