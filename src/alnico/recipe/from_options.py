"""Makes a recipe from a list of models and options, as a call in Python or a command line gives them."""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.checkpoint.file_arguments import model_path
from alnico.checkpoint.reference import Paths, path_list
from alnico.errors import MethodError, RecipeError
from alnico.methods import find, method_name
from alnico.methods.base import Method
from alnico.recipe import dialect
from alnico.recipe.load import load_recipe
from alnico.recipe.options import starts_from_a_model
from alnico.recipe.schema import Recipe


@dataclass(frozen=True)
class Words:
    """How messages name what a caller gave: ``names`` by the key of a recipe, all other options by ``other``."""

    names: Mapping[str, str]
    other: str
    give: Callable[[str], str]
    """Says how to give the option of a name."""

    def name(self, key: str) -> str:
        return self.names.get(key) or self.other.format(key)


IN_PYTHON = Words(
    {"weight": "weights", "merge_method": "method", "base_model": "base"}, "{}", "Pass {}".format
)


def make_recipe(
    models: Paths,
    method: str | Method = "linear",
    *,
    base: Any = None,
    weights: Sequence[float] | float | Mapping[str, Any] | None = None,
    t: Sequence[float] | float | None = None,
    density: Sequence[float] | float | None = None,
    dtype: Any = None,
    tokenizer: str | None = None,
    seed: int | None = None,
    missing: str = "error",
    unrelated: str = "error",
    **options: Any,
) -> Recipe:
    """Make a recipe from models and options, for :func:`alnico.merge` and :func:`alnico.plan`.

    ``options`` are those of the method (``alnico.methods()[method].options``): one value for all models, or a
    list with one per model. A list for an option of the whole merge is spread over the layers. A method that
    merges two models and starts from one of them (slerp, nearswap, arcee_fusion) starts from the first model,
    unless ``base`` names it. ``recipe.text`` is the recipe as YAML.

    Options:
        models: Models to merge: paths, hub ids, or base+adapter.
        method: Merge method; `alnico methods` lists them.
        base: Model that the others were fine-tuned from, for methods that need one.
        weights: Weight of each model, such as 0.7,0.3; one number is for all.
        t: Place on the arc from the first model (0) to the second (1), for slerp and nearswap.
        density: Share of each task vector that is kept, in (0, 1], for ties, dare and others; one number, or
            one per model.
        dtype: Dtype of the output, such as bfloat16; default: the promotion of the models' dtypes.
        tokenizer: Vocabulary of the output: union, base, or a model.
        seed: Seed of random methods; default: 0.
        missing: What to do with tensors that some models lack: error, copy or drop.
        unrelated: What to do with models that were not tuned from one base: error or allow.
    Errors: RecipeError, MethodError.

    >>> print(make_recipe(["models/a", "models/b"], "slerp", t=0.5).text.rstrip())
    merge_method: slerp
    base_model: models/a
    models:
    - model: models/a
    - model: models/b
    parameters:
      t: 0.5
    """
    given = {name: value for name, value in (("t", t), ("density", density)) if value is not None}
    return recipe_of_options(
        models,
        method,
        base=base,
        weights=weights,
        dtype=dtype,
        tokenizer=tokenizer,
        seed=seed,
        missing=missing,
        unrelated=unrelated,
        options={**given, **options},
    )


def recipe_of_options(
    models: Paths,
    method: str | Method,
    *,
    base: Any = None,
    weights: Any = None,
    dtype: Any = None,
    tokenizer: str | None = None,
    seed: int | None = None,
    missing: str = "error",
    unrelated: str = "error",
    options: Mapping[str, Any],
    words: Words = IN_PYTHON,
) -> Recipe:
    """Make the recipe of :func:`make_recipe`. Errors are in ``words``."""
    in_memory = "alnico.merge_models and alnico.merge_state_dicts merge models in memory."
    references = [_plain_path(path) for path in path_list(models, in_memory=in_memory)]
    base = None if base is None else _plain_path(model_path(base, "base", in_memory=in_memory))
    notes = []
    try:
        name = method_name(method)
        merges = find(name)
        if base is None and starts_from_a_model(merges):
            if len(references) != 2:
                raise MethodError(f"{name} merges 2 models; found {len(references)}. Give two.")
            base = references[0]
            notes.append(
                f"{base} is the base, as it is the first model; {words.name('base_model')} names another."
            )
        if merges.space == "delta" and len(references) > 1:  # a base among them has no weight and no density
            references = [r for r in references if r != base] or references
        document = recipe_of(
            references,
            base,
            "models",
            name,
            weights=weights,
            dtype=dtype,
            seed=seed or 0,
            missing=missing,
            unrelated=unrelated,
            options=options,
        )
        if tokenizer is not None:
            document["tokenizer_source"] = tokenizer
        recipe = load_recipe(document, seed=seed)
    except (RecipeError, MethodError) as error:
        lines = (in_words(str(line), words, options, references) for line in error.args)
        raise type(error)(*lines) from None
    notes += [in_words(note, words, options, references) for note in recipe.notes]
    return dataclasses.replace(recipe, notes=tuple(notes))


def _plain_path(reference: str) -> str:
    return reference.rstrip("/") or reference


