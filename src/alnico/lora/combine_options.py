"""How adapters are to be combined: the methods that there are, under our names and PEFT's, with their options checked.

What PEFT's ``add_weighted_adapter`` does under these names was read in its 0.18 to 0.21; where it is not what the name says, the
name here means the right thing, and a note says what differs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from alnico.errors import MethodError
from alnico.lora.spectral import SPECTRAL
from alnico.methods import find, registry
from alnico.methods.base import Merge
from alnico.numerics.numbers import real, said

CombineSpace = Literal["dense", "core", "knots"]
Class = Literal["cat", "sum", "spectral", "delta"]

SPACES: tuple[CombineSpace, ...] = ("dense", "core", "knots")
SUMS = ("svd", "linear", "task_arithmetic")
"""Weighted sums of updates: their singular vectors follow from the factors, and the rank given is reached with the least error."""

ALIASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ties_svd": ("ties", {"elect": "mass", "divide": "count"}),
    "dare_linear_svd": ("dare_linear", {"rescale": "inverse"}),
    "dare_ties_svd": ("dare_ties", {"rescale": "inverse", "elect": "mass", "divide": "count"}),
    "magnitude_prune": ("breadcrumbs", {"gamma": 0.0}),
    "magnitude_prune_svd": ("breadcrumbs", {"gamma": 0.0}),
}
"""PEFT's names that are not ours, as a method of ours with the options that PEFT's defaults mean."""

TWICE = "each adapter's scale (alpha / r) is applied once, as by PEFT from 0.21 on; PEFT up to 0.20 applied it twice."
APART = (
    "the products B A are merged. PEFT merges A and B by themselves under this name, whose product has terms of one adapter's B with "
    "another's A that no adapter has, so its result differs."
)
CORRECTED: Mapping[str, str] = {
    "svd": TWICE,
    "linear": APART,
    "ties": APART,
    "dare_linear": APART,
    "dare_ties": APART,
    "magnitude_prune": APART,
    "ties_svd": TWICE,
    "dare_linear_svd": TWICE,
    "dare_ties_svd": TWICE,
    "magnitude_prune_svd": TWICE,
}
ELECTS: Mapping[str, Mapping[str, str]] = {
    "total": {"elect": "mass"},
    "frequency": {"elect": "count", "tie": "plus"},
}
"""What PEFT's ``majority_sign_method`` means in our options: its ties elect plus."""


@dataclass(frozen=True)
class CombineOptions:
    """A checked wish: ``coefficients`` of a sum, one an adapter; or the ``options`` of a method in a ``space``."""

    name: str
    """As it was written."""
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
    """All names of methods that combine adapters."""
    deltas = [m.name for m in registry().values() if m.space == "delta" and not m.statistics]
    return list(dict.fromkeys(["cat", *SUMS, *SPECTRAL, *deltas, *ALIASES]))


def asked(
    method: str,
    adapters: int,
    weights: Sequence[float] | None,
    space: str | None,
    options: Mapping[str, Any],
) -> CombineOptions:
    """Check a wish. Errors: MethodError for a name, an option, a number of weights or a space that is not there."""
    if not isinstance(method, str):
        raise MethodError(f"method is {said(method)}; expected one of {', '.join(names())}.")
    if method not in names():
        near = difflib.get_close_matches(method, names(), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        if method in registry():
            hint = " It merges weights, not what was added to them."
        raise MethodError(f"method is {method!r}; expected one of {', '.join(names())}.{hint}")
    if weights is not None and (isinstance(weights, str) or not hasattr(weights, "__len__")):
        raise MethodError(
            f"weights is {said(weights)}; expected a number, or a list of one for each adapter."
        )
    if weights is not None and len(weights) != adapters:
        raise MethodError(
            f"weights has {len(weights)} values for {adapters} adapters; expected one for each."
        )
    given = (
        tuple(real(w, "a weight", error=MethodError) for w in weights)
        if weights is not None
        else (1.0,) * adapters
    )
    if space is not None and space not in SPACES:
        raise MethodError(f"space is {space!r}; expected one of {', '.join(SPACES)}.")
    target, defaults = ALIASES.get(method, (method, {}))
    known = {**defaults, **_in_our_words(options, target)}
    notes = (f"{method}: {CORRECTED[method]}",) if method in CORRECTED else ()
    if target in ("cat", *SUMS):
        if space is not None:
            raise MethodError(
                f"{method} has no space (found {space}): it works on the factors, and a sum is the same in all. Leave it out."
            )
        return CombineOptions(
            method,
            target,
            "cat" if target == "cat" else "sum",
            given,
            _coefficients(target, given, known),
            known,
            None,
            notes,
        )
    if target in SPECTRAL:
        if space not in (None, "core"):
            raise MethodError(
                f"{method} is made in the core space of the adapters (found {space}). Leave the space out."
            )
        return CombineOptions(
            method, target, "spectral", given, (), SPECTRAL[target].checked(known), "core", notes
        )
    found = find(target)
    if weights is not None or "weight" in found.options:
        known = {**known, "weight": given}
    known = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in known.items()}
    found.bind(known, adapters)
    return CombineOptions(method, target, "delta", given, (), known, space or "dense", notes)


def _in_our_words(options: Mapping[str, Any], target: str) -> dict[str, Any]:
    """The options with PEFT's ``majority_sign_method`` as ``elect``. Errors: MethodError."""
    known = dict(options)
    if "weight" in known or "weights" in known:
        raise MethodError("weight is no option here; give weights, one number an adapter.")
    sign = known.pop("majority_sign_method", None)
    if sign is None:
        return known
    if target not in registry() or "elect" not in registry()[target].options:
        raise MethodError(
            f"{target} elects no sign (majority_sign_method is {sign!r}). Leave it out, or choose ties or dare_ties."
        )
    if sign not in ELECTS:
        raise MethodError(
            f"majority_sign_method is {sign!r}; expected one of {', '.join(ELECTS)} (elect: mass, count)."
        )
    return {**known, **{name: value for name, value in ELECTS[sign].items() if name not in options}}


def _coefficients(target: str, weights: tuple[float, ...], options: Mapping[str, Any]) -> tuple[float, ...]:
    """What each update is multiplied by. Errors: MethodError, from the registry for what a method of ours has as an option."""
    if target == "cat":
        if options:
            raise MethodError(f"cat has no option {next(iter(options))!r}; it has none.")
        return weights
    name = "linear" if target == "svd" else target
    # PEFT's sums are not divided by their weights; a recipe's `linear` is, unless told otherwise.
    bound = find(name).bind(
        {**({"normalize": False} if name == "linear" else {}), **options, "weight": weights}, len(weights)
    )
    assert isinstance(bound, Merge)
    units = [tuple(float(i == j) for j in range(len(weights))) for i in range(len(weights))]
    return tuple(float(bound.mix(unit, *bound.arguments)) for unit in units)
