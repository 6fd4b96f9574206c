"""Reads search spaces: recipes with ranges and choices in place of values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from alnico.methods import digests_of_foreign
from alnico.methods.base import Method, Option
from alnico.recipe import dialect, scalars
from alnico.recipe.context import read_context
from alnico.recipe.load import parse_recipe, read_document
from alnico.recipe.schema import Recipe
from alnico.recipe.yaml_nodes import Node, ParseContext, quote, shorten
from alnico.tune.search.stack import read_stack, stacked

Value = float | int | str
PointValues = Mapping[str, Value]
"""A point of a space: the value of each dimension by name."""

SEARCH_KEYS = {
    "search": "[least, greatest], or simplex: weights of the models that are at least 0 and sum to 1.",
    "log": "true: sample on a logarithmic scale.",
    "step": "Only least, least + step, ... are tried.",
    "int": "true: whole numbers only.",
    "layers": "The number of values, spread evenly over the layers.",
}
"""The keys of a value to search."""

MOST_DIMENSIONS = 5_000
"""The maximum number of values to search; each of several values over layers counts."""

MANY_DIMENSIONS = 100
"""Above this number of dimensions, the ends are not checked if the default is wrong: the time grows quadratically."""

MAX_LAYERS = 1_000
MAX_CHOICES = 1_000
MOST_STEPS = 10**15
"""The maximum number of steps in a range: float64 cannot distinguish more."""
LEAST_SHARE, MOST_SHARE = 1e-9, 1 - 1e-9
"""The open interval (0, 1) of the shares that weights on a simplex are computed from."""

DimensionKind = Literal["number", "whole", "share", "choice"]
Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Dimension:
    """One value to search.

    A ``share`` u in (0, 1) gives the weight ``-log u``, divided by the sum over all models: if every u is uniform, the
    weights are uniform on the simplex.
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
        """Its minimum and maximum, or all choices."""
        return self.choices or (
            (int(self.low), int(self.high)) if self.kind == "whole" else (self.low, self.high)
        )

    def data(self) -> dict[str, Any]:
        """Return plain data; equal dimensions have equal data."""
        return {
            "name": self.name, "kind": self.kind, "low": self.low, "high": self.high, "log": self.is_log, "step": self.step,
            "choices": list(self.choices),
        }  # fmt: skip


@dataclass(frozen=True)
class _DimensionSite:
    """A place in the recipe with its dimensions, and the value they become."""

    path: Path_
    line: int
    dimensions: tuple[Dimension, ...]
    is_list: bool = False
    choices: tuple[Node, ...] = ()
    group: Path_ = ()
    """For a simplex: the path that the places of all models share."""


@dataclass(frozen=True)
class SearchSpace:
    """All recipes of a search: its dimensions, and how a point becomes a recipe."""

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
        """The default settings: weights of 1/n (1 of methods over whole matrices), else the method's defaults inside the
        ranges, else the middle."""
        return {d.name: d.default for d in self.dimensions}

    @property
    def references(self) -> tuple[str, ...]:
        """Every model that a recipe of the space can use."""
        choices = [d for d in self.dimensions if d.kind == "choice"]
        ways = [self.default, *(self.default | {d.name: choice} for d in choices for choice in d.choices[1:])]
        return tuple(dict.fromkeys(r for values in ways for r in self.instantiate(values).references))

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of all methods that a recipe of the space can use."""
        return tuple(method.name for method in _methods(self.root))

    def data(self) -> Any:
        """Return plain data that identifies the space of a study."""
        foreign = digests_of_foreign(self.methods)
        return {
            "recipe": _plain(self.root),
            "dimensions": [d.data() for d in self.dimensions],
            **({"methods": foreign} if foreign else {}),
        }

    def instantiate(self, values: PointValues) -> Recipe:
        """Return the recipe of a point, parsed from its ``text``. Errors: RecipeError."""
        text = yaml.safe_dump(
            _plain(self._filled(values)),
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=None,
            width=math.inf,
        )
        return parse_recipe(text, self.name, self.folder, has_lines=False)

    def check(self) -> None:
        """Read the recipe at its default, and with each dimension at each of its ends.

        Errors: RecipeError with one line per mistake, each with its line in the file.
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
        """Return the tree with values filled in, without options of methods that were not chosen."""
        values_by_path = {
            place.path: _value_at(place, self.places, values)
            for place in self.places
            if place.path[0] != "stack"
        }
        root = _replaced(self.root, (), values_by_path)
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
    """Find the values to search in the tree of a recipe, without its ``search`` key. Mistakes are reported to ``reading``."""
    sites: list[_DimensionSite] = []
    _collect(root, (), sites, root, _methods(root), reading)
    if reading.is_broken:
        raise reading.error()
    if isinstance(root.value, dict) and "stack" in root.value:
        stack = read_stack(root.value["stack"], reading)
        if stack is not None and stack.dimensions:
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
            sites.append(_DimensionSite(("stack",), line, dimensions))
    _check_simplices(sites, reading)
    if not sites and not reading.mistakes:
        reading.wrong(
            root.line,
            "nothing to search; expected {search: [least, greatest]} or {choice: [...]} in place of a value. "
            "Use `alnico merge` for this file, or mark a value to search.",
        )
    return SearchSpace(root, _named(sites, root), name, folder, reading.has_lines)


