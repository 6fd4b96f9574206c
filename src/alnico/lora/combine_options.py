"""Checks the method and options of a combination, under alnico's names and PEFT's.

The behaviour of PEFT's ``add_weighted_adapter`` under these names was read in versions 0.18 to 0.21. Where it is not
what the name says, the name does the right thing here, and a note states the difference.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from alnico.errors import MethodError
from alnico.lora.core_matrices import coefficients_of
from alnico.methods import find, known_methods, method_name
from alnico.methods.base import MatrixMethod, Merge, Method
from alnico.numerics.numbers import finite_number, quote_value

CombineSpace = Literal["dense", "core", "knots"]
Class = Literal["cat", "sum", "matrix", "delta"]

SPACES: tuple[CombineSpace, ...] = ("dense", "core", "knots")
SUMS = ("svd", "linear", "task_arithmetic")
"""Weighted sums of updates: their singular vectors come from the factors, so the given rank has the least error."""

ALIASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ties_svd": ("ties", {"elect": "mass", "divide": "count"}),
    "dare_linear_svd": ("dare_linear", {"rescale": "inverse"}),
    "dare_ties_svd": ("dare_ties", {"rescale": "inverse", "elect": "mass", "divide": "count"}),
    "magnitude_prune": ("breadcrumbs", {"gamma": 0.0}),
    "magnitude_prune_svd": ("breadcrumbs", {"gamma": 0.0}),
}
"""PEFT's names that alnico does not use, each as a method here with the options that match PEFT's defaults."""

TWICE = "the scale of each adapter (alpha / r) is applied once, as in PEFT 0.21 and later; PEFT 0.20 applied it twice."
SEPARATE = (
    "the products B A are merged. Under this name PEFT merges A and B separately, which adds products of one "
    "adapter's B and another's A, so its result differs."
)
CORRECTED: Mapping[str, str] = {
    "svd": TWICE,
    "linear": SEPARATE,
    "ties": SEPARATE,
    "dare_linear": SEPARATE,
    "dare_ties": SEPARATE,
    "magnitude_prune": SEPARATE,
    "ties_svd": TWICE,
    "dare_linear_svd": TWICE,
    "dare_ties_svd": TWICE,
    "magnitude_prune_svd": TWICE,
}
ELECTS: Mapping[str, Mapping[str, str]] = {
    "total": {"elect": "mass"},
    "frequency": {"elect": "count", "tie": "plus"},
}
"""PEFT's ``majority_sign_method`` in our options: in PEFT, ties elect plus."""


@dataclass(frozen=True)
class CombineOptions:
    """Checked options: the ``coefficients`` of a sum, one per adapter, or the ``options`` of a method in a ``space``."""

    name: str
    """As the caller wrote it."""
    method: str
    kind: Class
    weights: tuple[float, ...]
    coefficients: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    space: CombineSpace | None = None
    notes: tuple[str, ...] = ()

    def data(self) -> dict[str, Any]:
        return {
            "method": self.method,
            **({"written": self.name} if self.name != self.method else {}),
            **({"space": self.space} if self.space else {}),
            "weights": list(self.weights),
            **(
                {"options": {k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()}}
                if self.options
                else {}
            ),
        }


def names() -> list[str]:
    """Return the names of all methods that combine adapters."""
    deltas = [m.name for m in known_methods().values() if m.space == "delta" and not m.statistics]
    return list(dict.fromkeys(["cat", *SUMS, *deltas, *ALIASES]))


