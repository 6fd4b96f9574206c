"""NuSLERP: the arc between two models or task vectors, whole, by rows or by columns."""

import math
from functools import partial

import numpy as np

from alnico.kernels.facts import Derived, Extent, Gram
from alnico.methods.base import Merge, PerModel, combine, each, method, place_on_arc, total_weight
from alnico.numerics.sphere import arc_coefficients

COLINEAR = (1.0 - 1e-16) ** 0.5
"""|cosine| above which the straight line is taken: sin^2 <= 1e-16, as in mergekit."""


@method(
    space="delta",
    base="optional",
    models=(2, 2),
    source="Shoemake 1985, Animating rotation with quaternion curves, https://doi.org/10.1145/325165.325242",
)
def nuslerp(*, weight: PerModel[float] = each(1.0), flatten: bool = True, row_wise: bool = False) -> Merge:
    """Go from one model to another along the arc between them, to the share of the second one's weight.

    ``out = sin((1-t) theta)/sin(theta) * x_0 + sin(t theta)/sin(theta) * x_1`` with ``t = w_1 / (w_0 +
    w_1)``, theta the angle between the vectors. With a ``base_model``, x are task vectors, and the result is
    added to the base.

    Use when: you blend two fine-tunes of one base along an arc. With a ``base_model``, the angle is between
        their task vectors. Without one it is ``slerp`` with weights, which for fine-tunes is nearly always
        ``linear``.

    Options:
        weight: a model's coefficient, any number; only their ratio counts.
        flatten: true takes a tensor as one vector (``nuslerp_flatten`` in mergekit).
        row_wise: with ``flatten: false``, which vectors have their own angle: those along the last dimension
            (false: the rows of a matrix) or those along the first (true: its columns); the name is mergekit's
            (``nuslerp_row_wise``).
    Shapes: two values in, one number out.
    Measures: the Gram matrix of the tensor, its rows or its columns, one pass; then one to mix. Memory:
        blocks; by rows or columns, four numbers and their coefficients for each. Grain: element.
    Edge cases: the straight line is used for parallel and opposite vectors, and where a vector is 0; weights
        that sum to 0 give t = 1/2.
    Errors: MethodError if the weights add up to more than float64 holds, or t is beyond 1e6 in size.
    Differs from the source: angle from the normalised vectors, applied to the vectors as they are, as in
        slerp; unlike slerp, it takes the arc for every angle that float64 resolves. mergekit takes a right
        angle where a vector is 0.
    Source: Shoemake 1985, https://doi.org/10.1145/325165.325242; as a merge: mergekit 0.1.5.

    >>> [len(nuslerp.bind({"flatten": f}, 2).levels()) for f in (True, False)]
    [1, 1]
    """
    total = weight[0] + weight[1]
    if not math.isfinite(total):
        total_weight(weight)  # which refuses them
    t = place_on_arc(0.5 if abs(total) < 1e-6 else weight[1] / total)
    over: Extent = "tensor" if flatten else "column" if row_wise else "row"
    return combine(
        Derived(partial(_coefficients, t), (Gram(over),), over=over), copies={0.0: 0, 1.0: 1}.get(t)
    )


def _coefficients(t: float, gram: np.ndarray) -> np.ndarray:
    return arc_coefficients(gram, t, COLINEAR)
