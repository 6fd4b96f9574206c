"""Layers, as names of tensors tell them: the first number in a name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_NUMBERED = re.compile(r"(?P<stack>(?:[^.]+\.)*?)(?P<layer>\d+)\.(?P<rest>.+)", re.ASCII)


@dataclass(frozen=True)
class Place:
    """A tensor's place in a stack of layers: ``stack`` + number of the layer + ``.`` + ``rest`` is its name."""

    stack: str
    layer: int
    rest: str

    def at(self, layer: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.stack}{layer}.{self.rest}"


def place_of(name: str) -> Place | None:
    """Take a name apart at its first number; None if it has none.

    >>> place_of("model.layers.3.mlp.experts.7.w1.weight")
    Place(stack='model.layers.', layer=3, rest='mlp.experts.7.w1.weight')
    >>> place_of("lm_head.weight")
    """
    found = _NUMBERED.fullmatch(name)
    return Place(found["stack"], int(found["layer"]), found["rest"]) if found else None


def stacks(names: Iterable[str]) -> dict[str, int]:
    """The stacks of layers among names, and how many layers each has.

    >>> stacks(["h.0.w", "h.1.w", "v.0.w", "norm.w"])
    {'h.': 2, 'v.': 1}
    """
    found: dict[str, int] = {}
    for name in names:
        place = place_of(name)
        if place is not None:
            found[place.stack] = max(found.get(place.stack, 0), place.layer + 1)
    return found


def depth_of(layer: int, layers: int) -> float:
    """Where a layer stands among ``layers``: 0 is the first, 1 the last, or the only one."""
    return layer / (layers - 1) if layers > 1 else 1.0


def depths(names: Iterable[str]) -> Mapping[str, float]:
    """The depth of every tensor in its stack; 0 for those in no layer, as in mergekit (its last norm and head too)."""
    listed = list(names)
    counts = stacks(listed)
    found = {}
    for name in listed:
        place = place_of(name)
        found[name] = depth_of(place.layer, counts[place.stack]) if place is not None else 0.0
    return found
