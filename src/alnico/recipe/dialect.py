"""mergekit's names for our options, and what it accepts that has no effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alnico.methods.base import Method


@dataclass(frozen=True)
class Alias:
    """The option a key of mergekit's stands for, and what its values become."""

    option: str
    values: Mapping[Any, Any] = field(default_factory=dict)


ALIASES = {
    "lambda": Alias("scale"),
    "normalize": Alias("divide", {True: "weight", False: "none"}),
    "rescale": Alias("rescale", {True: "l1", False: "none"}),
}

WITHOUT_EFFECT = {
    "int8_mask": "only changes the type of a temporary in mergekit",
}
"""Keys that mean nothing for any method."""

WITHOUT_EFFECT_FOR = {
    "task_arithmetic": ("density", "rescale"),
}
"""Keys that mergekit accepts for a method and does not use."""

LATER = {
    "slices": "0.3",
    "modules": "0.3",
    "methods": "0.3",
    "preset": "0.3",
    "tokenizer": "0.3",
    "tokenizer_source": "0.3",
    "chat_template": "0.3",
    "name": "0.3",
}
"""Keys of the language that are refused by name until they are built, with the version that brings them."""


def own_name(method: Method, key: str) -> str | None:
    """Return the option of ``method`` that ``key`` stands for, or None.

    >>> from alnico.methods import find
    >>> own_name(find("ties"), "lambda"), own_name(find("ties"), "normalize"), own_name(find("linear"), "normalize")
    ('scale', 'divide', 'normalize')
    """
    if key in method.options:
        return key
    alias = ALIASES.get(key)
    return alias.option if alias and alias.option in method.options else None


def own_value(method: Method, key: str, value: Any) -> Any:
    """Translate a value given under mergekit's name."""
    alias = ALIASES.get(key)
    if alias is None or own_name(method, key) != alias.option or not isinstance(value, bool):
        return value
    return alias.values.get(value, value)


def known_names(method: Method) -> list[str]:
    """All names a recipe may use for the options of ``method``."""
    return [*method.options, *(a for a, alias in ALIASES.items() if alias.option in method.options)]
