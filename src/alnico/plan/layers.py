"""Layers, as names of tensors tell them: the first number in a name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_NUMBERED = re.compile(r"(?P<stack>(?:[^.]+\.)*?)(?P<layer>\d+)\.(?P<rest>.+)", re.ASCII)
_OF_PREDICTORS = re.compile(r"(?:eh_proj|enorm|hnorm|shared_head)\.", re.ASCII)
"""What only layers have that predict further tokens, as DeepSeek's and GLM's, which are numbered on from the last layer."""


@dataclass(frozen=True)
class LayerPosition:
    """A tensor's place in a stack of layers: ``stack`` + number of the layer + ``.`` + ``rest`` is its name."""

    stack: str
    layer: int
    rest: str

    def at(self, layer: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.stack}{layer}.{self.rest}"


def layer_position(name: str) -> LayerPosition | None:
    """Take a name apart at its first number; None if it has none, and for modules that predict further tokens (``mtp``).

    >>> layer_position("model.layers.3.mlp.experts.7.w1.weight")
    LayerPosition(stack='model.layers.', layer=3, rest='mlp.experts.7.w1.weight')
    >>> layer_position("lm_head.weight"), layer_position("mtp.layers.0.mlp.up_proj.weight")
    (None, None)
    """
    found = _NUMBERED.fullmatch(name)
    if found is None or any(word.startswith("mtp") for word in found["stack"].split(".")):
        return None
    return LayerPosition(found["stack"], int(found["layer"]), found["rest"])


@dataclass(frozen=True)
class Layers:
    """The layers of a model. ``counts`` has the number of layers of each stack.

    Layers that predict further tokens stand behind the last layer under the next numbers; they are no layers of the stack, and
    their tensors are in no layer.
    """

    counts: Mapping[str, int]

    def place(self, name: str) -> LayerPosition | None:
        """The place of a tensor; None if it is in no layer."""
        place = layer_position(name)
        return (
            place
            if place is not None and place.layer < self.counts.get(place.stack, place.layer + 1)
            else None
        )

    def further(self, name: str) -> LayerPosition | None:
        """The place of a tensor of a layer that predicts further tokens, counted from 0; None for all others."""
        place = layer_position(name)
        if place is None or self.place(name) is not None:
            return None
        return LayerPosition(place.stack, place.layer - self.counts[place.stack], place.rest)


def count_layers(names: Iterable[str]) -> Layers:
    """Count the layers of a model, whose tensors have these names.

    >>> count_layers(["h.0.w", "h.1.w", "v.0.w", "norm.w"]).counts
    {'h.': 2, 'v.': 1}
    >>> found = count_layers(["h.0.w", "h.1.w", "h.1.eh_proj.weight"])
    >>> found.counts, found.place("h.1.w"), found.further("h.1.w")
    ({'h.': 1}, None, LayerPosition(stack='h.', layer=0, rest='w'))
    """
    counts: dict[str, int] = {}
    further: dict[str, int] = {}
    for name in names:
        place = layer_position(name)
        if place is None:
            continue
        counts[place.stack] = max(counts.get(place.stack, 0), place.layer + 1)
        if _OF_PREDICTORS.match(place.rest):
            further[place.stack] = min(further.get(place.stack, place.layer), place.layer)
    return Layers({stack: further.get(stack, count) for stack, count in counts.items()})


def depth_of(layer: int, layers: int) -> float:
    """Where a layer stands among ``layers``: 0 is the first, 1 the last, or the only one."""
    return layer / (layers - 1) if layers > 1 else 1.0


def depths(names: Iterable[str]) -> Mapping[str, float]:
    """The depth of every tensor in its stack; 0 for those in no layer, as in mergekit (its last norm and head too)."""
    listed = list(names)
    layers = count_layers(listed)
    found = {}
    for name in listed:
        place = layers.place(name)
        found[name] = depth_of(place.layer, layers.counts[place.stack]) if place is not None else 0.0
    return found
