"""What is searched: a recipe with ranges and choices where values stand, and the recipes that lie in it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from alnico.methods.base import Method, Option
from alnico.recipe import dialect, scalars
from alnico.recipe.context import read_context
from alnico.recipe.load import parse_recipe, read_document
from alnico.recipe.schema import Recipe
from alnico.recipe.yaml_nodes import Node, ParseContext, quote, shorten
from alnico.tune.search.stack import read_stack, stacked

Value = float | int | str
PointValues = Mapping[str, Value]
"""A point of a space: the value of every dimension, by its name."""

SEARCH_KEYS = {
    "search": "[least, greatest], or simplex: weights of the models that are at least 0 and sum to 1.",
    "log": "true: equally many values are tried in every power of ten.",
    "step": "Only least, least + step, ... are tried.",
    "int": "true: whole numbers only.",
    "layers": "So many values, spread evenly over the layers.",
}
"""The keys of a value that is searched."""

MOST_DIMENSIONS = 5_000
"""Values that may be searched in all, those over layers counted each."""

MANY_DIMENSIONS = 100
"""Dimensions from which on the ends are not looked at where the default is wrong already: it takes time that grows with their square."""

MAX_LAYERS = 1_000
MAX_CHOICES = 1_000
MOST_STEPS = 10**15
"""Values of a range with steps; beyond, float64 does not tell them apart."""
LEAST_SHARE, MOST_SHARE = 1e-9, 1 - 1e-9
"""The open interval (0, 1) of what the weights on a simplex are made from."""

DimensionKind = Literal["number", "whole", "share", "choice"]
Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Dimension:
    """One value that is searched.

    A ``share`` u in (0, 1) stands for the weight ``-log u`` over the sum of those of all models: with every u uniform, the weights
    are uniform on the simplex.
    """

    name: str
    kind: DimensionKind
    default: Value
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    step: float | None = None
    choices: tuple[str | int | float, ...] = ()

    @property
    def ends(self) -> tuple[Value, ...]:
        """Its least and greatest value, or all choices."""
        return self.choices or (
            (int(self.low), int(self.high)) if self.kind == "whole" else (self.low, self.high)
        )

    def data(self) -> dict[str, Any]:
        """The dimension as plain data: two that are equal search the same."""
        return {
            "name": self.name, "kind": self.kind, "low": self.low, "high": self.high, "log": self.is_log, "step": self.step,
            "choices": list(self.choices),
        }  # fmt: skip


@dataclass(frozen=True)
class _DimensionSite:
    """Where in the recipe dimensions stand, and what they are turned into."""

    path: Path_
    line: int
    dimensions: tuple[Dimension, ...]
    is_list: bool = False
    choices: tuple[Node, ...] = ()
    group: Path_ = ()
    """Of a simplex: what the places of all models have in common."""


@dataclass(frozen=True)
class SearchSpace:
    """The recipes that a file asks to search: its dimensions, and how a point becomes a recipe."""

    root: Node
    places: tuple[_DimensionSite, ...]
    name: str
    folder: str
    has_lines: bool = True

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        return tuple(d for place in self.places for d in place.dimensions)

    @property
    def default(self) -> dict[str, Value]:
        """The default settings: weights of 1/n, else the method's defaults inside the ranges, else the middle."""
        return {d.name: d.default for d in self.dimensions}

    @property
    def references(self) -> tuple[str, ...]:
        """Every model that a recipe of the space can name."""
        chosen = [d for d in self.dimensions if d.kind == "choice"]
        ways = [self.default, *(self.default | {d.name: choice} for d in chosen for choice in d.choices[1:])]
        return tuple(dict.fromkeys(r for values in ways for r in self.instantiate(values).references))

    def data(self) -> Any:
        """What is searched, as plain data, for telling whether a study is of this space."""
        return {"recipe": _plain(self.root), "dimensions": [d.data() for d in self.dimensions]}

    def instantiate(self, values: PointValues) -> Recipe:
        """Return the recipe of a point. Its ``text`` is the recipe, and all that is known of it. Errors: RecipeError."""
        text = yaml.safe_dump(
            _plain(self._filled(values)),
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=None,
            width=math.inf,
        )
        return parse_recipe(text, self.name, self.folder, has_lines=False)

    def check(self) -> None:
        """Read the recipe at its default and with every dimension at each of its ends.

        Errors: RecipeError with one line for every mistake, each with the line of the file.
        """
        reading = ParseContext(self.name, self.has_lines)
        for values in self._corners():
            for mistake in read_document(self._filled(values), self.name, self.folder):
                if mistake not in reading.mistakes:
                    reading.wrong(*mistake)
            if reading.mistakes and len(self.dimensions) > MANY_DIMENSIONS:
                break
        if reading.mistakes:
            raise reading.error()

    def _corners(self) -> Iterator[dict[str, Value]]:
        default = self.default
        yield default
        for dimension in self.dimensions:
            for end in dimension.ends:
                if end != default[dimension.name]:
                    yield default | {dimension.name: end}

    def _filled(self, values: PointValues) -> Node:
        """The tree with values in the places, without options that belong to methods which were not chosen."""
        found = {
            place.path: _value_at(place, self.places, values)
            for place in self.places
            if place.path[0] != "stack"
        }
        root = _replaced(self.root, (), found)
        stack = (
            read_stack(self.root.value["stack"], ParseContext(self.name))
            if "stack" in self.root.value
            else None
        )
        if stack is not None:
            keys = {key: node for key, node in root.value.items() if key != "stack"}
            root = Node(
                {"merge_method": Node("passthrough", root.line), **keys, "slices": stacked(stack, values)},
                root.line,
            )
        return _without_options_of_others(root, self.root, self.places)