def _collect(
    node: Node,
    path: Path_,
    sites: list[_DimensionSite],
    root: Node,
    methods: Sequence[Method],
    reading: ParseContext,
) -> None:
    if reading.is_broken:
        return
    if isinstance(node.value, list):
        for i, item in enumerate(node.value):
            _collect(item, (*path, i), sites, root, methods, reading)
    if not isinstance(node.value, dict) or path[:1] in (("tokenizer",), ("stack",)):
        return
    if path and "search" in node.value:
        place = _searched(node, path, root, methods, reading)
    elif path and "choice" in node.value:
        place = _choice(node, path, reading)
    else:
        for key, inner in node.value.items():
            _collect(inner, (*path, key), sites, root, methods, reading)
        return
    if place is not None:
        sites.append(place)
        if sum(len(p.dimensions) for p in sites) > MOST_DIMENSIONS:
            reading.broken(
                node.line,
                f"more than {MOST_DIMENSIONS} values to search; expected fewer. Search one value for several "
                "tensors.",
            )


def dotted(path: Path_) -> str:
    """Return a path in a recipe as messages write it.

    >>> dotted(("models", 0, "parameters", "weight"))
    'models[0].parameters.weight'
    """
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _searched(
    node: Node, path: Path_, root: Node, methods: Sequence[Method], reading: ParseContext
) -> _DimensionSite | None:
    where = dotted(path)
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
                    f"{where}.{other} is given, but weights on the simplex do not take it. Remove it.",
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
    """Return minimum, maximum, is_whole, is_log and step; None after a mistake."""
    before = len(reading.mistakes)
    keys: dict[str, Node] = node.value
    expected = "expected [least, greatest], two finite numbers in increasing order, or simplex"
    ends = keys["search"].value if isinstance(keys["search"].value, list) else []
    numbers = [n for e in ends if (n := scalars.number(e.value)) is not None and math.isfinite(n)]
    if len(ends) != 2 or len(numbers) != 2 or not numbers[0] < numbers[1]:
        written = f"[{', '.join(quote(e.value) for e in ends)}]" if ends else keys["search"].kind
        reading.wrong(keys["search"].line, f"{where}.search is {shorten(written)}; {expected}.")
        return None
    low, high = numbers
    is_whole = scalars.boolean(keys.get("int"), f"{where}.int", reading)
    is_log = scalars.boolean(keys.get("log"), f"{where}.log", reading)
    step = (
        scalars.finite_number(keys["step"], f"{where}.step", node.line, reading) if "step" in keys else None
    )
    if is_whole and not (low.is_integer() and high.is_integer() and (step is None or step.is_integer())):
        reading.wrong(
            node.line,
            f"{where} is a whole number (int); expected whole numbers for least, greatest and step.",
        )
    if is_log and low <= 0:
        reading.wrong(node.line, f"{where} has log and starts at {low:g}; expected a least value above 0.")
    if is_log and step is not None:
        reading.wrong(node.line, f"{where} has log and step; expected one of them. Remove one.")
    if step is not None and not 0 < step <= high - low:
        reading.wrong(
            node.line, f"{where}.step is {step:g}; expected a number above 0 and at most {high - low:g}."
        )
    elif step is not None and not (high - low) / step <= MOST_STEPS:
        reading.wrong(
            node.line,
            f"{where}.step is {step:g}, which gives more than {MOST_STEPS:.0e} values; expected fewer.",
        )
    if len(reading.mistakes) > before:
        return None
    if step is not None:
        high = low + math.floor((high - low) / step + 1e-9) * step
    return low, high, is_whole, is_log, step