def in_words(line: str, words: Words, options: Iterable[str], models: Sequence[str]) -> str:
    """A line about a recipe as one about the arguments that it was made from."""

    def of_model(match: re.Match[str]) -> str:
        return f"{words.name(match[2])} of {models[int(match[1])]}"

    def needed(match: re.Match[str]) -> str:
        return f"needs {words.name(match[1])}{match[2]} {words.give(words.name(match[1]))}."

    line = line.removeprefix("recipe: ")
    line = re.sub(r"models\[(\d+)\]\.parameters\.(\w+)", of_model, line)
    line = re.sub(r"\bparameters\.(\w+)", lambda match: words.name(match[1]), line)
    line = re.sub(r"needs the option (\w+)(.*) Set it under parameters\b[^.]*\.$", needed, line)
    line = re.sub(r"(?<=Did you mean )\w+(?=\?$)", lambda m: words.names.get(m[0], m[0]), line)
    line = line.replace("Add base_model: PATH.", f"{words.give(words.name('base_model'))}.")
    line = re.sub(
        r"besides base_model|base_model one of them", lambda m: m[0].replace("base_model", "the base"), line
    )
    line = re.sub(r"^unknown merge method", f"{words.name('merge_method')}: unknown merge method", line)
    argument = re.match(r"(?:\w+\.)?(\w+)(?= (?:is|has) )", line)
    if argument and (key := {"weights": "weight"}.get(argument[1], argument[1])) in (*words.names, *options):
        line = words.name(key) + line[argument.end() :]
    return re.sub(r"\bbase_model\b", words.name("base_model"), line)


def recipe_of(
    references: Sequence[str],
    base: str | None,
    list_name: str,
    method: str | Method,
    *,
    weights: Sequence[float] | float | Mapping[str, Any] | None,
    dtype: Any,
    seed: int,
    missing: str,
    unrelated: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the recipe of a call. A list for a per-model option has one value per model, in order.

    Errors: RecipeError.
    """
    lists: dict[str, Sequence[Any]] = {}
    chosen = method_name(method)
    options = {name: plain_list(value) for name, value in options.items()}
    weights = plain_list(weights)
    if isinstance(weights, Mapping):
        weights = {key: plain_list(value) for key, value in weights.items()}
    if isinstance(weights, (Mapping, numbers.Real)):
        options = {**options, "weight": weights}
    elif isinstance(weights, Sequence) and not isinstance(weights, (str, bytes, bytearray)):
        lists["weight"] = weights
    elif weights is not None:
        raise RecipeError(
            f"weights is of type {type(weights).__name__}; expected a list with one number for each of the "
            f"{list_name}, or one number for all."
        )
    refuse_idle(chosen, [*options, *(["weight"] if weights is not None else [])])
    merges = find(chosen)
    lists |= {n: v for n, v in options.items() if isinstance(v, (list, tuple)) and _is_per_model(merges, n)}
    for name, values in lists.items():
        if len(values) != len(references):
            argument = "weights" if values is weights else name
            raise RecipeError(
                f"{argument} has {len(values)} values for {len(references)} {list_name}; expected one for each."
            )
    entries = [
        {
            "model": reference,
            **({"parameters": {n: plain_number(v[i]) for n, v in lists.items()}} if lists else {}),
        }
        for i, reference in enumerate(references)
    ]
    recipe: dict[str, Any] = {"merge_method": chosen}
    recipe |= {"base_model": base} if base is not None else {}
    recipe["models"] = entries
    if shared := {n: plain_number(v) for n, v in options.items() if n not in lists}:
        recipe["parameters"] = shared
    recipe |= {"dtype": dtype_name(dtype)} if dtype is not None else {}
    recipe |= {"missing": missing} if missing != "error" else {}
    recipe |= {"unrelated": unrelated} if unrelated != "error" else {}
    return {**recipe, "seed": seed} if seed else recipe


def _is_per_model(method: Method, name: str) -> bool:
    """Does a list for an option, or for its synonym, have one value per model?"""
    option = method.options.get(dialect.meant_option(method, name) or "")
    synonym = dialect.synonym_of(method, name)
    is_pair = synonym is not None and synonym.relation == "pair"  # one value for both models
    return option is not None and option.per_model and name not in dialect.ALIASES and not is_pair


def refuse_idle(method: str | Method, names: Iterable[str]) -> None:
    """Refuse options that recipes accept with a note, because a call in Python has nowhere to show it.

    Options that mergekit has for this very method are accepted. Errors: RecipeError, in the words of the
    call.
    """
    merges = find(method_name(method))
    for name in names:
        is_of_mergekits = name in dialect.MERGEKIT_OPTIONS.get(merges.name, ()) or name == "int8_mask"
        if is_of_mergekits or not (name in dialect.WITHOUT_EFFECT or dialect.why_no_effect(merges, name)):
            continue
        argument = "weights" if name == "weight" else name
        valid = ["weights" if n == "weight" else n for n in dialect.option_names(merges)]
        raise RecipeError(
            f"{argument} has no effect on {merges.name}; expected options of {merges.name}: "
            f"{', '.join(valid) or 'it has none'}. Leave it out."
        )


def plain_list(value: Any) -> Any:
    """Return a 1-D array or tensor as a list, a 0-D one as a number, and anything else unchanged."""
    return plain_number(value.tolist() if len(getattr(value, "shape", ())) == 1 else value)


def dtype_name(dtype: Any) -> str:
    """Return the name in recipes of a dtype, which is text, a torch dtype or a numpy dtype.

    >>> import numpy
    >>> dtype_name(numpy.float32), dtype_name("bfloat16")
    ('float32', 'bfloat16')
    """
    return dtype.__name__ if isinstance(dtype, type) else str(dtype)


def plain_number(value: Any) -> Any:
    """Return a numpy or torch scalar as a Python number; anything else unchanged."""
    if isinstance(value, np.longdouble):
        return float(value)
    return value.item() if getattr(value, "shape", None) == () else value
