"""Fisher merging: averages weighted by how much each parameter matters to its model."""

from typing import Annotated

from alnico.methods.base import (
    Between,
    Merge,
    PerModel,
    Recorded,
    Side,
    Statistics,
    combine,
    each,
    method,
    total_weight,
)  # fmt: skip


@method(
    space="weight",
    source="Matena and Raffel 2022, Merging models with Fisher-weighted averaging, https://arxiv.org/abs/2111.09832",
)
def fisher(
    *,
    fisher: PerModel[Statistics],
    weight: PerModel[Annotated[float, Between(0)]] = each(1.0),
    normalize: bool = True,
    floor: Annotated[float, Between(0)] = 0.0,
) -> Merge:
    """Average the models, each parameter weighted by its Fisher information in each model.

    ``out = sum_i weight_i * F_i * model_i / sum_i weight_i * F_i``, where ``F_i`` is the diagonal of model
    i's Fisher information, measured on its data by ``alnico statistics fisher``: a parameter is taken from
    the models whose predictions depend on it.

    Use when: models of different tasks were tuned from one base, and you have some data of each, without
        labels. The paper finds it better than plain averages; in later papers, RegMean and task arithmetic
        with a tuned scale are mostly better.

    Options:
        fisher: the directory that ``alnico statistics fisher`` wrote for the model.
        weight: a model's coefficient, at least 0.
        normalize: divide each model's Fisher information by its L2 norm over the whole model; the scales of
            different tasks differ by orders of magnitude.
        floor: the smallest value that a Fisher number counts as, as a share of the mean of its tensor, at
            least 0. Without it, noise chooses the model where all numbers are near 0.
    Shapes: one value and one Fisher number per model in, one number out; any number of models.
    Measures: one pass over the models and their statistics. Memory: blocks. Grain: element.
    Edge cases: the weighted mean is used where all Fisher numbers are 0, and for tensors that the statistics
        of a model lack (heads, buffers, parameters that its task does not use); an element on which all
        models agree keeps its bits.
    Errors: MethodError if all weights are 0. MismatchError for statistics of another model.
    Differs from the source: the authors' code has an absolute floor, 1e-6, for one of the models; here it is
        relative, and 0 by default. Their Fisher numbers use per-example gradients, as here; some later code
        squares batch gradients.
    Source: Matena and Raffel 2022, https://arxiv.org/abs/2111.09832, equation 2.

    >>> fisher.bind({"fisher": ("one", "other"), "weight": (1.0, 3.0)}, 2).otherwise.arguments
    ((0.25, 0.75),)
    """
    total = total_weight(weight, " of fisher")
    mean = combine(tuple(w / total for w in weight), fixes_equal_inputs=True)
    norm = Recorded("fisher", "l2_norm") if normalize else (1.0,) * len(weight)

    def mix(value, information, weight, norm, floor, mean, share):
        weighted_sum = 0.0
        total = 0.0
        plain = 0.0
        for i in range(len(value)):
            part = weight[i] * max(information[i], floor * mean[i]) / norm[i]
            weighted_sum += part * value[i]
            total += part
            plain += share[i] * value[i]
        return weighted_sum / total if total > 0 else plain

    # float64: Fisher numbers go down to 1e-40, where float32 has few digits, and their products with values
    # have none.
    return Merge(
        mix,
        (
            Side("fisher"),
            tuple(weight),
            norm,
            floor,
            Recorded("fisher", "mean"),
            tuple(w / total for w in weight),
        ),
        fixes_equal_inputs=True,
        is_wide=True,
        otherwise=mean,
    )
