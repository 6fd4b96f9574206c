"""Averages models with weights."""

from alnico.methods.base import Merge, PerModel, combine, each, method, total_weight


@method(
    space="weight",
    source="Wortsman et al. 2022, Model soups, https://arxiv.org/abs/2203.05482, section 2",
    presets={
        "uniform_soup": {"weight": 1.0, "normalize": True},
        "wise_ft": {"weight": 0.5, "normalize": True},
    },
)
def linear(*, weight: PerModel[float] = each(1.0), normalize: bool = True) -> Merge:
    """Average the models, each with its weight.

    ``out = sum_i weight_i * model_i / sum_i weight_i``; without ``normalize`` the sum is not divided.
    Equal weights make the uniform soup.

    Use when: the models are runs of one task from one start (a soup), or a base and its fine-tune (WiSE-FT,
        for distribution shift). Averaging models of different tasks shrinks what each has learned; if you
        know their base, use ``task_arithmetic``.

    Options:
        weight: a model's coefficient, any number; 1 for all gives the plain mean.
        normalize: divide the weights by their sum.
    Presets:
        uniform_soup: the plain mean of all models.
        wise_ft: half way between a base, listed first, and its fine-tune, listed second: the paper's alpha
            without validation. For another alpha set the weights 1 - alpha and alpha.
    Shapes: one value per model in, one number out; any number of models.
    Measures: one pass over the models. Memory: blocks. Grain: element.
    Edge cases: an element on which all models agree keeps its bits when the weights sum to 1; when one model
        has all the weight, its bytes are copied; an integer tensor is copied if all models agree.
    Errors: MethodError if ``normalize`` and the weights sum to 0.
    Differs from the source: nothing. mergekit also averages a ``base_model`` that is not among the models;
        here it only gives config, tokenizer and side files.
    Source: Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, section 2.

    >>> linear.bind({"weight": (1.0, 3.0)}, 2).arguments
    ((0.25, 0.75),)
    """
    total = total_weight(weight, " of linear", ", or set normalize: false") if normalize else 1.0
    coefficients = tuple(w / total for w in weight)
    carried = [i for i, c in enumerate(coefficients) if c != 0]
    alone = carried[0] if len(carried) == 1 and coefficients[carried[0]] == 1 else None
    return combine(coefficients, copies=alone, fixes_equal_inputs=normalize)