def check_options(
    method: str | Method,
    adapters: int,
    weights: Sequence[float] | None,
    space: str | None,
    options: Mapping[str, Any],
) -> CombineOptions:
    """Check the options. Errors: MethodError for an unknown method, option or space, or a wrong number of weights."""
    method = method_name(method)
    if not isinstance(method, str):
        raise MethodError(f"method is {quote_value(method)}; expected one of {', '.join(names())}.")
    if method not in names():
        near = difflib.get_close_matches(method, names(), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        if method in known_methods():
            hint = " It merges weights, not updates."
        raise MethodError(f"method is {method!r}; expected one of {', '.join(names())}.{hint}")
    if weights is not None and (isinstance(weights, str) or not hasattr(weights, "__len__")):
        raise MethodError(
            f"weights is {quote_value(weights)}; expected a number, or a list of one for each adapter."
        )
    if weights is not None and len(weights) != adapters:
        raise MethodError(
            f"weights has {len(weights)} values for {adapters} adapters; expected one for each."
        )
    checked_weights = (
        tuple(finite_number(w, "a weight", error=MethodError) for w in weights)
        if weights is not None
        else (1.0,) * adapters
    )
    if space is not None and space not in SPACES:
        raise MethodError(f"space is {space!r}; expected one of {', '.join(SPACES)}.")
    target, defaults = ALIASES.get(method, (method, {}))
    merged_options = {**defaults, **_translate(options, target)}
    notes = (f"{method}: {CORRECTED[method]}",) if method in CORRECTED else ()
    if target in ("cat", *SUMS):
        if space is not None:
            raise MethodError(
                f"{method} takes no space (found {space}): it works on the factors, and a sum is the same in "
                "every space. Remove it."
            )
        return CombineOptions(
            method,
            target,
            "cat" if target == "cat" else "sum",
            checked_weights,
            _coefficients(target, checked_weights, merged_options),
            merged_options,
            None,
            notes,
        )
    registered = find(target)
    if weights is not None or "weight" in registered.options:
        merged_options = {**merged_options, "weight": checked_weights}
    merged_options = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in merged_options.items()}
    if isinstance(registered.bind(merged_options, adapters), MatrixMethod):
        _check_of_matrices(method, space, merged_options)
        return CombineOptions(method, target, "matrix", checked_weights, (), merged_options, "core", notes)
    return CombineOptions(
        method, target, "delta", checked_weights, (), merged_options, space or "dense", notes
    )


def _check_of_matrices(method: str, space: str | None, options: Mapping[str, Any]) -> None:
    """Refuse what adapters cannot have. Errors: MethodError."""
    if space not in (None, "core"):
        raise MethodError(
            f"{method} always works in the core space of the adapters (found {space}). Remove the space."
        )
    if options.get("embeddings", "matrix") != "matrix":
        raise MethodError(
            f"{method}.embeddings is {options['embeddings']!r}; expected matrix: what an adapter adds to an embedding is a matrix. "
            "Remove the option."
        )
    if options.get("others", "mean") not in ("mean", "sum", "base"):
        raise MethodError(
            f"{method}.others is {options['others']!r}; expected mean, sum or base: of an adapter it is for biases alone. "
            "Choose one of these."
        )


def _translate(options: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Replace PEFT's ``majority_sign_method`` by ``elect``. Errors: MethodError."""
    translated = dict(options)
    if "weight" in translated or "weights" in translated:
        raise MethodError("weight is not an option here; give weights, one number per adapter.")
    sign = translated.pop("majority_sign_method", None)
    if sign is None:
        return translated
    if target not in known_methods() or "elect" not in find(target).options:
        raise MethodError(
            f"{target} does not elect signs (majority_sign_method is {sign!r}). Remove the option, or choose "
            "ties or dare_ties."
        )
    if sign not in ELECTS:
        raise MethodError(
            f"majority_sign_method is {sign!r}; expected one of {', '.join(ELECTS)} (elect: mass, count)."
        )
    return {**translated, **{name: value for name, value in ELECTS[sign].items() if name not in options}}


def _coefficients(target: str, weights: tuple[float, ...], options: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the coefficient of each update. Errors: MethodError."""
    if target == "cat":
        if options:
            raise MethodError(f"cat has no option {next(iter(options))!r}; it has none.")
        return weights
    name = "linear" if target == "svd" else target
    # PEFT does not divide sums by their weights; a recipe's `linear` does by default.
    bound = find(name).bind(
        {**({"normalize": False} if name == "linear" else {}), **options, "weight": weights}, len(weights)
    )
    assert isinstance(bound, Merge)
    return coefficients_of(bound, len(weights))
