"""Multi-SLERP: the mean direction of any number of models."""

from functools import partial

import numpy as np

from alnico.kernels.facts import Derived, Gram
from alnico.methods.base import Merge, PerModel, combine, each, method, total_weight
from alnico.numerics.sphere import direction_coefficients


@method(
    space="delta", base="optional", source="mergekit 0.1.5, https://github.com/arcee-ai/mergekit (multislerp)"
)
def multislerp(*, weight: PerModel[float] = each(1.0), normalize_weights: bool = True) -> Merge:
    """Take the weighted mean direction of the models, at their weighted mean length.

    ``out = (sum_i w_i |x_i|) * m / |m|`` with ``m = sum_i w_i x_i / |x_i|``; ``x`` are the tensors as flat
    vectors, or with a ``base_model`` the task vectors, and the result is added to the base.

    Use when: you blend more than two models as ``slerp`` blends two. With a ``base_model`` it blends task
        vectors. Without one, models tuned from one base are nearly parallel, and the result is nearly
        ``linear``. We know of no paper that compares it.

    Options:
        weight: a model's coefficient, any number.
        normalize_weights: divide the weights by their sum.
    Shapes: one value per model in, one number out; any number of models.
    Measures: the Gram matrix, one pass; then one to mix. Memory: blocks. Grain: element.
    Edge cases: a tensor of zeros has no direction and counts only in the length; where the directions cancel,
        the weighted sum is used; one model is copied.
    Errors: MethodError if ``normalize_weights`` and the weights sum to 0.
    Differs from the source: mergekit walks from m along the tangent mean, which is 0 at m by construction, so
        the result is the same; opposite directions are an error there from three models on, and its absolute
        ``eps`` is not needed here.
    Source: mergekit 0.1.5, https://github.com/arcee-ai/mergekit (multislerp).

    >>> multislerp.bind({"weight": (3.0,)}, 1).copies
    0
    """
    total = total_weight(weight, instead=", or set normalize_weights: false") if normalize_weights else 1.0
    parts = tuple(w / total for w in weight)
    return combine(Derived(partial(_coefficients, parts), (Gram(),)), copies=0 if parts == (1.0,) else None)


def _coefficients(weight: tuple[float, ...], gram: tuple[tuple[float, ...], ...]) -> np.ndarray:
    return direction_coefficients(gram, weight)
