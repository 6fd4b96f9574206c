"""Weighted averages of models."""

from alnico.errors import MethodError
from alnico.methods.base import Merge, PerModel, combine, each, method


@method(space="weight", source="Wortsman et al. 2022, Model soups, https://arxiv.org/abs/2203.05482, section 2")
def linear(*, weight: PerModel[float] = each(1.0), normalize: bool = True) -> Merge:
    """Average the models, each with its weight.

    ``out = sum_i weight_i * model_i / sum_i weight_i``; without ``normalize`` the sum is not divided.
    Equal weights make the uniform soup.

    Options:
        weight: a model's coefficient, any number; 1 for all makes the plain mean.
        normalize: divide the weights by their sum.
    Shapes: one value a model in, one number out; any number of models.
    Measures: nothing; one pass. Grain: element.
    Edge cases: an element on which all models agree keeps its bits when the weights sum to 1; when one model has all the
        weight, its bytes are copied; an integer tensor is copied if all models agree.
    Errors: MethodError if ``normalize`` and the weights sum to 0.
    Differs from the source: nothing. mergekit also averages a ``base_model`` that is not among the models; here it only
        gives config, tokenizer and side files.
    Source: Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, section 2.

    >>> linear.bind({"weight": (1.0, 3.0)}, 2).arguments
    ((0.25, 0.75),)
    """
    total = sum(weight) if normalize else 1.0
    if normalize and abs(total) <= 1e-12 * sum(map(abs, weight)):
        raise MethodError(
            f"the weights of linear sum to 0 ({', '.join(f'{w:g}' for w in weight)}), so they cannot be normalised; "
            "expected a sum other than 0. Change a weight, or set normalize: false."
        )
    coefficients = tuple(w / total for w in weight)
    carried = [i for i, c in enumerate(coefficients) if c != 0]
    alone = carried[0] if len(carried) == 1 and coefficients[carried[0]] == 1 else None
    return combine(coefficients, copies=alone, fixes_equal_inputs=normalize)