def read_space(root: Node, name: str, folder: str, reading: ParseContext) -> SearchSpace:
    """Find what is searched in the tree of a recipe (its ``search`` settings taken out). Mistakes are told to ``reading``."""
    found: list[_DimensionSite] = []
    _look(root, (), found, root, _methods(root), reading)
    if reading.is_broken:
        raise reading.error()
    if isinstance(root.value, dict) and "stack" in root.value:
        stack = read_stack(root.value["stack"], reading)
        if stack is not None:
            line = root.value["stack"].line
            dimensions = tuple(
                Dimension(
                    n,
                    "choice" if choices else "whole",
                    default,
                    float(low),
                    float(high),
                    choices=tuple(choices),
                )
                for n, default, low, high, choices in stack.dimensions
            )
            found.append(_DimensionSite(("stack",), line, dimensions))
    _check_simplices(found, reading)
    if not found and not reading.mistakes:
        reading.wrong(
            root.line,
            "nothing is searched; expected {search: [least, greatest]} or {choice: [...]} in place of a value. "
            "Give the file to `alnico merge`, or say what to search.",
        )
    return SearchSpace(root, _named(found, root), name, folder, reading.has_lines)


def _look(
    node: Node,
    path: Path_,
    found: list[_DimensionSite],
    root: Node,
    methods: Sequence[Method],
    reading: ParseContext,
) -> None:
    if reading.is_broken:
        return
    if isinstance(node.value, list):
        for i, item in enumerate(node.value):
            _look(item, (*path, i), found, root, methods, reading)
    if not isinstance(node.value, dict) or path[:1] in (("tokenizer",), ("stack",)):
        return
    if path and "search" in node.value:
        place = _searched(node, path, root, methods, reading)
    elif path and "choice" in node.value:
        place = _choice(node, path, reading)
    else:
        for key, inner in node.value.items():
            _look(inner, (*path, key), found, root, methods, reading)
        return
    if place is not None:
        found.append(place)
        if sum(len(p.dimensions) for p in found) > MOST_DIMENSIONS:
            reading.broken(
                node.line,
                f"more than {MOST_DIMENSIONS} values are searched; expected fewer. Search one for several tensors.",
            )


