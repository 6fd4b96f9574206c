"""Searches layer stacks: whose block of layers to use at each depth, how often; or a window of layers to repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from alnico.recipe import scalars
from alnico.recipe.yaml_nodes import Node, ParseContext, quote, shorten

STACK_KEYS = {
    "models": "The models that blocks are taken from.",
    "layers": "The number of layers of each model.",
    "block": "The number of layers in a block; default 1.",
    "places": "The number of blocks in the stack, each any block of any model; by default each block has one place, in order.",
    "repeat": "The maximum number of times a block is repeated, or [least, most]; least 0 allows dropping a block. Default 1.",
    "window": "Consecutive layers of one model that are repeated, in place of block, places and repeat.",
}
"""The keys of ``stack``."""

WINDOW_KEYS = {
    "from": "The first layer of the window, from 0: [least, greatest].",
    "length": "The number of layers in the window: [least, greatest].",
    "times": "How often the window appears in all: a whole number of 2 or more, or [least, greatest]. Default 2.",
}
"""The keys of ``stack.window``."""

FROM, LENGTH, TIMES = "stack.window.from", "stack.window.length", "stack.window.times"
"""The values of a window that are searched."""

MOST_LAYERS = 10_000

MAX_PLACES = 1_000

StackDimension = tuple[str, str | int, int, int, tuple[str, ...]]
"""A dimension: name, default, minimum, maximum, choices."""


@dataclass(frozen=True)
class RepeatedWindow:
    """The windows to search: least and greatest first layer, length, and times in all."""

    first: tuple[int, int]
    length: tuple[int, int]
    times: tuple[int, int]

    @property
    def dimensions(self) -> tuple[StackDimension, ...]:
        """The dimensions of the search. The default is the window in the middle of the ranges, twice."""
        ranges = ((FROM, self.first), (LENGTH, self.length), (TIMES, self.times))
        return tuple(
            (name, least if name == TIMES else (least + most) // 2, least, most, ())
            for name, (least, most) in ranges
            if least < most
        )


@dataclass(frozen=True)
class Stack:
    """The stacks to search: ``places`` consecutive blocks of ``block`` layers.

    For each place the search chooses the model, the number of repeats and, if ``is_free``, the number of the block;
    otherwise the block is that of the place.
    """

    models: tuple[str, ...]
    layers: int
    block: int
    places: int
    is_free: bool
    repeat: tuple[int, int]
    line: int
    window: RepeatedWindow | None = None

    @property
    def dimensions(self) -> tuple[StackDimension, ...]:
        """The dimensions of the search. The default is the blocks of the first model in order, each once."""
        if self.window is not None:
            return self.window.dimensions
        dimensions: list[StackDimension] = []
        last = self.layers // self.block - 1
        once = min(max(1, self.repeat[0]), self.repeat[1])
        for i in range(self.places):
            dimensions.append((f"stack[{i}].model", self.models[0], 0, 0, self.models))
            if self.is_free and last:
                dimensions.append((f"stack[{i}].block", min(i, last), 0, last, ()))
            if self.repeat[0] < self.repeat[1]:
                dimensions.append((f"stack[{i}].repeat", once, *self.repeat, ()))
        return tuple(dimensions)


def read_stack(node: Node, reading: ParseContext) -> Stack | None:
    """Read ``stack``; mistakes are reported to ``reading``."""
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
            node.line,
            "stack.models is missing or is not a list; expected the models that blocks are taken from.",
        )
    if len(set(models)) < len(models):
        reading.wrong(node.line, "stack.models lists a model twice; expected each model once. Remove one.")
    if "layers" not in keys:
        reading.wrong(node.line, "stack.layers is missing; expected the number of layers of each model.")
    layers = scalars.integer(keys.get("layers"), "stack.layers", 1, reading) or 1
    block = scalars.integer(keys.get("block"), "stack.block", 1, reading) or 1
    if layers % block:
        reading.wrong(
            node.line,
            f"stack.block is {block}, which does not divide the {layers} layers; expected a divisor.",
        )
    places = scalars.integer(keys.get("places"), "stack.places", 1, reading)
    if max(places or 1, layers // block) > MAX_PLACES:
        reading.wrong(node.line, f"stack has more than {MAX_PLACES} places; expected fewer. Raise block.")
    repeat = _repeat(keys.get("repeat"), reading)
    window = None
    if "window" in keys:
        for other in ("block", "places", "repeat"):
            if other in keys:
                reading.wrong(
                    keys[other].line,
                    f"stack.{other} and stack.window are both given; expected one of them. Remove one.",
                )
        if len(models) > 1:
            reading.wrong(
                node.line,
                f"stack.models has {len(models)} models, and a window is repeated in one; expected one model. Remove the others, or "
                "leave out window.",
            )
        window = _window(keys["window"], layers if "layers" in keys else MOST_LAYERS, reading)
    if len(reading.mistakes) > before:
        return None
    return Stack(
        tuple(models), layers, block, places or layers // block, places is not None, repeat, node.line, window
    )


def _window(node: Node, layers: int, reading: ParseContext) -> RepeatedWindow | None:
    where = "stack.window"
    keys = scalars.mapping(node, where, WINDOW_KEYS, "a mapping with from and length", reading)
    if not isinstance(node.value, dict):
        return None
    for key in ("from", "length"):
        if key not in keys:
            reading.wrong(node.line, f"{where}.{key} is missing; expected [least, greatest]. Add it.")
    first = _ends(keys.get("from"), f"{where}.from", 0, layers - 1, reading)
    length = _ends(keys.get("length"), f"{where}.length", 1, layers, reading)
    times = _ends(keys.get("times", Node(2, node.line)), f"{where}.times", 2, 100, reading)
    if first is None or length is None or times is None:
        return None
    if first[1] + length[1] > layers:
        reading.wrong(
            node.line,
            f"{where} reaches beyond the layers: from {first[1]} with length {length[1]} needs {first[1] + length[1]} layers, and "
            f"stack.layers is {layers}; expected greatest from + greatest length to be at most {layers}. Lower one of them.",
        )
        return None
    return RepeatedWindow(first, length, times)


def _ends(
    node: Node | None, where: str, least: int, most: int, reading: ParseContext
) -> tuple[int, int] | None:
    """Read a whole number, or [least, greatest], in a range."""
    if node is None:
        return None
    ends = [n.value for n in node.value] if isinstance(node.value, list) else [node.value, node.value]
    if (
        len(ends) == 2
        and all(isinstance(e, int) and not isinstance(e, bool) for e in ends)
        and least <= ends[0] <= ends[1] <= most
    ):
        return ends[0], ends[1]
    found = f"[{', '.join(quote(e) for e in ends)}]" if isinstance(node.value, list) else node.kind
    reading.wrong(
        node.line,
        f"{where} is {shorten(found)}; expected [least, greatest], or one whole number, from {least} to {most}.",
    )
    return None


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
        f"stack.repeat is {node.kind}; expected a whole number of 1 to 100, or [least, most] with least 0 or "
        "more.",
    )
    return 1, 1


def stacked(stack: Stack, values: Mapping[str, float | int | str]) -> Node:
    """Return the ``slices`` of a stack at a point."""

    def plain(value: object) -> Node:
        return Node(value, stack.line)

    slices = []
    if stack.window is not None:
        return plain(
            [plain({"sources": plain([plain(s)])}) for s in _around(stack, stack.window, values, plain)]
        )
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


def _around(
    stack: Stack,
    window: RepeatedWindow,
    values: Mapping[str, float | int | str],
    plain: Callable[[object], Node],
) -> Iterator[dict[str, Node]]:
    """Yield the parts of a stack with a window: the layers up to its end, it again, and the layers after it."""
    first = int(values.get(FROM, window.first[0]))
    end = first + int(values.get(LENGTH, window.length[0]))
    again = int(values.get(TIMES, window.times[0])) - 1
    for begin, stop in [(0, end), *[(first, end)] * again, (end, stack.layers)]:
        if begin < stop:
            yield {
                "model": plain(stack.models[0]),
                "layer_range": plain([plain(begin), plain(stop)]),
            }
