"""SLERP: goes along the arc between two models."""

from functools import partial
from typing import Literal

import numpy as np

from alnico.kernels.facts import Derived, Gram
from alnico.methods.base import Merge, combine, method, place_on_arc
from alnico.numerics.sphere import arc_coefficients


@method(
    space="weight",
    base="first",
    models=(2, 2),
    source="Shoemake 1985, Animating rotation with quaternion curves, https://doi.org/10.1145/325165.325242",
)
def slerp(*, t: float, over: Literal["tensor", "row"] = "tensor") -> Merge:
    """Go from the base to the other model along the arc between them.

    ``out = sin((1-t) theta)/sin(theta) * base + sin(t theta)/sin(theta) * model``, theta the angle between
    the two tensors as flat vectors, or between their rows. Where |cos theta| > 0.9995 it takes the straight
    line ``(1-t) * base + t * model``; tensors of fine-tunes of one base are nearly always that close.

    Use when: you want a model between two others. For two fine-tunes of one base it is nearly always
        ``linear`` with weights 1 - t and t, because their tensors are nearly parallel. ``nuslerp`` with a
        base takes the arc between task vectors, which are not parallel.
    Start with: {t: 0.5}

    Options:
        t: the place on the arc, any number; 0 is the base, 1 the other model, outside [0, 1] extrapolates.
        over: ``tensor`` takes a tensor as one vector, ``row`` each of its rows (along the last dimension) on
            its own.
    Shapes: two values in, one number out.
    Measures: the Gram matrix of the tensor or of its rows, one pass; then one to mix. Memory: blocks. Grain:
        element.
    Edge cases: t = 0 and t = 1 copy bytes; the straight line is used for a tensor of zeros and for opposite
        tensors.
    Errors: MethodError if t is beyond 1e6 in size, where the arc cannot be computed.
    Differs from the source: angle from the normalised tensors, applied to the tensors as they are (as in
        mergekit), so the length is not exactly interpolated; the angle is measured in float64 (mergekit:
        float32).
    Source: Shoemake 1985, https://doi.org/10.1145/325165.325242.

    >>> slerp.bind({"t": 0}, 2).copies
    0
    """
    place_on_arc(t)
    return combine(
        Derived(partial(_coefficients, t), (Gram(over),), over=over), copies={0.0: 0, 1.0: 1}.get(t)
    )


def _coefficients(t: float, gram: np.ndarray) -> np.ndarray:
    return arc_coefficients(gram, t)
