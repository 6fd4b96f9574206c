"""Finds the layers of a model in its tensor names: the first number in a name is the layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

_NUMBERED = re.compile(r"(?P<stack>(?:[^.]+\.)*?)(?P<layer>\d+)\.(?P<rest>.+)", re.ASCII)
_PREDICTOR_MODULES = re.compile(r"(?:eh_proj|enorm|hnorm|shared_head)\.", re.ASCII)
"""Modules of multi-token prediction layers (DeepSeek, GLM), which are numbered after the last layer."""


class LayerPosition(NamedTuple):
    """A tensor's place in a stack of layers. Its name is ``stack`` + ``layer`` + ``.`` + ``rest``."""

    stack: str
    layer: int
    rest: str

    def at(self, layer: int) -> str:
        """Return the name of the same tensor in another layer."""
        return f"{self.stack}{layer}.{self.rest}"


def layer_position(name: str) -> LayerPosition | None:
    """Split a name at its first number; None without a number and for multi-token prediction (``mtp``).

    >>> layer_position("model.layers.3.mlp.experts.7.w1.weight")
    LayerPosition(stack='model.layers.', layer=3, rest='mlp.experts.7.w1.weight')
    >>> layer_position("lm_head.weight"), layer_position("mtp.layers.0.mlp.up_proj.weight")
    (None, None)
    """
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return None
    stack, layer, rest = match.groups()
    if "mtp" in stack and any(word.startswith("mtp") for word in stack.split(".")):
        return None
    return LayerPosition(stack, int(layer), rest)


@dataclass(frozen=True)
class Layers:
    """The layers of a model. ``counts`` maps each stack to its number of layers.

    Multi-token prediction layers are numbered after the last layer. They do not count as layers of the stack.
    """

    counts: Mapping[str, int]

    def place(self, name: str) -> LayerPosition | None:
        """Return the place of a tensor; None if it is not in a layer."""
        place = layer_position(name)
        return (
            place
            if place is not None and place.layer < self.counts.get(place.stack, place.layer + 1)
            else None
        )

    def predictor_place(self, name: str) -> LayerPosition | None:
        """Return the place in a multi-token prediction layer, counted from 0; None for other tensors."""
        place = layer_position(name)
        if place is None or self.place(name) is not None:
            return None
        return LayerPosition(place.stack, place.layer - self.counts[place.stack], place.rest)


def count_layers(names: Iterable[str]) -> Layers:
    """Count the layers of a model from its tensor names.

    >>> count_layers(["h.0.w", "h.1.w", "v.0.w", "norm.w"]).counts
    {'h.': 2, 'v.': 1}
    >>> layers = count_layers(["h.0.w", "h.1.w", "h.1.eh_proj.weight"])
    >>> layers.counts, layers.place("h.1.w"), layers.predictor_place("h.1.w")
    ({'h.': 1}, None, LayerPosition(stack='h.', layer=0, rest='w'))
    """
    counts: dict[str, int] = {}
    first_predictor: dict[str, int] = {}
    for name in names:
        place = layer_position(name)
        if place is None:
            continue
        counts[place.stack] = max(counts.get(place.stack, 0), place.layer + 1)
        if _PREDICTOR_MODULES.match(place.rest):
            first_predictor[place.stack] = min(first_predictor.get(place.stack, place.layer), place.layer)
    return Layers({stack: first_predictor.get(stack, count) for stack, count in counts.items()})


def depth_of(layer: int, layers: int) -> float:
    """Return the relative depth of a layer among ``layers``: 0 is the first, 1 the last or the only one."""
    return layer / (layers - 1) if layers > 1 else 1.0


def depths(names: Iterable[str]) -> Mapping[str, float]:
    """Return the depth of every tensor in its stack; 0 outside of layers, also after them, as in mergekit."""
    listed = list(names)
    layers = count_layers(listed)
    depth_by_name = {}
    for name in listed:
        place = layers.place(name)
        depth_by_name[name] = depth_of(place.layer, layers.counts[place.stack]) if place is not None else 0.0
    return depth_by_name
