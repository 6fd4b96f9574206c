"""Writes recipes that people know by a name. They are ordinary recipes of ``linear`` and ``task_arithmetic``."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from alnico.checkpoint.file_arguments import model_path
from alnico.errors import RecipeError
from alnico.numerics.numbers import complement
from alnico.recipe.from_options import dtype_name, plain_number
from alnico.recipe.load import load_recipe
from alnico.recipe.schema import Recipe

IN_MEMORY = "alnico.merge_models merges models in memory."


def chat_vector(
    *,
    old_base: Any,
    tuned: Any,
    new_base: Any,
    scale: float = 1.0,
    keep: Sequence[str] = (),
    tokenizer: str | None = None,
    dtype: Any = None,
    unrelated: str = "error",
) -> Recipe:
    """Make the recipe that puts what tuning changed of an old base on a new base: a chat vector, or ParamDelta.

    ``out = new_base + scale * (tuned - old_base)``. The recipe is task arithmetic on the new base, with the weights ``scale``
    and ``-scale``: ``new + scale (tuned - new) - scale (old - new)`` is the same sum. Where tuning changed nothing, the bits
    of the new base are kept. Config and tokenizer are those of the new base, the chat template is that of the tuned model.

    Options:
        old_base: Base that the tuned model was tuned from.
        tuned: Model that was tuned from the old base, such as its chat model.
        new_base: Model to tune without training: the old base after more training, or its next version.
        scale: Factor on what tuning changed; 1 in the papers.
        keep: Tensors that stay those of the new base: part of a name, as embed_tokens; may be repeated.
        tokenizer: Vocabulary of the output: union, base (the new one), or a model; default: the new base's, if all are equal.
        dtype: Dtype of the output, such as bfloat16; default: the promotion of the models' dtypes.
        unrelated: What to do with bases that are too far apart to have one origin: error or allow.
    Errors: RecipeError, ModelError.
    Source: Huang et al. 2023, https://arxiv.org/abs/2310.04799; Cao et al. 2025, https://arxiv.org/abs/2504.21023.

    >>> print(chat_vector(old_base="old", tuned="chat", new_base="new").text.rstrip())
    # Chat vector (ParamDelta): out = new base + 1 * (tuned - old base).
    # Huang et al. 2023, https://arxiv.org/abs/2310.04799; Cao et al. 2025, https://arxiv.org/abs/2504.21023
    merge_method: task_arithmetic
    base_model: new
    models:
    - model: chat
      parameters:
        weight: 1.0
    - model: old
      parameters:
        weight: -1.0
    chat_template: auto
    """
    factor = _number(scale, "scale")
    return _recipe(
        [
            f"Chat vector (ParamDelta): out = new base + {factor:g} * (tuned - old base).",
            "Huang et al. 2023, https://arxiv.org/abs/2310.04799; Cao et al. 2025, https://arxiv.org/abs/2504.21023",
        ],
        {
            **_difference(
                _model(new_base, "new_base"),
                _model(tuned, "tuned"),
                _model(old_base, "old_base"),
                factor,
                keep,
            ),
            **({"tokenizer_source": tokenizer} if tokenizer is not None else {}),
            "chat_template": "auto",
        },
        dtype,
        unrelated,
    )


def add_difference(
    *,
    a: Any,
    b: Any,
    c: Any,
    multiplier: float = 1.0,
    keep: Sequence[str] = (),
    dtype: Any = None,
    unrelated: str = "error",
) -> Recipe:
    """Make the recipe that adds the difference of two models to a third: A + (B - C) * M.

    ``out = a + multiplier * (b - c)``. The recipe is task arithmetic on ``a``, with the weights ``multiplier`` for ``b`` and
    ``-multiplier`` for ``c``. Where ``b`` and ``c`` are equal, the bits of ``a`` are kept.

    Options:
        a: Model to add to; it gives config and tokenizer.
        b: Model that has what is added, such as an inpainting model.
        c: Model that b was made from, which is subtracted.
        multiplier: Factor on the difference.
        keep: Tensors that stay those of a: part of a name, as first_stage_model; may be repeated.
        dtype: Dtype of the output, such as float16; default: the promotion of the models' dtypes.
        unrelated: What to do with models that were not tuned from one base: error or allow.
    Errors: RecipeError, ModelError.

    >>> add_difference(a="mine", b="inpainting", c="base", multiplier=0.5).references
    ('inpainting', 'base', 'mine')
    """
    factor = _number(multiplier, "multiplier")
    return _recipe(
        [f"Add difference: out = A + {factor:g} * (B - C)."],
        _difference(_model(a, "a"), _model(b, "b"), _model(c, "c"), factor, keep),
        dtype,
        unrelated,
    )


def retain(
    *,
    pretrained: Any,
    finetuned: Any,
    alpha: float = 0.5,
    modules: Mapping[str, float] | None = None,
    dtype: Any = None,
) -> Recipe:
    """Make the recipe of a mean of the model before and after fine-tuning (RETAIN), by module if asked.

    ``out = (1 - alpha) * pretrained + alpha * finetuned``, with another alpha for the tensors of some modules, such as the
    vision encoder, the language model and the action expert of a robot policy. Config, tokenizer and side files are those
    of the fine-tune. With one alpha this is WiSE-FT.

    Options:
        pretrained: Model before fine-tuning.
        finetuned: Model after fine-tuning.
        alpha: Weight of the fine-tune, from 0 to 1.
        modules: Other weights by module: part of a name and the weight, as vision_tower=0.3; may be repeated. The first part
            that a name has counts.
        dtype: Dtype of the output, such as bfloat16; default: the promotion of the models' dtypes.
    Errors: RecipeError, ModelError.
    Source: Yadav et al. 2025, https://arxiv.org/abs/2512.08333; with one alpha Wortsman et al. 2022,
        https://arxiv.org/abs/2109.01903.

    >>> print(retain(pretrained="before", finetuned="after", alpha=0.5, modules={"vision": 0.3}).text.rstrip())
    # RETAIN: out = (1 - alpha) * before fine-tuning + alpha * after it, with alpha 0.5, vision 0.3.
    # Yadav et al. 2025, https://arxiv.org/abs/2512.08333
    merge_method: linear
    base_model: after
    models:
    - model: before
      parameters:
        weight:
        - filter: vision
          value: 0.7
        - 0.5
    - model: after
      parameters:
        weight:
        - filter: vision
          value: 0.3
        - 0.5
    """
    share = _share(alpha, "alpha")
    parts = {
        _filter(name, "modules"): _share(value, f"modules: {name}") for name, value in (modules or {}).items()
    }
    before, after = _model(pretrained, "pretrained"), _model(finetuned, "finetuned")

    def weights(of: Any) -> Any:
        cases = [{"filter": name, "value": of(value)} for name, value in parts.items()]
        return [*cases, of(share)] if cases else of(share)

    others = "".join(f", {name} {value:g}" for name, value in parts.items())
    return _recipe(
        [
            f"RETAIN: out = (1 - alpha) * before fine-tuning + alpha * after it, with alpha {share:g}{others}.",
            "Yadav et al. 2025, https://arxiv.org/abs/2512.08333",
        ],
        {
            "merge_method": "linear",
            "base_model": after,
            "models": [
                {"model": before, "parameters": {"weight": weights(complement)}},
                {"model": after, "parameters": {"weight": weights(float)}},
            ],
        },
        dtype,
        "error",
    )


def _difference(base: str, plus: str, minus: str, factor: float, keep: Sequence[str]) -> dict[str, Any]:
    """The recipe of ``base + factor * (plus - minus)``."""
    kept = [keep] if isinstance(keep, str) else list(keep or ())
    rules = [
        {"filter": _filter(name, "keep"), "merge_method": "passthrough", "model": "base"} for name in kept
    ]
    return {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [
            {"model": plus, "parameters": {"weight": factor}},
            {"model": minus, "parameters": {"weight": -factor}},
        ],
        **({"methods": rules} if rules else {}),
    }


def _recipe(comments: Sequence[str], document: Mapping[str, Any], dtype: Any, unrelated: str) -> Recipe:
    """The recipe of a document, with comments before it. Errors: RecipeError."""
    keys = {
        **document,
        **({"dtype": dtype_name(dtype)} if dtype is not None else {}),
        **({"unrelated": unrelated} if unrelated != "error" else {}),
    }
    text = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=math.inf)
    heads = "".join(f"# {line}\n" for line in comments)
    try:
        load_recipe(keys)  # for errors without lines, which a caller has not written
    except RecipeError as error:
        raise RecipeError(*(line.removeprefix("recipe: ") for line in error.args)) from None
    return load_recipe(f"{heads}{text}")


def _model(value: Any, argument: str) -> str:
    reference = model_path(value, argument, in_memory=IN_MEMORY)
    return reference.rstrip("/") or reference


def _number(value: Any, argument: str) -> float:
    """A finite number. Errors: RecipeError."""
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise RecipeError(f"{argument} is {value!r}; expected a finite number.")
    return float(value)


def _share(value: Any, argument: str) -> float:
    """A number from 0 to 1. Errors: RecipeError."""
    share = _number(value, argument)
    if not 0 <= share <= 1:
        raise RecipeError(f"{argument} is {share:g}; expected a weight of the fine-tune, from 0 to 1.")
    return share


def _filter(value: Any, argument: str) -> str:
    """Part of a tensor's name. Errors: RecipeError."""
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(
            f"{argument} has {value!r}; expected part of a tensor's name, such as embed_tokens."
        )
    return value
