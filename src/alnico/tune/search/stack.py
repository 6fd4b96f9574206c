"""Layer stacks that are searched: which model's block of layers stands at which depth, and how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from alnico.recipe import scalars
from alnico.recipe.yaml_nodes import Node, ParseContext

STACK_KEYS = {
    "models": "The models that a block may be taken from.",
    "layers": "How many layers each of them has.",
    "block": "How many layers are taken together; 1 if not given.",
    "places": "How many blocks the stack has, each any block of any model; if not given, there is a place for each block, in order.",
    "repeat": "The most often that a block follows itself, or [least, most]; least 0 lets a block be left out. 1 if not given.",
}
"""The keys of ``stack``."""

MAX_PLACES = 1_000

StackDimension = tuple[str, str | int, int, int, tuple[str, ...]]
"""A dimension: name, default, least, greatest, choices."""


@dataclass(frozen=True)
class Stack:
    """What stacks there are: ``places`` blocks of ``block`` layers, one after the other.

    At each place the model is searched; the number of its block too where ``is_free``, else it is the place's; and how often it
    is repeated.
    """

    models: tuple[str, ...]
    layers: int
    block: int
    places: int
    is_free: bool
    repeat: tuple[int, int]
    line: int

    @property
    def dimensions(self) -> tuple[StackDimension, ...]:
        """What is searched. The default takes the blocks in their order from the first model, each once."""
        found: list[StackDimension] = []
        last = self.layers // self.block - 1
        once = min(max(1, self.repeat[0]), self.repeat[1])
        for i in range(self.places):
            found.append((f"stack[{i}].model", self.models[0], 0, 0, self.models))
            if self.is_free and last:
                found.append((f"stack[{i}].block", min(i, last), 0, last, ()))
            if self.repeat[0] < self.repeat[1]:
                found.append((f"stack[{i}].repeat", once, *self.repeat, ()))
        return tuple(found)


def read_stack(node: Node, reading: ParseContext) -> Stack | None:
    """Read ``stack``; mistakes are told to ``reading``."""
    before = len(reading.mistakes)
    keys = scalars.mapping(node, "stack", STACK_KEYS, "a mapping with models and layers", reading)
    if not isinstance(node.value, dict):
        return None
    listed = keys["models"].value if "models" in keys and isinstance(keys["models"].value, list) else []
    models = [
        m for i, n in enumerate(listed) if (m := scalars.text(n, f"stack.models[{i}]", reading)) is not None
    ]
    if not models:
        reading.wrong(
            node.line, "stack.models is missing or no list; expected the models that blocks are taken from."
        )
    if len(set(models)) < len(models):
        reading.wrong(node.line, "stack.models has one model twice; expected each once. Remove one.")
    if "layers" not in keys:
        reading.wrong(node.line, "stack.layers is missing; expected the number of layers of each model.")
    layers = scalars.integer(keys.get("layers"), "stack.layers", 1, reading) or 1
    block = scalars.integer(keys.get("block"), "stack.block", 1, reading) or 1
    if layers % block:
        reading.wrong(
            node.line,
            f"stack.block is {block}, and {layers} layers are no whole number of blocks; expected a divisor.",
        )
    places = scalars.integer(keys.get("places"), "stack.places", 1, reading)
    if max(places or 1, layers // block) > MAX_PLACES:
        reading.wrong(node.line, f"stack has more than {MAX_PLACES} places; expected fewer. Raise block.")
    repeat = _repeat(keys.get("repeat"), reading)
    if len(reading.mistakes) > before:
        return None
    return Stack(
        tuple(models), layers, block, places or layers // block, places is not None, repeat, node.line
    )


def _repeat(node: Node | None, reading: ParseContext) -> tuple[int, int]:
    if node is None:
        return 1, 1
    ends = [n.value for n in node.value] if isinstance(node.value, list) else [1, node.value]
    if (
        len(ends) == 2
        and all(isinstance(e, int) and not isinstance(e, bool) for e in ends)
        and 0 <= ends[0] <= ends[1] <= 100
        and ends[1]
    ):
        return ends[0], ends[1]
    reading.wrong(
        node.line,
        f"stack.repeat is {node.kind}; expected a whole number of 1 to 100, or [least, most] with least 0 or more.",
    )
    return 1, 1


def stacked(stack: Stack, values: Mapping[str, float | int | str]) -> Node:
    """The ``slices`` of a stack at a point."""

    def plain(value: object) -> Node:
        return Node(value, stack.line)

    slices = []
    for i in range(stack.places):
        block = int(values.get(f"stack[{i}].block", min(i, stack.layers // stack.block - 1)))
        first = block * stack.block
        source = plain(
            {
                "model": plain(values[f"stack[{i}].model"]),
                "layer_range": plain([plain(first), plain(first + stack.block)]),
            }
        )
        repeat = int(values.get(f"stack[{i}].repeat", stack.repeat[1]))
        slices += [plain({"sources": plain([source])})] * repeat
    return plain(slices)