def written(path: Path_) -> str:
    """A place in a recipe as messages write it.

    >>> written(("models", 0, "parameters", "weight"))
    'models[0].parameters.weight'
    """
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _searched(
    node: Node, path: Path_, root: Node, methods: Sequence[Method], reading: ParseContext
) -> _DimensionSite | None:
    where = written(path)
    keys = scalars.mapping(node, where, SEARCH_KEYS, "a value to search", reading)
    layers = scalars.integer(keys.get("layers"), f"{where}.layers", 1, reading)
    if layers is not None and layers > MAX_LAYERS:
        reading.wrong(
            keys["layers"].line,
            f"{where}.layers is {layers}; expected at most {MAX_LAYERS} values over the depth.",
        )
        return None
    names = [where] if layers is None else [f"{where}[{i}]" for i in range(layers)]
    if keys["search"].value == "simplex":
        for other in ("log", "step", "int"):
            if other in keys:
                reading.wrong(
                    keys[other].line,
                    f"{where}.{other} is given, and weights on the simplex have none. Leave it out.",
                )
        share = math.exp(-1)
        dimensions = [Dimension(n, "share", share, LEAST_SHARE, MOST_SHARE) for n in names]
        return _DimensionSite(path, node.line, tuple(dimensions), layers is not None, group=_group(path))
    range_ = _range(node, where, reading)
    if range_ is None:
        return None
    low, high, is_whole, is_log, step = range_
    default = _inside(_default(path, root, methods, low, high, is_log), low, high, is_whole, step)
    dimensions = [
        Dimension(n, "whole" if is_whole else "number", default, low, high, is_log, step) for n in names
    ]
    return _DimensionSite(path, node.line, tuple(dimensions), layers is not None)


def _range(
    node: Node, where: str, reading: ParseContext
) -> tuple[float, float, bool, bool, float | None] | None:
    """Least, greatest, whole numbers alone, by powers of ten, step; None if something is wrong."""
    before = len(reading.mistakes)
    keys: dict[str, Node] = node.value
    wanted = "expected [least, greatest], two finite numbers of which the first is less, or simplex"
    ends = keys["search"].value if isinstance(keys["search"].value, list) else []
    numbers = [n for e in ends if (n := scalars.number(e.value)) is not None and math.isfinite(n)]
    if len(ends) != 2 or len(numbers) != 2 or not numbers[0] < numbers[1]:
        found = f"[{', '.join(quote(e.value) for e in ends)}]" if ends else keys["search"].kind
        reading.wrong(keys["search"].line, f"{where}.search is {shorten(found)}; {wanted}.")
        return None
    low, high = numbers
    is_whole = scalars.boolean(keys.get("int"), f"{where}.int", reading)
    is_log = scalars.boolean(keys.get("log"), f"{where}.log", reading)
    step = (
        scalars.finite_number(keys["step"], f"{where}.step", node.line, reading) if "step" in keys else None
    )
    if is_whole and not (low.is_integer() and high.is_integer() and (step is None or step.is_integer())):
        reading.wrong(
            node.line, f"{where} is to be a whole number; expected whole numbers as least, greatest and step."
        )
    if is_log and low <= 0:
        reading.wrong(
            node.line, f"{where} is searched by powers of ten from {low:g}; expected a least value above 0."
        )
    if is_log and step is not None:
        reading.wrong(node.line, f"{where} has log and step; expected one of them. Remove one.")
    if step is not None and not 0 < step <= high - low:
        reading.wrong(
            node.line, f"{where}.step is {step:g}; expected a number above 0 and at most {high - low:g}."
        )
    elif step is not None and not (high - low) / step <= MOST_STEPS:
        reading.wrong(
            node.line,
            f"{where}.step is {step:g}, and makes more than {MOST_STEPS:.0e} values; expected fewer.",
        )
    if len(reading.mistakes) > before:
        return None
    if step is not None:
        high = low + math.floor((high - low) / step + 1e-9) * step
    return low, high, is_whole, is_log, step


def _choice(node: Node, path: Path_, reading: ParseContext) -> _DimensionSite | None:
    where = written(path)
    keys = scalars.mapping(node, where, ("choice",), "a choice", reading)
    options = keys["choice"].value
    if not isinstance(options, list) or not 0 < len(options) <= MAX_CHOICES:
        found = "a list of 0" if options == [] else keys["choice"].kind
        reading.wrong(node.line, f"{where}.choice is {found}; expected a list of 1 to {MAX_CHOICES} values.")
        return None
    if any(_has_search(option) for option in options):
        reading.wrong(
            node.line,
            f"{where}.choice holds a value to search; expected plain values. Search it at a place of its own.",
        )
        return None
    labels = tuple(_label(option) for option in options)
    if len(set(map(str, labels))) < len(labels):
        reading.wrong(node.line, f"{where}.choice has one value twice; expected each once. Remove one.")
        return None
    return _DimensionSite(
        path, node.line, (Dimension(where, "choice", labels[0], choices=labels),), choices=tuple(options)
    )


