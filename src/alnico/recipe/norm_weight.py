"""``weight: {from: l2_norm, ...}``: a weight that follows from how far the models are from the base."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_type_hints

from alnico.errors import MethodError
from alnico.methods.base import Between, Method, Option
from alnico.recipe import scalars
from alnico.recipe.context import Context
from alnico.recipe.keys import NORM_WEIGHT
from alnico.recipe.schema import ModelEntry, NormWeight
from alnico.recipe.yaml_nodes import Node

NUMBERS = {"beta": Between(0), "alpha": Between(0, without_low=True), "scale": Between()}

CHOICES: Mapping[str, tuple[str, ...]] = {
    key: get_args(get_type_hints(NormWeight)[name])
    for key, name in (("from", "origin"), ("mode", "mode"), ("per", "per"))
}

USED_BY = {"beta": ("mode", "exp"), "alpha": ("mode", "power"), "path": ("from", "analysis")}
"""Keys that mean something for one word of another key alone."""


def takes_norms(option: Option) -> bool:
    """Is it the weight of a model?"""
    return option.name == "weight" and option.per_model and option.kind == "number"


def read_norm_weight(
    node: Node, where: str, takers: Sequence[tuple[Method, Option]], context: Context
) -> NormWeight | None:
    """Read the mapping; None if it is wrong."""
    reading = context.reading
    before = len(reading.mistakes)
    stranger = next((option.name for _, option in takers if not takes_norms(option)), None)
    if stranger is not None:
        reading.wrong(
            node.line,
            f"{where} is a measured value; expected one that is written: only weight is measured. Write the value.",
        )
        return None
    context.check_keys(node, where, NORM_WEIGHT)
    keys: dict[str, Node] = node.value
    words = {key: _word(keys.get(key), f"{where}.{key}", key, context) for key in CHOICES}
    numbers = {
        key: _number(keys[key], f"{where}.{key}", limits, context)
        for key, limits in NUMBERS.items()
        if key in keys
    }
    path = scalars.text(keys.get("path"), f"{where}.path", reading)
    if words["from"] == "analysis" and "path" not in keys:
        reading.wrong(
            node.line,
            f"{where}.path is missing; expected the folder that `alnico analyze` wrote. Add path: FOLDER.",
        )
    if len(reading.mistakes) > before:
        return None
    words["mode"] = words["mode"] or NormWeight().mode
    idle = [key for key, (other, word) in USED_BY.items() if key in keys and words[other] != word]
    for key in idle:
        other, word = USED_BY[key]
        reading.note(keys[key].line, f"{where}.{key} has no effect: it is for {other}: {word}.")
    given: dict[str, Any] = {
        "origin": words["from"],
        "mode": words["mode"],
        "per": words["per"],
        "path": path,
        **numbers,
    }
    return NormWeight(**{key: value for key, value in given.items() if value is not None and key not in idle})


def _word(node: Node | None, where: str, key: str, context: Context) -> str | None:
    if node is None:
        return None
    if node.value not in CHOICES[key]:
        near = difflib.get_close_matches(str(node.value), CHOICES[key], 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        context.reading.wrong(
            node.line, f"{where} is {node.kind}; expected one of {', '.join(CHOICES[key])}.{hint}"
        )
        return None
    return str(node.value)


def _number(node: Node, where: str, limits: Between, context: Context) -> float | None:
    found = scalars.number(node.value)
    if found is None or not math.isfinite(found) or found not in limits:
        expected = (
            "a finite number"
            if limits == Between()
            else f"a number {'above' if limits.without_low else 'of at least'} 0"
        )
        context.reading.wrong(node.line, f"{where} is {node.kind}; expected {expected}.")
        return None
    return found


def find_norm_weight(
    options: Mapping[str, Any], entries: Sequence[ModelEntry], base_model: str | None
) -> NormWeight | None:
    """Return the setting by which models of ``entries`` are weighed, if there is one.

    Errors: MethodError for two of them, where there is no base, and where the base itself is weighed.
    """
    weights = options.get("weight")
    if not isinstance(weights, tuple) or not any(isinstance(w, NormWeight) for w in weights):
        return None
    weighed = [(entry, w) for entry, w in zip(entries, weights, strict=True) if isinstance(w, NormWeight)]
    if base_model is None:
        raise MethodError(
            "weight is measured from the base, and there is no base_model. Add base_model: PATH."
        )
    if len({w for _, w in weighed}) > 1:
        raise MethodError(
            "weight is measured in different ways for models of one merge; expected one way. Give it once, under parameters."
        )
    if any(entry.reference == base_model for entry, _ in weighed):
        raise MethodError(
            f"{base_model}: weight is measured from the base, and this is the base. Give it a number, or leave it out of the models."
        )
    return weighed[0][1]


def with_weights(options: Mapping[str, Any], weights: Sequence[float]) -> dict[str, Any]:
    """Put numbers in the places of measured weights, in order.

    >>> with_weights({"weight": (NormWeight(), 2.0, NormWeight()), "scale": 1.0}, (0.25, 0.75))
    {'weight': (0.25, 2.0, 0.75), 'scale': 1.0}
    """
    rest = iter(weights)
    return {
        **options,
        "weight": tuple(next(rest) if isinstance(w, NormWeight) else w for w in options["weight"]),
    }


def with_equal_weights(options: Mapping[str, Any], setting: NormWeight) -> dict[str, Any]:
    """Put equal weights in the places of those that are not measured yet."""
    count = sum(isinstance(w, NormWeight) for w in options["weight"])
    return with_weights(options, (setting.scale / count,) * count)
