"""Merges dicts of tensors and modules in memory, by an ordinary recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alnico.checkpoint.memory_model import import_torch
from alnico.devices import DEFAULT_DEVICE
from alnico.errors import MethodError, RecipeError
from alnico.methods import find, method_name
from alnico.methods.base import Method
from alnico.models.open_models import (
    fill,
    list_models,
    merge_open_models,
    name_model,
    open_models,
    path_of,
    plain_copy,
    template_of,
)
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.recipe.from_options import IN_PYTHON, in_words, recipe_of
from alnico.recipe.options import starts_from_a_model
from alnico.run_options import RunOptions
from alnico.values.layers import in_python, layers_with_references, rules_of
from alnico.values.words import in_words_of_python


@ieee_arithmetic()
def merge_state_dicts(
    state_dicts: Sequence[Any],
    method: str | Method = "linear",
    *,
    base: Any = None,
    weights: Sequence[float] | float | Mapping[str, Any] | None = None,
    dtype: Any = None,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    protect: Mapping[str, Any] | None = None,
    seed: int = 0,
    missing: str = "error",
    unrelated: str = "error",
    threads: int | None = None,
    device: Any = DEFAULT_DEVICE,
    **options: Any,
) -> dict[str, Any]:
    """Merge dicts of tensors in memory; the bits are equal to those of the same merge on disk.

    Torch tensors give torch tensors on the CPU; numpy arrays give numpy arrays. With ``device="cuda"`` the merge is computed on
    the GPU, without a copy of tensors that live there, and the result of these stays there. A list may also contain
    modules, paths, hub ids, lazy models and task vectors of the base (``tau`` counts as ``tau.on(base)``); a
    module with PEFT adapters counts as its merged weights. ``options`` are those of the method, also in words
    of other texts (docs/recipes.md): one value for all models, or a list with one per model. Inputs are never
    changed. Tensors that share memory in all dicts share it in the result.

    Options:
        state_dicts: The models.
        method: Name of a merge method, or a method made by @alnico.method.
        base: The model that the others were tuned from, for methods that need one. Methods that start from one
            of two models (slerp, nearswap, arcee_fusion) start from the first by default.
        weights: Weight of each model, one for all, or a rule as in a recipe: ``{"from": "l2_norm"}``, or
            ``{"from": "given", "norms": [...]}``.
        dtype: Dtype of the output; default: the promotion of the inputs' dtypes.
        layers: Other methods for some tensors: ``{"fc1": {"method": "ties", "density": 0.7}}``. A key matches
            whole dotted components of names; the first match wins. A layer may have its own ``models``, in
            its order (positions in the list, some of its models, or others), and its own ``base``.
        protect: Keep what a model gives on its own inputs, as in recipes: ``{"gram": "base-gram", "energy": 0.99}``, with
            its ``model`` if that is not the base.
        seed: Seed of random methods.
        missing: What to do with tensors that some models lack, as in recipes.
    Errors: all of ``alnico.errors``, worded as for a recipe.

    >>> import numpy as np
    >>> merge_state_dicts([{"w": np.float32([1, 2])}, {"w": np.float32([3, 6])}], weights=[1, 3])
    {'w': array([2.5, 5. ], dtype=float32)}
    """
    arguments = {
        "weights": weights,
        "dtype": dtype,
        "seed": seed,
        "missing": missing,
        "unrelated": unrelated,
        "options": options,
    }
    run = RunOptions.of(threads=threads, device=device)
    return _merge(state_dicts, base, "state_dicts", method, layers, protect, run, **arguments)


@ieee_arithmetic()
def merge_models(
    models: Sequence[Any],
    method: str | Method = "linear",
    *,
    base: Any = None,
    weights: Sequence[float] | float | Mapping[str, Any] | None = None,
    dtype: Any = None,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    protect: Mapping[str, Any] | None = None,
    seed: int = 0,
    missing: str = "error",
    unrelated: str = "error",
    threads: int | None = None,
    device: Any = DEFAULT_DEVICE,
    **options: Any,
) -> Any:
    """Merge modules (``nn.Module``) into a copy of the base, or of the first model if there is no base.

    The copy has the merged parameters and buffers on the devices of the original, wherever ``device`` computes them, and everything else as in
    the original, including the training mode. A module in ``torch.compile`` or ``DataParallel`` is unwrapped.
    With ``missing="drop"`` a tensor that some models lack stays as it is in the copy. Models of all other
    kinds may be among them. Inputs are never changed. Other arguments are those of :func:`merge_state_dicts`.

    Errors: all of ``alnico.errors``, worded as for a recipe.
    """
    arguments = {
        "weights": weights,
        "dtype": dtype,
        "seed": seed,
        "missing": missing,
        "unrelated": unrelated,
        "options": options,
    }
    run = RunOptions.of(threads=threads, device=device)
    import_torch("a merge of modules")
    models = list_models(models, "models")
    template = template_of([base, *models])
    if template is None:
        raise RecipeError(_without_module(models))
    state = _merge(models, base, "models", method, layers, protect, run, **arguments)
    result = plain_copy(template)
    fill(result, state, partly=missing == "drop")
    return result


def _without_module(models: Sequence[Any]) -> str:
    """Say why a list without a module cannot be merged into one, and which function merges it."""
    kind, advice = "module", "merge_state_dicts merges these models into a dict of tensors."
    if all(path_of(model) is not None for model in models):
        kind = "object in memory, only paths"
        advice = (
            "To merge files: alnico.merge(alnico.make_recipe(models, method), out). To merge them in memory: "
            "merge_state_dicts, which returns a dict of tensors."
        )
    elif all(isinstance(model, Mapping) for model in models):
        kind = "nn.Module, only dicts of tensors"
        advice = "merge_state_dicts merges dicts of tensors into one."
    return (
        f"models: holds no {kind}; expected at least one nn.Module, which the result is a copy of. {advice}"
    )


def _starts_from_a_model(method: str | Method) -> bool:
    """Does a method start from one of its two models? An unknown one is left to the recipe, which names it."""
    try:
        return starts_from_a_model(find(method_name(method)))
    except MethodError:
        return False


def _with_reference(protect: Mapping[str, Any], named: dict[str, Any]) -> Any:
    """Return the setting with a reference in the place of a model in memory, which is added to those that are ``named``."""
    if not isinstance(protect, Mapping) or protect.get("model") is None:
        return protect
    model = protect["model"]
    known = next((reference for reference, one in named.items() if one is model), None)
    if known is None:
        known = "protect"
        name_model(model, known)
        named[known] = model
    return {**protect, "model": known}


def _merge(
    models: Sequence[Any],
    base: Any,
    list_name: str,
    method: str | Method,
    layers: Mapping[str, Mapping[str, Any]] | None,
    protect: Mapping[str, Any] | None,
    run: RunOptions,
    **arguments: Any,
) -> dict[str, Any]:
    """Merge models in memory into a dict of tensors. ``list_name`` is the name of their list in messages."""
    models = list_models(models, list_name)
    if base is not None:
        name_model(base, "base")
    named = {f"{list_name}[{i}]": model for i, model in enumerate(models)}
    references = list(named)
    base_reference: str | None = None
    if base is not None:
        same = next((reference for reference, model in named.items() if model is base), None)
        base_reference = same or "base"
        named[base_reference] = base
    elif len(models) == 2 and _starts_from_a_model(method):
        base_reference = references[0]
        if find(method_name(method)).space == "delta":
            references = references[1:]
    recipe = recipe_of(references, base_reference, list_name, method, **arguments)
    if protect is not None:
        recipe["protect"] = _with_reference(protect, named)
    layers = layers_with_references(layers, named, list_name) if layers else {}
    opened = open_models(named, base=base)
    try:
        if layers:
            names = {reference: list(source.tensors) for reference, source in opened.sources.items()}
            recipe["methods"] = rules_of(
                layers, method, names, [*references, base_reference or ""], has_base=base is not None
            )
    except BaseException:
        opened.close()
        raise
    try:
        with in_words_of_python():
            return merge_open_models(opened, recipe, run)
    except RecipeError as error:
        options = arguments["options"]
        lines = [in_python(str(line), layers) for line in error.args]
        lines = [in_words(line, IN_PYTHON, options, references) for line in lines]
        raise type(error)(*lines) from None
