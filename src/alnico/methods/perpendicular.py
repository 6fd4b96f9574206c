"""Perpendicular: adds of each task vector only what is at a right angle to those before it."""

import math
from functools import partial

import numpy as np

from alnico.kernels.facts import Derived, Gram
from alnico.methods.base import Merge, PerModel, combine, each, method

NOTHING = 1e-13
"""What is left of a task vector is rounding up to this share of its square: the inner products are in float64."""


@method(
    space="delta",
    models=(2, None),
    source="sd-mecha 2024, add_perpendicular, https://github.com/ljleb/sd-mecha",
)
def perpendicular(*, weight: PerModel[float] = each(1.0)) -> Merge:
    """Keep the first task vector, and add of each further one what is at a right angle to those before it.

    For the task vectors ``d_i`` of one tensor as flat vectors: ``q_1 = d_1``, ``q_i = d_i - sum_(j<i) <d_i, q_j> / <q_j, q_j> * q_j``
    (Gram-Schmidt), and ``out = base + sum_i weight_i * q_i``. All is computed in the k coefficients, from the Gram matrix in float64.

    Use when: one fine-tune should stay as it is, and another adds what the first does not have: what both have learned is not
        counted twice. Task vectors of different tasks are nearly at right angles, and the result is then nearly ``task_arithmetic``.
        People who merge image models use it; we know of no paper that compares it.

    Options:
        weight: the factor of a model's part, any number; for two models, the second one's is what sd-mecha calls alpha.
    Shapes: one task-vector entry per model in, one number out; at least two models besides the base, in the order that counts.
    Measures: the Gram matrix, one pass; then one to mix. Memory: blocks. Grain: element.
    Edge cases: a task vector that lies in the span of those before it adds nothing: what is left of it counts as 0 up to 1e-13 of its
        square. Nothing is subtracted for a task vector of zeros. All weights 0 give the base.
    Differs from the source: sd-mecha takes two models; a third and further ones are made perpendicular to all before them. It divides
        in the dtype of the models.
    Source: sd-mecha, https://github.com/ljleb/sd-mecha (``add_perpendicular``); the form in coefficients is derived here.

    >>> coefficients((1.0, 2.0), ((1.0, 0.5), (0.5, 1.0))).tolist()
    [0.0, 2.0]
    """
    only_first = weight[0] == 1 and not any(weight[1:])
    copies = 0 if only_first else None if any(weight) else "base"
    return combine(Derived(partial(coefficients, tuple(weight)), (Gram(),)), copies=copies)


def coefficients(weight: tuple[float, ...], gram: tuple[tuple[float, ...], ...]) -> np.ndarray:
    """The coefficients of the task vectors. Exact sums, so that no processor gives other bits."""
    models = range(len(weight))
    rows = [[float(v) for v in row] for row in gram]
    parts: list[tuple[list[float], float]] = []
    """What is perpendicular of each model, in coefficients, and its square."""
    for i in models:
        left = [float(j == i) for j in models]
        for part, square in parts:
            if square:
                share = math.fsum(p * rows[j][i] for j, p in enumerate(part)) / square
                left = [a - share * p for a, p in zip(left, part, strict=True)]
        square = math.fsum(a * b * rows[j][m] for j, a in enumerate(left) for m, b in enumerate(left))
        is_rounding = not square > NOTHING * rows[i][i]
        parts.append(([0.0 for _ in models], 0.0) if is_rounding else (left, square))
    return np.array(
        [math.fsum(w * part[j] for w, (part, _) in zip(weight, parts, strict=True)) for j in models]
    )
