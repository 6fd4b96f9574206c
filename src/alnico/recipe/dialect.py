"""Maps mergekit's option names and values to alnico's, and lists keys that have no effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from alnico.methods.base import Between, Method
from alnico.methods.shared.other_words import OPTION_SYNONYMS, Synonym
from alnico.numerics.numbers import complement
from alnico.recipe.schema import Recipe


@dataclass(frozen=True)
class Alias:
    """The option that a key of mergekit stands for, and how its values translate."""

    option: str
    values: Mapping[Any, Any] = field(default_factory=dict)
    of_deltas: bool = False
    """Does it apply only to methods on task vectors?"""

    def applies_to(self, method: Method) -> bool:
        return self.option in method.options and (method.space == "delta" or not self.of_deltas)


ALIASES = {
    "lambda": Alias("scale", of_deltas=True),  # passthrough's scale is a factor on the model
    "normalize": Alias("divide", {True: "weight", False: "none"}),
    "rescale": Alias("rescale", {True: "l1", False: "none"}),
    "nuslerp_flatten": Alias("flatten"),
    "nuslerp_row_wise": Alias("row_wise"),
}

WITHOUT_EFFECT = {
    **dict.fromkeys(("out_path", "output_path"), "belongs to the command line; pass the output path there"),
    "int8_mask": "only changes the dtype of a temporary tensor in mergekit",
    "random_seed": "is an option of mergekit's command line; here the seed is `seed` at the top of a recipe",
    "allow_negative_weights": "is for mergekit-evolve",
    "smooth": "is for mergekit-evolve",
    "embed_slerp": "was an option of mergekit before 0.0.5; embeddings are merged like all other tensors",
}
"""Keys without effect at any level of a recipe, and why. The reason follows "it"."""

WITHOUT_EFFECT_AT_THE_TOP = {
    **WITHOUT_EFFECT,
    **dict.fromkeys(
        ("copy_tokenizer", "cuda", "lazy_unpickle", "low_cpu_memory", "trust_remote_code"),
        "is an option of mergekit's command line",
    ),
}
"""Keys without effect at the top of a recipe, and why."""

WITHOUT_EFFECT_FOR = {
    "multislerp": {"eps": ": zero lengths are detected exactly"},
}
"""Keys of a method of mergekit that have no effect here, with the end of the note about them."""

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
"""The parameters of mergekit 0.1.5 by method. It ignores all others, which published recipes contain."""

MERGEKIT_OPTION_NAMES = frozenset(name for names in MERGEKIT_OPTIONS.values() for name in names)

DIFFERS_FROM_MERGEKIT = {
    "karcher": {
        "weight": "weights the models; mergekit's karcher ignores weights and averages all models equally"
    }
}
"""Options of alnico that mergekit ignores for the same method, so the results differ."""

BOOLEAN_WORDS = {"1": True, "on": True, "t": True, "true": True, "y": True, "yes": True} | {
    "0": False, "off": False, "f": False, "false": False, "n": False, "no": False,
}  # fmt: skip
"""Words that mergekit reads as true or false, in lower case."""


def as_boolean(value: Any) -> Any:
    """Convert a value that mergekit reads as true or false to a boolean; return any other value unchanged.

    >>> [as_boolean(v) for v in (1.0, 0, "True", "off", 2, "l1")]
    [True, False, True, False, 2, 'l1']
    """
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    return BOOLEAN_WORDS.get(value.lower(), value) if isinstance(value, str) else value


def takes_boolean(method: Method, key: str) -> bool:
    """Does ``key``, in alnico's or mergekit's name, take true or false for ``method``?"""
    name = option_name(method, key)
    return name is not None and (
        method.options[name].kind == "bool" or bool(key in ALIASES and ALIASES[key].values)
    )


def why_no_effect(method: Method, key: str) -> str | None:
    """Return the end of the note for a key that has no effect on ``method``, as in mergekit; else None.

    >>> from alnico.methods import find
    >>> why_no_effect(find("slerp"), "weight"), why_no_effect(find("slerp"), "wieght"), why_no_effect(find("ties"), "weight")
    (', as in mergekit', None, None)
    """
    if meant_option(method, key) is not None or method.name not in MERGEKIT_OPTIONS:
        return None
    return WITHOUT_EFFECT_FOR.get(method.name, {}).get(key) or (
        ", as in mergekit" if key in MERGEKIT_OPTION_NAMES else None
    )


def option_name(method: Method, key: str) -> str | None:
    """Return the option of ``method`` that ``key`` names, in alnico's words or mergekit's, or None.

    >>> from alnico.methods import find
    >>> option_name(find("ties"), "lambda"), option_name(find("ties"), "normalize"), option_name(find("linear"), "normalize")
    ('scale', 'divide', 'normalize')
    """
    if key in method.options:
        return key
    alias = ALIASES.get(key)
    return alias.option if alias and alias.applies_to(method) else None


def meant_option(method: Method, key: str) -> str | None:
    """Return the option of ``method`` that a written key stands for, also as a synonym, or None.

    >>> from alnico.methods import find
    >>> meant_option(find("dare_ties"), "trim_ratio"), meant_option(find("ties"), "trim_ratio"), meant_option(find("sce"), "trim_ratio")
    ('trim', 'density', None)
    """
    name = option_name(method, key)
    synonym = OPTION_SYNONYMS.get(key)
    if name is not None or synonym is None:
        return name
    return next((word for word in synonym.words if word in method.options), None)


def synonym_of(method: Method, key: str) -> Synonym | None:
    """Return the entry of a key that stands for an option of ``method`` as a synonym; None for all other keys.

    >>> from alnico.methods import find
    >>> synonym_of(find("linear"), "alpha").words, synonym_of(find("ramplus_tl"), "alpha"), synonym_of(find("ties"), "lambda")
    (('weight',), None, None)
    """
    is_synonym = option_name(method, key) is None and meant_option(method, key) is not None
    return OPTION_SYNONYMS[key] if is_synonym else None


def number_of(method: Method, key: str, number: float) -> float:
    """Return the value of the option that a number under ``key`` means.

    >>> from alnico.methods import find
    >>> number_of(find("ties"), "trim_ratio", 0.2), number_of(find("ties"), "density", 0.2)
    (0.8, 0.2)
    """
    synonym = synonym_of(method, key)
    return complement(number) if synonym is not None and synonym.relation == "complement" else number


def range_of(method: Method, key: str, limits: Between) -> str:
    """Describe the range of the numbers under ``key`` of an option with ``limits``.

    >>> from alnico.methods import find
    >>> range_of(find("ties"), "trim_ratio", find("ties").options["density"].range)
    '[0, 1)'
    """
    synonym = synonym_of(method, key)
    if synonym is None or synonym.relation != "complement":
        return str(limits)
    end = ")" if limits.without_low else "]"
    return f"[{complement(limits.high):g}, {complement(limits.low):g}{end}"


def translate_value(method: Method, key: str, value: Any) -> Any:
    """Translate a value written under mergekit's name."""
    alias = ALIASES.get(key)
    if alias is None or option_name(method, key) != alias.option or not isinstance(value, bool):
        return value
    return alias.values.get(value, value)


def option_names(method: Method) -> list[str]:
    """Return all names that a recipe may use for the options of ``method``."""
    return list(
        dict.fromkeys([*method.options, *(a for a, alias in ALIASES.items() if alias.applies_to(method))])
    )


def allow_crimes(recipes: Iterable[Recipe]) -> tuple[Recipe, ...]:
    """Return recipes with ``unrelated: allow``, which is what mergekit's ``--allow-crimes`` means here; their texts say so."""
    return tuple(
        replace(r, unrelated="allow", text=r.text and f"{r.text.rstrip()}\n# run with --allow-crimes\n")
        for r in recipes
    )
