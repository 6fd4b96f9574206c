"""Makes rules of a recipe from the argument ``layers``: other methods, models and bases for some tensors."""

from __future__ import annotations

import difflib
import numbers
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alnico.errors import MethodError, RecipeError, near_name
from alnico.methods import find, method_name
from alnico.methods.base import Method
from alnico.models.open_models import list_models, name_model
from alnico.recipe import dialect
from alnico.recipe.from_options import plain_list, plain_number, refuse_idle
from alnico.recipe.options import starts_from_a_model

KEYS = ("method", "models", "base", "preset")
"""The keys of a layer that are no options of a method."""

SYNONYMS = {"merge_method": "method", "model": "models", "base_model": "base"}
"""Words of recipes, and the keys of a layer that mean them."""


def layers_with_references(
    layers: Mapping[str, Mapping[str, Any]], models: dict[str, Any], list_name: str
) -> dict[str, dict[str, Any]]:
    """Return ``layers`` with references in place of models, and add models that are new to ``models``.

    ``models`` maps references to models; those of the call are ``list_name[0]``, ``list_name[1]``, ... A
    layer's model is one of these, its position, or a new one. Errors: RecipeError.

    >>> a, b = {}, {}
    >>> models = {"models[0]": a}
    >>> layers_with_references({"fc1": {"method": "slerp", "models": [0, b], "t": 0.3}}, models, "models")
    {'fc1': {'method': 'slerp', 'models': ['models[0]', "layers['fc1'].models[1]"], 't': 0.3}}
    >>> list(models)
    ['models[0]', "layers['fc1'].models[1]"]
    """
    if not isinstance(layers, Mapping):
        raise RecipeError(
            f"layers is of type {type(layers).__name__}; expected a dict of names, each with a dict of a "
            "method and options."
        )
    count = sum(reference.startswith(f"{list_name}[") for reference in models)
    plain: dict[str, dict[str, Any]] = {}
    for key, settings in layers.items():
        where = f"layers[{key!r}]"
        if not isinstance(key, str) or not isinstance(settings, Mapping):
            raise RecipeError(
                f"{where} is of type {type(settings).__name__}; expected a name with a dict of a method and "
                "options."
            )
        own = dict(settings)
        if "models" in own:
            listed = own["models"]
            if not isinstance(listed, (list, tuple)):
                listed = list_models(listed, f"{where}.models")
            if not listed:
                raise RecipeError(
                    f"{where}.models is empty; expected at least one model. Leave it out to merge all "
                    f"{list_name}."
                )
            own["models"] = [
                _reference(model, f"{where}.models[{i}]", models, list_name, count)
                for i, model in enumerate(listed)
            ]
        if own.get("base") is not None:
            own["base"] = _reference(own["base"], f"{where}.base", models, list_name, count)
        plain[key] = own
    return plain


def _reference(model: Any, place: str, models: dict[str, Any], list_name: str, count: int) -> str:
    """Return the reference of a layer's model; one that is not among ``models`` is added as ``place``."""
    if isinstance(model, numbers.Real):
        if isinstance(model, bool) or not isinstance(model, numbers.Integral) or not 0 <= int(model) < count:
            raise RecipeError(
                f"{place} is {model!r}; expected a model, or a position in {list_name}, from 0 to {count - 1}."
            )
        return f"{list_name}[{model}]"
    for reference, other in models.items():
        if other is model or (_is_path(model) and _is_path(other) and os.fspath(other) == os.fspath(model)):
            return reference
    name_model(model, place)
    models[place] = model
    return place


def _is_path(model: Any) -> bool:
    return isinstance(model, (str, os.PathLike))


