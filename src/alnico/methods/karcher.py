"""Karcher mean: the Riemannian mean of any number of models on the sphere."""

from functools import partial
from typing import Annotated

import numpy as np

from alnico.kernels.facts import Derived, Gram
from alnico.methods.base import Between, Merge, PerModel, combine, each, method, total_weight
from alnico.numerics.sphere import karcher_coefficients


@method(
    space="weight", source="Karcher 1977, Riemannian center of mass, https://doi.org/10.1002/cpa.3160300502"
)
def karcher(
    *,
    weight: PerModel[float] = each(1.0),
    max_iter: Annotated[int, Between(0, 100_000)] = 10,
    tol: Annotated[float, Between(0, 1)] = 1e-5,
) -> Merge:
    """Take the Riemannian mean of the models' directions on the sphere, at their mean length.

    ``out = (sum_i w_i |x_i|) * m``, where m minimises ``sum_i w_i theta_i^2`` and ``theta_i`` is the angle
    between m and the tensor ``x_i`` as a flat vector. All steps are taken in the k coefficients, from the
    Gram matrix in float64.

    Use when: you average several models whose directions really differ, and none of them comes first.
        Fine-tunes of one base are nearly parallel, so the result is nearly ``linear``. Few papers compare it
        with other methods.

    Options:
        weight: a model's coefficient, any number; divided by their sum.
        max_iter: the most steps of the iteration, in [0, 100000]; 0 gives the mean direction.
        tol: the iteration ends when a step is smaller than this, in radians, in [0, 1].
    Shapes: one value per model in, one number out; any number of models.
    Measures: the Gram matrix, one pass; then one to mix. Memory: blocks. Grain: element.
    Edge cases: a tensor of zeros has no direction and counts only in the length; one model is copied; not
        unique where directions are opposite.
    Errors: MethodError if the weights sum to 0.
    Differs from the source: stops after ``max_iter`` steps, as mergekit does. mergekit has no weights, drops
        models whose length is below ``tol``, takes angles in the inputs' dtype, and averages a ``base_model``
        that is not listed.
    Source: Karcher 1977, https://doi.org/10.1002/cpa.3160300502; as a merge: mergekit 0.1.5.

    >>> karcher.bind({}, 1).copies
    0
    """
    total = total_weight(weight)
    parts = tuple(w / total for w in weight)
    derived = Derived(partial(_coefficients, parts, int(max_iter), tol), (Gram(),))
    return combine(derived, copies=0 if len(parts) == 1 else None)


def _coefficients(
    weight: tuple[float, ...], steps: int, tolerance: float, gram: tuple[tuple[float, ...], ...]
) -> np.ndarray:
    return karcher_coefficients(gram, weight, steps, tolerance)
