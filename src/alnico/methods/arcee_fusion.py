"""Arcee Fusion: takes large changes in rows whose distribution changed much."""

import numpy as np

from alnico.kernels.facts import Derived, KthLargest, Largest, Sum
from alnico.methods.base import Merge, method
from alnico.methods.shared.exponential import exponential, logarithm


@method(
    space="weight",
    base="first",
    models=(2, 2),
    source="Arcee 2024, as in mergekit 0.1.5 (arcee_fusion), https://arcee.ai",
)
def arcee_fusion() -> Merge:
    """Take the model's parameter where its change is important, and the base's elsewhere.

    ``importance = |model - base| * KL(p || q)`` with ``p`` and ``q`` the softmax of the parameter's row of
    the model and of the base; ``out = model`` where ``importance >= median + 1.5 * (upper quartile - lower
    quartile)`` of the tensor's importances, else ``base``.

    Use when: you merge one model into another and want only its most important changes: about an eighth of
        the entries of a usual fine-tune. No paper describes or compares it.

    Shapes: two values in, one number out; a row is along the last dimension.
    Measures: the largest value of each row, then two sums; three quartiles of the tensor, up to four passes;
        then one to mix. All in float64. Memory: a few numbers per row, and a few MiB of counters. Grain:
        element.
    Edge cases: rows whose two distributions are equal in float64 have importance 0; if that holds for more
        than three quarters of a tensor, the limit is 0 and the whole model is taken; a tensor of one
        dimension is one row; importances beyond float64 (from values above 1e150) are an error.
    Differs from the source: quartiles of all elements; mergekit samples a million elements of larger tensors,
        without a seed. float64, where mergekit computes in the inputs' dtype, in which the divergence of
        fine-tunes is mostly rounding. mergekit adds 1e-8 to the probabilities, and writes float32 for inputs
        of any dtype.
    Source: mergekit 0.1.5; the limit is Tukey's outlier fence, measured from the median.

    >>> len(arcee_fusion.bind({}, 2).levels())
    3
    """
    shift = Derived(_shift, (Largest(itself), Largest(larger, across=True)), over="row")
    moved = Sum(weighted_change, (shift,), across=True, over="row")
    divergence = Derived(
        _divergence, (Sum(shifted_exponential, (shift,), over="row"), moved, shift), over="row"
    )
    quartiles = tuple(
        KthLargest((s,), importance, (divergence,), across=True, is_quantile=True) for s in (0.25, 0.5, 0.75)
    )

    def mix(value, divergence, limit):
        own = importance(value[0], value, divergence[0])
        # own - own is 0, or NaN where the product overflows: then it is unknown which is larger.
        return own - own if own - own != 0.0 else value[1] if own >= limit else value[0]

    limit = Derived(_limit, quartiles, per_model=False)
    return Merge(mix, (divergence, limit), fixes_equal_inputs=True, is_wide=True)


def itself(own):
    return own


def larger(own, value):
    return max(value[0], value[1])


def shifted_exponential(own, shift):
    return exponential(own - shift)


def weighted_change(own, value, shift):
    return exponential(own - shift) * (value[1] - value[0])


def importance(own, value, divergence):
    return abs(value[1] - value[0]) * divergence


FARTHEST = 660.0
"""The largest distance between the largest values of a row at which one shift serves both: the exponential of
-708 is 0."""


def _shift(own: np.ndarray, both: np.ndarray) -> np.ndarray:
    """The number subtracted from each row before the exponential: the larger of both maxima, or its own if
    they are far apart."""
    shift: np.ndarray = np.where(both - own > FARTHEST, own, both)
    return shift


def _divergence(total: np.ndarray, moved: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """KL(p || q) of each row: the mean change under p, minus the logarithm of the ratio of the sums of
    exponentials."""
    with np.errstate(invalid="ignore", divide="ignore"):
        divergence = moved[1] / total[1] - logarithm(total[1] / total[0]) - (shift[1] - shift[0])
        return np.broadcast_to(np.where(divergence > 1e-15, divergence, 0.0), total.shape)


def _limit(upper: tuple[float, ...], middle: tuple[float, ...], lower: tuple[float, ...]) -> float:
    return middle[0] + 1.5 * (upper[0] - lower[0])
