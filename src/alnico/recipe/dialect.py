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
    **dict.fromkeys(("out_path", "output_path"), "is for the command; give it the path of the output"),
    "int8_mask": "only changes the type of a temporary in mergekit",
    "random_seed": "is an option of mergekit's command line; `seed` at the top of a recipe is the seed here",
    "allow_negative_weights": "is for mergekit-evolve",
    "smooth": "is for mergekit-evolve",
    "embed_slerp": "was an option of mergekit before 0.0.5; embeddings are merged like other tensors",
}
"""Keys that mean nothing at any level of a recipe."""

WITHOUT_EFFECT_AT_THE_TOP = {
    **WITHOUT_EFFECT,
    **dict.fromkeys(
        ("copy_tokenizer", "cuda", "lazy_unpickle", "low_cpu_memory", "trust_remote_code"),
        "is an option of mergekit's command line",
    ),
}
"""Keys that mean nothing at the top of a recipe."""

WITHOUT_EFFECT_FOR = {
    "multislerp": {"eps": ": a length of 0 is told exactly, without a bound"},
}
"""Keys of a method of mergekit that change nothing here: how the note goes on."""

_OF_DELTAS = ("weight", "density", "normalize", "rescale", "lambda", "int8_mask")

MERGEKIT_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight", "normalize"),
    "slerp": ("t",),
    "nuslerp": ("weight", "nuslerp_row_wise", "nuslerp_flatten"),
    "multislerp": ("weight", "normalize_weights", "eps"),
    "karcher": ("max_iter", "tol"),
    "passthrough": ("scale",),
    "model_stock": ("filter_wise",),
    "arcee_fusion": (),
    "nearswap": ("t",),
    "sce": ("int8_mask", "select_topk"),
    "ram": ("epsilon",),
    "ramplus_tl": ("r", "alpha", "epsilon"),
    "task_arithmetic": _OF_DELTAS,
    "ties": _OF_DELTAS,
    "dare_linear": _OF_DELTAS,
    "dare_ties": _OF_DELTAS,
    "breadcrumbs": (*_OF_DELTAS, "gamma"),
    "breadcrumbs_ties": (*_OF_DELTAS, "gamma"),
    "della": (*_OF_DELTAS, "epsilon"),
    "della_linear": (*_OF_DELTAS, "epsilon"),
}
"""The parameters that mergekit 0.1.5 has for each of its methods. It ignores others, and recipes in circulation have them."""

MERGEKIT_OPTION_NAMES = frozenset(name for names in MERGEKIT_OPTIONS.values() for name in names)

DIFFERS_FROM_MERGEKIT = {
    "karcher": {"weight": "weighs the models; mergekit's karcher has no weights and averages all alike"}
}
"""Words of mergekit for other methods that are options of ours: a recipe that has them gives another result there."""

BOOLEAN_WORDS = {"1": True, "on": True, "t": True, "true": True, "y": True, "yes": True} | {
    "0": False, "off": False, "f": False, "false": False, "n": False, "no": False,
}  # fmt: skip
"""Text that mergekit reads as true or false, in small letters."""


def as_boolean(value: Any) -> Any:
    """Return what mergekit reads as true or false as that, and anything else as it is.

    >>> [as_boolean(v) for v in (1.0, 0, "True", "off", 2, "l1")]
    [True, False, True, False, 2, 'l1']
    """
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    return BOOLEAN_WORDS.get(value.lower(), value) if isinstance(value, str) else value


def takes_boolean(method: Method, key: str) -> bool:
    """Is ``key`` true or false for ``method``, under its own name or mergekit's?"""
    name = option_name(method, key)
    return name is not None and (
        method.options[name].kind == "bool" or bool(key in ALIASES and ALIASES[key].values)
    )


def why_no_effect(method: Method, key: str) -> str | None:
    """Say how a note goes on about a key that has no effect on ``method``, here as in mergekit; None for any other key.

    >>> from alnico.methods import find
    >>> why_no_effect(find("slerp"), "weight"), why_no_effect(find("slerp"), "wieght"), why_no_effect(find("ties"), "weight")
    (', as in mergekit', None, None)
    """
    if option_name(method, key) is not None or method.name not in MERGEKIT_OPTIONS:
        return None
    return WITHOUT_EFFECT_FOR.get(method.name, {}).get(key) or (
        ", as in mergekit" if key in MERGEKIT_OPTION_NAMES else None
    )


def option_name(method: Method, key: str) -> str | None:
    """Return the option of ``method`` that ``key`` stands for, or None.

    >>> from alnico.methods import find
    >>> option_name(find("ties"), "lambda"), option_name(find("ties"), "normalize"), option_name(find("linear"), "normalize")
    ('scale', 'divide', 'normalize')
    """
    if key in method.options:
        return key
    alias = ALIASES.get(key)
    return alias.option if alias and alias.fits(method) else None


def translate_value(method: Method, key: str, value: Any) -> Any:
    """Translate a value given under mergekit's name."""
    alias = ALIASES.get(key)
    if alias is None or option_name(method, key) != alias.option or not isinstance(value, bool):
        return value
    return alias.values.get(value, value)


def option_names(method: Method) -> list[str]:
    """All names a recipe may use for the options of ``method``."""
    return list(dict.fromkeys([*method.options, *(a for a, alias in ALIASES.items() if alias.fits(method))]))