def _choice(node: Node, path: Path_, reading: ParseContext) -> _DimensionSite | None:
    where = dotted(path)
    keys = scalars.mapping(node, where, ("choice",), "a choice", reading)
    options = keys["choice"].value
    if not isinstance(options, list) or not 0 < len(options) <= MAX_CHOICES:
        kind = "a list of 0" if options == [] else keys["choice"].kind
        reading.wrong(node.line, f"{where}.choice is {kind}; expected a list of 1 to {MAX_CHOICES} values.")
        return None
    if any(_has_search(option) for option in options):
        reading.wrong(
            node.line,
            f"{where}.choice contains a value to search; expected plain values. Search it in another place.",
        )
        return None
    labels = tuple(_label(option) for option in options)
    if len(set(map(str, labels))) < len(labels):
        reading.wrong(node.line, f"{where}.choice lists a value twice; expected each value once. Remove one.")
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
    """Return the label of a choice in a study: text or a number as it is, else its JSON."""
    plain = _plain(node)
    is_plain = isinstance(plain, (str, int, float)) and not isinstance(plain, bool)
    return plain if is_plain else json.dumps(plain)


def _group(path: Path_) -> Path_:
    """Return the path without the position of the model: places of one simplex share it."""
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
                f"{dotted(first.path)} is the only value on its simplex; expected at least two models. "
                "Search a range instead.",
            )
        for other in members[1:]:
            if len(other.dimensions) != len(first.dimensions):
                reading.wrong(
                    other.line,
                    f"{dotted(other.path)} has {len(other.dimensions)} values over the layers and "
                    f"{dotted(first.path)} {len(first.dimensions)}; expected the same number on one simplex.",
                )


def _default(
    path: Path_, root: Node, methods: Sequence[Method], low: float, high: float, is_log: bool
) -> float:
    """Return 1/n for a weight of n models, else the method's default, else the middle of the range.

    Methods over whole matrices of task vectors set their own length: their weights start at 1, the untuned merge.
    """
    middle = math.sqrt(low * high) if is_log else (low + high) / 2
    if "parameters" not in path[:-1]:  # all parameters at once: the check of the space reports this mistake
        return middle
    inside = path[:-1]
    key = str(path[len(inside) - inside[::-1].index("parameters")])
    for method in methods:
        name = dialect.meant_option(method, key)
        if name == "weight":
            return 1.0 if "others" in method.options else 1 / max(_models(path, root), 1)
        if name is not None:
            return dialect.number_of(method, key, _default_of(method.options[name], middle))
    return middle


def _default_of(option: Option, middle: float) -> float:
    default = option.default[0] if isinstance(option.default, tuple) else option.default
    return float(default) if isinstance(default, (int, float)) and not isinstance(default, bool) else middle


def _models(path: Path_, root: Node) -> int:
    """Return the number of models in the list that contains a place, without the base."""
    node = root
    keys: dict[str, Node] = root.value if isinstance(root.value, dict) else {}
    listed: Any = keys["models"].value if "models" in keys else []
    base = keys["base_model"].value if "base_model" in keys else None
    for before, part in pairwise(("", *path)):
        node = node.value[part]
        if part in ("models", "sources"):
            listed = node.value
        if before == "methods" and isinstance(node.value, dict):  # a rule, which may have its own
            listed = node.value["models"].value if "models" in node.value else listed
            base = node.value["base_model"].value if "base_model" in node.value else base
    items: list[Node] = listed if isinstance(listed, list) else []
    models = [i.value.get("model", i) if isinstance(i.value, dict) else i for i in items]
    return sum(base is None or n.value != base for n in models)