def _has_search(node: Node) -> bool:
    if isinstance(node.value, list):
        return any(map(_has_search, node.value))
    if isinstance(node.value, dict):
        return bool(node.value.keys() & {"search", "choice"}) or any(map(_has_search, node.value.values()))
    return False


def _label(node: Node) -> str | int | float:
    """What a choice is called in a study: as it is if it is text or a number, else its JSON."""
    plain = _plain(node)
    is_plain = isinstance(plain, (str, int, float)) and not isinstance(plain, bool)
    return plain if is_plain else json.dumps(plain)


def _group(path: Path_) -> Path_:
    """The place without saying which model: places of one simplex agree in it."""
    return tuple(
        "*"
        if isinstance(part, int) and (path[i - 1] in ("models", "sources") or i == len(path) - 1)
        else part
        for i, part in enumerate(path)
    )


def _check_simplices(places: Sequence[_DimensionSite], reading: ParseContext) -> None:
    groups: dict[Path_, list[_DimensionSite]] = {}
    for place in places:
        if place.group:
            groups.setdefault(place.group, []).append(place)
    for members in groups.values():
        first = members[0]
        if len(members) == 1:
            reading.wrong(
                first.line,
                f"{written(first.path)} is on the simplex alone; expected it of two models at least. Search a range instead.",
            )
        for other in members[1:]:
            if len(other.dimensions) != len(first.dimensions):
                reading.wrong(
                    other.line,
                    f"{written(other.path)} has {len(other.dimensions)} values over the layers and {written(first.path)} "
                    f"{len(first.dimensions)}; expected equally many on one simplex.",
                )


def _default(
    path: Path_, root: Node, methods: Sequence[Method], low: float, high: float, is_log: bool
) -> float:
    """1/n for a weight of n models, the default of the method that takes the option, else the middle of the range."""
    middle = math.sqrt(low * high) if is_log else (low + high) / 2
    if (
        "parameters" not in path[:-1]
    ):  # a place of all parameters at once is told as a mistake when the space is checked
        return middle
    inside = path[:-1]
    key = str(path[len(inside) - inside[::-1].index("parameters")])
    for method in methods:
        name = dialect.option_name(method, key)
        if name == "weight":
            return 1 / max(_models(path, root), 1)
        if name is not None:
            return _default_of(method.options[name], middle)
    return middle


def _default_of(option: Option, middle: float) -> float:
    default = option.default[0] if isinstance(option.default, tuple) else option.default
    return float(default) if isinstance(default, (int, float)) and not isinstance(default, bool) else middle


def _models(path: Path_, root: Node) -> int:
    """How many models the list has that a place is in, or the recipe's; the base aside."""
    node = root
    listed: Any = root.value.get("models", Node([], 0)).value if isinstance(root.value, dict) else []
    for part in path:
        node = node.value[part]
        if part in ("models", "sources"):
            listed = node.value
    keys: dict[str, Node] = root.value if isinstance(root.value, dict) else {}
    base = keys["base_model"].value if "base_model" in keys else None
    items: list[Node] = listed if isinstance(listed, list) else []
    named = [i.value.get("model", i) if isinstance(i.value, dict) else i for i in items]
    return sum(base is None or n.value != base for n in named)


def _inside(value: float, low: float, high: float, is_whole: bool, step: float | None) -> float | int:
    """The value that may be tried and is nearest."""
    value = min(max(value, low), high)
    step = step or (1.0 if is_whole else None)
    if step is not None:
        value = min(low + round((value - low) / step) * step, high)
    return round(value) if is_whole else value


def _methods(root: Node) -> list[Method]:
    """All methods that a recipe of the tree can name, those of the first choices first."""
    found: dict[str, Method] = {}
    for node in _named_methods(root):
        options = node.value.get("choice", node).value if isinstance(node.value, dict) else [node]
        for option in options if isinstance(options, list) else []:
            if (method := scalars.named_method(option)) is not None:
                found.setdefault(method.name, method)
    if isinstance(root.value, dict) and "stack" in root.value:
        found.setdefault("passthrough", scalars.named_method(Node("passthrough", 0)))  # type: ignore[arg-type]
    return list(found.values())


def _named_methods(node: Node) -> Iterator[Node]:
    inner: Iterable[Node] = node.value if isinstance(node.value, list) else ()
    if isinstance(node.value, dict):
        if "merge_method" in node.value:
            yield node.value["merge_method"]
        inner = node.value.values()
    for each in inner:
        yield from _named_methods(each)