def rules_of(
    layers: Mapping[str, Mapping[str, Any]],
    method: str | Method,
    names_by_model: Mapping[str, Sequence[str]],
    models: Sequence[str],
    *,
    has_base: bool = True,
) -> list[dict[str, Any]]:
    """Return ``layers`` as a recipe's ``methods``; a key matches whole dotted components of names.

    These are names of the call's ``models`` and of the layer's own. The first match wins. In a call without a
    base, a model that its method starts from is no base of a layer. Errors: RecipeError for a key that matches no tensor, with the nearest components,
    and for keys without effect.

    >>> names = {"models[0]": ["fc1.weight", "fc10.weight"]}
    >>> rules_of({"fc1": {"method": "ties", "density": 0.7}}, "linear", names, ["models[0]"])
    [{'filter': 're:(^|\\\\.)fc1(\\\\.|$)', 'merge_method': 'ties', 'parameters': {'density': 0.7}}]
    """
    rules: list[dict[str, Any]] = []
    for key, settings in layers.items():
        where = f"layers[{key!r}]"
        pattern = rf"(^|\.){re.escape(key)}(\.|$)"
        named = (*models, *settings.get("models", ()), settings.get("base"))
        names = list(dict.fromkeys(name for model in named for name in names_by_model.get(model or "", ())))
        if not any(re.search(pattern, name) for name in names):
            near = difflib.get_close_matches(
                key, dict.fromkeys(part for n in names for part in (n, *n.split("."))), 3
            )
            hint = f"Did you mean {' or '.join(near)}?" if near else f"The first tensor is {names[0]}."
            raise RecipeError(
                f"{where} matches no tensor; expected whole parts of a name, such as fc1 of fc1.weight. {hint}"
            )
        own = _method_of(where, settings.get("method", method))
        _check_keys(where, own, settings)
        refuse_idle(own, ["weight" if n == "weights" else n for n in settings if n not in KEYS])
        rule: dict[str, Any] = {"filter": f"re:{pattern}", "merge_method": own}
        plain = {n: plain_list(v) for n, v in settings.items() if n not in KEYS}
        options = {
            "weight" if n == "weights" else n: [plain_number(x) for x in v]
            if isinstance(v, (list, tuple))
            else v
            for n, v in plain.items()
        }
        rule |= {key: settings[key] for key in ("models", "preset") if key in settings}
        if "base" in settings or not (has_base or starts_from_a_model(find(own))):
            rule["base_model"] = settings.get("base")
        rules.append({**rule, **({"parameters": options} if options else {})})
    return rules


def _method_of(where: str, method: str | Method) -> str:
    """Return the name of a layer's method. Errors: MethodError that names the layer."""
    try:
        name: str = method_name(method)
        find(name)
    except MethodError as error:
        raise MethodError(f"{where}.method: {error}") from None
    return name


def _check_keys(where: str, method: str, settings: Mapping[str, Any]) -> None:
    """Refuse misspelt keys of a layer, and a base without effect. Errors: RecipeError."""
    merges = find(method)
    for key in settings:
        if key in (*KEYS, "weights") or dialect.meant_option(merges, key):
            continue
        if (
            meant := SYNONYMS.get(key) or near_name(key, (*KEYS, "weights"))
        ) is not None and meant not in settings:
            raise RecipeError(f"{where} has the unknown key {key!r}. Did you mean {meant}?")
    is_measured = any(isinstance(settings.get(name), Mapping) for name in ("weight", "weights"))
    if settings.get("base") is not None and merges.base == "unused" and not is_measured:
        raise RecipeError(f"{where}.base has no effect on {method}, which uses no base. Leave it out.")


def in_python(line: str, layers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line about the rules of a recipe as one about the ``layers`` that they were made from, in order.

    >>> in_python("recipe: methods[0]: ties needs base_model, the first model. Add base_model: PATH.", {"fc1": {}})
    "layers['fc1']: ties needs base, the first model. Pass base."
    """
    if not re.search(r"\bmethods\[\d+\]", line):
        return line
    line = line.removeprefix("recipe: ")
    line = re.sub(r"\bmethods\[(\d+)\](?:\.parameters\b)?(\.weight\b)?", _layer(layers), line)
    line = line.replace("Write a weight under each model.", "Pass weights.")
    line = line.replace("besides base_model", "besides the base").replace(
        "base_model one of them", "the base one of them"
    )
    line = line.replace("Add base_model: PATH.", "Pass base.")
    return re.sub(r"\bbase_model\b", "base", line)


def _layer(layers: Mapping[str, Mapping[str, Any]]) -> Callable[[re.Match[str]], str]:
    def named(match: re.Match[str]) -> str:
        key = list(layers)[int(match[1])]
        weight = ".weights" if "weights" in layers[key] else ".weight"
        return f"layers[{key!r}]{weight if match[2] else ''}"

    return named
