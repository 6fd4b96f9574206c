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
    of_deltas: bool = False
    """Is it for methods on task vectors alone?"""

    def fits(self, method: Method) -> bool:
        return self.option in method.options and (method.space == "delta" or not self.of_deltas)


ALIASES = {
    "lambda": Alias("scale", of_deltas=True),  # passthrough's scale is a factor on the model
    "normalize": Alias("divide", {True: "weight", False: "none"}),
    "rescale": Alias("rescale", {True: "l1", False: "none"}),
    "nuslerp_flatten": Alias("flatten"),
    "nuslerp_row_wise": Alias("row_wise"),
}

WITHOUT_EFFECT = {
    "int8_mask": "only changes the type of a temporary in mergekit",
}
"""Keys that mean nothing for any method."""

WITHOUT_EFFECT_FOR = {
    "task_arithmetic": dict.fromkeys(("density", "rescale"), ", here as in mergekit"),
    "multislerp": {"eps": ": a length of 0 is told exactly, without a bound"},
}
"""Keys that mergekit accepts for a method and that change nothing: how the note goes on."""


def own_name(method: Method, key: str) -> str | None:
    """Return the option of ``method`` that ``key`` stands for, or None.

    >>> from alnico.methods import find
    >>> own_name(find("ties"), "lambda"), own_name(find("ties"), "normalize"), own_name(find("linear"), "normalize")
    ('scale', 'divide', 'normalize')
    """
    if key in method.options:
        return key
    alias = ALIASES.get(key)
    return alias.option if alias and alias.fits(method) else None


def own_value(method: Method, key: str, value: Any) -> Any:
    """Translate a value given under mergekit's name."""
    alias = ALIASES.get(key)
    if alias is None or own_name(method, key) != alias.option or not isinstance(value, bool):
        return value
    return alias.values.get(value, value)


def known_names(method: Method) -> list[str]:
    """All names a recipe may use for the options of ``method``."""
    return list(dict.fromkeys([*method.options, *(a for a, alias in ALIASES.items() if alias.fits(method))]))
