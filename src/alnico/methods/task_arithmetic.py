"""Task arithmetic: adds weighted task vectors to the base."""

from typing import Literal

from alnico.methods.base import Merge, PerModel, each, method
from alnico.methods.shared.elect import sum_all
from alnico.methods.shared.sparsify import keep_all


@method(
    space="delta",
    source="Ilharco et al. 2023, Editing models with task arithmetic, https://arxiv.org/abs/2212.04089",
)
def task_arithmetic(
    *, weight: PerModel[float] = each(1.0), scale: float = 1.0, divide: Literal["weight", "none"] = "none"
) -> Merge:
    """Add weighted task vectors to the base; a negative weight subtracts one.

    ``out = base + scale * sum_i weight_i * (model_i - base)``.

    Use when: you combine several fine-tunes of one base, especially when you know little about them. On
        language models found in the wild it was, with a tuned ``scale``, the only method that reliably
        improved on the base (arXiv 2511.21437). Search ``scale`` on held-out data, from 1/k to 1/sqrt(k) for
        k models.
    Start with: {scale: 0.4}

    Options:
        weight: a model's coefficient, any number; negative to forget what it learned.
        scale: the factor on the whole sum (``lambda`` in YAML), any number; the papers' values are 0.2 to 0.4
            for 8 tasks.
        divide: ``weight`` divides the sum by the sum of the weights (mergekit: ``normalize: true``).
    Shapes: one task-vector entry per model in, one number out; any number of models besides the base.
    Measures: one pass over the models and the base. Memory: blocks. Grain: element.
    Edge cases: where the sum is exactly 0 the base's bits are written; one model at weight 1 is copied; all
        weights 0, or scale 0, copies the base.
    Errors: MethodError if ``divide`` is ``weight`` and the weights sum to 0.
    Differs from the source: nothing.
    Source: Ilharco et al. 2023, https://arxiv.org/abs/2212.04089, section 2.

    >>> task_arithmetic.bind({"weight": 0.0}, 2).copies
    'base'
    """
    return sum_all(keep_all(len(weight)), weight, scale, divide)
