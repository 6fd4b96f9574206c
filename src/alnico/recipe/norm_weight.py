"""Reads ``weight: {from: l2_norm, ...}``: weights computed from the norms of the task vectors."""

from __future__ import annotations

import difflib
import math
import os
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

SCHEDULE = "schedule"
"""What ``from`` is for weights that follow a schedule: :mod:`alnico.recipe.schedule_weight` reads these."""

USED_BY = {
    "beta": ("mode", "exp"),
    "alpha": ("mode", "power"),
    "path": ("from", "analysis"),
    "norms": ("from", "given"),
}
"""Keys that only apply together with one choice of another key."""


def setting_of(
    mode: str, beta: float, alpha: float, scale: float, per: str, analysis: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """Return the setting as a recipe writes it, with what ``mode`` uses; norms are measured, or an analysis has them.

    >>> setting_of("power", 1.0, 1.5, 1.0, "model", None)
    {'from': 'l2_norm', 'mode': 'power', 'alpha': 1.5, 'scale': 1.0, 'per': 'model'}
    """
    key = {"exp": {"beta": beta}, "power": {"alpha": alpha}}.get(mode, {}) if isinstance(mode, str) else {}
    origin = {"from": "l2_norm"} if analysis is None else {"from": "analysis", "path": os.fspath(analysis)}
    return {**origin, "mode": mode, **key, "scale": scale, "per": per}


def takes_norms(option: Option) -> bool:
    """Can the option be computed from norms: is it the weight of a model?"""
    return option.name == "weight" and option.per_model and option.kind == "number"


def read_norm_weight(
    node: Node, where: str, takers: Sequence[tuple[Method, Option]], context: Context
) -> NormWeight | None:
    """Read the mapping; return None if it is invalid."""
    reading = context.reading
    before = len(reading.mistakes)
    other_option = next((option.name for _, option in takers if not takes_norms(option)), None)
    if other_option is not None:
        reading.wrong(
            node.line,
            f"{where} is a mapping with `from`; only weight is computed from norms. Write a value.",
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
    norms = _norms(node, where, words, context) if words["from"] == "given" else ()
    if words["from"] == "given" and words["per"] not in (None, "model"):
        reading.wrong(
            keys["per"].line,
            f"{where}.per is {words['per']}, and a given norm is that of a whole model; expected model. Use from: "
            "l2_norm to measure norms of layers and tensors.",
        )
    if len(reading.mistakes) > before:
        return None
    words["mode"] = words["mode"] or NormWeight().mode
    idle = [key for key, (other, word) in USED_BY.items() if key in keys and words[other] != word]
    for key in idle:
        other, word = USED_BY[key]
        reading.note(keys[key].line, f"{where}.{key} has no effect: it applies to {other}: {word}.")
    fields: dict[str, Any] = {
        "origin": words["from"],
        "mode": words["mode"],
        "per": words["per"],
        "path": path,
        "norms": norms,
        **numbers,
    }
    return NormWeight(
        **{key: value for key, value in fields.items() if value is not None and key not in idle}
    )


def _norms(node: Node, where: str, words: Mapping[str, str | None], context: Context) -> tuple[float, ...]:
    """Read the norms that are given; report what is wrong with them."""
    held: Node | None = node.value.get("norms")
    if held is None or not isinstance(held.value, list) or not held.value:
        actual = "missing" if held is None else f"{held.kind}" if held.value != [] else "an empty list"
        context.reading.wrong(
            node.line if held is None else held.line,
            f"{where}.norms is {actual}; expected a list with one number per model. Write norms: [1.5, 0.8].",
        )
        return ()
    needs_more = words["mode"] in ("linear", "power")
    limits = Between(0, without_low=needs_more)
    read = [_number(item, f"{where}.norms[{i}]", limits, context) for i, item in enumerate(held.value)]
    return tuple(norm for norm in read if norm is not None)


def _word(node: Node | None, where: str, key: str, context: Context) -> str | None:
    if node is None:
        return None
    if node.value not in CHOICES[key]:
        words = (*CHOICES[key], *((SCHEDULE,) if key == "from" else ()))
        near = difflib.get_close_matches(str(node.value), words, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        context.reading.wrong(node.line, f"{where} is {node.kind}; expected one of {', '.join(words)}.{hint}")
        return None
    return str(node.value)


def _number(node: Node, where: str, limits: Between, context: Context) -> float | None:
    number = scalars.number(node.value)
    if number is None or not math.isfinite(number) or number not in limits:
        expected = (
            "a finite number"
            if limits == Between()
            else f"a number {'above' if limits.without_low else 'of at least'} 0"
        )
        context.reading.wrong(node.line, f"{where} is {node.kind}; expected {expected}.")
        return None
    return number


def find_norm_weight(
    options: Mapping[str, Any], entries: Sequence[ModelEntry], base_model: str | None
) -> NormWeight | None:
    """Return the setting that weights ``entries`` by norms, or None.

    Errors: MethodError for two different settings, for norms to be measured without a base or of the base
    itself, and for given norms of another number of models.
    """
    weights = options.get("weight")
    if not isinstance(weights, tuple) or not any(isinstance(w, NormWeight) for w in weights):
        return None
    with_norms = [(entry, w) for entry, w in zip(entries, weights, strict=True) if isinstance(w, NormWeight)]
    if base_model is None and any(w.origin != "given" for _, w in with_norms):
        raise MethodError(
            "weight is computed from distances to the base, but there is no base_model. Add base_model: PATH."
        )
    if len({w for _, w in with_norms}) > 1:
        raise MethodError(
            "weight is computed from norms in different ways in one merge; expected one way. Set it once, "
            "under parameters."
        )
    setting = with_norms[0][1]
    if setting.origin == "given":
        if len(setting.norms) != len(with_norms):
            raise MethodError(
                f"weight.norms has {len(setting.norms)} values, and {len(with_norms)} models have this weight; "
                "expected one norm for each of them, in the order of the recipe."
            )
        return setting
    if any(entry.reference == base_model for entry, _ in with_norms):
        raise MethodError(
            f"{base_model}: weight is computed from the distance to the base, and this is the base. Set a "
            "number, or remove the base from the models."
        )
    return setting


def with_weights(options: Mapping[str, Any], weights: Sequence[float]) -> dict[str, Any]:
    """Replace norm weights by numbers, in order.

    >>> with_weights({"weight": (NormWeight(), 2.0, NormWeight()), "scale": 1.0}, (0.25, 0.75))
    {'weight': (0.25, 2.0, 0.75), 'scale': 1.0}
    """
    rest = iter(weights)
    return {
        **options,
        "weight": tuple(next(rest) if isinstance(w, NormWeight) else w for w in options["weight"]),
    }


def with_equal_weights(options: Mapping[str, Any], setting: NormWeight) -> dict[str, Any]:
    """Replace norm weights that are not measured yet by equal weights."""
    count = sum(isinstance(w, NormWeight) for w in options["weight"])
    return with_weights(options, (setting.scale / count,) * count)