def _inside(value: float, low: float, high: float, is_whole: bool, step: float | None) -> float | int:
    """Return the nearest valid value."""
    value = min(max(value, low), high)
    step = step or (1.0 if is_whole else None)
    if step is not None:
        value = min(low + round((value - low) / step) * step, high)
    return round(value) if is_whole else value


def _methods(root: Node) -> list[Method]:
    """Return all methods that a recipe of the tree can use, those of the first choices first."""
    methods: dict[str, Method] = {}
    for node in _named_methods(root):
        options = node.value.get("choice", node).value if isinstance(node.value, dict) else [node]
        for option in options if isinstance(options, list) else []:
            if (method := scalars.named_method(option)) is not None:
                methods.setdefault(method.name, method)
    if isinstance(root.value, dict) and "stack" in root.value:
        methods.setdefault("passthrough", scalars.named_method(Node("passthrough", 0)))  # type: ignore[arg-type]
    return list(methods.values())


def _named_methods(node: Node) -> Iterator[Node]:
    inner: Iterable[Node] = node.value if isinstance(node.value, list) else ()
    if isinstance(node.value, dict):
        if "merge_method" in node.value:
            yield node.value["merge_method"]
        inner = node.value.values()
    for child in inner:
        yield from _named_methods(child)


def _named(places: Sequence[_DimensionSite], root: Node) -> tuple[_DimensionSite, ...]:
    """Shorten the names of dimensions where unambiguous: ``code.weight`` for ``models[0].parameters.weight``."""
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
    tail = name.removeprefix(dotted(path))
    parts: list[str | int] = [part for part in path if part != "parameters"]
    if len(path) > 2 and path[0] == "models":
        entry = root.value["models"].value[path[1]].value
        reference = entry.get("model") if isinstance(entry, dict) else None
        if reference is not None and isinstance(reference.value, str):
            parts = [Path(reference.value).name, *parts[2:]]
    return dotted(tuple(parts)) + tail


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


def _replaced(node: Node, path: Path_, values: Mapping[Path_, Node]) -> Node:
    if path in values:
        return values[path]
    if isinstance(node.value, list):
        return Node([_replaced(item, (*path, i), values) for i, item in enumerate(node.value)], node.line)
    if isinstance(node.value, dict):
        return Node(
            {key: _replaced(item, (*path, key), values) for key, item in node.value.items()}, node.line
        )
    return node


def _without_options_of_others(tree: Node, root: Node, places: Sequence[_DimensionSite]) -> Node:
    """Remove options, presets and ``lines`` that only methods understand which were not chosen."""
    if not any(p.choices and p.path[-1] == "merge_method" for p in places):
        return tree
    chosen = read_context(tree.value, ParseContext("")).methods
    others = [m for m in _methods(root) if m not in chosen]

    def is_of_others(key: str) -> bool:
        return not any(dialect.meant_option(m, key) for m in chosen) and any(
            dialect.meant_option(m, key) for m in others
        )

    def is_scaled(methods: Iterable[Method]) -> bool:
        return any(m.space == "delta" and "scale" in m.options for m in methods)

    def filtered(node: Node, is_parameters: bool) -> Node:
        if isinstance(node.value, list):
            return Node([filtered(item, False) for item in node.value], node.line)
        if not isinstance(node.value, dict):
            return node
        inner = {
            k: filtered(n, k == "parameters")
            for k, n in node.value.items()
            if not (is_parameters and is_of_others(k))
        }
        preset = inner.get("preset")
        if preset is not None and not _is_preset(preset, chosen) and _is_preset(preset, others):
            del inner["preset"]
        return Node(inner, node.line)

    tree = filtered(tree, False)
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