def _named(places: Sequence[_DimensionSite], root: Node) -> tuple[_DimensionSite, ...]:
    """The places with short names of their dimensions where these are clear: ``code.weight`` for ``models[0].parameters.weight``."""
    short = {d.name: _short(d.name, place.path, root) for place in places for d in place.dimensions}
    taken: dict[str, int] = {}
    for name in short.values():
        taken[name] = taken.get(name, 0) + 1

    def renamed(d: Dimension) -> Dimension:
        name = short[d.name] if taken[short[d.name]] == 1 else d.name
        return Dimension(name, d.kind, d.default, d.low, d.high, d.is_log, d.step, d.choices)

    return tuple(
        _DimensionSite(p.path, p.line, tuple(map(renamed, p.dimensions)), p.is_list, p.choices, p.group)
        for p in places
    )


def _short(name: str, path: Path_, root: Node) -> str:
    tail = name.removeprefix(written(path))
    parts: list[str | int] = [part for part in path if part != "parameters"]
    if len(path) > 2 and path[0] == "models":
        entry = root.value["models"].value[path[1]].value
        reference = entry.get("model") if isinstance(entry, dict) else None
        if reference is not None and isinstance(reference.value, str):
            parts = [Path(reference.value).name, *parts[2:]]
    return written(tuple(parts)) + tail


def _value_at(place: _DimensionSite, places: Sequence[_DimensionSite], values: PointValues) -> Node:
    if place.choices:
        (dimension,) = place.dimensions
        return place.choices[dimension.choices.index(values[dimension.name])]
    numbers = [values[d.name] for d in place.dimensions]
    if place.group:
        others = [p for p in places if p.group == place.group]
        for i, dimension in enumerate(place.dimensions):
            sizes = [-math.log(float(values[p.dimensions[i].name])) for p in others]
            numbers[i] = -math.log(float(values[dimension.name])) / math.fsum(sizes)
    return Node([Node(n, place.line) for n in numbers] if place.is_list else numbers[0], place.line)


def _replaced(node: Node, path: Path_, found: Mapping[Path_, Node]) -> Node:
    if path in found:
        return found[path]
    if isinstance(node.value, list):
        return Node([_replaced(item, (*path, i), found) for i, item in enumerate(node.value)], node.line)
    if isinstance(node.value, dict):
        return Node(
            {key: _replaced(item, (*path, key), found) for key, item in node.value.items()}, node.line
        )
    return node


def _without_options_of_others(tree: Node, root: Node, places: Sequence[_DimensionSite]) -> Node:
    """Leave out what only methods understand that were not chosen this time: options, presets, and ``lines``."""
    if not any(p.choices and p.path[-1] == "merge_method" for p in places):
        return tree
    chosen = read_context(tree.value, ParseContext("")).methods
    others = [m for m in _methods(root) if m not in chosen]

    def is_of_others(key: str) -> bool:
        return not any(dialect.option_name(m, key) for m in chosen) and any(
            dialect.option_name(m, key) for m in others
        )

    def is_scaled(methods: Iterable[Method]) -> bool:
        return any(m.space == "delta" and "scale" in m.options for m in methods)

    def kept(node: Node, is_parameters: bool) -> Node:
        if isinstance(node.value, list):
            return Node([kept(item, False) for item in node.value], node.line)
        if not isinstance(node.value, dict):
            return node
        inner = {
            k: kept(n, k == "parameters")
            for k, n in node.value.items()
            if not (is_parameters and is_of_others(k))
        }
        preset = inner.get("preset")
        if preset is not None and not _is_preset(preset, chosen) and _is_preset(preset, others):
            del inner["preset"]
        return Node(inner, node.line)

    tree = kept(tree, False)
    if "lines" in tree.value and not is_scaled(chosen) and is_scaled(others):
        tree = Node({key: node for key, node in tree.value.items() if key != "lines"}, tree.line)
    return tree


def _is_preset(node: Node, methods: Iterable[Method]) -> bool:
    return isinstance(node.value, str) and any(node.value in m.presets for m in methods)


def _plain(node: Node) -> Any:
    if isinstance(node.value, list):
        return [_plain(item) for item in node.value]
    if isinstance(node.value, dict):
        return {key: _plain(item) for key, item in node.value.items()}
    return node.value
