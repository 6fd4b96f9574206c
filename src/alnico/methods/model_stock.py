"""Model Stock: a point between base and mean, chosen by the angles between task vectors."""

import numpy as np

from alnico.kernels.facts import Derived, Extent, Gram
from alnico.methods.base import Merge, combine, method


@method(
    space="delta", models=(2, None), source="Jang et al. 2024, Model Stock, https://arxiv.org/abs/2403.19522"
)
def model_stock(*, filter_wise: bool = False) -> Merge:
    """Go from the base towards the mean of the models, further the more their task vectors agree.

    ``out = base + t * mean_i(model_i - base)``, ``t = k c / (1 + (k - 1) c)``, c the mean cosine between the
    task vectors of all pairs of the k models, tensor by tensor.

    Use when: you have two or more fine-tunes of one task from one base, with different seeds or data orders.
        There is nothing to tune. Task vectors of different tasks are nearly orthogonal, and the result then
        stays near the base. Some texts call another merge Model Stock: the mean direction of the task vectors
        at their mean norm. That is ``multislerp`` with a ``base_model``.

    Options:
        filter_wise: true takes the angles row by row (the last dimension is a row).
    Shapes: one task-vector entry per model in, one number out; at least two models besides the base.
    Measures: the Gram matrix of the tensor or of its rows, one pass; then one to mix. Memory: blocks; by
        rows, k x k products per row. Grain: element.
    Edge cases: a task vector of zeros is at a right angle to all; t is not cut to [0, 1]: a mean cosine below
        0 leads away from the models; where ``1 + (k - 1) c`` is 0 the base is written.
    Differs from the source: for more than two models the paper has no formula for c; this is mergekit's
        (FusionBench averages angles). mergekit bounds the product of two lengths at 1e-6, which takes small
        tensors for orthogonal.
    Source: Jang et al. 2024, https://arxiv.org/abs/2403.19522, section 4.

    >>> len(model_stock.bind({}, 2).levels())
    1
    """
    over: Extent = "row" if filter_wise else "tensor"
    return combine(Derived(_coefficients, (Gram(over),), over=over))


def _coefficients(gram: np.ndarray) -> np.ndarray:
    products = np.asarray(gram, np.float64)
    k = products.shape[-1]
    lengths = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    area = lengths[..., :, None] * lengths[..., None, :]
    cosines = np.clip(np.divide(products, area, out=np.zeros(products.shape), where=area != 0), -1.0, 1.0)
    first, second = np.triu_indices(k, 1)
    mean = cosines[..., first, second].mean(axis=-1)
    bottom = 1.0 + (k - 1) * mean
    vanishes = np.abs(bottom) < 1e-6
    t = np.where(vanishes, 0.0, k * mean / np.where(vanishes, 1.0, bottom))
    return np.broadcast_to(t / k, (k, *t.shape)).copy()
